"""The ReLU^2 MLP with its activation inside the matrix products, in Triton, for NVIDIA GPUs with TMA and bf16.

Plain PyTorch writes what comes before the activation, reads it for the activation, and reads it again going back. Here
the first product's epilogue squares, only the squares a = relu(z)^2 are kept, and going back the epilogue of the
product that makes da multiplies it with da/dz = 2 * sqrt(a). The other four products are cuBLAS's; those that make the
weights' gradients give them in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdclimb.kernels.fused import INTERPRETED, triton

if triton is not None:
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

ROWS, COLUMNS, DEPTH = 128, 256, 64  # of a tile, and what of the inner dimension it takes at a time
HALF = COLUMNS // 2  # the epilogue works on one half after the other, which leaves room for the operands of the next
GROUP = 16  # tiles of rows whose columns are done together, so that both operands stay in the L2 cache


def relu2_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """relu(x up^T)^2 down^T: x (T, d), up (4d, d) and down (d, 4d) of any float dtype, the result in x's.

    Runs in Triton where that can (bf16 on a GPU of compute capability 9.0 or more, widths in 8s), else in PyTorch.
    """
    if _fits(x, up):
        return _mlp(x, up, down)[0]
    return F.linear(F.relu(F.linear(x, up.to(x.dtype))).square(), down.to(x.dtype))


def _fits(x: Tensor, up: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16 and not any(width % 8 for width in up.shape) and has_tma()


def has_tma() -> bool:
    """Whether the GPU copies tiles by itself. torch.compile would stop here: `compile_layer` has it asked once."""
    return triton is not None and torch.cuda.get_device_capability() >= (9, 0)


@torch.library.custom_op("kdclimb::relu2_mlp", mutates_args=())
def _mlp(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    activation = _product(x, up.to(x.dtype), None)
    return activation @ down.to(x.dtype).T, activation


@_mlp.register_fake
def _(x, up, down):
    return x.new_empty(x.shape), x.new_empty(len(x), len(up))


@torch.library.custom_op("kdclimb::relu2_mlp_backward", mutates_args=())
def _mlp_backward(
    grad: Tensor, x: Tensor, up: Tensor, down: Tensor, activation: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad, x = grad.contiguous(), x.contiguous()
    before = _product(grad, down.T.to(grad.dtype, memory_format=torch.contiguous_format), activation)
    return before @ up.to(x.dtype), _weight_grad(before, x, up.dtype), _weight_grad(grad, activation, down.dtype)


@_mlp_backward.register_fake
def _(grad, x, up, down, activation):
    return x.new_empty(x.shape), up.new_empty(up.shape), down.new_empty(down.shape)


def _weight_grad(grad: Tensor, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    if grad.is_cuda and dtype == torch.float32:
        return torch.mm(grad.T, inputs, out_dtype=dtype)
    return (grad.T @ inputs).to(dtype)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    return _mlp_backward(grad, *ctx.saved_tensors)


_mlp.register_autograd(_backward, setup_context=_save)


def _product(a: Tensor, b: Tensor, activation: Tensor | None) -> Tensor:
    """(T, d) by (n, d): relu(a b^T)^2, or with `activation` (T, n): a b^T * 2 sqrt(activation)."""
    (rows, width), columns = a.shape, len(b)
    out = a.new_empty(rows, columns)
    half = [ROWS, HALF]
    programs = 4 if INTERPRETED else torch.cuda.get_device_properties(a.device).multi_processor_count
    _relu2_product[(min(programs, triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS)),)](
        TensorDescriptor(a, [rows, width], [width, 1], [ROWS, DEPTH]),
        TensorDescriptor(b, [columns, width], [width, 1], [COLUMNS, DEPTH]),
        TensorDescriptor(out, [rows, columns], [columns, 1], half),
        TensorDescriptor(out if activation is None else activation, [rows, columns], [columns, 1], half),
        rows,
        columns,
        WIDTH=width,
        DEPTH=DEPTH,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        GROUP=GROUP,
        BACKWARD=activation is not None,
        FAST=not INTERPRETED,
        num_warps=8,
        num_stages=3,
    )
    return out


if triton is not None:

    @triton.jit
    def _relu2_product(
        a, b, out, activation, rows, columns,
        WIDTH: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
        BACKWARD: tl.constexpr, FAST: tl.constexpr,
    ):  # fmt: skip
        HALF: tl.constexpr = COLUMNS // 2
        row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
        # as many programs as SMs, each with many tiles: the next one's operands come in under a tile's epilogue
        for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True):
            group, inside = tile // (GROUP * column_tiles), tile % (GROUP * column_tiles)
            in_group = tl.minimum(GROUP, row_tiles - group * GROUP)
            row = (group * GROUP + inside % in_group) * ROWS
            column = inside // in_group * COLUMNS
            z = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            for k in range(0, WIDTH, DEPTH):
                left, right = a.load([row, k]), b.load([column, k])
                if not FAST:  # the interpreter multiplies bf16 as if its bits were integers
                    left, right = left.to(tl.float32), right.to(tl.float32)
                z = tl.dot(left, right.T, z)
            first, second = tl.split(tl.permute(tl.reshape(z, (ROWS, 2, HALF)), (0, 2, 1)))
            _finish(first, out, activation, row, column, BACKWARD)
            _finish(second, out, activation, row, column + HALF, BACKWARD)

    @triton.jit
    def _finish(z, out, activation, row, column, BACKWARD: tl.constexpr):
        if BACKWARD:
            z = z * 2.0 * tl.sqrt(activation.load([row, column]).to(tl.float32))
        else:
            z = tl.maximum(z, 0.0)
            z = z * z
        out.store([row, column], z.to(tl.bfloat16))
