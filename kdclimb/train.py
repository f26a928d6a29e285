"""Train one run: the readable loop, and what makes it repeatable, resumable and honest about its time.

    PYTHONPATH=. python workflow/scripts/train.py --config results/runs/<id>/config.json --out results/runs/<id> ...

Time is the speedrun's train_time_ms: warm-up (with the state reset after it), validation and
checkpoint I/O are outside the clock, data loading and the teacher's forward pass inside.
"""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import sys
import time
import traceback
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from kdclimb import schedule
from kdclimb.artifacts import (
    STEP_COLUMNS,
    SUMMARY_COLUMNS,
    VAL_COLUMNS,
    DeviceLease,
    RunFolder,
    plot_run,
    write_csv,
    write_json,
    write_via,
)
from kdclimb.attention import choose_backend
from kdclimb.config import ConfigError, RunConfig, short_hash
from kdclimb.data import Dataset
from kdclimb.distill import KDController
from kdclimb.evaluate import validate
from kdclimb.kernels import distill_loss
from kdclimb.model import GPT
from kdclimb.optim import Optimizers
from kdclimb.provenance import device_kind, source_hash, versions
from kdclimb.teacher import load_teacher, random_teacher, read_description, save_checkpoint

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: start it again and it goes on
ENTRY = "workflow/scripts/train.py"
WARMUP_STEPS = 2
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0}  # dense bf16, from NVIDIA's data sheets


class Diverged(RuntimeError):
    """A loss that is no finite number."""


class Interrupted(BaseException):
    """Asked to stop, or the master is gone."""


# ---- the loop -------------------------------------------------------------------------------------


