"""The metric: mean cross-entropy per token in nats, on a fixed set of tokens."""

from __future__ import annotations

import torch

from kdclimb.data import Batch
from kdclimb.kernels import DenseTeacher, distill_loss
from kdclimb.model import GPT


@torch.no_grad()
def validate(model: GPT, batches: list[Batch], teacher: GPT | None = None) -> tuple[float, float | None]:
    """(val_loss, teacher_kl): mean over all tokens of `batches` of the CE on the softcapped logits, and of
    KL(teacher || student) at temperature 1 if a teacher is given. Both in nats a token.
    """
    hard, soft, tokens = 0.0, 0.0, 0
    for batch in batches:
        target = None if teacher is None else teacher_target(teacher, batch)
        hidden = model(batch.inputs, batch.documents)
        loss = distill_loss(hidden, model.head_weight, target, batch.labels, student_softcap=model.softcap)
        hard += loss.hard.item() * len(batch.labels)
        soft += loss.soft.item() * len(batch.labels)
        tokens += len(batch.labels)
    return hard / tokens, None if teacher is None else soft / tokens


@torch.no_grad()
def teacher_target(teacher: GPT, batch: Batch) -> DenseTeacher:
    """The teacher's side of the KD loss for one batch, without gradients."""
    return DenseTeacher(teacher(batch.inputs, batch.documents), teacher.head_weight, teacher.softcap)
