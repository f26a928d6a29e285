"""One pass of a teacher over a run's exact tokens, written to the disk (`kdclimb/cache.py` reads it).

It is written in a hidden folder beside its place, with a state from which an interrupted pass goes on: what a rule
declares, Snakemake deletes when its job fails, or before the job if it did not see the end of the one before.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdclimb.artifacts import (
    WEIGHTS_ELSEWHERE,
    Damaged,
    DeviceLease,
    link,
    locked,
    needs_room,
    read_sealed,
    seal,
    stand_in,
    sync,
    write_json,
)
from kdclimb.attention import choose_backend
from kdclimb.cache import DESCRIPTION, STEPS_A_NAT, layout
from kdclimb.config import CacheConfig, ConfigError, canonical_json, require, short_hash
from kdclimb.data import Dataset
from kdclimb.evaluate import teacher_target
from kdclimb.kernels import DenseTeacher, fp8
from kdclimb.model import GPT
from kdclimb.provenance import device_identity, device_kind, source_hash, versions
from kdclimb.sparsify import sample, top_k
from kdclimb.stop import EXIT_INTERRUPTED, StopRequests
from kdclimb.teacher import data_facts, load_teacher, read_description

ENTRY = "workflow/scripts/kd_cache.py"
SPARE = 2**30  # bytes of the disk that a cache leaves free
SAVE_SECONDS = 30.0  # between two states: what a kill costs at most


def write(config: CacheConfig, out: Path, manifest: Path, teacher_folder: Path, threads: int) -> int:
    """Make the folder `out`; its size is announced first. 0: it is there and whole; 75: interrupted, start it again.

    Goes on from the last whole micro-batch of an interrupted pass with the same key: config, code, data, teacher,
    torch, device and threads. Raises ConfigError if the disk has no room for it, and ValueError if teacher or data
    don't fit.
    """
    if out.name != config.cache_id:
        raise ConfigError(f"{out}: the folder of this cache is called {config.cache_id}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda is asked for, but torch finds no CUDA GPU here; allowed: auto, cpu")
    stop = StopRequests()
    torch.set_num_threads(threads)
    dataset = Dataset(manifest)
    key = {
        "config": short_hash(canonical_json(dataclasses.asdict(config))),
        "code": source_hash(ENTRY),
        "data_hash": dataset.hash,
        "teacher_sha256": read_description(teacher_folder)["weights_sha256"],
        "torch": torch.__version__,
        "device": device_kind(config.device),
        "threads": threads,
    }
    unfinished = out.with_name(f".{out.name}")
    with locked(unfinished):
        teacher = _teacher(config, dataset, teacher_folder)
        files = Files(config, unfinished, teacher.config.dim, key)
        announce(config, teacher.config.dim, out.parent, files.size)
        with DeviceLease(device_identity(config.device)) as lease:
            fill(config, files, dataset, teacher, stop)
            files.shared |= lease.shared()
        if files.done < config.micro_batches:
            files.save()
            print(f"interrupted: after {files.done} of {config.micro_batches} micro-batches; start it again to go on")
            return EXIT_INTERRUPTED
        files.publish(out, _cost_ms(config, files, teacher))
    return 0


def stands_in(out: Path, teacher_folder: Path) -> bool:
    """Whether the cache can't be made here and needn't be, since a bundle brought the runs that read it and its teacher
    without weights. Then `out` is the folder that the import left for it, should Snakemake have deleted that. Who would
    train from it is refused there.
    """
    if (teacher_folder / "model.safetensors").is_file() or not (teacher_folder / WEIGHTS_ELSEWHERE).is_file():
        return False
    ended = (status.with_name("config.json") for status in out.parent.parent.glob("runs/*/status.json"))
    if not any((json.loads(config.read_text()).get("kd") or {}).get("cache") == out.name for config in ended):
        return False
    stand_in(out)
    print(f"{out.name}: not here, nor its teacher's weights: a bundle brought the runs that read it")
    return True


def _teacher(config: CacheConfig, dataset: Dataset, folder: Path) -> GPT:
    packing = config.micro_batch_tokens, config.validation.cut(config.max_doc_tokens)
    on_gpu = config.device == "cuda"
    teacher, _ = load_teacher(
        folder,
        dataset.val_batches(config.validation.tokens, *packing, config.device),
        data_facts(dataset, config.validation.tokens, *packing),
        device=config.device,
        backend=choose_backend(config.attention, config.device),
        compute_dtype=torch.bfloat16 if on_gpu else torch.float32,
        compiled=on_gpu,
        matrix_dtype=config.teacher_dtype,
    )
    return teacher


def announce(config: CacheConfig, width: int, out: Path, written: int = 0) -> None:
    """Print the cache's size and the room there is, with `written` bytes of it there. Raises ConfigError if that is too
    little.
    """
    a_token = sum(np.dtype(dtype).itemsize * values for dtype, values in layout(config, width).values())
    size, free = a_token * config.micro_batches * config.micro_batch_tokens, shutil.disk_usage(out).free
    a_file = f"{size / 1e9:.3f} GB at {a_token:,} bytes a token"
    print(f"{config.cache_id}: {a_file}; {free / 1e9:.1f} GB are free", flush=True)
    if size - written + SPARE > free:
        raise ConfigError(
            f"kd.cache: {config.kind} takes {size / 1e9:.1f} GB, but {out} has {free / 1e9:.1f} GB free, of which "
            f"{SPARE / 1e9:.1f} GB are left alone; take another kind, lower kd.token_frac, or set none"
        )


def fill(config: CacheConfig, files: Files, dataset: Dataset, teacher: GPT, stop: StopRequests) -> None:
    """Write the micro-batches that are missing, unless asked to stop."""
    size = config.micro_batch_tokens
    generator = torch.Generator(config.device)
    first = dataset.train_stream(config.seed, config.max_doc_tokens).next_batch(size, config.device)
    _values(config, teacher_target(teacher, first), generator)  # compiles outside the clock
    stream = dataset.train_stream(config.seed, config.max_doc_tokens)
    for _ in range(files.done):
        stream.skip_batch(size)
    begun, place, written = time.perf_counter(), files.done, Future()
    written.set_result(None)
    with ThreadPoolExecutor(1) as writer:  # of one micro-batch, while the teacher is at the next
        while place < config.micro_batches and not stop.asked():
            generator.manual_seed(_seed_of(config, place))
            target = teacher_target(teacher, stream.next_batch(size, config.device))
            values = files.on_host(_values(config, target, generator))
            written.result()
            written, place = writer.submit(files.append, values), place + 1
            if time.perf_counter() - begun > SAVE_SECONDS:
                written.result()
                files.cost_ms += 1e3 * (time.perf_counter() - begun)
                files.save()
                begun = time.perf_counter()
        written.result()
    files.cost_ms += 1e3 * (time.perf_counter() - begun)


def _seed_of(config: CacheConfig, place: int) -> int:
    """Of a micro-batch's draws, whichever process makes them."""
    return int(np.random.SeedSequence((config.seed, place)).generate_state(1)[0])


