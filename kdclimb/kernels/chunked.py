"""The loss chunk by chunk, with the gradients made in the forward pass, as one operator of torch.

No (T, V) tensor is held: a chunk's logits are turned into their own gradient in place, multiplied into dh and dW, and
dropped. With z the capped logits, p = softmax(z), p_T = softmax(z/T), q the teacher's softmax at T, y the one-hot label
and N the tokens that count, a token's gradient on the raw logits is
    cap'(z) * [hard_weight * (p - y) + soft_weight * norm * T * (p_T - q)] / N
Here are the loop over the chunks, the matrix products behind the logits, the normalisation, and the operator; what
happens inside a chunk is in `torch_chunk.py` and `fused.py`. As an operator it is opaque to torch.compile, so it breaks
no graph, and it never waits for the device.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from kdclimb.kernels import fused, torch_chunk
from kdclimb.kernels.targets import DenseTeacher, Entries, Labels, Problem, Softcap

# Memory for both sides' logits of one chunk. On a CPU what its caches hold; on a GPU where the matrix products reach
# the speed of large ones (docs/KERNELS.md has the measurement).
LOGITS_MIB = {"cpu": 4, "cuda": 1600}


def chunk_tokens(tokens: int, vocab: int, bytes_per_logit: int, logits_mib: int) -> int:
    """Rows a chunk: as many as both sides' logits fit `logits_mib`, then evened out over the chunks, in 128s."""
    most = max(64, logits_mib * 2**20 // (2 * bytes_per_logit * vocab))
    if tokens <= most:
        return max(tokens, 1)
    if most < 128:
        return most
    chunks = -(-tokens // most)
    return min(-(-tokens // (chunks * 128)) * 128, most // 128 * 128)


def norm_ratio(hard: Tensor, soft: Tensor, floor: float, largest: float) -> Tensor:
    return (hard / soft.clamp_min(floor)).clamp_max(largest)


def evaluate(
    hidden: Tensor,
    head: Tensor,
    target: DenseTeacher | Entries | None,
    labels: Labels,
    *,
    weights: tuple[float, float],
    factor: Tensor,
    norm: tuple[str, float, float],
    temperature: float,
    softcap: Softcap | None,
    needs_mask: bool,
    measure_share: bool,
    implementation: str,
    head_dtype: str,
    logits_mib: int | None,
) -> tuple[Tensor, ...]:
    """(total, hard, soft, factor, kd_share); the gradients of total are right for any grad_output."""
    dense = (target.hidden, target.head) if isinstance(target, DenseTeacher) else (None, None)
    sparse = (None,) * 4
    if isinstance(target, Entries):
        sparse = (target.ids, target.probs, target.rest, target.constant)
    total, *others, _, _ = _operator(
        hidden,
        head,
        *dense,
        *sparse,
        labels.ids,
        labels.weights,
        labels.keep,
        labels.hard_count,
        labels.soft_count,
        factor,
        *weights,
        *norm,
        temperature,
        _flat(softcap),
        _flat(target.softcap if isinstance(target, DenseTeacher) else None),
        needs_mask,
        torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad),
        measure_share,
        implementation,
        head_dtype,
        LOGITS_MIB[hidden.device.type] if logits_mib is None else logits_mib,
    )
    return total, *(other.detach() for other in others)


def _flat(softcap: Softcap | None) -> list[float]:
    return [] if softcap is None else [softcap.a, softcap.b, softcap.c]


def _loss(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Optional[Tensor],  # noqa: UP045 (torch reads these annotations)
    teacher_head: Optional[Tensor],  # noqa: UP045
    ids: Optional[Tensor],  # noqa: UP045
    probs: Optional[Tensor],  # noqa: UP045
    rest: Optional[Tensor],  # noqa: UP045
    constant: Optional[Tensor],  # noqa: UP045
    label_ids: Tensor,
    label_weights: Tensor,
    keep: Tensor,
    hard_count: Tensor,
    soft_count: Tensor,
    factor: Tensor,
    hard_weight: float,
    soft_weight: float,
    norm: str,
    norm_floor: float,
    norm_largest: float,
    temperature: float,
    softcap: list[float],
    teacher_softcap: list[float],
    needs_mask: bool,
    need_grad: bool,
    measure_share: bool,
    implementation: str,
    head_dtype: str,
    logits_mib: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    weight = head.to(hidden.dtype)
    problem = Problem(
        hidden,
        weight,
        teacher_hidden,
        None if teacher_head is None else teacher_head.to(hidden.dtype),
        None if ids is None else Entries(ids, probs, rest, constant),
        Labels(label_ids, label_weights, keep, hard_count, soft_count),
        temperature,
        Softcap(*softcap) if softcap else None,
        Softcap(*teacher_softcap) if teacher_softcap else None,
        needs_mask,
    )
    bytes_per_logit = 2 if implementation == "triton" else wide.itemsize
    size = chunk_tokens(len(hidden), len(head), bytes_per_logit, logits_mib)
    exact = norm == "exact" and need_grad  # its factor is known after the last chunk, so the two sums stay apart
    if implementation == "triton":
        chunks = fused.TritonChunks(problem, size, head_dtype, two_gradients=exact or measure_share)
    else:
        chunks = torch_chunk.TorchChunks(problem, wide)
    sums = GradientSums(hidden, weight, wide, 2 if exact else 1) if need_grad else None
    hard, soft = (torch.zeros(len(hidden), dtype=wide, device=hidden.device) for _ in range(2))
    hard_count, soft_count = hard_count.to(wide), soft_count.to(wide)
    hard_scale, soft_scale = hard_weight / hard_count, soft_weight / soft_count
    scaled_soft = torch.zeros_like(hard_scale)
    norms = [scaled_soft, scaled_soft]
    for start in range(0, len(hidden), size):
        rows = slice(start, min(start + size, len(hidden)))
        chunks.load(rows)
        if norm == "chunk" or not need_grad:
            chunks.losses(hard[rows], soft[rows])
        if norm == "chunk":
            factor = norm_ratio(*_chunk_means(hard[rows], soft[rows], problem.labels, rows), norm_floor, norm_largest)
            scaled_soft = scaled_soft + factor * soft[rows].sum()
        if need_grad:
            first = measure_share and start == 0
            scale = soft_scale if exact else soft_scale * factor
            parts = chunks.gradients(hard[rows], soft[rows], hard_scale, scale, apart=exact or first)
            products = sums.add(rows, parts)
            norms = [product.to(wide).norm() for product in products] if first else norms
    hard, soft = hard.sum() / hard_count, soft.sum() / soft_count
    if norm == "exact":
        factor = norm_ratio(hard, soft, norm_floor, norm_largest)
    elif norm == "chunk":
        factor = torch.where(soft > 0, scaled_soft / soft_count / soft, 1.0)
    factor = factor.to(wide, copy=True)
    soft_norm = norms[1] * factor if exact else norms[1]
    share = soft_norm / (norms[0] + soft_norm)  # nan, 0 / 0, where it was not asked for
    total = hard_weight * hard + soft_weight * factor * soft
    if not need_grad:
        return total, hard, soft, factor, share, hidden.new_empty(0), hidden.new_empty(0)
    return total, hard, soft, factor, share, *sums.combined(factor)


def _chunk_means(hard: Tensor, soft: Tensor, labels: Labels, rows: slice) -> tuple[Tensor, Tensor]:
    hard_count = (labels.weights[rows] != 0).any(dim=1).sum().clamp_min(1)
    return hard.sum() / hard_count, soft.sum() / labels.keep[rows].sum().clamp_min(1)


class GradientSums:
    """dh (T, d) in the hidden states' dtype and dW (V, d) in `wide`; two of each where hard and soft stay apart."""

    def __init__(self, hidden: Tensor, weight: Tensor, wide: torch.dtype, parts: int):
        self.hidden, self.weight = hidden, weight
        self.dh = [torch.empty_like(hidden) for _ in range(parts)]
        self.dw = [torch.empty(weight.shape, dtype=wide, device=weight.device) for _ in range(parts)]
        self.begun = [False] * parts

    def add(self, rows: slice, parts: list[Tensor]) -> list[Tensor]:
        """Add a chunk's gradients on the logits, [both] or [hard, soft]; the dh of each."""
        products = []
        for i, grad in enumerate(parts):
            in_place = len(parts) == len(self.dh)
            dh = self.dh[i][rows] if in_place else torch.empty_like(self.dh[0][rows])
            products.append(torch.mm(grad, self.weight, out=dh))
            of = min(i, len(self.dw) - 1)
            _add_product(self.dw[of], grad.T, self.hidden[rows], fresh=not self.begun[of])
            self.begun[of] = True
        if not in_place:
            torch.add(*products, out=self.dh[0][rows])
        return products

    def combined(self, factor: Tensor) -> tuple[Tensor, Tensor]:
        if len(self.dh) > 1:
            self.dh[0].add_((self.dh[1] * factor).to(self.dh[0].dtype))
            self.dw[0].addcmul_(self.dw[1], factor)
        return self.dh[0], self.dw[0]


def _add_product(total: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    """total += a @ b, or = if `fresh`, added up in total's dtype."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0 if fresh else 1, out=total)
    elif a.is_cuda and fresh:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif fresh:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)


_operator = torch.library.custom_op("kdclimb::distill_loss", _loss, mutates_args=())
# Once more, as it is: what custom_op makes of it imports torch's compiler, a second and a half.
torch.library.impl("kdclimb::distill_loss", "cpu", _loss)


@_operator.register_fake
def _(hidden, head, *arguments):
    need_grad = arguments[-5]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    scalars = [hidden.new_empty((), dtype=wide) for _ in range(5)]
    if not need_grad:
        return *scalars, hidden.new_empty(0), hidden.new_empty(0)
    return *scalars, torch.empty_like(hidden), torch.empty_like(head, dtype=wide)


def _save(ctx, inputs, output):
    ctx.save_for_backward(output[5], output[6])
    ctx.head_dtype, ctx.num_inputs = inputs[1].dtype, len(inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_total, *_):
    grad_hidden, grad_head = ctx.saved_tensors
    scaled = torch.empty_like(grad_head, dtype=ctx.head_dtype)
    torch.mul(grad_head, grad_total, out=scaled)
    return (grad_hidden * grad_total, scaled, *(None,) * (ctx.num_inputs - 2))


_operator.register_autograd(_backward, setup_context=_save)
