"""Count an n-gram teacher from the training shards, and write it as a finished run.

Interpolated absolute discounting (Ney, Essen and Kneser 1994): of a context h that was seen n times, with D different
tokens after it,
    p(w | h) = max(count(h w) - discount, 0) / n + discount * D / n * p(w | h')
where h' is h without its first token, down to unigrams with 1 added to each count. A row keeps the most frequent
tokens after its context and, if they are fewer than k, the likeliest others: each with its exact probability.
Symbols as in `kdclimb/ngram.py`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdclimb.artifacts import DeviceLease, RunFolder, write_json, write_tables, write_text
from kdclimb.config import ConfigError, NgramConfig, canonical_json
from kdclimb.data import Dataset
from kdclimb.ngram import NgramTable
from kdclimb.provenance import device_identity, device_kind, source_hash, versions
from kdclimb.teacher import data_facts, save_table

ENTRY = "workflow/scripts/ngram.py"
BLOCK = 2**24  # tokens counted in one go
MATCHES = 2**24  # comparisons of entries in one go
SEEN = 2  # a pair has a distribution of its own from so many occurrences on


@dataclass(frozen=True)
class Counts:
    """How often each token follows each context: `keys` ascending, context * V + token, and `counts` (n,) int64."""

    keys: Tensor
    counts: Tensor

    @classmethod
    def of(cls, blocks: Iterable[Tensor], device: str) -> Counts:
        keys = counts = torch.zeros(0, dtype=torch.int64, device=device)
        for block in blocks:
            found, times = block.unique(return_counts=True)
            keys, place = torch.cat([keys, found]).unique(return_inverse=True)
            counts = torch.zeros_like(keys).index_add_(0, place, torch.cat([counts, times]))
        return cls(keys, counts)


@dataclass(frozen=True)
class Level:
    """One order's distributions, over C contexts."""

    keys: Tensor  # (n,) of its Counts
    probs: Tensor  # (n,) float64: of each key's token after its context
    back: Tensor  # (C,) float64: weight of the lower order

    @classmethod
    def of(cls, counts: Counts, contexts: int, vocab: int, discount: float, lower: Tensor) -> Level:
        """`lower`: (n,) the lower order's probability of each key's token."""
        context = counts.keys // vocab
        seen = torch.zeros(contexts, dtype=torch.int64, device=lower.device).index_add_(0, context, counts.counts)
        different = torch.bincount(context, minlength=contexts)
        back = torch.where(seen > 0, discount * different.double() / seen.clamp_min(1), 1.0)
        return cls(counts.keys, (counts.counts.double() - discount) / seen[context] + back[context] * lower, back)


