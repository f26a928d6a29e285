"""The truth that every fast path is held against: plain autograd, whole logits, any float dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def losses(student_hidden, student_head, target, labels, *, temperature, student_softcap, ignore_index):
    """Hard CE and T^2 * KL(teacher || student), each the mean over non-ignored tokens in nats; 0 if there are none.

    Shapes as in `kdclimb.kernels.distill_loss`. Both come back attached to autograd. soft is 0 without a target.
    """
    valid = labels != ignore_index
    count = valid.sum().clamp_min(1)
    logits = cap(student_hidden @ student_head.T, student_softcap)
    hard = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum") / count
    if target is None:
        return hard, hard.new_zeros(())
    with torch.no_grad():
        teacher = torch.log_softmax(cap(target.hidden @ target.head.T, target.softcap) / temperature, dim=-1)
    student = torch.log_softmax(logits / temperature, dim=-1)
    kl = (teacher.exp() * (teacher - student)).sum(dim=-1)
    return hard, temperature**2 * (kl * valid).sum() / count


def cap(logits, softcap):
    return logits if softcap is None else softcap.a * torch.sigmoid((logits + softcap.b) / softcap.c)
