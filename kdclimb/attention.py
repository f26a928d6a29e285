"""Causal attention over packed documents, with sliding windows, behind one function.

Every backend takes q, k, v of shape (T, H, D) for T packed tokens and the documents' boundaries; no token sees another
document, nor one that lies more than the window before it. Backends: "reference" (any device, pads the documents into
a batch for torch's SDPA) and "torch_varlen" (CUDA, torch's own variable-length flash attention).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("reference", "torch_varlen")


@dataclass(frozen=True)
class Documents:
    """Where the documents of a packed stream lie. Shared by all layers, so it is worked out once a batch."""

    cu_seqlens: Tensor  # (N + 1,) int32: start of each document, then T; on a GPU padded with T
    max_len: int  # no document is longer
    total: int  # T

    @classmethod
    def of(cls, starts: list[int], total: int, device: torch.device | str, longest: int | None = None) -> Documents:
        """Of documents that start at these tokens of `total`. `longest`: what no document of the data exceeds."""
        if torch.device(device).type == "cuda":
            return cls.padded(starts, total, device, longest or total)
        bounds = [*starts, total]
        max_len = max(b - a for a, b in pairwise(bounds))
        return cls(torch.tensor(bounds, dtype=torch.int32, device=device), max_len, total)

    @classmethod
    def padded(cls, starts: list[int], total: int, device: torch.device | str, longest: int) -> Documents:
        """The same with a power of 2 of documents, some empty, and `max_len` as given: few shapes for compiled code.

        Empty documents cost a GPU's kernels next to nothing, and the reference as much as full ones.
        """
        bounds = [*starts, total] + [total] * ((1 << max(7, len(starts).bit_length())) - len(starts))
        return cls(to_device(torch.tensor(bounds, dtype=torch.int32), device), longest, total)

    @cached_property
    def slots(self) -> Tensor:
        """(T,) int64: each token's place in a padded (N, max_len) batch."""
        bounds = self.cu_seqlens.long()
        row = torch.repeat_interleave(torch.arange(len(bounds) - 1, device=bounds.device), bounds.diff())
        return row * self.max_len + torch.arange(self.total, device=bounds.device) - bounds[row]

    @cached_property
    def doubled(self) -> Documents:
        """The same documents with two entries a token, as paired heads see them."""
        return Documents(2 * self.cu_seqlens, 2 * self.max_len, 2 * self.total)


@dataclass(frozen=True)
class Span:
    """How far a layer looks, and its softmax scale, as 0-d CPU tensors: new values are no new graph, and reading them
    waits for nothing.
    """

    window: Tensor  # int64: tokens before a token that it sees; -1 for all
    scale: Tensor  # float64

    @classmethod
    def of(cls, window: int, scale: float) -> Span:
        return cls(torch.tensor(window, device="cpu"), torch.tensor(scale, dtype=torch.float64, device="cpu"))


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """`values`, from the host, on `device`, without waiting for what that has still to do."""
    if torch.device(device).type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def choose_backend(device: str) -> str:
    """The fastest backend that this machine has for `device`."""
    return "torch_varlen" if device == "cuda" else "reference"


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, span: Span, backend: str) -> Tensor:
    """softmax(scale * q k^T) v within each document and window, causal; (T, H, D) in and out.

    ValueError: no such backend.
    """
    if backend == "torch_varlen":
        return _varlen(q, k, v, documents.cu_seqlens, documents.max_len, span.window, span.scale)[0]
    if backend == "reference":
        return _padded(q, k, v, documents, span.window.item(), span.scale.item())
    raise ValueError(f"attention backend: {backend!r} is not allowed; allowed: {', '.join(BACKENDS)}")


def _padded(q, k, v, documents, window, scale):
    max_len, slots = documents.max_len, documents.slots
    num_docs = len(documents.cu_seqlens) - 1

    def pad(x):  # padding comes last in each document, so the causal mask hides it from every real token
        empty = x.new_zeros(num_docs * max_len, *x.shape[1:])
        return empty.index_copy(0, slots, x).view(num_docs, max_len, *x.shape[1:]).transpose(1, 2)

    options = {"is_causal": True}
    if 0 <= window < max_len - 1:
        place = torch.arange(max_len, device=q.device)
        distance = place[:, None] - place
        options = {"attn_mask": (distance >= 0) & (distance <= window)}
    out = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), scale=scale, **options)
    return out.transpose(1, 2).reshape(num_docs * max_len, *q.shape[1:]).index_select(0, slots)


# ---- torch's flash attention, as an operator whose window and scale are no part of the graph ----------------------


@torch.library.custom_op("kdclimb::varlen_attention", mutates_args=())
def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, window: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    out, log_norm, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, max_len, max_len, 0.0, window.item() < 0, False,
        scale=scale.item(), window_size_left=window.item(), window_size_right=0,
    )  # fmt: skip
    return out, log_norm


@_varlen.register_fake
def _(q, k, v, cu_seqlens, max_len, window, scale):
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("kdclimb::varlen_attention_backward", mutates_args=())
def _varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_norm: Tensor, cu_seqlens: Tensor, max_len: int,
    window: Tensor, scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    unused = torch.empty(0, device=q.device)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad.contiguous(), q, k, v, out, log_norm, cu_seqlens, cu_seqlens, max_len, max_len, 0.0, window.item() < 0,
        no_dropout, unused, scale=scale.item(), window_size_left=window.item(), window_size_right=0,
    )  # fmt: skip
    return dq, dk, dv


@_varlen_backward.register_fake
def _(grad, q, k, v, out, log_norm, cu_seqlens, max_len, window, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output):
    q, k, v, cu_seqlens, ctx.max_len, window, scale = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, window, scale)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    q, k, v, out, log_norm, cu_seqlens, window, scale = ctx.saved_tensors
    grads = _varlen_backward(grad, q, k, v, out, log_norm, cu_seqlens, ctx.max_len, window, scale)
    return (*grads, None, None, None, None)


_varlen.register_autograd(_backward, setup_context=_save)
