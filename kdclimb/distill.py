"""The KD controller: when the teacher is asked, how its loss is weighed, and when KD stops."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kdclimb import schedule, sparsify
from kdclimb.cache import TargetCache
from kdclimb.config import KDConfig, ScheduleConfig, require
from kdclimb.data import Batch
from kdclimb.evaluate import teacher_target
from kdclimb.kernels import DenseTeacher, DistillLoss, DynamicNorm, SparseTeacher, distill_loss
from kdclimb.model import GPT
from kdclimb.ngram import NgramTable


class KDController:
    """One run's KD. Active from the start until it stops for good; `stop_step` is the step after which it is off.

    It stops where `token_frac` of the horizon's tokens are trained, and by `stop_mode`: at `stop_frac` of the horizon
    ("step"), or at the last of `stop_consecutive` validations, at `stop_min_step` or later, whose loss is within
    `stop_margin` of the teacher's ("val_margin"), so that a single noisy one decides nothing.
    """

    def __init__(
        self,
        config: KDConfig,
        teacher: GPT | NgramTable,
        teacher_val: float,
        sched: ScheduleConfig,
        cache: TargetCache | None = None,
    ):
        if isinstance(teacher, NgramTable):  # another temperature would need what the table leaves out
            require(config.temperature == 1.0, "temperature", config.temperature, "1 with an n-gram teacher")
            require(config.top_k == 0, "top_k", config.top_k, "0 with an n-gram teacher, whose entries are its table's")
        self.config, self.teacher, self.sched, self.cache = config, teacher, sched, cache
        self.teacher_val = teacher_val if config.teacher_val is None else config.teacher_val
        self.norm = DynamicNorm(config.norm_floor, config.norm_max) if config.dynamic_norm else None
        self.kd_tokens = config.token_frac * schedule.total_tokens(sched)
        self.peak_lr = max(schedule.base_lr(sched, step) for step in range(sched.horizon))
        self.stop_step: int | None = None
        self.kept: Tensor | None = None  # share of the latest micro-batch's tokens that passed the gate
        self.streak = 0  # validations in a row within the margin

    @property
    def active(self) -> bool:
        return self.stop_step is None

    def micro_batches(self, step: int, num_micro: int) -> int:
        """How many of a step's micro-batches, from its first, have a teacher."""
        if not self.active or step % self.config.every:
            return 0
        return min(self.config.micro_batches or num_micro, num_micro)

    def alpha(self, step: int, tokens: int) -> float:
        """Weight of the KD term in this step, before which `tokens` were trained."""
        if self.config.alpha_schedule == "linear":
            return self.config.alpha * max(0.0, 1.0 - tokens / self.kd_tokens)
        if self.config.alpha_schedule == "lr":
            return self.config.alpha * schedule.base_lr(self.sched, step) / self.peak_lr
        return self.config.alpha

    def target(self, batch: Batch, place: int) -> DenseTeacher | SparseTeacher:
        """The teacher's side for the micro-batch at this place of the run's stream."""
        if self.cache is not None:
            target = self.cache.target(place, batch.inputs.device.type)
        else:
            target = teacher_target(self.teacher, batch, self.config.tail)
        if isinstance(target, DenseTeacher):
            k = self.config.top_k
            return sparsify.top_k(target, k, self.config.temperature, self.config.tail) if k else target
        return dataclasses.replace(target, tail=self.config.tail)

    def loss(
        self,
        hidden: Tensor,
        student: GPT,
        target: DenseTeacher | SparseTeacher,
        batch: Batch,
        *,
        alpha: float,
        **options,
    ) -> DistillLoss:
        """The training loss of a micro-batch that has a teacher, whose side is `target`; `options` are distill_loss's.

        With `infer_only` the teacher's answer is dropped.
        """
        options |= {"logits_mib": self.config.logits_mib or None}
        if self.config.infer_only:
            return distill_loss(hidden, student.head_weight, None, batch.labels, **options)
        mask = sparsify.gate(
            self.config.token_gate,
            self.config.token_gate_frac,
            self.config.temperature,
            hidden.detach(),
            student.head_weight.detach(),
            student.softcap,
            target,
            batch.labels,
        )
        self.kept = None if mask is None else mask.double().mean()
        return distill_loss(
            hidden,
            student.head_weight,
            target,
            batch.labels,
            soft_mask=mask,
            hard_weight=1.0 - alpha,
            soft_weight=alpha,
            temperature=self.config.temperature,
            token_stride=self.config.token_stride,
            norm=self.norm,
            **options,
        )

    def advance(self, step: int, tokens: int) -> str | None:
        """Before each step: why KD stops here, or None. An `infer_only` control keeps its teacher to the end."""
        if not self.active or self.config.infer_only:
            return None
        if why := schedule.kd_ends(self.sched, self.config, step, tokens):
            self.stop_step = step
        return why

    def observe(self, step: int, val_loss: float) -> str | None:
        """Take note of a validation: why KD stops here, or None."""
        if not self.active or self.config.infer_only or self.config.stop_mode != "val_margin":
            return None
        reached = val_loss <= self.teacher_val + self.config.stop_margin
        self.streak = self.streak + 1 if reached and step >= self.config.stop_min_step else 0
        if self.streak < self.config.stop_consecutive:
            return None
        self.stop_step = step
        return f"within {self.config.stop_margin:g} of the teacher's {self.teacher_val:.4f}"

    def state(self) -> dict:
        """JSON-able state for resuming; the factor as hex, so that it comes back to the bit."""
        factor = None if self.norm is None or self.norm.factor is None else self.norm.factor.item().hex()
        return {"stop_step": self.stop_step, "streak": self.streak, "norm_factor": factor}

    def load_state(self, state: dict, device: str) -> None:
        self.stop_step, self.streak = state["stop_step"], state["streak"]
        if self.norm is not None and state["norm_factor"] is not None:
            self.norm.factor = torch.tensor(float.fromhex(state["norm_factor"]), device=device)
