"""One chunk of the loss in Triton, for NVIDIA GPUs with TMA (compute capability 9.0 or more) and bf16.

Three kernels a chunk, before the matrix products of `chunked.py`; docs/KERNELS.md has reasons and measurements:
1. `_logits`: hidden @ head.T by tiles. The epilogue caps the logits in fp32, stores them as 16-bit fixed point and
   leaves each row's sum of exponentials over the tile.
2. `_normalise`: those sums to log2-normalisers, one a row.
3. `_gradient`: one program a row reads both sides' logits once, adds up the losses and writes the gradient in place
   of the student's logits.
Exponents are kept in units of log2, since the hardware has exp2. Under TRITON_INTERPRET=1 the same kernels run on a
CPU, in numpy.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from kdclimb.kernels.fp8 import E4M3_MAX
from kdclimb.kernels.targets import Entries, Problem, Softcap

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a CPU build of torch comes without triton; why_not says so to whoever asks for it
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TILE = 128  # rows and words of a tile of logits
GRADIENT_TILES, GRADIENT_WARPS = 16, 8  # words a pass of `_gradient`, in tiles
STEPS = 65535  # of the 16-bit fixed point in which logits are stored
LARGEST_RANGE = 80.0  # of capped logits over the temperature: exp(-80) is still a normal fp32 number
LOG2_E = math.log2(math.e)


def why_not(hidden: Tensor, head: Tensor, target, softcap: Softcap | None, temperature: float) -> str | None:
    """What keeps these inputs from running here, or None if they can."""
    teacher = getattr(target, "hidden", None)
    caps = [cap for cap in (softcap, getattr(target, "softcap", None)) if cap is not None]
    if triton is None:
        return "triton is not installed"
    if not hidden.is_cuda and not INTERPRETED:
        return f"the tensors are on {hidden.device.type}, and it needs an NVIDIA GPU"
    if hidden.is_cuda and torch.cuda.get_device_capability(hidden.device) < (9, 0):
        return "it needs compute capability 9.0 or more"
    if hidden.dtype != torch.bfloat16 or (teacher is not None and teacher.dtype != torch.bfloat16):
        return "hidden states are not bfloat16"
    if any(width % 8 for width in [head.shape[1]] + ([] if teacher is None else [teacher.shape[1]])):
        return "a width is not a multiple of 8"
    if any(cap.a / min(1.0, temperature) > LARGEST_RANGE for cap in caps):
        return f"a softcap's range over the temperature is above {LARGEST_RANGE:g}"
    if len(hidden) == 0:
        return "there are no tokens"
    return None


class TritonChunks:
    """load(rows), then losses() or gradients(), as in `torch_chunk.TorchChunks`.

    Holds two 16-bit buffers (size, V) for a dense teacher, else one. If hard and soft are asked for apart, the hard
    gradient takes the place of the teacher's logits, or a buffer of its own where a mask moves them or there are none.
    """

    def __init__(self, problem: Problem, size: int, head_dtype: str, two_gradients: bool):
        self.problem, self.head_dtype = problem, head_dtype
        self.vocab, device = len(problem.head), problem.hidden.device
        self.padded = triton.cdiv(self.vocab, TILE) * TILE
        self.dense = problem.teacher_hidden is not None
        buffers = 2 if self.dense else 1
        if two_gradients and problem.has_target and (problem.needs_mask or not self.dense):
            buffers += 1
        self.logits = [torch.empty(size, self.padded, dtype=torch.uint16, device=device) for _ in range(buffers)]
        self.student = _Side(problem.hidden, problem.head, problem.softcap, head_dtype)
        if self.dense:
            self.teacher = _Side(problem.teacher_hidden, problem.teacher_head, problem.teacher_softcap, head_dtype)

    def load(self, rows: slice) -> None:
        problem, tau = self.problem, self.problem.temperature
        self.rows, self.size = rows, rows.stop - rows.start
        tempered = problem.has_target and tau != 1
        self.student.load(rows, self.logits[0], None, tau, hard=True, tempered=tempered)
        self.slots = count = index = None
        if not self.dense:
            return
        if problem.needs_mask:
            # the kept tokens' teacher states move together, so that tiles behind the last one are not computed
            keep = problem.labels.keep[rows]
            self.slots = torch.where(keep, keep.cumsum(0) - 1, -1).int()
            count, index = keep.sum().int(), torch.argsort(~keep, stable=True)
        self.teacher.load(rows, self.logits[1], count, tau, hard=tau == 1, tempered=tau != 1, index=index)

    def losses(self, hard: Tensor, soft: Tensor) -> None:
        zero = torch.zeros((), device=hard.device)
        self._launch(hard, soft, zero, zero, write=0)

    def gradients(
        self, hard: Tensor, soft: Tensor, hard_scale: Tensor, soft_scale: Tensor, apart: bool
    ) -> list[Tensor]:
        apart = apart and self.problem.has_target
        self._launch(hard, soft, hard_scale, soft_scale, write=2 if apart else 1)
        views = [logits[: self.size].view(torch.bfloat16)[:, : self.vocab] for logits in self.logits]
        return [views[-1], views[0]] if apart else views[:1]

    def _launch(self, hard, soft, hard_scale, soft_scale, write) -> None:
        problem, rows, tau = self.problem, self.rows, self.problem.temperature
        labels, entries = problem.labels, problem.entries
        student, teacher = self.student, self.teacher if self.dense else self.student
        target = 1 if self.dense else 2 if entries is not None else 0
        if entries is None:
            entries = Entries(labels.ids, labels.weights, None, labels.weights)  # unread
        num_entries, num_labels = entries.ids.shape[1], labels.ids.shape[1]
        width = problem.hidden.shape[1]
        cap, teacher_cap = problem.softcap, problem.teacher_softcap
        _gradient[(self.size,)](
            self.logits[0],
            self.logits[1] if self.dense else self.logits[0],
            self.logits[-1],
            student.low,
            student.step,
            teacher.low,
            teacher.step,
            student.log_norm,
            student.log_norm if tau == 1 else student.log_norm_tau,
            teacher.log_norm if tau == 1 else teacher.log_norm_tau,
            self.slots if self.slots is not None else labels.keep,
            labels.keep[rows],
            labels.ids[rows],
            labels.weights[rows],
            entries.ids[rows],
            entries.probs[rows],
            entries.rest[rows] if entries.rest is not None else labels.weights,
            entries.constant[rows],
            problem.hidden[rows],
            problem.head,
            hard_scale,
            soft_scale,
            hard,
            soft,
            self.size,
            self.vocab,
            self.padded,
            *((0.0,) * 4 if cap is None else (_step(cap), cap.a, cap.b, 1.0 / cap.c)),
            0.0 if teacher_cap is None else _step(teacher_cap),
            tau,
            CAPPED=cap is not None,
            TEACHER_CAPPED=teacher_cap is not None,
            TEMPERED=tau != 1,
            TARGET=target,
            MASKED=self.slots is not None,
            GHOST=entries.rest is not None,
            CORRECTED=self.head_dtype == "same",
            WRITE=write,
            WIDTH=width,
            LABELS=num_labels,
            LABEL_BLOCK=triton.next_power_of_2(num_labels),
            ENTRIES=num_entries,
            ENTRY_BLOCK=triton.next_power_of_2(num_entries),
            WIDTH_BLOCK=triton.next_power_of_2(width),
            TILES=GRADIENT_TILES,
            TILE=TILE,
            FAST=not INTERPRETED,
            num_warps=GRADIENT_WARPS,
        )


class _Side:
    """The student's or the teacher's logits of a chunk: what `_logits` and `_normalise` leave, and their launches."""

    def __init__(self, hidden: Tensor, head: Tensor, softcap: Softcap | None, head_dtype: str):
        self.hidden, self.softcap = hidden.contiguous(), softcap
        self.head, self.scale = head.contiguous(), torch.ones((), device=head.device)
        self.head_dtype = head_dtype
        if head_dtype == "fp8":
            self.head, self.scale = _to_fp8(self.head)

    def load(self, rows, out, count, tau, *, hard: bool, tempered: bool, index=None) -> None:
        """Fill `out` with the logits of `rows`, or of `rows[index]`, whose first `count` are wanted."""
        hidden = self.hidden[rows] if index is None else self.hidden[rows].index_select(0, index)
        size, width = hidden.shape
        scale = self.scale
        if self.head_dtype == "fp8":
            hidden, hidden_scale = _to_fp8(hidden)
            scale = scale * hidden_scale
        vocab, tiles = len(self.head), triton.cdiv(len(self.head), TILE)
        cap = self.softcap
        device = hidden.device
        sums = torch.empty(2, tiles, size, device=device)
        bounds = torch.empty(2, tiles, size, device=device) if cap is None else sums
        self.low, self.step = bounds
        depth = 64 if self.head_dtype == "same" else 128
        _logits[(triton.cdiv(size, TILE) * tiles,)](
            TensorDescriptor(hidden, [size, width], [width, 1], [TILE, depth]),
            TensorDescriptor(self.head, [vocab, width], [width, 1], [TILE, depth]),
            TensorDescriptor(out, [size, tiles * TILE], [tiles * TILE, 1], [TILE, TILE]),
            sums[0],
            sums[1],
            self.low,
            self.step,
            scale,
            scale if count is None else count,
            size,
            vocab,
            0.0 if cap is None else -LOG2_E / cap.c,
            0.0 if cap is None else -LOG2_E * cap.b / cap.c,
            0.0 if cap is None else cap.a * LOG2_E / _step(cap),
            0.0 if cap is None else _step(cap),
            1.0 / tau,
            WIDTH=width,
            DEPTH=depth,
            TILE=TILE,
            STEPS=STEPS,
            CAPPED=cap is not None,
            HARD=hard,
            TEMPERED=tempered,
            RAGGED=vocab % TILE != 0,
            COUNTED=count is not None,
            SCALED=self.head_dtype == "fp8",
            FAST=not INTERPRETED,
            num_warps=4,
            num_stages=3,
        )
        self.log_norm = self._normaliser(sums[0], 1.0, tiles, size) if hard else None
        self.log_norm_tau = self._normaliser(sums[1], 1.0 / tau, tiles, size) if tempered else None

    def _normaliser(self, sums: Tensor, inverse_tau: float, tiles: int, size: int) -> Tensor:
        log_norm = torch.empty(size, device=sums.device)
        _normalise[(triton.cdiv(size, 32),)](
            sums, self.low, self.step, log_norm, size, tiles, inverse_tau,
            CAPPED=self.softcap is not None, STEPS=STEPS, ROWS=32, TILES=64, num_warps=4,
        )  # fmt: skip
        return log_norm


def _step(softcap: Softcap) -> float:
    """The fixed point's step for logits in [0, a], as an exponent of 2. Its 8 significant bits make products exact."""
    least = softcap.a * math.log2(math.e) / STEPS
    unit = 2.0 ** (math.floor(math.log2(least)) - 7)
    return math.ceil(least / unit) * unit


