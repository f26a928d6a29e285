"""n-gram teachers: a table of next-token distributions, looked up by the tokens of a batch.

How it is counted is in `kdclimb/count_ngrams.py`. Symbols: T tokens, V vocabulary, C pairs of tokens with a
distribution of their own, R = V + C rows, k entries a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdclimb.data import Batch
from kdclimb.kernels import SparseTeacher


@dataclass(frozen=True)
class NgramTable:
    """Row v < V: the token after v; row V + i: the token after the pair `pairs[i]`. Each row has k different tokens."""

    ids: Tensor  # (R, k) int32
    log_probs: Tensor  # (R, k) fp32, over the whole vocabulary
    unigram: Tensor  # (V,) fp32 probabilities
    pairs: Tensor  # (C,) int64, ascending: first * V + second

    def rows(self, inputs: Tensor) -> Tensor:
        """(T,) int64: each token's row. That of its pair with the one before it if there is one, else its own.

        A batch starts with a document, and no pair ends with the token that documents start with: none spans two.
        """
        if not len(self.pairs):
            return inputs
        pair = inputs.roll(1) * len(self.unigram) + inputs
        pair[:1] = -1
        place = torch.searchsorted(self.pairs, pair).clamp_max(len(self.pairs) - 1)
        return torch.where(self.pairs[place] == pair, len(self.unigram) + place, inputs)

    def target(self, batch: Batch, tail: str = "ghost") -> SparseTeacher:
        """(T, k) entries on the batch's device; nothing waits for it."""
        rows = self.rows(batch.inputs)
        return SparseTeacher(self.ids[rows], log_probs=self.log_probs[rows], tail=tail)

    def score(self, batches: list[Batch]) -> float:
        """Mean cross-entropy a token in nats. What the entries leave goes to the other tokens as unigrams."""
        total = 0.0
        for batch in batches:
            rows = self.rows(batch.inputs)
            ids, probs = self.ids[rows].long(), self.log_probs[rows].double().exp()
            held = ids == batch.labels[:, None]
            rest = (1 - probs.sum(dim=1)).clamp_min(0)
            others = (1 - self.unigram[ids].double().sum(dim=1)).clamp_min(1e-12)
            tail = rest * self.unigram[batch.labels].double() / others
            prob = torch.where(held.any(dim=1), (probs * held).sum(dim=1), tail)
            total -= prob.log().sum().item()
        return total / sum(len(batch.labels) for batch in batches)

    def flops_per_token(self, context: float, backward: bool) -> float:
        """None to speak of: a look-up."""
        return 0.0

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("ids", "log_probs", "unigram", "pairs")}
