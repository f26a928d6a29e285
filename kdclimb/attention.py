"""Causal attention over packed documents, behind one function.

Every backend takes q, k, v of shape (T, H, D) for T packed tokens, and `cu_seqlens`, the documents'
boundaries; no token sees another document. Backends: "reference" (any device, pads the documents
into a batch for torch's SDPA) and "torch_varlen" (CUDA, torch's own variable-length flash attention).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Where the documents of a packed stream lie. Shared by all layers, so it is worked out once a batch."""

    cu_seqlens: Tensor  # (N + 1,) int32: start of each document, then T
    max_len: int
    slots: Tensor  # (T,) int64: each token's place in the padded (N, max_len) batch

    @classmethod
    def of(cls, starts: list[int], total: int, device: torch.device | str) -> Documents:
        bounds = torch.tensor([*starts, total], dtype=torch.int32)
        lengths = (bounds[1:] - bounds[:-1]).long()
        max_len = int(lengths.max())
        row = torch.repeat_interleave(torch.arange(len(starts)), lengths)
        slots = row * max_len + torch.arange(total) - bounds[:-1].long()[row]
        return cls(bounds.to(device), max_len, slots.to(device))


def choose_backend(device: str) -> str:
    """The fastest backend that this machine has for `device`."""
    return "torch_varlen" if device == "cuda" else "reference"


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, backend: str) -> Tensor:
    """softmax(scale * q k^T) v within each document, causal; (T, H, D) in and out. ValueError: no such backend."""
    if backend == "torch_varlen":
        from torch.nn.attention.varlen import varlen_attn

        bounds, longest = documents.cu_seqlens, documents.max_len
        return varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0))
    if backend == "reference":
        return _padded(q, k, v, documents, scale)
    raise ValueError(f"attention backend: {backend!r} is not allowed; allowed: reference, torch_varlen")


def _padded(q, k, v, documents, scale):
    num_docs, max_len, slots = len(documents.cu_seqlens) - 1, documents.max_len, documents.slots

    def pad(x):  # padding comes last in each document, so the causal mask hides it from every real token
        empty = x.new_zeros(num_docs * max_len, *x.shape[1:])
        return empty.index_copy(0, slots, x).view(num_docs, max_len, *x.shape[1:]).transpose(1, 2)

    out = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), is_causal=True, scale=scale)
    return out.transpose(1, 2).reshape(num_docs * max_len, *q.shape[1:]).index_select(0, slots)
