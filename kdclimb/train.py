"""The training loop: what makes a run repeatable, resumable to the bit, and honest about its time.

Time is the speedrun's train_time_ms: warm-up (with the state reset after it), validation and
checkpoint I/O are outside the clock, data loading and the teacher's forward pass inside.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kdclimb import schedule
from kdclimb.artifacts import Damaged, write_via
from kdclimb.attention import to_device
from kdclimb.cache import TargetCache
from kdclimb.config import RunConfig
from kdclimb.data import Batch, Dataset
from kdclimb.distill import KDController
from kdclimb.evaluate import validate
from kdclimb.kernels import DenseTeacher, DistillLoss, distill_loss
from kdclimb.model import GPT
from kdclimb.ngram import NgramTable
from kdclimb.optim import Optimizers
from kdclimb.teacher import checkpoint_facts, grow, load_teacher, random_teacher, read_description

WARMUP_STEPS = 2
CHECKPOINT_PAUSE = 10.0  # checkpoints lie so many times as far apart as one takes: seconds for a large model
CHECKPOINT_SPEED = 5e8  # bytes a second that the first one is taken to be copied, hashed and written with
SHARE_EVERY = 10  # steps between two measurements of kd_share, which takes a little more than the loss alone


def fix_order(config: RunConfig) -> None:
    """Have this process sum in a fixed order: on a CPU always, on a GPU where the run asks for it.

    torch's operators do then, or raise, and our own ask torch. To be called before the process first uses the GPU.
    """
    on_cpu = config.device == "cpu"
    if on_cpu:
        torch.set_deterministic_debug_mode("error")  # the same without importing the compiler, a second and a half
    else:
        torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # one of the two that torch accepts then
    torch.utils.deterministic.fill_uninitialized_memory = on_cpu  # no order's part, and a GPU's logits are gigabytes


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    dynamo = sys.modules.get("torch._dynamo")  # seconds to import, and not needed on a CPU
    return 0 if dynamo is None else dynamo.utils.counters["stats"]["unique_graphs"]


def _on_host(losses: list[DistillLoss], with_teacher: int, **others: torch.Tensor) -> dict[str, float]:
    """Means over the micro-batches, of KD's terms over those with a teacher; the first kd_share; and `others`."""
    names = ("hard", "soft", "norm_factor", "kd_share")
    table = torch.stack([torch.stack([getattr(loss, name).double() for name in names]) for loss in losses])
    values = torch.cat([table.flatten(), *(other.double()[None] for other in others.values())]).tolist()
    hard, *of_kd = (values[i : table.numel() : len(names)] for i in range(len(names)))
    means = {"hard": statistics.fmean(hard)} | dict(zip(others, values[table.numel() :], strict=True))
    if with_teacher:
        soft, factor, share = of_kd
        means |= {"soft": statistics.fmean(soft[:with_teacher]), "norm_factor": statistics.fmean(factor[:with_teacher])}
        means["kd_share"] = share[0]
    return means


class Diverged(RuntimeError):
    """A loss or a gradient that is no finite number."""


class Interrupted(BaseException):
    """Asked to stop, or the master is gone."""


def state_sha256(text: str, tensors: dict[str, torch.Tensor]) -> str:
    """Over a resume state's facts and its tensors on the host: safetensors itself has no checksum."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_state(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """(facts, tensors on the host) of a resume state. Raises Damaged unless it is as it was written."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if state_sha256(metadata.get("facts", ""), tensors) != metadata.get("sha256"):
            raise ValueError("not as it was written")
        return json.loads(metadata["facts"]), tensors
    except (SafetensorError, ValueError, OSError) as error:
        raise Damaged(f"{path}: damaged ({error}); the run starts from step 0") from error


class Paced:
    """`action`, but not before CHECKPOINT_PAUSE times as long as it took last is over; `expected` seconds the first."""

    def __init__(self, action, expected: float):
        self.action, self.ready = action, time.perf_counter() + CHECKPOINT_PAUSE * expected

    def __call__(self) -> None:
        began = time.perf_counter()
        if began >= self.ready:
            self.action()
            ended = time.perf_counter()
            self.ready = ended + CHECKPOINT_PAUSE * (ended - began)


