"""The metric: mean cross-entropy per token in nats, on a fixed set of tokens."""

from __future__ import annotations

import torch

from kdclimb.data import Batch
from kdclimb.kernels import DenseTeacher, SparseTeacher, distill_loss
from kdclimb.model import GPT
from kdclimb.ngram import NgramTable


@torch.no_grad()
def validate(model: GPT, batches: list[Batch], teacher: GPT | NgramTable | None = None) -> tuple[float, float | None]:
    """(val_loss, teacher_kl): mean over all tokens of `batches` of the CE on the softcapped logits, and of
    KL(teacher || student) at temperature 1 if a teacher is given; of a sparse one the lower bound that its entries and
    tail give. Both in nats a token.
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
def teacher_target(teacher: GPT | NgramTable, batch: Batch, tail: str = "ghost") -> DenseTeacher | SparseTeacher:
    """The teacher's side of the KD loss for one batch, without gradients. `tail` is a sparse one's."""
    if isinstance(teacher, NgramTable):
        return teacher.target(batch, tail)
    return DenseTeacher(teacher(batch.inputs, batch.documents), teacher.head_weight, teacher.softcap)
