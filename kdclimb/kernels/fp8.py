"""8-bit floats (e4m3) with a scale a row: the products of a teacher that only runs forward, and its cached states.

A row's largest value becomes the largest e4m3 number, so that an outlier coarsens its own row alone. Rows are tokens
on one side of a product and output dimensions on the other, so both scales leave it as factors. Micikevicius et al.,
arXiv 2209.05433, on the format.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

E4M3_MAX = 448.0  # largest e4m3 number
SMALLEST = 1e-12  # a row of zeros counts as if this were its largest value


class Rows8(NamedTuple):
    """values (n, d) e4m3 times scale (n, 1) fp32."""

    values: Tensor
    scale: Tensor

    def to(self, dtype: torch.dtype) -> Tensor:
        return (self.values.float() * self.scale).to(dtype)


def by_rows(x: Tensor) -> Rows8:
    """(n, d) of any float dtype, each row divided by its scale. Nothing waits for the device."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp_min(SMALLEST) / E4M3_MAX
    return Rows8((x.float() / scale).to(torch.float8_e4m3fn), scale)


def product(x: Tensor, weight: Rows8) -> Tensor:
    """x weight^T: x (T, d) rounded by rows, weight (n, d) with d and n multiples of 16; (T, n) bf16, summed in fp32."""
    rows = by_rows(x)
    return torch._scaled_mm(
        rows.values, weight.values.T, rows.scale, weight.scale.T, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def why_not(device: torch.device | str, dim: int) -> str | None:
    """What keeps a model `dim` wide from its products in 8 bits on `device`, or None."""
    if torch.device(device).type != "cuda":
        return "it needs an NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return "it needs compute capability 9.0 or more"
    return f"the teacher's width, {dim}, is not a multiple of 16" if dim % 16 else None