class Trainer:
    """State and steps of one run. `train()` goes from wherever the state stands to the end."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        teacher_folder: Path | None,
        backend: str,
        cache: Path | None = None,
        kd_stop_step: int | None = None,
    ):
        """`kd_stop_step` is that of the KD run whose LR policy is followed (`lr_policy`); None if KD never stopped."""
        self.config, self.dataset = config, dataset
        self.backend, self.device = backend, config.device
        on_gpu = config.device == "cuda"
        dtype = torch.bfloat16 if on_gpu else torch.float32
        self.options = {"backend": backend, "compute_dtype": dtype, "compiled": on_gpu}
        sched = config.schedule
        cut = config.validation.cut(sched.max_doc_tokens)
        self.val_batches = dataset.val_batches(config.validation.tokens, sched.micro_batch_tokens, cut, self.device)
        self.region = lambda name: nullcontext()  # around the parts of a step; `profile.py` times them
        self.kernel: str | None = None  # the loss's implementation, known once it ran
        self.teacher_folder, self.kd_stop_step = teacher_folder, kd_stop_step
        self.teacher = None if config.kd is None else self._load_teacher()
        self.cache = None if config.kd is None else self._open_cache(cache)
        self.reset()

    def _load_teacher(self) -> tuple[GPT | NgramTable, float]:
        compiled = self.options["compiled"] and self.config.kd.compile_teacher
        options = {"device": self.device, **self.options, "compiled": compiled}
        options["matrix_dtype"] = self.config.kd.teacher_dtype
        if self.config.kd.random_teacher:
            return random_teacher(self.teacher_folder, self.config.seed, self.val_batches, **options)
        return load_teacher(
            self.teacher_folder, self.val_batches, checkpoint_facts(self.config, self.dataset), **options
        )

    def _open_cache(self, folder: Path | None) -> TargetCache | None:
        if self.config.kd.cache is None:
            return None
        if folder is None:
            raise ValueError(f"kd.cache: {self.config.kd.cache} is asked for, but no --cache folder is given")
        weights = read_description(self.teacher_folder)["weights_sha256"]
        expected = {"teacher_sha256": weights, "data_hash": self.dataset.hash}
        return TargetCache(folder, self.config, self.teacher[0], expected)

    def reset(self) -> None:
        """Everything at step 0, from the seed."""
        torch.manual_seed(self.config.seed)
        with torch.device(self.device):  # never whole on the host: a model too large for it must fail as `oom` too
            self.model = GPT(self.config.model, **self.options)
        if self.config.grown_from is not None:
            grow(self.model, self.teacher_folder)
        self.optimizers = Optimizers(self.model, self.config.optim, compiled=self.options["compiled"])
        self.stream = self.dataset.train_stream(self.config.seed, self.config.schedule.max_doc_tokens)
        self.kd = None
        if self.teacher is not None:
            self.kd = KDController(self.config.kd, *self.teacher, self.config.schedule, self.cache)
        self.step, self.tokens, self.time_ms, self.broken, self.recompiles = 0, 0, 0.0, 0, 0
        self.steps: list[dict] = []
        self.vals: list[dict] = []

    def warm_up(self) -> None:
        """Run every path that the clock will see, each stage's with and without the teacher, then start afresh."""
        if self.kd:
            self._warm_up_stages()
            self.kd.stop_step = 0
        self._warm_up_stages()
        self._warm_up_untied()
        self.reset()

    def _warm_up_stages(self) -> None:
        """Steps of each stage that this run reaches: other numbers of labels are other kernels. Ends where KD does."""
        sched, every = self.config.schedule, self.config.kd.every if self.kd else 1
        taught = self.kd is not None and self.kd.active
        for first in schedule.stage_starts(sched):
            self.step = math.ceil(first / every) * every  # the stage's first with a teacher
            self.tokens = schedule.total_tokens(sched, self.step)
            for _ in range(max(WARMUP_STEPS, self.config.optim.adam.every)):  # so that Adam steps too
                if self.step >= sched.stop_step or (taught and self.kd.advance(self.step, self.tokens)):
                    return
                self.train_step()

    def _warm_up_untied(self) -> None:
        """Steps with the head untied, if this run reaches them: Adam has a graph for each kind of parameter."""
        untie, sched = self.optimizers.untie_step(self.config.schedule.scheduled), self.config.schedule
        if untie is None or untie >= sched.stop_step:
            return
        self.step, self.tokens = untie, schedule.total_tokens(sched, untie)
        for parameter in self.model.parameters():
            parameter.grad = None  # what waits for Adam
        self.optimizers.untie()
        for _ in range(min(max(WARMUP_STEPS, self.config.optim.adam.every), sched.stop_step - untie)):
            self.train_step()

    def train(self, checkpoint, should_stop, progress) -> None:
        """Train to the stop step. `checkpoint()` is called after validations, `should_stop()` after each step."""
        size = 3 * sum(p.nbytes for p in self.model.parameters())  # with about two moments of each
        after_validation = Paced(checkpoint, size / CHECKPOINT_SPEED)
        every, stop = self.config.validation.every, self.config.schedule.stop_step
        untie = self.optimizers.untie_step(self.config.schedule.scheduled)
        if self.step == 0:
            self.validate(progress)
        graphs = compiled_graphs()
        while self.step < stop:
            if self.step == untie:
                self.optimizers.untie()
            if self.kd is not None and (why := self.kd.advance(self.step, self.tokens)):
                progress.report(f"KD stops at step {self.step}: {why}")
            cursor = self.stream.cursor
            with self.clock():
                row = self.train_step()
            self.recompiles += compiled_graphs() - graphs
            self.steps.append(row | {"step": self.step, "tokens": self.tokens, "train_time_ms": self.time_ms})
            progress.update(1)
            for name in ("loss_hard", "loss_soft", "grad_norm"):
                if not math.isfinite(row.get(name, 0.0)):
                    raise Diverged(f"{name} is {row[name]} at step {self.step}, {self.batch(row, cursor)}")
            if self.step % every == 0 or self.step == stop:
                self.validate(progress)
                if self.reached():
                    progress.report(f"ends at step {self.step}: validation.stop_at is reached")
                    break
                if self.step < stop:
                    after_validation()
            if self.step < stop and should_stop():
                checkpoint()
                raise Interrupted
            graphs = compiled_graphs()  # a validation may compile: it is outside the clock

    def batch(self, row: dict, cursor: tuple[int, int, int]) -> str:
        """Which tokens the last step trained on, in words that find them again."""
        epoch, shard, place = cursor
        size = self.config.schedule.micro_batch_tokens
        first, last = (self.tokens - row["batch_tokens"]) // size, self.tokens // size - 1
        file = self.dataset.manifest["train"][shard]["file"]
        return (
            f"on micro-batches {first} to {last} of seed {self.config.seed}'s stream, from document {place} in "
            f"the order of epoch {epoch} of {file}; {size} tokens each"
        )

    def train_step(self) -> dict:
        """One optimiser step; returns its row for steps.csv, less step, tokens and time."""
        sched = self.config.schedule
        num_tokens = schedule.batch_tokens(sched, self.step)
        num_micro = num_tokens // sched.micro_batch_tokens
        self.model.set_windows(*schedule.windows(sched, self.step))
        with_teacher = self.kd.micro_batches(self.step, num_micro) if self.kd else 0
        options, losses = self._loss_options(), []
        for micro in range(num_micro):
            with self.region("data"):
                batch = self.stream.next_batch(sched.micro_batch_tokens, self.device)
            with self.region("student"):
                hidden = self.model(batch.inputs, batch.documents)
            if micro < with_teacher:
                loss = self._taught(hidden, batch, micro, options)
            else:
                loss = self._untaught(hidden, batch, options)
            with self.region("backward"):
                (loss.total / num_micro).backward()
            losses.append(loss)
        self.kernel = losses[0].implementation
        mult = schedule.lr_mult(sched, self.config.kd or self.config.lr_policy, self.step, self._stopped())
        with self.region("optimiser"):
            grad_norm = self.optimizers.grad_norm()
            self.optimizers.step(
                self.step,
                lr_mult=mult,
                base_mult=schedule.base_lr(sched, self.step),
                momentum=schedule.momentum(self.config.optim.muon, sched.horizon, self.step),
            )
        self.step += 1
        self.tokens += num_tokens
        return {"lr_mult": mult, "batch_tokens": num_tokens} | self._row(losses, with_teacher, grad_norm)

    def _loss_options(self) -> dict:
        """What the loss of each micro-batch of this step is given."""
        weights = torch.tensor(schedule.mtp_weights(self.config.schedule, self.step))
        return {
            "head_dtype": self.config.schedule.head_dtype,
            "student_softcap": self.model.softcap,
            "mtp_weights": None if len(weights) == 1 else to_device(weights, self.device),
        }

    def _taught(self, hidden: torch.Tensor, batch: Batch, micro: int, options: dict) -> DistillLoss:
        """The loss of this step's micro-batch number `micro`, which has a teacher."""
        with self.region("teacher"):
            target = self.kd.target(batch, self.tokens // self.config.schedule.micro_batch_tokens + micro)
        share = self.step % SHARE_EVERY == 0 and micro == 0
        alpha = self.kd.alpha(self.step, self.tokens)
        with self.region("loss"):
            return self.kd.loss(hidden, self.model, target, batch, alpha=alpha, measure_share=share, **options)

    def _untaught(self, hidden: torch.Tensor, batch: Batch, options: dict) -> DistillLoss:
        with self.region("loss"):
            target, weights = self._uniform(hidden)
            return distill_loss(hidden, self.model.head_weight, target, batch.labels, **weights, **options)

    def _uniform(self, hidden: torch.Tensor) -> tuple[DenseTeacher | None, dict]:
        """Label smoothing as KD from a uniform teacher, whose KL has the same gradient: all its logits are 0."""
        weight = self.config.label_smoothing
        if not weight:
            return None, {}
        teacher = DenseTeacher(torch.zeros_like(hidden), self.model.head_weight.detach(), None)
        return teacher, {"hard_weight": 1.0 - weight, "soft_weight": weight}

    def _row(self, losses: list[DistillLoss], with_teacher: int, grad_norm: torch.Tensor) -> dict:
        """What a step's losses come to, the first so many of which had a teacher: its one wait for the device."""
        kept = {"kept": self.kd.kept} if with_teacher and self.kd.kept is not None else {}
        measured = _on_host(losses, with_teacher, grad_norm=grad_norm, **kept)
        row = {"loss_hard": measured["hard"], "grad_norm": measured["grad_norm"]}
        if self.model.windows[0] is not None:
            row |= dict(zip(("window_short", "window_long"), self.model.windows[0], strict=True))
        if self.kd is not None:
            row["kd_active"] = int(with_teacher > 0)
            if with_teacher and not self.config.kd.infer_only:
                row |= {"loss_soft": measured["soft"], "kd_norm": measured["norm_factor"]}
                row |= {"kd_kept": measured["kept"]} if kept else {}
                if not math.isnan(measured["kd_share"]):  # not asked for, or 0 / 0 while the head is at zero
                    row["kd_share"] = measured["kd_share"]
        return row

    def _stopped(self) -> int | None:
        """The step after which KD stopped, here or in the run whose LR policy is followed; None if it has not yet."""
        if self.kd:
            return self.kd.stop_step
        return None if self.kd_stop_step is None or self.step < self.kd_stop_step else self.kd_stop_step

    def validate(self, progress) -> None:
        teacher = None if self.kd is None else self.kd.teacher
        self.model.set_windows(*schedule.windows(self.config.schedule, self.step))
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
        if self.kd is not None and (why := self.kd.observe(self.step, val_loss)):
            progress.report(f"KD stops at step {self.step}: {why}")

    def reached(self) -> bool:
        """Whether the last two validations, that at step 0 apart, are at or below validation.stop_at."""
        goal, last = self.config.validation.stop_at, [row["val_loss"] for row in self.vals if row["step"]][-2:]
        return goal is not None and len(last) == 2 and max(last) <= goal

    # ---- time

    @contextmanager
    def clock(self):
        """Add the time of a step, the body, to `time_ms`: measured, or charged by its FLOPs."""
        before, sched = self.tokens, self.config.schedule
        num_micro = schedule.batch_tokens(sched, self.step) // sched.micro_batch_tokens
        share = self.kd.micro_batches(self.step, num_micro) / num_micro if self.kd else 0.0
        started = time.perf_counter()
        yield
        if self.config.clock == "measured":
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.time_ms += 1e3 * (time.perf_counter() - started)
        else:
            student, teacher = self.flops_per_token()
            flops = (self.tokens - before) * (student + share * teacher)
            self.time_ms += flops / (self.config.modelled_tflops * 1e9)

    def flops_per_token(self) -> tuple[float, float]:
        """(student forward and backward, teacher forward). A document's mean context is taken as half its longest."""
        context = self.config.schedule.max_doc_tokens / 2
        teacher = 0.0
        if self.kd:
            cache = self.cache
            teacher = cache.flops_per_token() if cache else self.kd.teacher.flops_per_token(context, backward=False)
        return self.model.flops_per_token(context, backward=True), teacher

    def mean_flops_per_token(self) -> float:
        """The student's, forward and backward, over all steps so far, whose windows differ."""
        sched, tokens = self.config.schedule, Counter()
        for row in self.steps:
            tokens[schedule.windows(sched, row["step"] - 1)[0]] += row["batch_tokens"]
        if not tokens:
            return self.flops_per_token()[0]
        context, total = sched.max_doc_tokens / 2, tokens.total()
        return math.fsum(
            count / total * self.model.flops_per_token(context, backward=True, windows=windows)
            for windows, count in tokens.items()
        )

    # ---- resuming

    def save_state(self, path: Path, key: dict) -> None:
        """All that the next steps depend on, to the bit, in one safetensors file."""
        facts = {
            "key": key,
            "step": self.step,
            "tokens": self.tokens,
            "time_ms": self.time_ms.hex(),
            "broken": self.broken,
            "recompiles": self.recompiles,
            "steps": self.steps,
            "vals": self.vals,
            "kd": None if self.kd is None else self.kd.state(),
            "untied": self.model.head is not None,
        }
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"optim.{name}": value for name, value in self.optimizers.state_tensors().items()}
        tensors = {name: value.detach().contiguous().cpu() for name, value in tensors.items()}
        text = json.dumps(facts)
        metadata = {"facts": text, "sha256": state_sha256(text, tensors)}
        write_via(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))

    def load_state(self, path: Path, key: dict) -> bool:
        """Go on from a saved state made with the same key; False, and nothing changed, if there is none.

        Raises Damaged for one that is not as it was written.
        """
        if not path.is_file():
            return False
        facts, tensors = read_state(path)
        if facts["key"] != key:
            return False
        tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        if facts["untied"] and self.model.head is None:
            self.optimizers.untie()
        model = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        optim = {name.removeprefix("optim."): t for name, t in tensors.items() if name.startswith("optim.")}
        self.model.load_state_dict(model, strict=True)
        self.optimizers.load_state_tensors(optim)
        self.step, self.tokens, self.broken = facts["step"], facts["tokens"], facts["broken"] + 1
        self.recompiles = facts["recompiles"]
        self.time_ms = float.fromhex(facts["time_ms"])
        self.steps, self.vals = facts["steps"], facts["vals"]
        if self.kd is not None:
            self.kd.load_state(facts["kd"], self.device)
        sched = self.config.schedule
        for step in range(self.step):
            for _ in range(schedule.batch_tokens(sched, step) // sched.micro_batch_tokens):
                self.stream.skip_batch(sched.micro_batch_tokens)
        return True