def _to_fp8(values: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values and the factor that undoes their scaling, both made on the device: the largest becomes E4M3_MAX."""
    largest = values.abs().amax().float().clamp_min(1e-12)
    return (values * (E4M3_MAX / largest)).to(torch.float8_e4m3fn), largest / E4M3_MAX


if triton is not None:
    LOG2E = tl.constexpr(LOG2_E)
    LN2 = tl.constexpr(math.log(2.0))
    EPS = tl.constexpr(torch.finfo(torch.float32).eps)  # what 1 less the entries' mass can tell from 0
    MAGIC = tl.constexpr(8388608.0)  # 2^23: added to a float below 2^16, its last 16 bits are the rounded integer
    MAGIC_BITS = tl.constexpr(0x4B000000)

    @triton.jit
    def _exp2(x, FAST: tl.constexpr):
        if FAST:  # one instruction; subnormal results become 0
            return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
        else:
            return tl.exp2(x)

    @triton.jit
    def _inverse(x, FAST: tl.constexpr):
        if FAST:  # one instruction, within 1 ulp
            return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
        else:
            return 1.0 / x

    @triton.jit
    def _to_float(u):
        """uint16 to fp32 by bits, which needs no conversion instruction."""
        return (u.to(tl.uint32) | MAGIC_BITS).to(tl.float32, bitcast=True) - MAGIC

    @triton.jit
    def _logits(
        hidden, head, out, sums, sums_tau, low, step, scale, count, size, vocab, slant, offset, steps, exponent,
        inverse_tau,
        WIDTH: tl.constexpr, DEPTH: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr, CAPPED: tl.constexpr,
        HARD: tl.constexpr, TEMPERED: tl.constexpr, RAGGED: tl.constexpr, COUNTED: tl.constexpr, SCALED: tl.constexpr,
        FAST: tl.constexpr,
    ):  # fmt: skip
        # tiles of all rows for one part of the head, then the next: the hidden states stay in the L2 cache
        row_tiles = tl.cdiv(size, TILE)
        row_tile = tl.program_id(0) % row_tiles
        word_tile = tl.program_id(0) // row_tiles
        if COUNTED:  # noqa: SIM102 (decided when it is compiled)
            if row_tile * TILE >= tl.load(count):
                return
        x = tl.zeros((TILE, TILE), dtype=tl.float32)
        for k in range(0, WIDTH, DEPTH):
            states, weights = hidden.load([row_tile * TILE, k]), head.load([word_tile * TILE, k])
            if not FAST:  # the interpreter multiplies bf16 as if its bits were integers
                states, weights = states.to(tl.float32), weights.to(tl.float32)
            x = tl.dot(states, weights.T, x)
        if SCALED:
            x = x * tl.load(scale)
        rows = row_tile * TILE + tl.arange(0, TILE)
        words = word_tile * TILE + tl.arange(0, TILE)
        place = word_tile * size + rows
        if CAPPED:
            # capped = a * sigmoid, in [0, a], so its exponential needs no shift. Sums and gradients see the same
            # rounded logits: equal sides have a KL of exactly 0.
            u = _inverse(1.0 + _exp2(x * slant + offset, FAST), FAST) * steps + MAGIC
            exponents = u * exponent - MAGIC * exponent
        else:
            inside = (words < vocab)[None, :]
            high = tl.max(tl.where(inside, x, float("-inf")), axis=1)
            least = tl.min(tl.where(inside, x, float("inf")), axis=1)
            size_of_step = (high - least) / STEPS
            per_step = tl.where(high > least, STEPS / (high - least), 0.0)
            u = tl.where(inside, (x - least[:, None]) * per_step[:, None], 0.0) + MAGIC
            exponents = ((u - MAGIC) * size_of_step[:, None] + (least - high)[:, None]) * LOG2E
            tl.store(low + place, least, mask=rows < size)
            tl.store(step + place, size_of_step, mask=rows < size)
        out.store([row_tile * TILE, word_tile * TILE], u.to(tl.int32, bitcast=True).to(tl.uint16))
        if HARD:
            e = _exp2(exponents, FAST)
            if RAGGED:
                e = tl.where((words < vocab)[None, :], e, 0.0)
            tl.store(sums + place, tl.sum(e, axis=1), mask=rows < size)
        if TEMPERED:
            e = _exp2(exponents * inverse_tau, FAST)
            if RAGGED:
                e = tl.where((words < vocab)[None, :], e, 0.0)
            tl.store(sums_tau + place, tl.sum(e, axis=1), mask=rows < size)

    @triton.jit
    def _normalise(
        sums, low, step, log_norm, size, tiles, inverse_tau,
        CAPPED: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        most = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
        if CAPPED:
            most = tl.zeros((ROWS,), dtype=tl.float32)
        else:
            for t in range(0, tiles, TILES):
                tile = t + tl.arange(0, TILES)
                place = tile[:, None] * size + rows[None, :]
                inside = (tile[:, None] < tiles) & (rows[None, :] < size)
                high = tl.load(low + place, mask=inside, other=0.0) + STEPS * tl.load(
                    step + place, mask=inside, other=0.0
                )
                most = tl.maximum(most, tl.max(tl.where(inside, high, float("-inf")), axis=0))
        total = tl.zeros((ROWS,), dtype=tl.float32)
        for t in range(0, tiles, TILES):
            tile = t + tl.arange(0, TILES)
            place = tile[:, None] * size + rows[None, :]
            inside = (tile[:, None] < tiles) & (rows[None, :] < size)
            part = tl.load(sums + place, mask=inside, other=0.0)
            if not CAPPED:
                high = tl.load(low + place, mask=inside, other=0.0) + STEPS * tl.load(
                    step + place, mask=inside, other=0.0
                )
                distance = tl.where(inside, high - most[None, :], 0.0)
                part = part * tl.exp2(distance * (LOG2E * inverse_tau))
            total += tl.sum(part, axis=0)
        tl.store(log_norm + rows, tl.log2(total) + most * (LOG2E * inverse_tau), mask=rows < size)

    @triton.jit
    def _log2_logits(u, low, step, row, tile, size, inside, exponent, CAPPED: tl.constexpr):
        """Stored logits, as exponents of 2, in steps of `exponent`; uncapped, each tile of a row has its own."""
        if CAPPED:
            return _to_float(u) * exponent
        else:
            place = tile * size + row
            least = tl.load(low + place, mask=inside, other=0.0)
            return (_to_float(u) * tl.load(step + place, mask=inside, other=0.0) + least) * LOG2E

    @triton.jit
    def _slope(t, a, inverse_c, CAPPED: tl.constexpr):
        """The cap's derivative z * (1 - z / a) / c at the capped logit z, given as an exponent of 2."""
        if CAPPED:
            return t * (LN2 * inverse_c - t * (LN2 * LN2 * inverse_c / a))
        else:
            return 1.0

    @triton.jit
    def _gradient(
        student, teacher, apart, low, step, teacher_low, teacher_step, log_norm, log_norm_tau, teacher_log_norm,
        slots, keep, label_ids, label_weights, entry_ids, entry_probs, entry_rest, entry_constant, hidden, head,
        hard_scale, soft_scale, hard_out, soft_out, size, vocab, padded, exponent, a, b, inverse_c,
        teacher_exponent, tau,
        CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, TEMPERED: tl.constexpr, TARGET: tl.constexpr,
        MASKED: tl.constexpr, GHOST: tl.constexpr, CORRECTED: tl.constexpr, WRITE: tl.constexpr,
        WIDTH: tl.constexpr, LABELS: tl.constexpr, LABEL_BLOCK: tl.constexpr,
        ENTRIES: tl.constexpr, ENTRY_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr, TILES: tl.constexpr,
        TILE: tl.constexpr, FAST: tl.constexpr,
    ):  # fmt: skip
        # TARGET: 0 none, 1 dense, 2 sparse. WRITE: 0 losses only, 1 the gradient over the student's logits, 2 the soft
        # one there and the hard one into `apart`.
        row = tl.program_id(0).to(tl.int64)
        student += row * padded
        inverse_tau = 1.0 / tau
        norm = tl.load(log_norm + row)
        norm_tau = tl.load(log_norm_tau + row)
        hard_factor = tl.load(hard_scale)
        teacher_row = row
        if MASKED and TARGET == 1:
            teacher_row = tl.load(slots + row).to(tl.int64)
        kept = tl.load(keep + row).to(tl.int1)
        soft_factor = tl.where(kept, tl.load(soft_scale) * tau, 0.0)
        if TARGET == 1:
            read_row = tl.maximum(teacher_row, 0)
            teacher_norm = tl.load(teacher_log_norm + read_row)
            other = teacher + read_row * padded

        # the labels: their logits are read before the gradient overwrites them
        offsets = tl.arange(0, LABEL_BLOCK)
        is_label = offsets < LABELS
        label = tl.load(label_ids + row * LABELS + offsets, mask=is_label, other=0)
        weight = tl.load(label_weights + row * LABELS + offsets, mask=is_label, other=0.0)
        all_weight = tl.sum(weight)
        t_label = _log2_logits(
            tl.load(student + label), low, step, row, label // TILE, size, is_label, exponent, CAPPED
        )
        p_label = tl.exp2(t_label - norm)
        ce = (norm - t_label) * LN2
        if CORRECTED:
            # CE with the label's unrounded logit, to first order: d CE / d z_y = p_y - 1
            columns = tl.arange(0, WIDTH_BLOCK)
            in_width = columns < WIDTH
            state = tl.load(hidden + row * WIDTH + columns, mask=in_width, other=0.0).to(tl.float32)
            for k in tl.static_range(LABELS):
                word = tl.load(label_ids + row * LABELS + k)
                weights = tl.load(head + word * WIDTH + columns, mask=in_width, other=0.0).to(tl.float32)
                exact = tl.sum(state * weights)
                if CAPPED:
                    exact = a / (1.0 + tl.exp(-(exact + b) * inverse_c))
                ce = tl.where(offsets == k, ce - (1.0 - p_label) * (exact - t_label * LN2), ce)
        tl.store(hard_out + row, tl.sum(ce * weight))

        if TARGET == 2:
            entry_offsets = tl.arange(0, ENTRY_BLOCK)
            is_entry = entry_offsets < ENTRIES
            entry = tl.load(entry_ids + row * ENTRIES + entry_offsets, mask=is_entry, other=0)
            q_entry = tl.load(entry_probs + row * ENTRIES + entry_offsets, mask=is_entry, other=0.0)
            t_entry = _log2_logits(
                tl.load(student + entry), low, step, row, entry // TILE, size, is_entry, exponent, CAPPED
            )
            log_p = t_entry * inverse_tau - norm_tau
            soft = tl.load(entry_constant + row) - tl.sum(q_entry * log_p) * LN2
            tail = 1.0
            if GHOST:
                rest = tl.load(entry_rest + row)
                p_rest = tl.maximum(1.0 - tl.sum(tl.where(is_entry, tl.exp2(log_p), 0.0)), EPS)
                soft -= rest * tl.log(p_rest)
                tail = 1.0 - rest / p_rest
            tl.store(soft_out + row, tl.where(kept, tau * tau * soft, 0.0))
        if TARGET == 1:
            q_label = tl.exp2(
                _log2_logits(
                    tl.load(other + label), teacher_low, teacher_step, read_row, label // TILE, size, is_label,
                    teacher_exponent, TEACHER_CAPPED,
                ) * inverse_tau - teacher_norm
            )  # fmt: skip
        if WRITE > 0:
            tl.debug_barrier()

        if TARGET == 1 or WRITE > 0:
            difference = tl.zeros((TILES, TILE), dtype=tl.float32)
            for first in range(0, padded, TILES * TILE):
                tile = first // TILE + tl.arange(0, TILES)[:, None]
                words = tile * TILE + tl.arange(0, TILE)[None, :]
                stored = words < padded
                tile_inside = tile * TILE < padded
                u = tl.load(student + words, mask=stored, other=0)
                t = _log2_logits(u, low, step, row, tile, size, tile_inside, exponent, CAPPED)
                p = _exp2(t - norm, FAST)
                p_tau = p
                if TEMPERED:
                    p_tau = _exp2(t * inverse_tau - norm_tau, FAST)
                hard_part = hard_factor * all_weight * p
                if TARGET == 1:
                    if MASKED and teacher_row < 0:
                        soft_part = tl.zeros((TILES, TILE), dtype=tl.float32)
                    else:
                        v = tl.load(other + words, mask=stored, other=0)
                        t_teacher = _log2_logits(
                            v, teacher_low, teacher_step, read_row, tile, size, tile_inside, teacher_exponent,
                            TEACHER_CAPPED,
                        )  # fmt: skip
                        q = _exp2(t_teacher * inverse_tau - teacher_norm, FAST)
                        difference += tl.where(words < vocab, q * (t_teacher - t), 0.0)
                        soft_part = soft_factor * (p_tau - q)
                elif TARGET == 2:
                    soft_part = (soft_factor * tail) * p_tau
                else:
                    soft_part = 0.0
                if WRITE > 0:
                    slope = _slope(t, a, inverse_c, CAPPED)
                    if WRITE == 1:
                        _put(student + words, slope * (hard_part + soft_part), stored)
                    else:
                        _put(student + words, slope * soft_part, stored)
                        _put(apart + row * padded + words, slope * hard_part, stored)
            if TARGET == 1:
                kl = (tl.sum(difference) * inverse_tau - teacher_norm + norm_tau) * LN2
                tl.store(soft_out + row, tl.where(kept, tau * tau * kl, 0.0))

        if WRITE > 0:
            # the few words whose gradient differs: entries first, then labels, which know about entries too
            tl.debug_barrier()
            if TARGET == 2:
                slope = _slope(t_entry, a, inverse_c, CAPPED)
                hard_part = hard_factor * all_weight * tl.exp2(t_entry - norm)
                p_tau = tl.exp2(log_p)
                if GHOST:
                    changed = is_entry
                else:  # unused entries may repeat an id
                    changed = is_entry & (q_entry != 0)
                soft_part = soft_factor * (p_tau - q_entry)
                if WRITE == 1:
                    _put(student + entry, slope * (hard_part + soft_part), changed)
                else:
                    _put(student + entry, slope * soft_part, changed)
                tl.debug_barrier()
            slope = _slope(t_label, a, inverse_c, CAPPED)
            # a word that is the label of several steps ahead has their weights together
            same = (label[:, None] == label[None, :]) & is_label[None, :]
            own_weight = tl.sum(tl.where(same, weight[None, :], 0.0), axis=1)
            hard_part = hard_factor * (all_weight * p_label - own_weight)
            p_tau = p_label
            if TEMPERED:
                p_tau = tl.exp2(t_label * inverse_tau - norm_tau)
            changed = is_label & (own_weight != 0)
            if TARGET == 1:  # where, not a product: without a kept token the teacher's side is not computed at all
                soft_part = tl.where(kept, soft_factor * (p_tau - q_label), 0.0)
            elif TARGET == 2:
                held = (label[:, None] == entry[None, :]) & is_entry[None, :]
                q_here = tl.sum(tl.where(held, q_entry[None, :], 0.0), axis=1)
                is_held = tl.sum(held.to(tl.int32), axis=1) > 0
                soft_part = soft_factor * (tl.where(is_held, 1.0, tail) * p_tau - q_here)
            else:
                soft_part = 0.0
            if WRITE == 1:
                _put(student + label, slope * (hard_part + soft_part), changed)
            else:
                _put(apart + row * padded + label, slope * hard_part, changed)

    @triton.jit
    def _put(pointer, value, mask):
        """A bf16 gradient over a 16-bit logit."""
        bits = value.to(tl.bfloat16).to(tl.uint16, bitcast=True)
        tl.store(pointer, bits, mask=mask)
