"""Synthetic checkpoints in the seed's format, and what the seed's formulas make of them: slow, plain, in float64."""

import math
from collections import OrderedDict

import torch

from kdclimb.import_teacher import Shape

L3 = Shape(layers=3, heads=2, head_dim=16, vocab_size=384, bigram_vocab_size=2)
L11 = Shape(layers=11, heads=4, head_dim=8, vocab_size=384, bigram_vocab_size=61)


def model(shape, *, seed=0, prefix="_orig_mod.", gate_rows=None, padding=0):
    """A state dict with random values everywhere, so that each of them matters; dtypes as the seed's."""
    generator = torch.Generator().manual_seed(seed)
    layers, heads, d = shape.layers, shape.heads, shape.heads * shape.head_dim
    num_attention = layers - (layers > 6)

    def normal(*size, std=1.0, dtype=torch.bfloat16):
        return (std * torch.randn(*size, generator=generator)).to(dtype)

    found = {
        "smear_gate.weight": normal(1, 12, dtype=torch.float32),
        "skip_gate.weight": normal(1, 12, dtype=torch.float32),
        **{f"value_embeds.{i}.weight": normal(shape.vocab_size, d) for i in range(5)},
        "attn_gate_bank": normal(gate_rows or num_attention, heads, 12, dtype=torch.float32),
        "ve_gate_bank": normal(5, heads, 12, dtype=torch.float32),
        "attn_bank": normal(num_attention, 4 * d, d, std=d**-0.5),
        "mlp_bank": normal(layers + 1, 2, 4 * d, d, std=d**-0.5),
        "lm_head.weight": normal(d, shape.vocab_size, std=0.2),
        "embed.weight": normal(shape.vocab_size, d),
        "bigram_embed.weight": normal(shape.bigram_vocab_size, d),
        "x0_lambdas": normal(layers, std=0.3, dtype=torch.float32),
        "scalars": 1 + normal(4 * layers + 3 + padding, std=0.3, dtype=torch.float32),
    }
    return OrderedDict((prefix + name, value) for name, value in found.items())


def checkpoint(shape, **options):
    """All that state_best.pt holds."""
    entries = {"step": 250, "code": "import torch", "best_val_loss": 4.069, "kd_enabled": False, "kd_stop_step": None}
    return entries | {"model": model(shape, **options)}


# ---- the seed's forward pass, from the description of its formulas ----------------------------


def norm(x):
    return x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def yarn(head_dim, long_windows):
    """(frequencies, softmax scale) after training through these long windows."""
    count = head_dim // 4
    frequencies = torch.tensor([1024 ** (-j / (count - 1)) for j in range(count)], dtype=torch.float64)
    scale = 0.1
    for old, new in zip(long_windows, long_windows[1:]):
        weight = ((old * frequencies / (2 * math.pi) - 1) / 31).clamp(0, 1)
        frequencies = frequencies * (old / new + weight * (1 - old / new))
        scale *= 1 + 0.2 * math.log(new / old)
    return frequencies, scale


def rotated(head, position, frequencies):
    """One head's (D,) vector: neighbouring dims of the first half turn, the others stay."""
    out = head.clone()
    for j, frequency in enumerate(frequencies):
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        out[2 * j] = head[2 * j] * cos + head[2 * j + 1] * sin
        out[2 * j + 1] = head[2 * j + 1] * cos - head[2 * j] * sin
    return out


