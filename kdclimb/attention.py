"""Causal attention over packed documents, with sliding windows, behind one function.

Every backend takes q, k, v of shape (T, H, D) for T packed tokens and the documents' boundaries; no token sees another
document, nor one that lies more than the window before it. "reference" runs on any device: torch's SDPA on one document
after the other. The others are flash attention on a GPU (docs/ATTENTION.md): the packages flash-attn 4, 3 and
2, where they are installed, and "torch_varlen", which is in torch itself.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kdclimb.config import AttentionConfig, require

MODULES = {  # of flash-attn: what to import, and the compute capabilities that it is for
    "flash_attn_4": ("flash_attn.cute.interface", (9, 10, 11, 12)),
    "flash_attn_3": ("flash_attn_interface", (9,)),
    "flash_attn_2": ("flash_attn.flash_attn_interface", (8, 9, 10, 11, 12)),
}
BROKEN = "it is installed but can't be imported"


@dataclass(frozen=True)
class Documents:
    """Where the documents of a packed stream lie. Shared by all layers, so it is worked out once a batch."""

    cu_seqlens: Tensor  # (N + 1,) int32: start of each document, then T; on a GPU padded with T
    max_len: int  # no document is longer
    total: int  # T

    @classmethod
    def of(
        cls, starts: list[int], total: int, device: torch.device | str, longest: int | None = None, room: int = 0
    ) -> Documents:
        """Of documents that start at these tokens of `total`. `longest`: what no document of the data exceeds; `room`:
        how many may well be in a batch of this size, so that compiled code meets one shape.
        """
        if torch.device(device).type == "cuda":
            return cls.padded(starts, total, device, longest or total, room)
        bounds = [*starts, total]
        max_len = max(b - a for a, b in pairwise(bounds))
        return cls(torch.tensor(bounds, dtype=torch.int32, device=device), max_len, total)

    @classmethod
    def padded(
        cls, starts: list[int], total: int, device: torch.device | str, longest: int, room: int = 0
    ) -> Documents:
        """The same with a power of 2 of documents, some empty, and `max_len` as given: few shapes for compiled code.

        Empty documents cost next to nothing.
        """
        slots = 1 << max(7, max(len(starts), room).bit_length())
        bounds = [*starts, total] + [total] * (slots - len(starts))
        return cls(to_device(torch.tensor(bounds, dtype=torch.int32), device), longest, total)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each document, without the empty ones; to read them waits for the device."""
        return [length for length in self.cu_seqlens.diff().tolist() if length]

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


def choose_backend(config: AttentionConfig, device: str, deterministic: bool = False) -> str:
    """The backend that `config` asks for; for "auto" the fastest that this machine has for `device`.

    `deterministic`: one that also goes back in a fixed order, under torch.use_deterministic_algorithms.

    ConfigError: it can't run here, or `require_flash_attn` is set and none of flash-attn's can, or one is installed but
    broken, which "auto" does not pass over in silence.
    """
    reasons = {name: why_not(name, device, deterministic) for name in (*MODULES, "torch_varlen", "reference")}
    here = [name for name, reason in reasons.items() if reason is None]
    if config.backend != "auto":
        reason = reasons[config.backend]
        require(reason is None, "attention.backend", config.backend, f"{', '.join(here)}; this one: {reason}")
        return config.backend
    for name, reason in reasons.items():
        if reason is None:
            break
        require(not reason.startswith(BROKEN), "attention.backend", "auto", f"{', '.join(here)}; {name}: {reason}")
    missing = "; ".join(f"{name}: {reasons[name]}" for name in MODULES)
    found = here[0] in MODULES or not config.require_flash_attn
    require(found, "attention.require_flash_attn", True, f"false. {missing} (docs/ATTENTION.md)")
    return here[0]


def why_not(backend: str, device: str, deterministic: bool = False) -> str | None:
    """What keeps a backend from running on `device` here, going back in a fixed order if `deterministic`, or None."""
    if backend == "reference":
        return None
    if device != "cuda":
        return "it needs an NVIDIA GPU"
    if backend == "torch_varlen":
        return None
    module, capabilities = MODULES[backend]
    major = torch.cuda.get_device_capability()[0]
    if major not in capabilities:
        return f"it is not for GPUs of compute capability {major}.x"
    if deterministic and (backend, major) == ("flash_attn_4", 12):  # it asserts so itself
        return "it has no fixed order going back on compute capability 12.x, which train.deterministic asks for"
    try:
        importlib.import_module(module)
        _flash(backend)
    except Exception as error:  # whatever a package raises that does not fit the rest of this machine
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            return "it is not installed"
        return f"{BROKEN} ({type(error).__name__}: {error})"
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, span: Span, backend: str) -> Tensor:
    """softmax(scale * q k^T) v within each document and window, causal; (T, H, D) in and out.

    ValueError: no such backend.
    """
    if backend == "reference":
        return _by_document(q, k, v, documents, span.window.item(), span.scale.item())
    if backend not in (*MODULES, "torch_varlen"):
        raise ValueError(f"attention backend: {backend!r} is not allowed")
    return _varlen(q, k, v, documents.cu_seqlens, documents.max_len, span.window, span.scale, backend)[0]


