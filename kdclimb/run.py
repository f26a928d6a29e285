"""One run from its config to its folder: attempts, resuming, endings, artifacts.

PYTHONPATH=. python workflow/scripts/train.py --config results/runs/<id>/config.json --out results/runs/<id> ...
"""

from __future__ import annotations

import csv
import json
import shutil
import statistics
import sys
import time
import traceback
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch
from tqdm import tqdm

from kdclimb.anchor import anchor_ms
from kdclimb.artifacts import (
    Damaged,
    DeviceLease,
    RunFolder,
    last_lines,
    needs_room,
    read_sealed,
    rehearse_plots,
    verify,
    write_json,
    write_tables,
)
from kdclimb.attention import choose_backend
from kdclimb.config import ConfigError, RunConfig, short_hash
from kdclimb.data import Dataset
from kdclimb.lease import Lease, slurm_job, status_of
from kdclimb.provenance import device_identity, device_kind, source_hash, versions
from kdclimb.stop import EXIT_INTERRUPTED, StopRequests
from kdclimb.teacher import checkpoint_facts, read_description, save_checkpoint
from kdclimb.train import Diverged, Interrupted, Trainer, fix_order

ENTRY = "workflow/scripts/train.py"
KILLED_TRIES = 2  # tries without progress, each ended from outside, after which that is the run's result
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0}  # dense bf16, from NVIDIA's data sheets


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


def run(
    config: RunConfig,
    out: Path,
    manifest: Path,
    teacher: Path | None,
    *,
    threads: int,
    any_code: bool,
    last_attempt: bool,
    cache: Path | None = None,
    policy: Path | None = None,
    give_up: bool = False,
    weights: bool = True,
    any_weights: bool = False,
) -> int:
    """Train `config` into the folder `out`; returns the exit code.

    0: the folder holds a result, which may be a failure (diverged, oom, failed) with its reason in
    status.json. 75: interrupted, start it again. 1: failed unexpectedly, and this was not the last attempt.
    Raises ConfigError or ValueError, and leaves no result, if config, data or teacher don't fit. A finished
    run of the same config, code, data and teacher is brought back, not trained again; `any_code` takes one of any
    code, `any_weights` one that kept none. So is one that a bundle brought, whatever it was made of. `policy` is
    summary.csv of the run that `lr_policy` names. `give_up` makes a result of tries that were killed without a word.
    Without `weights` none are kept.
    """
    if out.name != config.run_id:
        raise ConfigError(f"{out}: the folder of this config is called {config.run_id}")
    folder = RunFolder(out)
    if folder.restore_imported():  # before anything is asked of this machine, which need not be able to train it
        return 0
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda is asked for, but torch finds no CUDA GPU here; allowed: auto, cpu")
    torch.set_num_threads(threads)
    fix_order(config)
    with folder.lock():
        _refuse_other_config(out, config)
        dataset = Dataset(manifest)
        stop = policy_stop_step(config, policy)
        key = _key(config, dataset, teacher, threads) | ({"kd_stop_step": stop} if config.lr_policy else {})
        if folder.restore_complete(key, any_code=any_code, weights=weights and not any_weights):
            again = f"to train it anew: --out ELSEWHERE/{config.run_id}"
            print(f"{config.run_id}: already complete; its artifacts are back ({again})", file=sys.stderr)
            return 0
        inputs = {"teacher_folder": teacher, "cache": cache, "kd_stop_step": stop}
        return _Attempt(config, folder, dataset, inputs, policy, key, threads, weights).go(last_attempt, give_up)


def _refuse_other_config(out: Path, config: RunConfig) -> None:
    path = out / "config.json"
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else None
    except ValueError as error:
        raise ConfigError(f"{path}: damaged: not JSON ({error}); delete {out}, and ./run makes it again") from error
    if found is not None and found != json.loads(config.canonical()):
        raise ConfigError(f"{path}: holds another config than the one asked for; move {out} away")
    write_json(path, config.to_dict())


def policy_stop_step(config: RunConfig, policy: Path | None) -> int | None:
    """Where KD stopped in the run whose LR policy is followed; None if it did not, or if none is followed.

    Raises ValueError for a `policy` that is another run's, and Damaged.
    """
    if config.lr_policy is None:
        return None
    if policy is None:
        raise ValueError(f"lr_policy: run {config.lr_policy.run} is named, but no --policy file is given")
    remedy = f"make it again: python -m kdclimb retry --run {config.lr_policy.run}, then ./run"
    verify(policy, read_sealed(policy.with_name("status.json"), remedy)["files"][policy.name], remedy)
    with policy.open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    if row["run_id"] != config.lr_policy.run:
        raise ValueError(f"{policy}: of run {row['run_id']}, not of {config.lr_policy.run}, which lr_policy names")
    return int(row["kd_stop_step"]) if row["kd_stop_step"] else None


