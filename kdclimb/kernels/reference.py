"""The truth that every fast path is held against: plain autograd, whole logits, any float dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from kdclimb.kernels.targets import DenseTeacher, Entries, Labels, Softcap


def losses(
    hidden: Tensor,
    head: Tensor,
    target: DenseTeacher | Entries | None,
    labels: Labels,
    temperature: float,
    softcap: Softcap | None,
) -> tuple[Tensor, Tensor]:
    """Hard CE and T^2 * KL(teacher || student), each a mean over the tokens that have it, in nats.

    Shapes as in `kdclimb.kernels.distill_loss`. Both are attached to autograd. soft is 0 without a target.
    """
    logits = cap(hidden @ head.T, softcap)
    log_probs = torch.log_softmax(logits, dim=-1)
    hard = -(labels.weights.to(logits.dtype) * log_probs.gather(1, labels.ids)).sum() / labels.hard_count
    if target is None:
        return hard, hard.new_zeros(())
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    if isinstance(target, DenseTeacher):
        with torch.no_grad():
            teacher = torch.log_softmax(cap(target.hidden @ target.head.T, target.softcap) / temperature, dim=-1)
        kl = (teacher.exp() * (teacher - log_probs)).sum(dim=-1)
    else:
        picked = log_probs.gather(1, target.ids.long())
        kl = target.constant - (target.probs * picked).sum(dim=-1)
        if target.rest is not None:
            kl = kl - target.rest * torch.log1p(-picked.exp().sum(dim=-1))
    return hard, temperature**2 * torch.where(labels.keep, kl, 0.0).sum() / labels.soft_count


def cap(logits: Tensor, softcap: Softcap | None) -> Tensor:
    if softcap is None:
        return logits
    return softcap.a * torch.sigmoid((logits + softcap.b) / softcap.c) + softcap.offset
