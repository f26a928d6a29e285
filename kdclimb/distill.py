"""The KD controller: when the teacher is asked, how its loss is weighed, and when KD stops."""

from __future__ import annotations

import torch
from torch import Tensor

from kdclimb.config import KDConfig
from kdclimb.data import Batch
from kdclimb.evaluate import teacher_target
from kdclimb.kernels import DistillLoss, DynamicNorm, distill_loss
from kdclimb.model import GPT


class KDController:
    """One run's KD. Active from the start until the student's validation loss comes within `stop_margin` of the
    teacher's, at `stop_min_step` or later; then off for good (`stop_step` is that validation's step).
    """

    def __init__(self, config: KDConfig, teacher: GPT, teacher_val: float):
        self.config, self.teacher, self.teacher_val = config, teacher, teacher_val
        self.norm = DynamicNorm(config.norm_floor, config.norm_max) if config.dynamic_norm else None
        self.stop_step: int | None = None

    @property
    def active(self) -> bool:
        return self.stop_step is None

    def loss(
        self, hidden: Tensor, student: GPT, batch: Batch, *, measure_share: bool = False, **options
    ) -> DistillLoss:
        """The training loss while KD is active; `options` are distill_loss's that CE has too.

        With `infer_only` the teacher runs and its answer is dropped.
        """
        target = teacher_target(self.teacher, batch)
        if self.config.infer_only:
            return distill_loss(hidden, student.head_weight, None, batch.labels, **options)
        return distill_loss(
            hidden,
            student.head_weight,
            target,
            batch.labels,
            hard_weight=1.0 - self.config.alpha,
            soft_weight=self.config.alpha,
            temperature=self.config.temperature,
            norm=self.norm,
            measure_share=measure_share,
            **options,
        )

    def observe(self, step: int, val_loss: float) -> bool:
        """Take note of a validation; True if it stops KD. An `infer_only` control keeps its teacher to the end."""
        reached = val_loss <= self.teacher_val + self.config.stop_margin
        if not self.active or self.config.infer_only or step < self.config.stop_min_step or not reached:
            return False
        self.stop_step = step
        return True

    def state(self) -> dict:
        """JSON-able state for resuming; the factor as hex, so that it comes back to the bit."""
        factor = None if self.norm is None or self.norm.factor is None else self.norm.factor.item().hex()
        return {"stop_step": self.stop_step, "norm_factor": factor}

    def load_state(self, state: dict, device: str) -> None:
        self.stop_step = state["stop_step"]
        if self.norm is not None and state["norm_factor"] is not None:
            self.norm.factor = torch.tensor(float.fromhex(state["norm_factor"]), device=device)