class Trainer:
    """State and steps of one run. `train()` goes from wherever the state stands to the end."""

    def __init__(self, config: RunConfig, dataset: Dataset, teacher_folder: Path | None, backend: str):
        self.config, self.dataset = config, dataset
        self.backend, self.device = backend, config.device
        self.dtype = torch.bfloat16 if config.device == "cuda" else torch.float32
        sched = config.schedule
        self.val_batches = dataset.val_batches(
            config.validation.tokens, sched.micro_batch_tokens, sched.max_doc_tokens, self.device
        )
        self.teacher_folder = teacher_folder
        self.teacher = None if config.kd is None else self._load_teacher()
        self.reset()

    def _load_teacher(self) -> tuple[GPT, float]:
        options = {"device": self.device, "backend": self.backend, "compute_dtype": self.dtype}
        if self.config.kd.random_teacher:
            return random_teacher(self.teacher_folder, self.config.seed, self.val_batches, **options)
        return load_teacher(
            self.teacher_folder, self.val_batches, checkpoint_facts(self.config, self.dataset), **options
        )

    def reset(self) -> None:
        """Everything at step 0, from the seed."""
        torch.manual_seed(self.config.seed)
        with torch.device(self.device):  # never whole on the host: a model too large for it must fail as `oom` too
            self.model = GPT(self.config.model, backend=self.backend, compute_dtype=self.dtype)
        self.optimizers = Optimizers(self.model, self.config.optim)
        self.stream = self.dataset.train_stream(self.config.seed, self.config.schedule.max_doc_tokens)
        self.kd = None if self.teacher is None else KDController(self.config.kd, *self.teacher)
        self.step, self.tokens, self.time_ms, self.broken = 0, 0, 0.0, 0
        self.steps: list[dict] = []
        self.vals: list[dict] = []

    def warm_up(self) -> None:
        """Run every path that the clock will see, with and without the teacher, then start afresh."""
        for kd_on in (True, False) if self.kd else (False,):
            for _ in range(WARMUP_STEPS):
                self.train_step(kd_on=kd_on)
        self.reset()

    def train(self, checkpoint, should_stop, progress) -> None:
        """Train to the stop step. `checkpoint()` is called after each validation, `should_stop()` after each step."""
        every, stop = self.config.validation.every, self.config.schedule.stop_step
        untie = self.model.untie_step(self.config.schedule.horizon)
        if self.step == 0:
            self.validate(progress)
        while self.step < stop:
            if self.step == untie:
                self.optimizers.untie()
            kd_on = self.kd is not None and self.kd.active
            with self.clock(kd_on):
                row = self.train_step(kd_on=kd_on)
            self.steps.append(row | {"step": self.step, "tokens": self.tokens, "train_time_ms": self.time_ms})
            progress.update(1)
            if not math.isfinite(row["loss_hard"]):
                raise Diverged(f"loss_hard is {row['loss_hard']} at step {self.step}")
            if self.step % every == 0 or self.step == stop:
                self.validate(progress)
                if self.step < stop:
                    checkpoint()
            if self.step < stop and should_stop():
                checkpoint()
                raise Interrupted

    def train_step(self, *, kd_on: bool) -> dict:
        """One optimiser step; returns its row for steps.csv, less step, tokens and time."""
        sched = self.config.schedule
        num_tokens = schedule.batch_tokens(sched, self.step)
        num_micro = num_tokens // sched.micro_batch_tokens
        losses = []
        for _ in range(num_micro):
            batch = self.stream.next_batch(sched.micro_batch_tokens, self.device)
            hidden = self.model(batch.inputs, batch.documents)
            if kd_on:
                loss = self.kd.loss(hidden, self.model, batch)
            else:
                head = self.model.head_weight
                loss = distill_loss(hidden, head, None, batch.labels, student_softcap=self.model.softcap)
            (loss.total / num_micro).backward()
            losses.append(loss)
        stop_step = self.kd.stop_step if self.kd else None
        mult = schedule.lr_mult(sched, self.config.kd, self.step, stop_step)
        grad_norm = self.optimizers.grad_norm()
        self.optimizers.step(mult)
        self.step += 1
        self.tokens += num_tokens

        def mean(name):
            return statistics.fmean(getattr(loss, name).item() for loss in losses)

        row = {"lr_mult": mult, "batch_tokens": num_tokens, "loss_hard": mean("hard"), "grad_norm": grad_norm.item()}
        if self.kd is not None:
            row["kd_active"] = int(kd_on)
            if kd_on and not self.config.kd.infer_only:
                row |= {"loss_soft": mean("soft"), "kd_norm": mean("norm_factor"), "kd_share": mean("kd_share")}
        return row

    def validate(self, progress) -> None:
        teacher = None if self.kd is None else self.kd.teacher
        val_loss, teacher_kl = validate(self.model, self.val_batches, teacher)
        if not math.isfinite(val_loss):
            raise Diverged(f"val_loss is {val_loss} at step {self.step}")
        row = {"step": self.step, "tokens": self.tokens, "train_time_ms": self.time_ms, "val_loss": val_loss}
        if self.kd is not None:
            row |= {"teacher_kl": teacher_kl, "kd_active": int(self.kd.active)}
        self.vals.append(row)
        progress.report(
            f"step {self.step}/{self.config.schedule.stop_step} val_loss {val_loss:.4f} {self.time_ms / 1e3:.1f} s"
        )
        if self.kd is not None and self.kd.observe(self.step, val_loss):
            margin = self.config.kd.stop_margin
            progress.report(f"KD stops at step {self.step}: within {margin} of the teacher's {self.kd.teacher_val:.4f}")

    # ---- time

    @contextmanager
    def clock(self, kd_on: bool):
        """Add the time of the body to `time_ms`: measured, or charged by its FLOPs."""
        before = self.tokens
        started = time.perf_counter()
        yield
        if self.config.clock == "measured":
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.time_ms += 1e3 * (time.perf_counter() - started)
        else:
            flops = (self.tokens - before) * sum(self.flops_per_token(kd_on))
            self.time_ms += flops / (self.config.modelled_tflops * 1e9)

    def flops_per_token(self, kd_on: bool) -> tuple[float, float]:
        """(student forward and backward, teacher forward). A document's mean context is taken as half its longest."""
        context = self.config.schedule.max_doc_tokens / 2
        teacher = self.kd.teacher.flops_per_token(context, backward=False) if kd_on else 0.0
        return self.model.flops_per_token(context, backward=True), teacher

    # ---- resuming

    def save_state(self, path: Path, key: dict) -> None:
        """All that the next steps depend on, to the bit, in one safetensors file."""
        facts = {
            "key": key,
            "step": self.step,
            "tokens": self.tokens,
            "time_ms": self.time_ms.hex(),
            "broken": self.broken,
            "steps": self.steps,
            "vals": self.vals,
            "kd": None if self.kd is None else self.kd.state(),
            "untied": self.model.head is not None,
        }
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"optim.{name}": value for name, value in self.optimizers.state_tensors().items()}
        tensors = {name: value.detach().contiguous() for name, value in tensors.items()}
        write_via(path, lambda temporary: save_file(tensors, temporary, metadata={"facts": json.dumps(facts)}))

    def load_state(self, path: Path, key: dict) -> bool:
        """Go on from a saved state made with the same key; False, and nothing changed, if there is none."""
        if not path.is_file():
            return False
        with safe_open(path, framework="pt", device=self.device) as file:
            facts = json.loads(file.metadata()["facts"])
            if facts["key"] != key:
                return False
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if facts["untied"] and self.model.head is None:
            self.optimizers.untie()
        model = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        optim = {name.removeprefix("optim."): t for name, t in tensors.items() if name.startswith("optim.")}
        self.model.load_state_dict(model, strict=True)
        self.optimizers.load_state_tensors(optim)
        self.step, self.tokens, self.broken = facts["step"], facts["tokens"], facts["broken"] + 1
        self.time_ms = float.fromhex(facts["time_ms"])
        self.steps, self.vals = facts["steps"], facts["vals"]
        if self.kd is not None:
            self.kd.load_state(facts["kd"], self.device)
        sched = self.config.schedule
        for step in range(self.step):
            for _ in range(schedule.batch_tokens(sched, step) // sched.micro_batch_tokens):
                self.stream.skip_batch(sched.micro_batch_tokens)
        return True


# ---- one run, from folder to folder ---------------------------------------------------------------


class Progress:
    """train.log, and for the person at the terminal a bar, or a line a validation where there is no terminal."""

    def __init__(self, run_id: str, log, total: int):
        self.run_id, self.log = run_id, log
        self.bar = tqdm(total=total, desc=run_id, unit="step", disable=not sys.stderr.isatty(), leave=False)

    def update(self, steps: int) -> None:
        self.bar.update(steps)

    def report(self, text: str) -> None:
        print(text, file=self.log, flush=True)
        self.bar.write(f"{self.run_id}: {text}", file=sys.stderr)


def checkpoint_facts(config: RunConfig, dataset: Dataset) -> dict:
    """What a teacher and its student must have in common for its validation loss to mean the same."""
    return {
        "data_hash": dataset.hash,
        "tokenizer_sha256": dataset.manifest["tokenizer_sha256"],
        "val_tokens": config.validation.tokens,
        "micro_batch_tokens": config.schedule.micro_batch_tokens,
        "max_doc_tokens": config.schedule.max_doc_tokens,
    }


def run(
    config: RunConfig,
    out: Path,
    manifest: Path,
    teacher: Path | None,
    *,
    threads: int,
    any_code: bool,
    last_attempt: bool,
) -> int:
    """Train `config` into the folder `out`; returns the exit code.

    0: the folder holds a result, which may be a failure (diverged, oom, failed) with its reason in
    status.json. 75: interrupted, start it again. 1: failed unexpectedly, and this was not the last attempt.
    Raises ConfigError or ValueError, and leaves no result, if config, data or teacher don't fit. A finished
    run with the same key (config, code, data, teacher, torch, threads) is brought back, not trained again;
    `any_code` takes one of any code.
    """
    if out.name != config.run_id:
        raise ConfigError(f"{out}: the folder of this config is called {config.run_id}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda is asked for, but torch finds no CUDA GPU here; allowed: auto, cpu")
    torch.set_num_threads(threads)
    # On CUDA the flash-attention backward sums in any order; there bytes may differ between runs.
    torch.use_deterministic_algorithms(config.device == "cpu")
    folder = RunFolder(out)
    with folder.lock():
        _refuse_other_config(out, config)
        dataset = Dataset(manifest)
        key = _key(config, dataset, teacher, threads)
        if folder.restore_complete(key, any_code=any_code):
            print(f"{config.run_id}: already complete; its artifacts are back", file=sys.stderr)
            return 0
        return _Attempt(config, folder, dataset, teacher, key, threads).go(last_attempt)


def _refuse_other_config(out: Path, config: RunConfig) -> None:
    path = out / "config.json"
    if path.is_file() and json.loads(path.read_text()) != json.loads(config.canonical()):
        raise ConfigError(f"{path}: holds another config than the one asked for; move {out} away")
    write_json(path, config.to_dict())


def _key(config: RunConfig, dataset: Dataset, teacher: Path | None, threads: int) -> dict:
    """What a resume state or a finished run must share with what is asked, to stand for it."""
    return {
        "config": short_hash(config.canonical()),
        "code": source_hash(ENTRY),
        "data": dataset.hash,
        "teacher": None if teacher is None else read_description(teacher)["weights_sha256"],
        "torch": torch.__version__,
        "device": device_kind(config.device),
        "threads": threads,
    }


class _Attempt:
    """One try at a run: trains, and writes down whatever comes of it."""

    def __init__(self, config, folder: RunFolder, dataset, teacher, key, threads):
        self.config, self.folder, self.dataset, self.teacher = config, folder, dataset, teacher
        self.key, self.threads = key, threads
        self.backend = choose_backend(config.device)
        self.started = datetime.now(UTC)
        self.trainer: Trainer | None = None

    def go(self, last_attempt: bool) -> int:
        out = self.folder.path
        attempts = self.folder.count_attempt()
        stop = _StopRequests()
        lease = DeviceLease(self.key["device"])
        log_path = out / "train.log"
        new = not log_path.is_file() or log_path.stat().st_size == 0
        with log_path.open("a") as log:
            progress = Progress(self.config.run_id, log, self.config.schedule.stop_step)
            if new:
                print(self._command(), file=log)
            print(f"attempt {attempts}: {json.dumps(self.key)} {json.dumps(versions())}", file=log, flush=True)
            status, reason = self._train(stop, progress)
            progress.report(f"{status}{': ' + reason if reason else ''}")
            progress.bar.close()
        if status == "interrupted":
            return EXIT_INTERRUPTED
        if status == "failed" and not last_attempt:
            return 1
        self._write(status, reason, attempts, lease.shared())
        return 0

    def _train(self, stop: _StopRequests, progress: Progress) -> tuple[str, str | None]:
        try:
            self.trainer = trainer = Trainer(self.config, self.dataset, self.teacher, self.backend)
        except torch.OutOfMemoryError as error:
            return "oom", _oom_reason(error)
        try:
            if self.config.clock == "measured":
                trainer.warm_up()
            if trainer.load_state(self.folder.resume_file, self.key):
                progress.report(f"resumed at step {trainer.step}")
                progress.update(trainer.step)
            if self.config.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            trainer.train(lambda: trainer.save_state(self.folder.resume_file, self.key), stop.asked, progress)
        except Interrupted:
            return "interrupted", f"at step {trainer.step}; start it again to go on"
        except Diverged as error:
            return "diverged", str(error)
        except (torch.OutOfMemoryError, MemoryError) as error:
            return "oom", _oom_reason(error)
        except Exception as error:
            if "can't allocate memory" in str(error):  # the CPU allocator's RuntimeError
                return "oom", _oom_reason(error)
            traceback.print_exc(file=progress.log)
            return "failed", f"{type(error).__name__}: {error}"
        return "ok", None

    def _write(self, status: str, reason: str | None, attempts: int, shared: bool) -> None:
        """All artifacts; status.json last."""
        out, trainer, config = self.folder.path, self.trainer, self.config
        steps = [] if trainer is None else trainer.steps
        vals = [] if trainer is None else trainer.vals
        write_csv(out / "steps.csv", STEP_COLUMNS, steps)
        write_csv(out / "val.csv", VAL_COLUMNS, vals)
        write_csv(out / "summary.csv", SUMMARY_COLUMNS, [self._summary(status, shared)])
        plot_run(out, config.run_id, steps, vals)
        checkpoints = out / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        if status == "ok":
            facts = checkpoint_facts(config, self.dataset)
            facts |= {"run_id": config.run_id, "step": trainer.step, "final_val": vals[-1]["val_loss"]}
            save_checkpoint(checkpoints, trainer.model, facts | {"untied": trainer.model.head is not None})
        description = {
            "status": status,
            "reason": reason,
            "started": self.started.isoformat(timespec="seconds"),
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "attempts": attempts,
            "attention": self.backend,
            "kernel": "torch",
            "device": self.key["device"],
            "threads": self.threads,
            "shared_device": shared,
            "code_hash": self.key["code"],
            "versions": versions(),
        }
        self.folder.finish(description, self.key)

    def _summary(self, status: str, shared: bool) -> dict:
        config, trainer = self.config, self.trainer
        kd = config.kd
        kind = "ce" if kd is None else "kd"
        if kd is not None and (kd.infer_only or kd.random_teacher):
            kind = "infer_only" if kd.infer_only else "random_teacher"
        row = {
            "run_id": config.run_id,
            "arm": kind,
            "seed": config.seed,
            "status": status,
            "device": self.key["device"],
            "threads": self.threads,
            "shared_device": int(shared),
            "clock": config.clock,
            "code_hash": self.key["code"],
            "data_hash": self.dataset.hash,
        }
        if trainer is None:
            return row
        flops, teacher_flops = trainer.flops_per_token(kd_on=trainer.kd is not None)
        row |= {
            "steps": trainer.step,
            "tokens": trainer.tokens,
            "train_time_ms": trainer.time_ms,
            "params_stored": trainer.model.params_stored(),
            "params_active": trainer.model.params_active(),
            "flops_per_token": flops,
            "teacher_flops_per_token": teacher_flops if trainer.kd else None,
            "kd_stop_step": trainer.kd.stop_step if trainer.kd else None,
            "broken": trainer.broken,
        }
        if trainer.vals:
            row |= {"best_val": min(v["val_loss"] for v in trainer.vals), "final_val": trainer.vals[-1]["val_loss"]}
        return row | _step_times(trainer) | _memory(config.device)

    def _command(self) -> str:
        out = self.folder.path
        teacher = f" --teacher {self.teacher}" if self.teacher else ""
        return (
            f"PYTHONPATH=. python {ENTRY} --config {out}/config.json --out {out} "
            f"--manifest {self.dataset.folder}/manifest.json{teacher} --threads {self.threads}"
        )


def _oom_reason(error: BaseException) -> str:
    return f"out of memory; lower train.micro_batch_tokens ({str(error).splitlines()[0]})"


def _step_times(trainer: Trainer) -> dict:
    """Median and 90th percentile of the step times in ms, and the share of the GPU's peak FLOPs where that is known."""
    times = [row["train_time_ms"] for row in trainer.steps]
    deltas = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    if not deltas:
        return {}
    row = {"step_ms_median": statistics.median(deltas), "step_ms_p90": sorted(deltas)[int(0.9 * (len(deltas) - 1))]}
    if trainer.config.clock == "measured" and trainer.device == "cuda":
        peak = next((v for name, v in PEAK_TFLOPS.items() if name in torch.cuda.get_device_name()), None)
        if peak and trainer.kd is None:
            flops = trainer.tokens * trainer.flops_per_token(False)[0]
            row["mfu"] = flops / (trainer.time_ms * 1e9 * peak)
    return row


def _memory(device: str) -> dict:
    if device != "cuda":
        return {}
    return {
        "peak_alloc_gib": torch.cuda.max_memory_allocated() / 2**30,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }


class _StopRequests:
    """Whether to stop: on SIGTERM or SIGINT, or when the master that KDCLIMB_MASTER names is gone.

    ./run sets that variable. Without it a training job would outlive a killed master, and its successor
    would wait for a device that nobody watches.
    """

    def __init__(self):
        self.signalled = False
        self.master = int(os.environ.get("KDCLIMB_MASTER", 0))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, *_) -> None:
        self.signalled = True

    def asked(self) -> bool:
        if self.master and not Path(f"/proc/{self.master}").exists():
            return True
        return self.signalled
