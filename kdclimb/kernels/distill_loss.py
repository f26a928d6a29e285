"""distill_loss: the one public entry to the hard + soft loss, and what it takes and gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdclimb.kernels import chunked, reference


@dataclass(frozen=True)
class Softcap:
    """logits -> a * sigmoid((logits + b) / c), as in the NanoGPT speedrun."""

    a: float
    b: float
    c: float


@dataclass(frozen=True)
class DenseTeacher:
    """A teacher given by its last hidden states (T, d_t), its head (V, d_t) and its softcap."""

    hidden: Tensor
    head: Tensor
    softcap: Softcap | None


@dataclass(frozen=True)
class DistillLoss:
    """0-d tensors. Only `total` carries gradient."""

    total: Tensor  # hard_weight * hard + soft_weight * norm_factor * soft
    hard: Tensor  # mean CE, nats a token
    soft: Tensor  # mean T^2 KL(teacher || student), nats a token
    norm_factor: Tensor  # the factor that this call used; 1 without a norm
    kd_share: Tensor  # KD's part of the gradient on the logits, 0 to 1, measured on the first chunk


class DynamicNorm:
    """Scales the soft loss to the size of the hard one: factor = hard / max(soft, floor), at most `largest`.

    Lagged: each call uses the factor of the call before, so one pass gives all gradients; the first
    call takes an extra pass without gradients to know its own. `floor` (nats) and `largest` keep the
    factor finite as the student approaches the teacher. The factor stays on the device. Source of
    the idea: hard / soft loss balancing with both detached, as in NVIDIA ModelOpt's loss balancer.
    """

    def __init__(self, floor: float, largest: float):
        self.floor, self.largest = floor, largest
        self.factor: Tensor | None = None

    def update(self, hard: Tensor, soft: Tensor) -> None:
        self.factor = (hard / soft.clamp_min(self.floor)).clamp_max(self.largest)


def distill_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    target: DenseTeacher | None,
    labels: Tensor,
    *,
    hard_weight: float = 1.0,
    soft_weight: float = 0.0,
    temperature: float = 1.0,
    student_softcap: Softcap | None = None,
    ignore_index: int = -100,
    norm: DynamicNorm | None = None,
    implementation: str = "auto",
) -> DistillLoss:
    """hard_weight * CE + soft_weight * norm * T^2 * KL(teacher || student), from hidden states.

    student_hidden (T, d), student_head (V, d), labels (T,) int64; means over the tokens whose label
    is not `ignore_index`, so an all-ignored batch gives 0 with zero gradient. CE and KL see the same
    softcapped logits. `temperature` divides both sides' logits (Hinton et al., arXiv 1503.02531).
    `implementation`: "torch" computes in chunks of tokens, with the gradients made in the forward
    pass; "reference" is plain autograd over whole logits; "auto" is "torch".

    Raises ValueError for shapes that don't match, an unknown implementation, or a soft weight
    without a target.
    """
    _check(student_hidden, student_head, target, labels, soft_weight, temperature)
    options = {"temperature": temperature, "student_softcap": student_softcap, "ignore_index": ignore_index}
    if implementation == "reference":
        evaluate = _reference
    elif implementation in ("auto", "torch"):
        evaluate = chunked.evaluate
    else:
        raise ValueError(f"implementation: {implementation!r} is not allowed; allowed: auto, torch, reference")
    inputs = (student_hidden, student_head, target, labels)
    factor = torch.ones((), device=student_hidden.device)
    if norm is not None and target is not None:
        if norm.factor is None:
            with torch.no_grad():
                first = evaluate(*inputs, hard_weight, torch.zeros_like(factor), **options)
            norm.update(first[1], first[2])
        factor = norm.factor
    total, hard, soft, share = evaluate(*inputs, hard_weight, soft_weight * factor, **options)
    if norm is not None and target is not None:
        norm.update(hard, soft)
    return DistillLoss(total, hard, soft, factor, share)


def _reference(student_hidden, student_head, target, labels, hard_weight, soft_weight, **options):
    hard, soft = reference.losses(student_hidden, student_head, target, labels, **options)
    total = hard_weight * hard + soft_weight * soft
    share = torch.full_like(hard, float("nan"))  # the reference does not take gradients apart
    return total, hard.detach(), soft.detach(), share.detach()


def _check(student_hidden, student_head, target, labels, soft_weight, temperature) -> None:
    tokens, width = student_hidden.shape
    vocab = student_head.shape[0]
    if student_head.shape != (vocab, width):
        raise ValueError(f"student_head is {tuple(student_head.shape)}; (V, {width}) fits the hidden states")
    if labels.shape != (tokens,):
        raise ValueError(f"labels is {tuple(labels.shape)}; ({tokens},) fits the hidden states")
    if temperature <= 0:
        raise ValueError(f"temperature: {temperature!r} is not allowed; allowed: above 0")
    if target is None:
        if soft_weight:
            raise ValueError("a soft_weight needs a target")
        return
    if target.hidden.shape[0] != tokens:
        raise ValueError(f"the teacher has {target.hidden.shape[0]} tokens, the student {tokens}")
    if target.head.shape != (vocab, target.hidden.shape[1]):
        raise ValueError(f"teacher head is {tuple(target.head.shape)}; ({vocab}, {target.hidden.shape[1]}) is needed")