def _key(config: RunConfig, dataset: Dataset, teacher: Path | None, threads: int) -> dict:
    """What a resume state must share with what is asked, to stand for it; a finished run, but for what it ran on."""
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

    def __init__(self, config, folder: RunFolder, dataset, inputs: dict, policy, key, threads, weights: bool):
        """`inputs` go to the trainer; `policy` is the file that its KD stop step was read from."""
        self.config, self.folder, self.dataset, self.inputs, self.policy = config, folder, dataset, inputs, policy
        self.key, self.threads, self.weights = key, threads, weights
        self.anchor: list[float] = []  # ms of a step before and after
        self.backend = choose_backend(config.attention, config.device, config.deterministic)
        self.started = datetime.now(UTC)
        self.trainer: Trainer | None = None
        self.wall: dict[str, float] = {}  # seconds of this try, by what they went to
        self.nested = 0.0  # of them, those of parts within the present one
        self.killed: list[str] = []  # how the tries since the last progress were ended from outside

    def go(self, last_attempt: bool, give_up: bool) -> int:
        out = self.folder.path
        (out / "status.json").unlink(missing_ok=True)  # an earlier result, of other code or data
        with Lease(self.folder.state / "lease.json", self.folder.progress()) as held:
            self.folder.drop_unfinished()  # after the wait for a job on another node, which the lock may not reach
            attempts, self.killed = self.folder.count_attempt(), held.killed
            if give_up and len(held.killed) >= KILLED_TRIES:
                status, how = status_of(held.killed), "; ".join(held.killed)
                reason = f"{how}; lower train.micro_batch_tokens" if status == "oom" else how
                self._write(status, reason, attempts, shared=False)
                return 0
            return self._try(attempts, last_attempt)

    def _try(self, attempts: int, last_attempt: bool) -> int:
        with DeviceLease(device_identity(self.config.device)) as lease:
            status, reason = self._log(attempts)
            shared = lease.shared()
        if status == "interrupted":
            return EXIT_INTERRUPTED
        if status == "failed" and not last_attempt:
            return 1
        self._write(status, reason, attempts, shared)
        return 0

    def _log(self, attempts: int) -> tuple[str, str | None]:
        """Train with train.log open; the status and its reason."""
        log_path = self.folder.path / "train.log"
        new = not log_path.is_file() or log_path.stat().st_size == 0
        with needs_room(log_path), log_path.open("a") as log:
            progress = Progress(self.config.run_id, log, self.config.schedule.stop_step)
            if new:
                print(self._command(), file=log)
            job = f" (Slurm job {slurm_job()})" if slurm_job() else ""
            print(f"attempt {attempts}{job}: {json.dumps(self.key)} {json.dumps(versions())}", file=log, flush=True)
            for how in self.killed:
                progress.report(f"before this: {how}; if the kernel lacked memory, lower train.micro_batch_tokens")
            rehearse_plots()
            status, reason = self._train(StopRequests(), progress)
            progress.report(f"{status}{': ' + reason if reason else ''}")
            progress.bar.close()
        return status, reason

    @contextmanager
    def _part(self, name: str):
        """Count the seconds of the body to the part of that name, but for those of parts within it."""
        began, outer, self.nested = time.perf_counter(), self.nested, 0.0
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self.wall[name] = self.wall.get(name, 0.0) + took - self.nested
            self.nested = outer + took

    def _train(self, stop: StopRequests, progress: Progress) -> tuple[str, str | None]:
        try:
            with self._part("set_up"):
                self.trainer = trainer = Trainer(self.config, self.dataset, backend=self.backend, **self.inputs)
        except Exception as error:
            if not _is_oom(error):
                raise  # data or teacher don't fit: no result of this run
            return "oom", _oom_reason(error)
        try:
            if self.config.clock == "measured":
                with self._part("warm_up"):
                    trainer.warm_up()
            with self._part("checkpoints"):
                self._resume(progress)
            self._measure_anchor()
            if self.config.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with self._part("training"):
                trainer.train(self._save_state, stop.asked, progress)
            self._measure_anchor()
        except Interrupted:
            return "interrupted", f"at step {trainer.step}; start it again to go on"
        except Diverged as error:
            return "diverged", str(error)
        except (OSError, Damaged) as error:  # of the disk, or of a file that is read on the way: no result of this run
            with needs_room(self.folder.path):
                raise error
        except Exception as error:
            if _is_oom(error):
                return "oom", _oom_reason(error)
            traceback.print_exc(file=progress.log)
            return "failed", f"{type(error).__name__}: {error}"
        if trainer.recompiles:
            return "failed", f"torch.compile made {trainer.recompiles} graphs inside the clock; its times are void"
        return "ok", None

    def _resume(self, progress: Progress) -> None:
        """Go on from the last try's state, where there is one."""
        try:
            if self.trainer.load_state(self.folder.resume_file, self.key):
                progress.report(f"resumed at step {self.trainer.step}")
                progress.update(self.trainer.step)
        except Damaged as error:
            progress.report(str(error))

    def _save_state(self) -> None:
        with self._part("checkpoints"):
            self.trainer.save_state(self.folder.resume_file, self.key)

    def _measure_anchor(self) -> None:
        if self.config.anchor_steps:
            with self._part("anchor"):
                self.anchor.append(anchor_ms(self.config.device, self.config.anchor_steps))

    def _write(self, status: str, reason: str | None, attempts: int, shared: bool) -> None:
        """All artifacts; status.json last."""
        out, trainer, config = self.folder.path, self.trainer, self.config
        steps = [] if trainer is None else trainer.steps
        vals = [] if trainer is None else trainer.vals
        # Anew, since on a node that Slurm lost an earlier try's Snakemake may have deleted it as a failed job's output.
        write_json(out / "config.json", config.to_dict())
        with self._part("artifacts"):
            write_tables(out, config.run_id, steps, vals, self._summary(status, shared))
            self._save_weights(status)
        description = {
            "status": status,
            "reason": reason,
            "slurm_job": slurm_job(),
            "log_tail": None if status == "ok" else last_lines(out / "train.log"),
            "started": self.started.isoformat(timespec="seconds"),
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "wall_s": {name: round(seconds, 3) for name, seconds in self.wall.items()},
            "attempts": attempts,
            "attention": self.backend,
            "kernel": None if trainer is None else trainer.kernel,
            "recompiles": None if trainer is None else trainer.recompiles,
            "device": self.key["device"],
            "threads": self.threads,
            "shared_device": shared,
            "code_hash": self.key["code"],
            "teacher_sha256": self.key["teacher"],
            "versions": versions(),
        }
        self.folder.finish(description, self.key)

    def _save_weights(self, status: str) -> None:
        """Those of a run that ended well, if they are wanted; a failed one must not keep an earlier one's."""
        checkpoints = self.folder.path / "checkpoints"
        shutil.rmtree(checkpoints, ignore_errors=True)
        checkpoints.mkdir()
        if status == "ok" and self.weights:
            trainer, facts = self.trainer, checkpoint_facts(self.config, self.dataset)
            facts |= {"run_id": self.config.run_id, "step": trainer.step, "final_val": trainer.vals[-1]["val_loss"]}
            save_checkpoint(checkpoints, trainer.model, facts | {"untied": trainer.model.head is not None})

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
        teacher_flops = trainer.flops_per_token()[1]
        row |= {
            "steps": trainer.step,
            "tokens": trainer.tokens,
            "train_time_ms": trainer.time_ms,
            "params_stored": trainer.model.params_stored(),
            "params_active": trainer.model.params_active(),
            "flops_per_token": trainer.mean_flops_per_token(),
            "teacher_flops_per_token": teacher_flops if trainer.kd else None,
            "kd_stop_step": trainer.kd.stop_step if trainer.kd else None,
            "kd_cache_ms": trainer.cache.cost_ms if trainer.cache else None,
            "broken": trainer.broken,
        }
        row |= dict(zip(("anchor_before_ms", "anchor_after_ms"), self.anchor, strict=False))
        if trainer.vals:
            row |= {"best_val": min(v["val_loss"] for v in trainer.vals), "final_val": trainer.vals[-1]["val_loss"]}
        return row | _step_times(trainer) | _memory(config.device)

    def _command(self) -> str:
        out = self.folder.path
        given = {"teacher": self.inputs["teacher_folder"], "cache": self.inputs["cache"], "policy": self.policy}
        flags = "".join(f" --{name} {path}" for name, path in given.items() if path)
        return (
            f"PYTHONPATH=. python {ENTRY} --config {out}/config.json --out {out} "
            f"--manifest {self.dataset.folder}/manifest.json{flags} --threads {self.threads}"
        )


def _is_oom(error: Exception) -> bool:
    # torch's CPU allocator raises a plain RuntimeError
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


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
            row["mfu"] = trainer.tokens * trainer.mean_flops_per_token() / (trainer.time_ms * 1e9 * peak)
    return row


def _memory(device: str) -> dict:
    if device != "cuda":
        return {}
    return {
        "peak_alloc_gib": torch.cuda.max_memory_allocated() / 2**30,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }
