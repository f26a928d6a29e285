"""The GPT: student and teacher are this class at other shapes.

The NanoGPT speedrun's core: RMSNorm without gain, QK-norm, half-truncated rotary, ReLU^2 MLP, hashed
bigram embedding, a softcapped head that is tied to the embedding until `untie`. The model stops at
the last hidden states: the loss takes them and the head, so that no (T, V) logits need exist.
Shapes: T packed tokens, d width, H heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdclimb.attention import Documents, attention
from kdclimb.config import ModelConfig
from kdclimb.kernels import Softcap

ROTARY_BASE = 1024.0  # the speedrun's


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


class GPT(nn.Module):
    """hidden = model(tokens, documents): (T,) int64 -> (T, d). Weights are fp32; they run in `compute_dtype`."""

    def __init__(self, config: ModelConfig, *, backend: str, compute_dtype: torch.dtype):
        super().__init__()
        self.config, self.backend, self.compute_dtype = config, backend, compute_dtype
        d = config.dim
        self.embed = nn.Parameter(torch.empty(config.vocab_size, d))
        self.bigram = nn.Parameter(torch.zeros(config.bigram_vocab_size, d))
        self.bigram_lambdas = nn.Parameter(torch.full((config.num_layers,), 0.1))
        self.blocks = nn.ModuleList(Block(d) for _ in range(config.num_layers))
        self.head: nn.Parameter | None = None
        nn.init.normal_(self.embed, std=0.005)  # small, since it is the head too; the embedding is normed anyway
        if config.untie_frac == 0.0:
            self.head = nn.Parameter(torch.zeros_like(self.embed))
            nn.init.normal_(self.embed)

    @property
    def softcap(self) -> Softcap:
        return Softcap(*self.config.softcap)

    @property
    def head_weight(self) -> Tensor:
        """(V, d): the head's own weight, or the embedding's while they are tied."""
        return self.embed if self.head is None else self.head

    def untie(self) -> nn.Parameter:
        """Give the head weights of its own, a copy of the embedding's, and return them."""
        assert self.head is None
        self.head = nn.Parameter(self.embed.detach().clone())
        return self.head

    def kinds(self) -> dict[str, str]:
        """The kind of each parameter, by name: it decides which optimiser steps it, and in which group."""
        kinds = {name: "matrix" for name, _ in self.named_parameters() if name.startswith("blocks.")}
        kinds |= {"embed": "embed", "bigram": "table", "bigram_lambdas": "scalar"}
        return kinds if self.head is None else kinds | {"head": "head"}

    def untie_step(self, horizon: int) -> int | None:
        """The step before which the head unties; None if it never does."""
        frac = self.config.untie_frac
        return None if frac in (0.0, 1.0) else math.ceil(frac * horizon)

    def forward(self, tokens: Tensor, documents: Documents) -> Tensor:
        x = rms_norm(F.embedding(tokens, self.embed).to(self.compute_dtype))
        bigram = F.embedding(bigram_hash(tokens, self.config.bigram_vocab_size), self.bigram).to(self.compute_dtype)
        rotary = rotary_tables(len(tokens), self.config.head_dim, x)
        scale = 0.12 * math.sqrt(128 / self.config.head_dim)  # the speedrun's 0.12 at head_dim 128
        for weight, block in zip(self.bigram_lambdas.to(x.dtype), self.blocks, strict=True):
            x = x + weight * bigram
            x = x + block.attend(rms_norm(x), rotary, documents, self.config, scale, self.backend)
            x = x + block.mlp(rms_norm(x))
        return rms_norm(x)

    def params_stored(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def params_active(self) -> int:
        """Weights that a token is multiplied with: the blocks' matrices and the head, no table look-ups."""
        return sum(p.numel() for p in self.blocks.parameters()) + self.head_weight.numel()

    def flops_per_token(self, context: float, *, backward: bool) -> float:
        """Active FLOPs: 2 a weight forward and 4 backward, and attention over `context` mean visible tokens."""
        forward = 2 * self.params_active() + 4 * self.config.num_layers * self.config.dim * context
        return forward * (3 if backward else 1)


class Block(nn.Module):
    """One layer's matrices. Initialised as in the speedrun: uniform, the MLP's output zero."""

    def __init__(self, d: int):
        super().__init__()
        bound = 0.5 * math.sqrt(3.0 / d)
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Parameter(torch.empty(d, d).uniform_(-bound, bound)))
        self.up = nn.Parameter(torch.empty(4 * d, d).uniform_(-bound, bound))
        self.down = nn.Parameter(torch.zeros(d, 4 * d))

    def attend(self, x, rotary, documents, config, scale, backend):
        q, k, v = (
            F.linear(x, w.to(x.dtype)).view(-1, config.num_heads, config.head_dim) for w in (self.q, self.k, self.v)
        )
        q, k = (rotate(rms_norm(y), rotary) for y in (q, k))
        return F.linear(attention(q, k, v, documents, scale, backend).flatten(1), self.o.to(x.dtype))

    def mlp(self, x):
        return F.linear(F.relu(F.linear(x, self.up.to(x.dtype))).square(), self.down.to(x.dtype))


def bigram_hash(tokens: Tensor, rows: int) -> Tensor:
    """(T,) row of each (previous token, token) pair; the last row is the first token's, which has none before it.

    The multipliers and the xor are the speedrun's (record 62).
    """
    hashed = torch.bitwise_xor(36313 * tokens[1:], 27191 * tokens[:-1]) % (rows - 1)
    return torch.cat([tokens.new_tensor([rows - 1]), hashed])


def rotary_tables(length: int, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, (T, 1, D/2); the second half of the frequencies is zero (half-truncated rotary)."""
    frequencies = ROTARY_BASE ** -torch.linspace(0, 1, head_dim // 4, device=like.device)
    frequencies = torch.cat([frequencies, torch.zeros_like(frequencies)])
    angles = torch.arange(length, device=like.device)[:, None, None] * frequencies
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = tables
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)
