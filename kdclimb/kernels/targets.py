"""What the loss is taken against: labels, a teacher's dense or sparse distribution, and which tokens count.

Shapes: T tokens, V vocabulary, d and d_t widths of student and teacher, K labels a token, k entries a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TAILS = ("ghost", "label", "renormalised")


@dataclass(frozen=True)
class Softcap:
    """logits -> a * sigmoid((logits + b) / c) + offset; with offset 0 as in the NanoGPT speedrun.

    An offset moves all logits of a token alike, so it changes no probability and no loss.
    """

    a: float
    b: float
    c: float
    offset: float = 0.0

    @classmethod
    def tanh(cls, c: float) -> Softcap:
        """logits -> c * tanh(logits / c), as in Gemma 2, by tanh(x) = 2 * sigmoid(2x) - 1."""
        return cls(2 * c, 0.0, c / 2, -c)


@dataclass(frozen=True)
class DenseTeacher:
    """A teacher given by its last hidden states (T, d_t), its head (V, d_t) and its softcap."""

    hidden: Tensor
    head: Tensor
    softcap: Softcap | None


@dataclass(frozen=True)
class SparseTeacher:
    """A teacher given by some entries of each token's distribution: ids (T, k), no id twice in a row.

    Either `log_probs` (T, k): the teacher's log-probabilities at the loss's temperature, over the whole
    vocabulary; -inf for an unused entry. What they leave is the tail:
    - "ghost": one more word that stands for all others, on both sides. A lower bound of the exact KL.
    - "label": the tail's mass goes to the label (the residual fix of arXiv 2503.16870).
    - "renormalised": the entries are scaled to sum to 1. Biased: it pushes all other words towards 0, and with few
      entries trains worse than no teacher (same source).
    Or `counts` (T, k): how often each id came up in draws from the teacher's distribution; 0 for an unused entry.
    Their mean gradient is the exact one. The loss is then T^2 times the cross-entropy with the drawn distribution, less
    `entropy` (T,), the teacher's at the loss's temperature, which draws don't tell: with it the loss is on the mean the
    exact KL too, and a `DynamicNorm` scales both alike. Without it nothing is subtracted.
    """

    ids: Tensor
    log_probs: Tensor | None = None
    counts: Tensor | None = None
    tail: str = "ghost"
    entropy: Tensor | None = None  # nats


@dataclass(frozen=True)
class Entries:
    """A sparse target, brought to one form: soft = T^2 * (constant - sum_i q_i log p_i - rest * log p_rest)."""

    ids: Tensor  # (T, k) int32
    probs: Tensor  # (T, k) fp32: q
    rest: Tensor | None  # (T,) fp32: the ghost's q, whose p_rest is what the entries leave; None without a ghost
    constant: Tensor  # (T,) fp32: -entropy, of q, for draws of what they were drawn from, or 0 if that is not known


@dataclass(frozen=True)
class Labels:
    """Labels t+1, t+2, ... of each token with their weights, and which tokens count."""

    ids: Tensor  # (T, K) int64, 0 where the weight is 0
    weights: Tensor  # (T, K) fp32
    keep: Tensor  # (T,) bool: tokens that have a soft loss
    hard_count: Tensor  # 0-d fp32, at least 1: tokens that have a hard loss
    soft_count: Tensor  # the same of the soft loss


@dataclass(frozen=True)
class Problem:
    """All that an implementation needs to know. Hidden states and heads have one dtype; one kind of teacher or none."""

    hidden: Tensor  # (T, d)
    head: Tensor  # (V, d)
    teacher_hidden: Tensor | None  # (T, d_t)
    teacher_head: Tensor | None  # (V, d_t)
    entries: Entries | None
    labels: Labels
    temperature: float
    softcap: Softcap | None
    teacher_softcap: Softcap | None
    needs_mask: bool  # whether labels.keep may hold less than the tokens with a hard loss

    @property
    def has_target(self) -> bool:
        return self.teacher_hidden is not None or self.entries is not None


def label_table(labels: Tensor, mtp_weights: Tensor | None, soft_mask: Tensor | None, ignore_index: int) -> Labels:
    """Row t holds labels[t], labels[t+1], ... with `mtp_weights` (K,); beyond the end and for ignored labels 0.

    A token whose own label is ignored has no loss at all.
    """
    valid = labels != ignore_index
    if mtp_weights is None:
        mtp_weights = torch.ones(1, device=labels.device)
    later = len(mtp_weights) - 1
    padded = torch.cat([labels, labels.new_full((later,), ignore_index)]) if later else labels
    ids = padded.unfold(0, later + 1, 1)
    usable = (ids != ignore_index) & valid[:, None]
    weights = torch.where(usable, mtp_weights.float(), 0.0)
    keep = valid if soft_mask is None else valid & soft_mask
    counts = (mask.sum().clamp_min(1).float() for mask in (valid, keep))
    return Labels(torch.where(usable, ids, 0), weights, keep, *counts)


def entries(target: SparseTeacher, labels: Labels) -> Entries:
    """`target` in the one form that the implementations take."""
    ids = target.ids.int()
    if target.counts is not None:
        counts = target.counts.float()
        probs = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
        constant = probs.new_zeros(len(probs)) if target.entropy is None else -target.entropy.float()
        return Entries(ids, probs, None, constant)
    probs = target.log_probs.float().exp()
    left = (1 - probs.sum(dim=1)).clamp_min(0)
    rest = None
    if target.tail == "renormalised":
        probs = probs / probs.sum(dim=1, keepdim=True)
    elif target.tail == "label":
        label = labels.ids[:, :1].int()
        held = ids == label
        probs = probs + held * left[:, None]
        # the label as one more entry, unless it is one already: then unused, with a probability of 0
        ids = torch.cat([ids, label], dim=1)
        probs = torch.cat([probs, (left * ~held.any(dim=1))[:, None]], dim=1)
    else:
        rest = left
    constant = torch.special.xlogy(probs, probs).sum(dim=1)
    if rest is not None:
        constant = constant + torch.special.xlogy(rest, rest)
    return Entries(ids, probs, rest, constant)
