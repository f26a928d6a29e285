"""What takes a pass of its own over logits: sparse targets of a neural teacher, and the choice of tokens that have KD.

Both walk over chunks of tokens, so that no (T, V) tensor is held, make no gradient, and wait for nothing.
Symbols: T tokens, d width, V vocabulary, k entries a token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdclimb.kernels import DenseTeacher, Softcap, SparseTeacher
from kdclimb.kernels.chunked import LOGITS_MIB, chunk_tokens
from kdclimb.kernels.draws import capped, draw

GATES = ("none", "teacher_better", "student_entropy")


@torch.no_grad()
def over_logits(hidden: Tensor, head: Tensor, each: Callable) -> tuple[Tensor, ...]:
    """The results of each(logits (t, V) in `hidden`'s dtype, rows), chunk by chunk, put together along dimension 0."""
    weight = head.to(hidden.dtype).T
    size = chunk_tokens(len(hidden), len(head), 4, LOGITS_MIB[hidden.device.type])
    parts = []
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        parts.append(each(hidden[rows] @ weight, rows))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def top_k(target: DenseTeacher, k: int, temperature: float, tail: str) -> SparseTeacher:
    """The k likeliest words of each token, with their log-probabilities over the whole vocabulary."""

    def likeliest(logits: Tensor, _) -> tuple[Tensor, Tensor]:
        log_probs = (capped(logits, target.softcap) / temperature).log_softmax(dim=1)
        values, ids = log_probs.topk(min(k, logits.shape[1]), dim=1)
        return ids.int(), values

    ids, log_probs = over_logits(target.hidden, target.head, likeliest)
    return SparseTeacher(ids, log_probs=log_probs, tail=tail)


def sample(target: DenseTeacher, draws: int, temperature: float, generator: torch.Generator) -> SparseTeacher:
    """So many draws from each token's distribution, as different words with their counts, and its entropy; unused
    entries count 0.
    """

    def drawn(logits: Tensor, _) -> tuple[Tensor, Tensor, Tensor]:
        numbers = torch.rand(len(logits), draws, generator=generator, device=logits.device).sort(dim=1).values
        ids, entropy = draw(logits, target.softcap, temperature, numbers)  # equal words side by side
        new = torch.ones_like(ids, dtype=torch.bool)
        new[:, 1:] = ids[:, 1:] != ids[:, :-1]
        slot = new.cumsum(dim=1) - 1
        counts = torch.zeros_like(ids).scatter_add_(1, slot, torch.ones_like(ids))
        return torch.zeros_like(ids).scatter_(1, slot, ids).int(), counts, entropy

    ids, counts, entropy = over_logits(target.hidden, target.head, drawn)
    return SparseTeacher(ids, counts=counts, entropy=entropy)


def label_log_probs(
    hidden: Tensor, head: Tensor, softcap: Softcap | None, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    """(T,) log-probability of each label at `temperature`."""

    def of_labels(logits: Tensor, rows: slice) -> tuple[Tensor]:
        return ((capped(logits, softcap) / temperature).log_softmax(dim=1).gather(1, labels[rows, None])[:, 0],)

    return over_logits(hidden, head, of_labels)[0]


def entropies(hidden: Tensor, head: Tensor, softcap: Softcap | None) -> Tensor:
    """(T,) entropy in nats of each token's distribution at temperature 1."""

    def entropy(logits: Tensor, _) -> tuple[Tensor]:
        log_probs = capped(logits, softcap).log_softmax(dim=1)
        return (-(log_probs.exp() * log_probs).sum(dim=1),)

    return over_logits(hidden, head, entropy)[0]


def gate(
    kind: str,
    share: float,
    temperature: float,
    hidden: Tensor,
    head: Tensor,
    softcap: Softcap | None,
    target: DenseTeacher | SparseTeacher,
    labels: Tensor,
) -> Tensor | None:
    """(T,) bool: the tokens that have KD; None for all. `hidden`, `head` and `softcap` are the student's.

    "teacher_better": where the teacher gives the label more probability than the student does, both at `temperature`,
    at which a sparse teacher was taken; a label that is not among its entries counts as given none. "student_entropy":
    the `share` of the tokens of which the student is least certain.
    """
    if kind == "none":
        return None
    if kind == "student_entropy":
        entropy = entropies(hidden, head, softcap)
        return entropy >= entropy.topk(max(1, round(share * len(entropy)))).values[-1]
    ours = label_log_probs(hidden, head, softcap, labels, temperature)
    if isinstance(target, DenseTeacher):
        return label_log_probs(target.hidden, target.head, target.softcap, labels, temperature) > ours
    given = target.log_probs
    if given is None:
        given = (target.counts / target.counts.sum(dim=1, keepdim=True)).log()
    held = torch.where(target.ids == labels[:, None], given, -torch.inf)
    return held.amax(dim=1) > ours
