"""Adding rows of gradients to those of a table: an embedding's backward pass without a copy in fp32, where it can."""

from __future__ import annotations

import torch
from torch import Tensor

from kdclimb.kernels.fused import triton

if triton is not None:
    import triton.language as tl


def add_rows(table: Tensor, rows: Tensor, grad: Tensor) -> None:
    """table[rows[t]] += grad[t], in place: table (V, d), rows (T,) int64, grad (T, d) of any float dtype.

    On a GPU rows that meet are added in no fixed order, but for torch.use_deterministic_algorithms, under which torch's
    index_add_ sorts them.
    """
    fixed = torch.are_deterministic_algorithms_enabled()
    if triton is not None and not fixed and grad.is_cuda and table.dtype == torch.float32 and table.is_contiguous():
        _launch(table, rows, grad)
    else:
        table.index_add_(0, rows, grad.to(table.dtype))


def _launch(table: Tensor, rows: Tensor, grad: Tensor) -> None:
    width = table.shape[1]
    block = triton.next_power_of_2(width)
    _add_rows[(len(rows),)](table, rows.contiguous(), grad.contiguous(), WIDTH=width, BLOCK=block, num_warps=2)


if triton is not None:

    @triton.jit
    def _add_rows(table, rows, grad, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
        t = tl.program_id(0).to(tl.int64)
        place = tl.arange(0, BLOCK)
        inside = place < WIDTH
        value = tl.load(grad + t * WIDTH + place, mask=inside, other=0.0)
        tl.atomic_add(table + tl.load(rows + t) * WIDTH + place, value.to(tl.float32), mask=inside, sem="relaxed")