def _cost_ms(config: CacheConfig, files: Files, teacher: GPT) -> float:
    """Of the whole pass, writing included, on the config's clock."""
    if config.clock == "measured":
        return files.cost_ms
    flops = teacher.flops_per_token(config.max_doc_tokens / 2, backward=False)
    return config.micro_batches * config.micro_batch_tokens * flops / (config.modelled_tflops * 1e9)


class Files:
    """The files of a cache in `folder`, as far as they are written, and the state to go on from.

    done: micro-batches in them; checksums: of each file, by micro-batch; cost_ms: of all of them, on the wall clock;
    broken: how often the pass went on in a new process; shared: whether its device was shared.
    """

    def __init__(self, config: CacheConfig, folder: Path, width: int, key: dict):
        """Takes up what an interrupted pass with this key left, up to its first micro-batch that is not as it was
        written; what lies behind that is cut off.
        """
        self.config, self.folder, self.key = config, folder / "files", key
        self.state = folder / "state.json"
        self.forms = layout(config, width)
        self.checksums: dict[str, list[int]] = {name: [] for name in self.forms}
        self.cost_ms, self.broken, self.shared = 0.0, 0, False
        self._take_up()
        self.done = min(map(len, self.checksums.values()))
        if self.done < config.micro_batches and any(file.stat().st_nlink > 1 for file in self.folder.glob("*")):
            shutil.rmtree(self.folder)  # the same files are a cache in its place, which may be read
            self.done = 0
        self.broken += 0 < self.done < config.micro_batches
        self.folder.mkdir(exist_ok=True)
        self.open = {}
        for name in self.forms:
            del self.checksums[name][self.done :]
            path = self._path(name)
            path.touch()
            os.truncate(path, self.done * self._bytes(name))
            self.open[name] = path.open("ab")

    def _take_up(self) -> None:
        try:
            state = read_sealed(self.state, "the cache is written from its beginning") if self.state.is_file() else {}
        except Damaged as error:
            print(error, flush=True)
            return
        if state.get("key") != self.key:
            return
        for name, promised in state["checksums"].items():
            found = self._checksums(name, len(promised))
            whole = next((i for i, pair in enumerate(zip(promised, found, strict=False)) if pair[0] != pair[1]), None)
            self.checksums[name] = found[:whole]
            if (kept := len(self.checksums[name])) < len(promised):
                print(f"{self._path(name)}: damaged from micro-batch {kept} on, which are made again", flush=True)
        self.cost_ms, self.broken, self.shared = state["cost_ms"], state["broken"], state["shared"]

    def _checksums(self, name: str, count: int) -> list[int]:
        """Of at most the first `count` micro-batches in a file, those that are there in full."""
        return [zlib.crc32(raw) for raw in self._micro_batches(name, count)]

    def _micro_batches(self, name: str, count: int) -> Iterator[bytes]:
        if not self._path(name).is_file():
            return
        with self._path(name).open("rb") as file:
            for _ in range(count):
                if len(raw := file.read(self._bytes(name))) < self._bytes(name):
                    return
                yield raw

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _bytes(self, name: str) -> int:
        """Of a micro-batch."""
        dtype, values = self.forms[name]
        return np.dtype(dtype).itemsize * values * self.config.micro_batch_tokens

    @property
    def size(self) -> int:
        """Bytes that are written."""
        return self.done * sum(map(self._bytes, self.forms))

    def on_host(self, values: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """A micro-batch as it lies in the files."""
        narrow = {"<u2": torch.int16, "|u1": torch.uint8}  # on the device, so that less is copied; ids wrap around
        arrays = {}
        for name, tensor in values.items():
            form = self.forms[name][0]
            arrays[name] = np.ascontiguousarray(tensor.to(narrow.get(form, tensor.dtype)).cpu().numpy().view(form))
        return arrays

    def append(self, values: dict[str, np.ndarray]) -> None:
        """One micro-batch more."""
        for name, array in values.items():
            with needs_room(self._path(name)):
                self.open[name].write(array.data)
            self.checksums[name].append(zlib.crc32(array))
        self.done += 1

    def save(self) -> None:
        """Flush all to the disk, then the state that vouches for it."""
        for name, file in self.open.items():
            with needs_room(self._path(name)):
                file.flush()
                sync(self._path(name))
        state = {"key": self.key, "checksums": self.checksums, "cost_ms": self.cost_ms}
        write_json(self.state, seal(state | {"broken": self.broken, "shared": self.shared}))

    def publish(self, out: Path, cost_ms: float) -> None:
        """Make `out` of hard links to the files, and the description. What is here stays."""
        self.save()
        facts = {name: self.key[name] for name in ("code", "teacher_sha256", "data_hash", "device")}
        facts |= {"config": dataclasses.asdict(self.config)}
        facts |= {"checksums": self.checksums, "cost_ms": cost_ms, "broken": self.broken}
        facts |= {"shared_device": self.shared, "versions": versions()}
        for file in self.open.values():
            file.close()
        whole = self.folder.with_name("whole")
        shutil.rmtree(whole, ignore_errors=True)
        link(self.folder, whole)
        write_json(whole / DESCRIPTION, seal(facts))
        shutil.rmtree(out, ignore_errors=True)  # an earlier one, of other code or data
        os.replace(whole, out)
        sync(out.parent)


def _values(config: CacheConfig, target: DenseTeacher, generator: torch.Generator) -> dict[str, Tensor]:
    if config.kind == "hidden":
        if config.dtype == "bf16":
            return {"hidden": target.hidden.bfloat16().view(torch.int16)}
        rows = fp8.by_rows(target.hidden)
        return {"hidden": rows.values.view(torch.int8), "scale": rows.scale}
    if config.kind == "samples":
        sparse = sample(target, config.entries, config.temperature, generator)
        return {"ids": sparse.ids, "counts": sparse.counts, "entropy": sparse.entropy}
    require(
        config.entries <= len(target.head), "kd.top_k", config.entries, f"at most the vocabulary, {len(target.head)}"
    )
    sparse = top_k(target, config.entries, config.temperature, "ghost")
    steps = (sparse.log_probs * -STEPS_A_NAT).round().clamp(0, 2**16 - 1).int()
    return {"ids": sparse.ids, "log_probs": steps}