def _by_document(q, k, v, documents, window, scale):
    """One document after the other: on a CPU less than what a batch of documents padded to the longest costs."""
    heads = (x.transpose(0, 1)[None].split(documents.lengths, dim=2) for x in (q, k, v))
    out = []
    for parts in zip(*heads, strict=True):
        options, place = {"is_causal": True}, torch.arange(parts[0].shape[2], device=q.device)
        if 0 <= window < len(place) - 1:
            distance = place[:, None] - place
            options = {"attn_mask": (distance >= 0) & (distance <= window)}
        out.append(F.scaled_dot_product_attention(*parts, scale=scale, **options)[0].transpose(0, 1))
    return torch.cat(out)


# ---- flash attention, as one operator whose window and scale are no part of the graph -----------------------------


@torch.library.custom_op("kdclimb::varlen_attention", mutates_args=())
def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_len: int, window: Tensor, scale: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    forward, _ = _flash(backend)
    return forward(q, k, v, cu_seqlens, max_len, window.item(), scale.item())


@_varlen.register_fake
def _(q, k, v, cu_seqlens, max_len, window, scale, backend):
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("kdclimb::varlen_attention_backward", mutates_args=())
def _varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_norm: Tensor, cu_seqlens: Tensor, max_len: int,
    window: Tensor, scale: Tensor, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _, backward = _flash(backend)
    return backward(grad.contiguous(), q, k, v, out, log_norm, cu_seqlens, max_len, window.item(), scale.item())


@_varlen_backward.register_fake
def _(grad, q, k, v, out, log_norm, cu_seqlens, max_len, window, scale, backend):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output):
    q, k, v, cu_seqlens, ctx.max_len, window, scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, window, scale)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    q, k, v, out, log_norm, cu_seqlens, window, scale = ctx.saved_tensors
    grads = _varlen_backward(grad, q, k, v, out, log_norm, cu_seqlens, ctx.max_len, window, scale, ctx.backend)
    return (*grads, None, None, None, None, None)


_varlen.register_autograd(_backward, setup_context=_save)


# ---- the packages: (forward, backward) of each, on plain numbers; forward also gives the (H, T) log-normalisers ------


@cache
def _flash(backend: str):
    if backend == "torch_varlen":
        return _aten_forward, _aten_backward
    if backend == "flash_attn_3":  # torch itself knows how to put it in the place of its own kernels
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl("FA3")
        return _aten_forward, _aten_backward
    module = importlib.import_module(MODULES[backend][0])
    if backend == "flash_attn_2":
        return _flash_attn_2(module._flash_attn_varlen_forward, module._flash_attn_varlen_backward)
    return _flash_attn_4(module._flash_attn_fwd, module._flash_attn_bwd)


def _aten_forward(q, k, v, cu_seqlens, max_len, window, scale):
    out, log_norm, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, max_len, max_len, 0.0, window < 0, False,
        scale=scale, window_size_left=window, window_size_right=0,
    )  # fmt: skip
    return out, log_norm


def _aten_backward(grad, q, k, v, out, log_norm, cu_seqlens, max_len, window, scale):
    unused = torch.empty(0, device=q.device)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, log_norm, cu_seqlens, cu_seqlens, max_len, max_len, 0.0, window < 0, no_dropout, unused,
        scale=scale, window_size_left=window, window_size_right=0,
    )  # fmt: skip


def _flash_attn_4(run_forward, run_backward):
    warnings.filterwarnings("ignore", module=r"cutlass\.")  # its compiler's, on code that is not ours

    def options(cu_seqlens, max_len, window, scale):
        return {
            "softmax_scale": scale,
            "causal": True,
            "window_size_left": None if window < 0 else window,
            "window_size_right": None if window < 0 else 0,
            "cu_seqlens_q": cu_seqlens,
            "cu_seqlens_k": cu_seqlens,
            "max_seqlen_q": max_len,
            "max_seqlen_k": max_len,
        }

    def forward(q, k, v, *how):
        out, log_norm, *_ = run_forward(q, k, v, return_lse=True, **options(*how))
        return out, log_norm

    def backward(grad, q, k, v, out, log_norm, *how):
        fixed = torch.are_deterministic_algorithms_enabled()
        return run_backward(q, k, v, out, grad, log_norm, deterministic=fixed, **options(*how))

    return forward, backward


def _flash_attn_2(run_forward, run_backward):
    def options(cu_seqlens, max_len, window, scale):
        return {
            "softmax_scale": scale,
            "causal": True,
            "window_size_left": window,
            "window_size_right": 0 if window >= 0 else -1,
            "cu_seqlens_q": cu_seqlens,
            "cu_seqlens_k": cu_seqlens,
            "max_seqlen_q": max_len,
            "max_seqlen_k": max_len,
            "dropout_p": 0.0,
            "softcap": 0.0,
            "alibi_slopes": None,
        }

    def forward(q, k, v, *how):
        out, log_norm, *_ = run_forward(q, k, v, **options(*how))
        return out, log_norm

    def backward(grad, q, k, v, out, log_norm, *how):
        grads = [torch.empty_like(t) for t in (q, k, v)]
        fixed = torch.are_deterministic_algorithms_enabled()
        run_backward(grad, q, k, v, out, log_norm, *grads, deterministic=fixed, **options(*how))
        return tuple(grads)

    return forward, backward
