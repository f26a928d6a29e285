"""distill_loss: the one public entry to the hard + soft loss, and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdclimb.kernels import chunked, fused, reference
from kdclimb.kernels.targets import TAILS, DenseTeacher, Softcap, SparseTeacher, entries, label_table

IMPLEMENTATIONS = ("auto", "torch", "triton", "reference")
NORM_MODES = ("lagged", "chunk", "exact")


@dataclass(frozen=True)
class DistillLoss:
    """0-d tensors, and the name of the implementation that ran. Only `total` carries gradient."""

    total: Tensor  # hard_weight * hard + soft_weight * norm_factor * soft
    hard: Tensor  # mean CE, nats a token
    soft: Tensor  # mean T^2 KL(teacher || student), nats a token
    norm_factor: Tensor  # the factor that this call used; 1 without a norm
    kd_share: Tensor  # ||soft|| / (||soft|| + ||hard||) of the gradients on the hidden states; nan if not asked for
    implementation: str


class DynamicNorm:
    """Scales the soft loss to the size of the hard one: factor = hard / max(soft, floor), at most `largest`.

    Both losses are detached. `floor` (nats) and `largest` bound the factor as the student approaches the teacher: there
    the soft loss falls below the hard one instead of being scaled up without end. Modes:
    - "lagged": the ratio of the call before, kept on the device; 1 in the first call. Costs nothing.
    - "chunk": each chunk of tokens by its own ratio, known before its gradients are made; one more pass over the
      chunk's logits. `norm_factor` is then the mean, weighted by the soft loss.
    - "exact": this call's own ratio. Hard and soft gradients are accumulated apart, which takes the two backward
      matrix products twice.
    Source of the idea: the balancing of detached losses in NVIDIA ModelOpt.
    """

    def __init__(self, floor: float, largest: float, mode: str = "lagged"):
        if mode not in NORM_MODES:
            raise ValueError(f"norm mode: {mode!r} is not allowed; allowed: {', '.join(NORM_MODES)}")
        self.floor, self.largest, self.mode = floor, largest, mode
        self.factor: Tensor | None = None

    def of(self, hard: Tensor, soft: Tensor) -> Tensor:
        return chunked.norm_ratio(hard, soft, self.floor, self.largest)


def distill_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    target: DenseTeacher | SparseTeacher | None,
    labels: Tensor,
    *,
    hard_weight: float = 1.0,
    soft_weight: float = 0.0,
    temperature: float = 1.0,
    student_softcap: Softcap | None = None,
    mtp_weights: Tensor | Sequence[float] | None = None,
    soft_mask: Tensor | None = None,
    token_stride: int = 1,
    ignore_index: int = -100,
    norm: DynamicNorm | None = None,
    measure_share: bool = False,
    implementation: str = "auto",
    head_dtype: str = "same",
    logits_mib: int | None = None,
) -> DistillLoss:
    """hard_weight * CE + soft_weight * norm * T^2 * KL(teacher || student), from hidden states.

    student_hidden (T, d), student_head (V, d), labels (T,) int64. Both losses are means over the tokens whose label is
    not `ignore_index`, so an all-ignored batch gives 0 with zero gradient. CE and KL see the same softcapped logits;
    `temperature` divides both sides' logits (Hinton et al., arXiv 1503.02531). The gradients are made in the
    forward pass, chunk by chunk, and no (T, V) tensor is held. The head's gradient is summed in fp32.

    mtp_weights (K,): the hard loss becomes the sum over k of mtp_weights[k] * CE against labels[t + k] (multi-token
    prediction on the same logits; nothing beyond the end). soft_mask (T,) bool and token_stride (every so many tokens):
    the tokens that have a soft loss; its mean is over these, and a dense teacher's head runs for no other.
    `measure_share` fills `kd_share` from the first chunk, at two more matrix products on it.
    `implementation`: "triton" (an NVIDIA GPU of compute capability 9.0 or more, bf16), "torch" (any device, any float
    dtype), "reference" (plain autograd over whole logits), or "auto": triton where it can run, else torch.
    `head_dtype="fp8"`: student's and teacher's logits from e4m3 operands (triton only).
    `logits_mib`: memory for both sides' logits of a chunk; None is `chunked.LOGITS_MIB`.

    Raises ValueError for shapes or dtypes that don't match, for an implementation that can't run here, and for a soft
    weight without a target.
    """
    _check(student_hidden, student_head, target, labels, soft_weight, temperature, soft_mask, token_stride)
    if token_stride > 1:
        on_stride = torch.arange(len(labels), device=labels.device) % token_stride == 0
        soft_mask = on_stride if soft_mask is None else soft_mask & on_stride
    if mtp_weights is not None:
        mtp_weights = torch.as_tensor(mtp_weights, dtype=torch.float32, device=labels.device)
    table = label_table(labels, mtp_weights, soft_mask, ignore_index)
    if isinstance(target, SparseTeacher):
        target = entries(target, table)
    inputs = (student_hidden, student_head, target, table)
    chosen = _choose(implementation, student_hidden, student_head, target, student_softcap, temperature, head_dtype)
    mode = "none" if norm is None or target is None else norm.mode
    wide = torch.promote_types(student_hidden.dtype, torch.float32)
    factor = torch.ones((), dtype=wide, device=student_hidden.device)
    if mode == "lagged" and norm.factor is not None:
        factor = norm.factor
    if chosen == "reference":
        total, hard, soft, factor = _reference(
            inputs, hard_weight, soft_weight, temperature, student_softcap, norm, mode, factor
        )
        share = torch.full_like(hard, torch.nan)
    else:
        total, hard, soft, factor, share = chunked.evaluate(
            *inputs,
            weights=(hard_weight, soft_weight),
            factor=factor,
            norm=("none", 0.0, 0.0) if norm is None else (mode, norm.floor, norm.largest),
            temperature=temperature,
            softcap=student_softcap,
            needs_mask=soft_mask is not None,
            measure_share=measure_share and target is not None,
            implementation=chosen,
            head_dtype=head_dtype,
            logits_mib=logits_mib,
        )
    if mode == "lagged":
        norm.factor = norm.of(hard, soft)
    return DistillLoss(total, hard, soft, factor, share, chosen)


def _reference(inputs, hard_weight, soft_weight, temperature, softcap, norm, mode, factor):
    if mode == "chunk":
        raise ValueError("norm mode: 'chunk' is not allowed with the reference, which has no chunks")
    hard, soft = reference.losses(*inputs, temperature, softcap)
    if mode == "exact":
        factor = norm.of(hard.detach(), soft.detach())
    return hard_weight * hard + soft_weight * factor * soft, hard.detach(), soft.detach(), factor


def _choose(implementation, hidden, head, target, softcap, temperature, head_dtype) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: {implementation!r} is not allowed; allowed: {', '.join(IMPLEMENTATIONS)}")
    if head_dtype not in ("same", "fp8"):
        raise ValueError(f"head_dtype: {head_dtype!r} is not allowed; allowed: same, fp8")
    reason = fused.why_not(hidden, head, target, softcap, temperature)
    if implementation == "auto":  # never the interpreter
        implementation = "triton" if reason is None and hidden.is_cuda else "torch"
    if implementation == "triton" and reason:
        raise ValueError(f"implementation: 'triton' can't run here: {reason}")
    if head_dtype == "fp8" and implementation != "triton":
        raise ValueError(f"head_dtype: 'fp8' needs the implementation 'triton', not {implementation!r}: {reason or ''}")
    return implementation


def _check(hidden, head, target, labels, soft_weight, temperature, soft_mask, token_stride) -> None:
    if hidden.dim() != 2 or head.dim() != 2:
        raise ValueError(
            f"student_hidden is {tuple(hidden.shape)}, student_head {tuple(head.shape)}; (T, d) and (V, d) are needed"
        )
    tokens, width = hidden.shape
    vocab = head.shape[0]
    if head.shape[1] != width:
        raise ValueError(f"student_head is {tuple(head.shape)}; (V, {width}) fits the hidden states")
    for name, tensor in {"student_hidden": hidden, "student_head": head}.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; a float dtype is needed")
    if labels.shape != (tokens,):
        raise ValueError(f"labels is {tuple(labels.shape)}; ({tokens},) fits the hidden states")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels is {labels.dtype}; torch.int64 is needed")
    if temperature <= 0:
        raise ValueError(f"temperature: {temperature!r} is not allowed; allowed: above 0")
    if token_stride < 1:
        raise ValueError(f"token_stride: {token_stride!r} is not allowed; allowed: 1 or more")
    if soft_mask is not None and (soft_mask.shape != (tokens,) or soft_mask.dtype != torch.bool):
        raise ValueError(f"soft_mask is {soft_mask.dtype} {tuple(soft_mask.shape)}; torch.bool ({tokens},) is needed")
    if target is None:
        if soft_weight:
            raise ValueError("a soft_weight needs a target")
    elif isinstance(target, SparseTeacher):
        _check_sparse(target, tokens)
    else:
        if target.hidden.shape[0] != tokens:
            raise ValueError(f"the teacher has {target.hidden.shape[0]} tokens, the student {tokens}")
        if target.head.shape != (vocab, target.hidden.shape[1]):
            raise ValueError(
                f"teacher head is {tuple(target.head.shape)}; ({vocab}, {target.hidden.shape[1]}) is needed"
            )


def _check_sparse(target: SparseTeacher, tokens: int) -> None:
    given = [values for values in (target.log_probs, target.counts) if values is not None]
    if len(given) != 1:
        raise ValueError("a SparseTeacher has either log_probs or counts")
    if target.ids.dim() != 2 or target.ids.shape[0] != tokens or given[0].shape != target.ids.shape:
        raise ValueError(
            f"the teacher's ids are {tuple(target.ids.shape)} and their values {tuple(given[0].shape)}; "
            f"({tokens}, k) is needed for both"
        )
    if target.entropy is not None and (target.counts is None or target.entropy.shape != (tokens,)):
        raise ValueError(f"the teacher's entropy is {tuple(target.entropy.shape)}; ({tokens},), with counts, is needed")
    if target.tail not in TAILS:
        raise ValueError(f"tail: {target.tail!r} is not allowed; allowed: {', '.join(TAILS)}")