def count(dataset: Dataset, config: NgramConfig) -> NgramTable:
    """The table of `config`. Memory goes with the different pairs (and triples) of tokens, not with the tokens."""
    vocab, discount, device = config.data.vocab_size, config.discount, config.device
    k = min(config.entries, vocab)
    single = sum(torch.bincount(tokens, minlength=vocab) for tokens in _blocks(dataset, config, 1)) + 1
    unigram = single.double() / single.sum()
    pairs = Counts.of((t[:-1] * vocab + t[1:] for t in _blocks(dataset, config, 2)), device)
    bigram = Level.of(pairs, vocab, vocab, discount, unigram[pairs.keys % vocab])
    top = unigram.argsort(descending=True, stable=True)[:k]
    ids, probs = rows(pairs, bigram, vocab, k, top[None], unigram[top][None])
    chosen = pairs.keys[:0]
    if config.order == 3:
        chosen = _contexts(pairs, config.contexts, vocab, dataset.bos)
        triples = Counts.of((_triples(t, chosen, vocab) for t in _blocks(dataset, config, 3)), device)
        second, token = (chosen % vocab)[triples.keys // vocab], triples.keys % vocab
        lower = bigram.probs[torch.searchsorted(pairs.keys, second * vocab + token)]
        trigram = Level.of(triples, len(chosen), vocab, discount, lower)
        more = rows(triples, trigram, vocab, k, ids[chosen % vocab], probs[chosen % vocab])
        ids, probs = torch.cat([ids, more[0]]), torch.cat([probs, more[1]])
    return NgramTable(ids.int(), probs.log().float(), unigram.float(), chosen)


def _blocks(dataset: Dataset, config: NgramConfig, width: int) -> Iterator[Tensor]:
    """The first `config.tokens` training tokens in blocks that overlap so that each n-gram of `width` lies in one."""
    left = config.tokens
    for shard in dataset.shards("train"):
        shard = shard[:left]  # by tokens, so that each triple that is counted has its pair
        for start in range(0, len(shard) - width + 1, BLOCK):
            tokens = shard[start : start + BLOCK + width - 1]
            yield torch.from_numpy(tokens.astype(np.int64)).to(config.device)
        left -= len(shard)
        if left <= 0:
            return


def _contexts(pairs: Counts, most: int, vocab: int, bos: int) -> Tensor:
    """(C,) the most frequent pairs, ascending. None ends with the token that documents start with."""
    usable = (pairs.counts >= SEEN) & (pairs.keys % vocab != bos)
    keys, counts = pairs.keys[usable], pairs.counts[usable]
    return keys[counts.argsort(descending=True, stable=True)[:most]].sort().values


def _triples(tokens: Tensor, chosen: Tensor, vocab: int) -> Tensor:
    """Key of each triple whose first two tokens are one of the chosen pairs: its place among them * V + the third."""
    pair = tokens[:-2] * vocab + tokens[1:-1]
    if not len(chosen):
        return pair[:0]
    place = torch.searchsorted(chosen, pair).clamp_max(len(chosen) - 1)
    known = chosen[place] == pair
    return place[known] * vocab + tokens[2:][known]


def rows(
    counts: Counts, level: Level, vocab: int, k: int, lower_ids: Tensor, lower_probs: Tensor
) -> tuple[Tensor, Tensor]:
    """ids (C, k) int64 and probs (C, k) float64. lower_*: (C, k) or (1, k), the lower order's likeliest tokens, best
    first, which fill rows that have less than k of their own.
    """
    order = counts.counts.argsort(descending=True, stable=True)
    order = order[(counts.keys[order] // vocab).argsort(stable=True)]  # by context, most frequent first, then by id
    context, num = counts.keys[order] // vocab, len(level.back)
    every = torch.arange(num, device=context.device)
    place = torch.arange(len(order), device=context.device) - torch.searchsorted(context, every)[context]
    kept = place < k
    ids = torch.full((num, k), -1, device=context.device)
    probs = torch.zeros(num, k, dtype=torch.float64, device=context.device)
    ids[context[kept], place[kept]] = counts.keys[order][kept] % vocab
    probs[context[kept], place[kept]] = level.probs[order][kept]
    lower_ids, lower_probs = lower_ids.expand(num, k), lower_probs.expand(num, k)
    for part in every.split(max(1, MATCHES // k**2)):
        ids[part], probs[part] = _filled(
            ids[part], probs[part], lower_ids[part], level.back[part, None] * lower_probs[part]
        )
    return ids, probs


def _filled(ids: Tensor, probs: Tensor, lower_ids: Tensor, lower_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of k: their own entries, then those of the lower order that they don't have (ids of -1 are unused)."""
    new = (lower_ids[:, :, None] != ids[:, None, :]).all(dim=2)
    rank = torch.cat([torch.where(ids >= 0, 0, 2), torch.where(new, 1, 2)], dim=1)
    chosen = rank.argsort(dim=1, stable=True)[:, : ids.shape[1]]
    return (torch.cat(both, dim=1).gather(1, chosen) for both in ((ids, lower_ids), (probs, lower_probs)))


def make(config: NgramConfig, out: Path, manifest: Path, threads: int, any_code: bool = False) -> None:
    """Count the teacher and write its run into the folder `out`; its training time is that of counting. One that was
    counted before from the same data by the same code, or with `any_code` by any, is brought back; so is one that a
    bundle brought.

    Raises ConfigError if the folder or the device don't fit the config.
    """
    if out.name != config.run_id:
        raise ConfigError(f"{out}: the folder of this config is called {config.run_id}")
    folder = RunFolder(out)
    if folder.restore_imported():
        return
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda is asked for, but torch finds no CUDA GPU here; allowed: auto, cpu")
    torch.set_num_threads(threads)
    torch.zeros(1, device=config.device)  # a GPU is woken outside the clock
    with folder.lock(), DeviceLease(device_identity(config.device)) as lease:
        dataset, started = Dataset(manifest), datetime.now(UTC)
        key = {"code": source_hash(ENTRY), "data": dataset.hash, "device": device_kind(config.device)}
        if folder.restore_complete(key, any_code=any_code):  # what a job counted whose master was killed
            return
        folder.drop_unfinished()
        (out / "status.json").unlink(missing_ok=True)
        table, tokens, cost_ms = timed_count(dataset, config)
        cut = config.validation.cut(config.max_doc_tokens)
        packing = config.validation.tokens, config.micro_batch_tokens, cut
        val_loss = table.score(dataset.val_batches(*packing, config.device))
        facts = data_facts(dataset, *packing) | {"run_id": config.run_id, "step": 0, "final_val": val_loss}
        (out / "checkpoints").mkdir(exist_ok=True)
        save_table(out / "checkpoints", table, facts | {"order": config.order})
        summary = {"tokens": tokens, "train_time_ms": cost_ms, "best_val": val_loss, "final_val": val_loss}
        summary |= {"params_stored": table.log_probs.numel(), "flops_per_token": 0.0, "data_hash": dataset.hash}
        command = f"PYTHONPATH=. python {ENTRY} --config {out}/config.json --out {out} --manifest {manifest}"
        size = " x ".join(map(str, table.ids.shape))
        said = f"{tokens:,} tokens in {cost_ms:.1f} ms ({config.clock}): {size} entries, val_loss {val_loss:.4f}"
        write_text(out / "train.log", f"{command} --threads {threads}\n{canonical_json(versions())}\n{said}\n")
        folder.finish(_write(out, config, summary, started, threads, shared=lease.shared()), key)


def timed_count(dataset: Dataset, config: NgramConfig) -> tuple[NgramTable, int, float]:
    """(table, tokens counted, what that took in ms, on the config's clock)."""
    dataset.shards("train")  # verifies them, which no training's clock counts either
    begun = time.perf_counter()
    table = count(dataset, config)
    if config.device == "cuda":
        torch.cuda.synchronize()
    cost_ms = 1e3 * (time.perf_counter() - begun)
    tokens = min(config.tokens, sum(len(shard) for shard in dataset.shards("train")))
    if config.clock == "modelled":  # a sort of the tokens for each order that is counted
        cost_ms = (config.order - 1) * tokens * math.log2(tokens) / (config.modelled_tflops * 1e9)
    return table, tokens, cost_ms


def _write(out: Path, config: NgramConfig, summary: dict, started: datetime, threads: int, *, shared: bool) -> dict:
    """The run's files but its checkpoint, its log, and status.json, whose content is returned."""
    device = device_kind(config.device)
    vals = [{"step": 0, "val_loss": summary["final_val"]} | {key: summary[key] for key in ("tokens", "train_time_ms")}]
    summary = summary | {"run_id": config.run_id, "arm": "ngram", "status": "ok", "clock": config.clock}
    summary |= {"device": device, "threads": threads, "shared_device": int(shared)}
    write_json(out / "config.json", dataclasses.asdict(config))
    write_tables(out, config.run_id, [], vals, summary)
    return {
        "status": "ok",
        "reason": None,
        "started": started.isoformat(timespec="seconds"),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "threads": threads,
        "shared_device": shared,
        "code_hash": source_hash(ENTRY),  # not in the summary too: it is not the trainer's
        "versions": versions(),
    }
