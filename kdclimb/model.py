"""The GPT: student and teacher are this class at other shapes.

The NanoGPT speedrun's architecture (record 71), most of whose parts a config can leave out: RMSNorm without gain,
QK-norm, half-truncated rotary with YaRN, sliding windows, ReLU^2 MLP, hashed bigram embedding, value embeddings, paired
heads, attention gates, key offset, smear, skip and backout, a head that is tied to the embedding until `untie`. The
model stops at the last hidden states: the loss takes them and the head, so that no (T, V) logits need exist.
Shapes: T packed tokens, d width, H heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdclimb.attention import Documents, Span, attention, to_device
from kdclimb.config import ModelConfig
from kdclimb.kernels import Softcap, fp8
from kdclimb.kernels.mlp import has_tma, relu2_mlp
from kdclimb.kernels.rows import add_rows

ROTARY_BASE = 1024.0  # this and all below are the speedrun's
YARN_ROTATIONS = (1.0, 32.0)  # in a window: frequencies that turn less often are stretched, those that turn more kept
GATE_INPUTS = 12  # a gate looks at so many dimensions of the hidden state
VALUE_STD = 0.01  # of value embeddings that start at random
RESIDUAL, BIGRAM, QKV, BACKOUT, SKIP = 1.1, 0.1, 0.5, 0.5, -1.5  # where learned factors start
MATRICES = ("q", "k", "v", "o", "up", "down")
# torch 2.11's scheduler fails an assertion (reorder_loops_by_dep_pair) where it reorders the loops of small tensors
COMPILE_OPTIONS = {"loop_ordering_after_fusion": False}


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


class GPT(nn.Module):
    """hidden = model(tokens, documents): (T,) int64 -> (T, d). Weights are fp32; they run in `compute_dtype`.

    Which windows it looks through is set by `set_windows`; without, every layer sees whole documents.
    """

    def __init__(self, config: ModelConfig, *, backend: str, compute_dtype: torch.dtype, compiled: bool = False):
        super().__init__()
        self.config, self.backend, self.compute_dtype = config, backend, compute_dtype
        self._layer = compile_layer() if compiled else layer
        d, layers, gate = config.dim, config.num_layers, min(GATE_INPUTS, config.dim)
        self.embed = nn.Parameter(torch.empty(config.vocab_size, d))
        if config.bigram_vocab_size:
            self.bigram = nn.Parameter(torch.zeros(config.bigram_vocab_size, d))
            self.bigram_lambdas = nn.Parameter(torch.full((layers,), BIGRAM))
        if config.x0:
            self.residual_lambdas = nn.Parameter(torch.full((layers,), RESIDUAL))
            self.x0_lambdas = nn.Parameter(torch.zeros(layers))
        self.value_embeds = nn.ParameterDict({str(i): torch.zeros(config.vocab_size, d) for i in config.value_layers})
        for table in self.value_embeds.values() if config.value_gate == "both" else ():
            nn.init.normal_(table, std=VALUE_STD)
        if config.smear:
            self.smear_gate, self.smear_lambda = nn.Parameter(torch.zeros(1, gate)), nn.Parameter(torch.zeros(()))
        if config.skip:
            self.skip_gate, self.skip_lambda = nn.Parameter(torch.zeros(1, gate)), nn.Parameter(torch.tensor(SKIP))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.tensor(BACKOUT))
        self.blocks = nn.ModuleList(Block(config, i) for i in range(layers))
        self.head: nn.Parameter | None = None
        nn.init.normal_(self.embed, std=0.005)  # small, since it is the head too; the embedding is normed anyway
        if config.untie_frac == 0.0:
            self.head = nn.Parameter(torch.zeros_like(self.embed))
            nn.init.normal_(self.embed)
        self.set_windows(None, ())

    @property
    def softcap(self) -> Softcap | None:
        return Softcap(*self.config.softcap) if self.config.softcap else None

    @property
    def head_weight(self) -> Tensor:
        """(V, d): the head's own weight, or the embedding's while they are tied."""
        return self.embed if self.head is None else self.head

    def untie(self) -> nn.Parameter:
        """Give the head weights of its own, a copy of the embedding's, and return them."""
        assert self.head is None
        self.head = nn.Parameter(self.embed.detach().clone())
        return self.head

    def round_matrices(self) -> None:
        """From now on the blocks' products are of 8-bit operands (`kernels/fp8.py`): for a frozen model at work."""
        for block in self.blocks:
            block.rounded = tuple(map(fp8.by_rows, block.matrices()))

    def kinds(self) -> dict[str, str]:
        """The kind of each parameter, by name: it decides which optimiser steps it, and in which group."""
        return {name: _kind(name) for name, _ in self.named_parameters()}

    def untie_step(self, horizon: int) -> int | None:
        """The step before which the head unties; None if it never does, or has."""
        frac = self.config.untie_frac
        if frac in (0.0, 1.0) or self.head is not None:
            return None
        step = math.floor(frac * horizon)
        return step + (step / horizon < frac)  # no ceil: 0.68 * 150 lies above 102

    def set_windows(self, windows: tuple[int, int] | None, long_windows: tuple[int, ...]) -> None:
        """Look through these windows from now on: (short, long) in tokens, None for whole documents.

        `long_windows`: the long windows that training has gone through, up to now. With YaRN they decide the rotary
        frequencies and the softmax scale.
        """
        if (windows, long_windows) == getattr(self, "windows", ()):
            return
        self.windows = windows, long_windows
        self.frequencies, factor = rotary(self.config, long_windows)
        scale = self.config.attention_scale * math.sqrt(128 / self.config.head_dim) * factor
        self.short, self.long = (Span.of(window, scale) for window in windows or (-1, -1))
        self.tables: dict[tuple, tuple[Tensor, Tensor]] = {}

    def forward(self, tokens: Tensor, documents: Documents) -> Tensor:
        config, dtype = self.config, self.compute_dtype
        x = look_up(self.embed, tokens, dtype)
        if config.smear:
            x = smear(x, self.smear_gate, self.smear_lambda)
        x = x0 = rms_norm(x)
        bigram = None
        if config.bigram_vocab_size:
            bigram = look_up(self.bigram, bigram_hash(tokens, config.bigram_vocab_size), dtype)
        kept = backed_out = None
        for i, block in enumerate(self.blocks):
            if config.skip and i == config.skip[1]:
                x = x + gate(x0, self.skip_gate, 2 * self.skip_lambda.sigmoid()) * kept
            value = look_up(self.value_embeds[str(i)], tokens, dtype) if i in config.value_layers else None
            span = self.long if i in config.long_layers else self.short
            tables = self._tables(len(tokens), block.paired, x.device)
            seen = documents.doubled if block.paired else documents
            x = self._layer(block, x, x0, bigram, value, self._factors(i), tables, seen, span, self.backend)
            kept = x if config.skip and i == config.skip[0] else kept
            backed_out = x if config.backout and i == config.backout[0] else backed_out
        if config.backout:
            x = x - self.backout_lambda.to(dtype) * backed_out
        return rms_norm(x)

    def _factors(self, i: int) -> tuple[Tensor | None, ...]:
        """Layer i's learned factors of the residual stream, of the first hidden state and of the bigram embedding."""
        names = ("residual_lambdas", "x0_lambdas", "bigram_lambdas")
        return tuple(getattr(self, name)[i] if hasattr(self, name) else None for name in names)

    def _tables(self, length: int, paired: bool, device: torch.device) -> tuple[Tensor, Tensor]:
        key = length, paired, device
        if key not in self.tables:
            self.tables[key] = rotary_tables(
                length, self.config.num_heads if paired else 1, to_device(self.frequencies, device), self.compute_dtype
            )
        return self.tables[key]

    def params_stored(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def params_active(self) -> int:
        """Weights that a token is multiplied with: the blocks' matrices and the head, no table look-ups, no gates."""
        matrices = (p.numel() for name, p in self.named_parameters() if _kind(name) == "matrix")
        return sum(matrices) + self.head_weight.numel()

    def flops_per_token(self, context: float, *, backward: bool, windows: tuple[int, int] | None = None) -> float:
        """Active FLOPs: 2 a weight forward and 4 backward, and attention over the visible tokens.

        `context`: mean number of tokens of its document before a token; `windows`: (short, long) in tokens, by default
        those of now. Paired heads see twice as many entries.
        """
        forward, spans = 2.0 * self.params_active(), windows or self.windows[0] or (math.inf, math.inf)
        for i, block in enumerate(self.blocks):
            if block.attends:
                entries = context * (2 if block.paired else 1)
                forward += 4 * self.config.dim * min(entries, spans[i in self.config.long_layers])
        return forward * (3 if backward else 1)


def _kind(name: str) -> str:
    last = name.rsplit(".", 1)[-1]
    if name.startswith("value_embeds.") or name == "bigram":
        return "table"
    if name.startswith("blocks."):
        return "matrix" if last in MATRICES else "scalar" if last == "factors" else "gate"
    return {"x0_lambdas": "x0"}.get(name, name if name in ("embed", "head", "smear_gate", "skip_gate") else "scalar")


class Block(nn.Module):
    """One layer's weights. Initialised as in the speedrun: uniform, the MLP's output and gates zero."""

    def __init__(self, config: ModelConfig, i: int):
        super().__init__()
        d, bound = config.dim, 0.5 * math.sqrt(3.0 / config.dim)
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.attends = i not in config.attention_free_layers
        self.paired = i in config.paired_layers
        self.norms_queries_and_keys = config.qk_norm
        self.value_gate_sees_value = config.value_gate == "both"
        self.offsets_keys = config.key_offset and i in config.long_layers and not self.paired
        for name in MATRICES[:4] if self.attends else ():
            setattr(self, name, nn.Parameter(torch.empty(d, d).uniform_(-bound, bound)))
        self.up = nn.Parameter(torch.empty(4 * d, d).uniform_(-bound, bound))
        self.down = nn.Parameter(torch.zeros(d, 4 * d))
        gate = min(GATE_INPUTS, d)
        self.factors = self.attention_gate = self.value_gate = None
        self.rounded: tuple[fp8.Rows8, ...] = ()  # `matrices()` in 8 bits
        if config.qkvo_factors and self.attends:
            self.factors = nn.Parameter(torch.tensor([QKV, 1.0]))
        if config.attention_gate and self.attends:
            self.attention_gate = nn.Parameter(torch.zeros(self.num_heads, gate))
        if i in config.value_layers:
            self.value_gate = nn.Parameter(torch.zeros(self.num_heads, gate))

    def attention_matrices(self) -> tuple[Tensor, Tensor]:
        """(3d, d) of queries, keys and values, and (d, d) of the output, with their learned factors."""
        weights, output = torch.cat([self.q, self.k, self.v]), self.o
        if self.factors is not None:
            weights, output = self.factors[0] * weights, self.factors[1] * output
        return weights, output

    def matrices(self) -> tuple[Tensor, ...]:
        return (self.up, self.down, *(self.attention_matrices() if self.attends else ()))

    def attend(self, x, value, tables, documents, span, backend):
        shape = (len(x), self.num_heads, self.head_dim)
        weights, output = self.rounded[2:] or self.attention_matrices()
        q, k, v = (y.view(shape) for y in linear(x, weights).chunk(3, dim=-1))
        if self.norms_queries_and_keys:
            q, k = rms_norm(q), rms_norm(k)
        q, k = rotate(q, tables), rotate(k, tables)
        if self.offsets_keys:
            k = offset_keys(k)
        if value is not None:
            v = v + self.gate_value(x, value)[..., None] * value.view(shape)
        if self.paired:  # token t is entries 2t, with the first half of the heads, and 2t + 1, with the others
            q, k, v = (y.reshape(2 * len(x), self.num_heads // 2, self.head_dim) for y in (q, k, v))
        y = attention(q, k, v.contiguous(), documents, span, backend).reshape(shape)
        if self.attention_gate is not None:
            y = y * gate(x, self.attention_gate, 1.0)[..., None]
        return linear(y.flatten(1), output)

    def gate_value(self, x, value):
        if not self.value_gate_sees_value:
            return gate(x, self.value_gate, 2.0)
        half = self.value_gate.shape[1] // 2
        return gate(torch.cat([x[:, :half], value[:, :half]], dim=1), self.value_gate, 2.0)

    def mlp(self, x):
        if self.rounded:
            up, down = self.rounded[:2]
            return linear(F.relu(linear(x, up)).square(), down)
        return relu2_mlp(x, self.up, self.down)


def linear(x: Tensor, weight: Tensor | fp8.Rows8) -> Tensor:
    return F.linear(x, weight.to(x.dtype)) if isinstance(weight, Tensor) else fp8.product(x, weight)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.table = table
        ctx.save_for_backward(rows)
        return F.embedding(rows, table).to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (rows,) = ctx.saved_tensors
        if ctx.table.grad is None:
            ctx.table.grad = torch.zeros_like(ctx.table)
        add_rows(ctx.table.grad, rows, grad)
        return None, None, None


def look_up(table: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """table[rows] in `dtype`. Its gradient is added to table.grad at these rows.

    Autograd would make a whole table of it in each backward pass: for the full student's, several GB of memory traffic.
    """
    return _LookUp.apply(table, rows, dtype)


def layer(block: Block, x, x0, bigram, value, factors, tables, documents, span, backend) -> Tensor:
    """(T, d) -> (T, d), one layer whole. A function of its own, so that it is compiled once for all alike layers."""
    residual, first, hashed = factors
    if residual is not None:
        x = residual * x + first * x0
    if bigram is not None:
        x = x + hashed * bigram
    if block.attends:
        x = x + block.attend(rms_norm(x), value, tables, documents, span, backend)
    return x + block.mlp(rms_norm(x))


def gate(x: Tensor, weight: Tensor, most: float | Tensor) -> Tensor:
    """(T, d) -> (T, n): most * sigmoid of `weight` (n, g) on the first g dimensions of x."""
    out = F.linear(x[:, : weight.shape[1]], weight.to(x.dtype)).sigmoid()
    return (most.to(x.dtype) if isinstance(most, Tensor) else most) * out


def smear(x: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    """(T, d): to each token some of the one before it, over documents' boundaries too."""
    return torch.cat([x[:1], x[1:] + gate(x[1:], weight, factor) * x[:-1]])


def offset_keys(k: Tensor) -> Tensor:
    """(T, H, D): dimensions that don't rotate come from the token before, which lets one layer do induction."""
    quarter = k.shape[-1] // 4
    fixed = [slice(quarter, 2 * quarter), slice(3 * quarter, None)]
    late = [torch.cat([k[:1, :, part], k[:-1, :, part]]) for part in fixed]
    return torch.cat([k[..., :quarter], late[0], k[..., 2 * quarter : 3 * quarter], late[1]], dim=-1)


def bigram_hash(tokens: Tensor, rows: int) -> Tensor:
    """(T,) row of each (previous token, token) pair; the last row is the first token's, which has none before it.

    The multipliers and the xor are the speedrun's (record 62).
    """
    hashed = torch.bitwise_xor(36313 * tokens[1:], 27191 * tokens[:-1]) % (rows - 1)
    return F.pad(hashed, (1, 0), value=rows - 1)


def rotary(config: ModelConfig, long_windows: tuple[int, ...]) -> tuple[Tensor, float]:
    """(D/2,) float64 frequencies of the pairs in radians a token, and the softmax scale's factor.

    The second half of the pairs does not rotate (half-truncated rotary), unless the config has all of them do so.
    YaRN (arXiv 2309.00071), as the speedrun applies it: whenever the long window changes, frequencies that turn seldom
    in the old one are stretched by the ratio of the two. A function of the windows alone: a checkpoint needs no more.
    """
    pairs = config.head_dim // 2
    rotating = pairs // 2 if config.half_rotary else pairs
    frequencies = ROTARY_BASE ** -torch.linspace(0, 1, rotating, dtype=torch.float64, device="cpu")
    frequencies = F.pad(frequencies, (0, pairs - rotating))
    factor, (low, high) = 1.0, YARN_ROTATIONS
    for old, new in pairwise(long_windows) if config.yarn else ():
        kept = ((old * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (old / new + kept * (1 - old / new))
        factor *= 1 + 0.2 * math.log(new / old)
    return frequencies, factor


def rotary_tables(length: int, heads: int, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, (T, heads, D/2).

    `heads` above 1 is for paired heads: of token t, head h turns as position 2t + h % 2 (records 58 to 71).
    """
    place = torch.arange(length, device=frequencies.device)[:, None]
    if heads > 1:
        place = 2 * place + torch.arange(heads, device=place.device) % 2
    angles = place[..., None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = tables
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


@functools.cache
def compile_layer(backend: str = "inductor"):
    """`layer` by torch.compile: one graph for each kind of layer and shape, none for new windows or scales."""
    torch.compiler.assume_constant_result(has_tma)  # not where it is defined: it imports the compiler, in seconds
    torch._dynamo.config.automatic_dynamic_shapes = False  # a new shape is a graph of its own, no slow one for all
    torch._dynamo.config.recompile_limit = 64  # kinds of layers, student and teacher, with and without gradients
    options = COMPILE_OPTIONS if backend == "inductor" else None
    return torch.compile(layer, fullgraph=True, backend=backend, options=options)
