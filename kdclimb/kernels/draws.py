"""Words drawn from softmax distributions by inversion, and the distributions' entropies: what a cache of samples holds.

A number u in [0, 1) draws the first word at which the cumulated probability is above u. On a GPU one program a token
reads its logits twice, for their maximum and for the sums of exponentials by blocks of words, then one block for each
draw: no probabilities are written. Elsewhere it is plain PyTorch. Symbols: T tokens, V vocabulary, k draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdclimb.kernels.fused import triton
from kdclimb.kernels.targets import Softcap

BLOCK = 1024  # words

if triton is not None:
    import triton.language as tl


def capped(logits: Tensor, softcap: Softcap | None) -> Tensor:
    """The logits in fp32, behind the softcap; without its offset, which changes no probability."""
    logits = logits.float()
    return logits if softcap is None else softcap.a * torch.sigmoid((logits + softcap.b) / softcap.c)


def draw(logits: Tensor, softcap: Softcap | None, temperature: float, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """(words (T, k) int64, entropies (T,) fp32 in nats) of softmax(capped logits / temperature).

    logits (T, V), not yet capped, of any float dtype; numbers (T, k) fp32 in [0, 1), one for each draw.
    """
    if triton is not None and logits.is_cuda:
        return _launch(logits, softcap, temperature, numbers)
    probs = (capped(logits, softcap) / temperature).softmax(dim=1)
    ends = probs.cumsum(dim=1)
    words = torch.searchsorted(ends, numbers * ends[:, -1:], right=True).clamp_(max=logits.shape[1] - 1)
    return words, torch.special.entr(probs).sum(dim=1)


def _launch(logits: Tensor, softcap: Softcap | None, temperature: float, numbers: Tensor) -> tuple[Tensor, Tensor]:
    tokens, vocab = logits.shape
    words = torch.empty(numbers.shape, dtype=torch.int64, device=logits.device)
    entropies = torch.empty(tokens, device=logits.device)
    cap = (0.0, 0.0, 0.0) if softcap is None else (softcap.a, softcap.b, 1.0 / softcap.c)
    blocks = triton.cdiv(vocab, BLOCK)
    _draw[(tokens,)](
        logits.contiguous(), numbers.contiguous(), words, entropies, vocab, numbers.shape[1], *cap, 1.0 / temperature,
        CAPPED=softcap is not None, BLOCK=BLOCK, BLOCKS=blocks, ROOM=triton.next_power_of_2(blocks), num_warps=4,
    )  # fmt: skip
    return words, entropies


if triton is not None:
    NOTHING = tl.constexpr(-1e30)  # finite: times its own exponential it is 0

    @triton.jit
    def _block(logits, i, vocab, a, b, inverse_c, inverse_tau, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
        """The i-th block of a token's logits, over the temperature; behind the vocabulary's end NOTHING."""
        place = i * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + place, mask=place < vocab, other=0.0).to(tl.float32)
        if CAPPED:
            x = a / (1.0 + tl.exp(-(x + b) * inverse_c))
        return tl.where(place < vocab, x * inverse_tau, NOTHING)

    @triton.jit
    def _draw(
        logits, numbers, words, entropies, vocab, k, a, b, inverse_c, inverse_tau,
        CAPPED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, ROOM: tl.constexpr,
    ):  # fmt: skip
        t = tl.program_id(0).to(tl.int64)
        logits += t * vocab
        largest = tl.full((BLOCK,), NOTHING, tl.float32)
        for i in range(BLOCKS):
            x = _block(logits, i, vocab, a, b, inverse_c, inverse_tau, CAPPED, BLOCK)
            largest = tl.maximum(largest, x)
        top = tl.max(largest, 0)
        blocks = tl.arange(0, ROOM)
        sums, weighted = tl.zeros((ROOM,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for i in range(BLOCKS):
            x = _block(logits, i, vocab, a, b, inverse_c, inverse_tau, CAPPED, BLOCK) - top
            e = tl.exp(x)
            weighted += e * x
            sums = tl.where(blocks == i, tl.sum(e, 0), sums)
        total, ends = tl.sum(sums, 0), tl.cumsum(sums, 0)
        tl.store(entropies + t, tl.log(total) - tl.sum(weighted, 0) / total)
        for j in range(k):
            mass = tl.load(numbers + t * k + j) * total
            i = tl.minimum(tl.sum((ends <= mass).to(tl.int32), 0), BLOCKS - 1)
            before = tl.sum(tl.where(blocks < i, sums, 0.0), 0)
            e = tl.exp(_block(logits, i, vocab, a, b, inverse_c, inverse_tau, CAPPED, BLOCK) - top)
            place = tl.sum((before + tl.cumsum(e, 0) <= mass).to(tl.int32), 0)
            word = tl.minimum(i * BLOCK + tl.minimum(place, BLOCK - 1), vocab - 1)  # rounding may pass a block's end
            tl.store(words + t * k + j, word.to(tl.int64))