def attend(layer, x, tokens, documents, get, shape, window, frequencies, scale):
    """(T, d) output of one attention layer."""
    length, heads, head_dim, d = len(tokens), shape.heads, shape.head_dim, shape.heads * shape.head_dim
    paired, long_layers = layer in (0, 2, 5, 9), (3, 10) if shape.layers == 11 else (min(3, shape.layers - 1),)
    factor_in, factor_out = get("scalars")[shape.layers + 2 * layer : shape.layers + 2 * layer + 2]
    weights = get("attn_bank")[layer - (layer > 6)]
    xn = norm(x)
    q, k, v = (factor_in * (xn @ weights[i * d : (i + 1) * d].T).view(length, heads, head_dim) for i in range(3))
    q, k = norm(q), norm(k)
    place = (lambda t, h: 2 * t + h % 2) if paired else (lambda t, h: t)
    for t in range(length):
        for h in range(heads):
            q[t, h] = rotated(q[t, h], place(t, h), frequencies)
            k[t, h] = rotated(k[t, h], place(t, h), frequencies)
    if layer in long_layers and not paired:
        k[1:, :, head_dim // 2 :] = k[:-1, :, head_dim // 2 :].clone()
    used = [0, 1][: shape.layers] + list(range(max(2, shape.layers - 3), shape.layers))
    if layer in used:
        table = used.index(layer)
        gate = 2 * torch.sigmoid(xn[:, :12] @ get("ve_gate_bank")[table].T)
        v = v + gate[:, :, None] * get(f"value_embeds.{table}.weight")[tokens].view(length, heads, head_dim)
    if paired:  # one stream of 2T rows with half the slots
        q, k, v = (y.reshape(2 * length, heads // 2, head_dim) for y in (q, k, v))
        documents = [document for document in documents for _ in range(2)]
    y = torch.zeros_like(v)
    for row in range(len(q)):
        seen = [j for j in range(max(0, row - window), row + 1) if documents[j] == documents[row]]
        for h in range(q.shape[1]):
            y[row, h] = torch.softmax(scale * (k[seen, h] @ q[row, h]), 0) @ v[seen, h]
    gate = torch.sigmoid(xn[:, :12] @ get("attn_gate_bank")[layer - (layer > 6)].T)
    y = y.reshape(length, heads, head_dim) * gate[:, :, None]
    return factor_out * (y.reshape(length, d) @ weights[3 * d :].T)


def forward(tensors, shape, tokens, documents, windows, long_windows):
    """(hidden states (T, d), softcapped logits (T, V)) of `tokens`; `documents` numbers the document of each."""

    def get(name):
        return tensors[name].double()

    layers, (short, long) = shape.layers, windows
    residual, bigram_factors = get("scalars")[:layers], get("scalars")[3 * layers : 4 * layers]
    smear, backout, skip = get("scalars")[4 * layers : 4 * layers + 3]
    e = get("embed.weight")[tokens]
    gate = smear * torch.sigmoid(e[1:, :12] @ get("smear_gate.weight").T)
    x = x0 = norm(torch.cat([e[:1], e[1:] + gate * e[:-1]]))
    ids = tokens.tolist()
    rows = [((36313 * b) ^ (27191 * a)) % (shape.bigram_vocab_size - 1) for a, b in zip(ids, ids[1:])]
    bigram = get("bigram_embed.weight")[[shape.bigram_vocab_size - 1, *rows]]
    frequencies, scale = yarn(shape.head_dim, long_windows)
    outputs = []
    for layer in range(layers):
        if layers == 11 and layer == 6:
            gate = torch.sigmoid(skip) * 2 * torch.sigmoid(x0[:, :12] @ get("skip_gate.weight").T)
            x = x + gate * outputs[3]
        x = residual[layer] * x + get("x0_lambdas")[layer] * x0 + bigram_factors[layer] * bigram
        if layer != 6:
            is_long = layer in ((3, 10) if layers == 11 else (min(3, layers - 1),))
            window = long if is_long else short
            x = x + attend(layer, x, tokens, documents, get, shape, window, frequencies, scale)
        up, down = get("mlp_bank")[layer]
        x = x + (norm(x) @ up.T).relu() ** 2 @ down
        outputs.append(x)
    if layers == 11:
        x = x - backout * outputs[7]
    hidden = norm(x)
    return hidden, 23 * torch.sigmoid((hidden @ get("lm_head.weight") + 5) / 7.5)
