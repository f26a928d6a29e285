"""n-gram teachers: counts and probabilities against a dictionary, look-up, loading, and KD from one."""

import dataclasses
import itertools
import json
import math
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from configs import ROOT, merged

from kdclimb import campaign, count_ngrams, expansion
from kdclimb.artifacts import ARTIFACTS, RunFolder, hashes
from kdclimb.config import ConfigError
from kdclimb.count_ngrams import count, make
from kdclimb.data import Dataset
from kdclimb.teacher import load_teacher, random_teacher
from kdclimb.train import Trainer

DISCOUNT = 0.75
NGRAMS = {"orders": [2, 3], "token_frac": [0.3], "entries": 8, "contexts": 300}


@pytest.fixture(scope="module")
def dataset(manifest):
    return Dataset(manifest)


@pytest.fixture(scope="module")
def with_ngrams():
    return campaign.load(merged("tests/tiny.yaml", {"kd": {"ngram": NGRAMS}}), ROOT)


@pytest.fixture(scope="module")
def configs(with_ngrams, manifest):
    """{order: the config of the n-gram teacher}."""
    return {run.config.order: run.config for run in expansion.tables(with_ngrams, manifest.parent.name)}


@pytest.fixture(scope="module")
def batches(dataset, configs):
    return dataset.val_batches(configs[2].validation.tokens, 128, 64, "cpu")


@pytest.fixture(scope="module")
def folders(configs, manifest, tmp_path_factory):
    """{order: the teacher's run folder}."""
    out = tmp_path_factory.mktemp("ngrams")
    for config in configs.values():
        make(config, out / config.run_id, manifest, threads=1)
    return {order: out / config.run_id for order, config in configs.items()}


class ByHand:
    """The same distributions from dictionaries, over the whole vocabulary."""

    def __init__(self, tokens, vocab):
        self.vocab, self.total = vocab, len(tokens) + vocab
        self.single = Counter(tokens)
        self.after = [{}, {}, {}]
        for width in (1, 2):
            for context, token in zip(itertools.zip_longest(*(tokens[i:] for i in range(width))), tokens[width:]):
                self.after[width].setdefault(context, Counter())[token] += 1

    def prob(self, token, context):
        if not context:
            return (self.single[token] + 1) / self.total
        lower, seen = self.prob(token, context[1:]), self.after[len(context)].get(context)
        if seen is None:
            return lower
        n = sum(seen.values())
        return max(seen[token] - DISCOUNT, 0) / n + DISCOUNT * len(seen) / n * lower


@pytest.fixture(scope="module")
def by_hand(dataset):
    (shard,) = dataset.shards("train")
    return ByHand(shard.tolist(), 384)


@pytest.mark.parametrize("order", [2, 3])
def test_every_entry_has_the_probability_of_the_dictionaries(order, dataset, configs, by_hand):
    table = count(dataset, configs[order])
    assert table.ids.shape == (384 + (300 if order == 3 else 0), 8)
    contexts = [(v,) for v in range(384)] + [divmod(pair, 384) for pair in table.pairs.tolist()]
    for row in range(0, len(contexts), 7):
        found = dict(zip(table.ids[row].tolist(), table.log_probs[row].double().exp().tolist(), strict=True))
        assert len(found) == 8  # no token twice
        assert found == pytest.approx({token: by_hand.prob(token, contexts[row]) for token in found}, rel=1e-5)
        seen = by_hand.after[len(contexts[row])].get(contexts[row], Counter())
        assert sum(seen[token] for token in found) == sum(times for _, times in seen.most_common(8))
    assert (table.log_probs.double().exp().sum(dim=1) <= 1 + 1e-6).all()


def test_the_frequent_pairs_have_rows_and_none_spans_documents(dataset, configs, by_hand):
    pairs = [divmod(pair, 384) for pair in count(dataset, configs[3]).pairs.tolist()]
    assert pairs == sorted(pairs) and dataset.bos not in {second for _, second in pairs}
    times = {(a, b): by_hand.after[1][(a,)][b] for a, b in pairs}
    every = {(a, b): n for (a,), seen in by_hand.after[1].items() for b, n in seen.items() if b != dataset.bos}
    assert sorted(times.values()) == sorted(every.values())[-300:]


def test_blocks_and_few_tokens_change_nothing_but_what_is_counted(dataset, configs, monkeypatch):
    whole = count(dataset, configs[3])
    monkeypatch.setattr(count_ngrams, "BLOCK", 1000)
    monkeypatch.setattr(count_ngrams, "MATCHES", 64 * 5)
    for name, tensor in count(dataset, configs[3]).tensors().items():
        assert torch.equal(tensor, whole.tensors()[name]), name
    few = count(dataset, dataclasses.replace(configs[2], tokens=2500))
    (shard,) = dataset.shards("train")
    single = Counter(shard[:2500].tolist())
    assert few.unigram.tolist() == pytest.approx([(single[v] + 1) / (2500 + 384) for v in range(384)])


@pytest.mark.parametrize(("lengths", "beyond"), [((2500, 2500), 2500), ((900, 1600, 900), 2500), ((5000,), 2499)])
def test_at_the_limit_of_tokens_each_triple_has_its_pair(dataset, configs, lengths, beyond):
    """A whole shard of just so many tokens, or a limit within one; a triple there whose second pair is nowhere else."""
    (shard,) = dataset.shards("train")
    ends, tokens = [0, *itertools.accumulate(lengths)], shard[: sum(lengths)].copy()
    tokens[tokens == 383] = 1
    pairs = Counter(pair for pair in itertools.pairwise(tokens[:2500].tolist()) if dataset.bos not in pair)
    tokens[beyond : beyond + 3] = (*pairs.most_common(1)[0][0], 383)
    shards = [tokens[start:end] for start, end in itertools.pairwise(ends)]
    few = SimpleNamespace(shards=lambda split: shards, bos=dataset.bos)
    table = count(few, dataclasses.replace(configs[3], tokens=2500, entries=384))
    sums = table.log_probs.double().exp().sum(dim=1)
    assert sums.tolist() == pytest.approx([1.0] * len(sums), abs=1e-5)
    counted = Counter(tokens[:2500].tolist())
    assert table.unigram.tolist() == pytest.approx([(counted[v] + 1) / (2500 + 384) for v in range(384)])


def test_the_clock_counts_and_does_not_verify(manifest, configs, monkeypatch):
    seen = []
    real = Dataset.shards

    def shards(self, split):
        seen.append(now[0])
        return real(self, split)

    now = [0.0]
    monkeypatch.setattr(Dataset, "shards", shards)
    monkeypatch.setattr(count_ngrams.time, "perf_counter", lambda: now.__setitem__(0, now[0] + 1.0) or now[0])
    count_ngrams.timed_count(Dataset(manifest), configs[2])
    assert seen[0] == 0.0  # before the first look at the clock


def test_a_batch_is_looked_up_by_its_tokens(dataset, configs, batches):
    table = count(dataset, configs[3])
    rows, inputs = table.rows(batches[0].inputs), batches[0].inputs.tolist()
    place = {pair: i for i, pair in enumerate(table.pairs.tolist())}
    expected = [inputs[0]]
    for before, token in itertools.pairwise(inputs):
        i = place.get(before * 384 + token)
        expected.append(token if i is None else 384 + i)
    assert rows.tolist() == expected and max(expected) >= 384
    target = table.target(batches[0], "label")
    assert torch.equal(target.ids, table.ids[rows]) and target.tail == "label"
    bigram = count(dataset, configs[2])
    assert torch.equal(bigram.rows(batches[0].inputs), batches[0].inputs)


def test_the_score_is_the_cross_entropy_of_a_distribution(dataset, configs, batches):
    table = count(dataset, configs[2])
    probs, ids = table.log_probs.double().exp(), table.ids.long()
    dense = table.unigram.double().expand(384, 384).clone()
    dense.scatter_(1, ids, 0.0)
    dense *= ((1 - probs.sum(1)) / dense.sum(1))[:, None]
    dense.scatter_(1, ids, probs)
    assert torch.allclose(dense.sum(1), torch.ones(384, dtype=torch.float64))
    inputs, labels = (torch.cat([getattr(b, name) for b in batches]) for name in ("inputs", "labels"))
    assert table.score(batches) == pytest.approx(-dense[inputs, labels].log().mean().item(), rel=1e-6)


def test_a_higher_order_knows_more_of_what_it_counted(dataset, configs):
    """More entries, a higher order: each lowers the loss on the training tokens themselves."""
    train = dataset.train_stream(0, 64)
    batches = [train.next_batch(512, "cpu") for _ in range(8)]
    few, more = (count(dataset, dataclasses.replace(configs[2], entries=k)).score(batches) for k in (8, 64))
    triples = count(dataset, dataclasses.replace(configs[3], entries=64, contexts=5000)).score(batches)
    assert triples < more - 0.1 < few - 0.1 < math.log(384)


def test_its_run_is_a_teacher_like_another(folders, configs, batches, dataset):
    folder, config = folders[2], configs[2]
    table, val = load_teacher(folder / "checkpoints", batches, {"data_hash": dataset.hash}, device="cpu")
    assert json.loads((folder / "checkpoints/model.json").read_text())["final_val"] == val
    assert torch.equal(table.ids, count(dataset, config).ids)
    with pytest.raises(ValueError, match="data_hash"):
        load_teacher(folder / "checkpoints", batches, {"data_hash": "x"}, device="cpu")
    with pytest.raises(ValueError, match="kd.random_teacher"):
        random_teacher(folder / "checkpoints", 0, batches, device="cpu")
    with pytest.raises(ConfigError, match="is called"):
        make(config, folder.parent / "other", folder, threads=1)


def test_a_counted_table_comes_back_unless_the_code_differs(folders, configs, manifest, tmp_path, monkeypatch):
    """As after a master that was killed: Snakemake deletes what the job left, and starts it again."""
    out = tmp_path / configs[2].run_id
    shutil.copytree(folders[2], out)
    before = {
        name: (out / name).read_bytes() for name in ("status.json", "summary.csv", "checkpoints/model.safetensors")
    }
    for name in ARTIFACTS:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
    monkeypatch.setattr(count_ngrams, "timed_count", None)
    make(configs[2], out, manifest, threads=1)
    assert {name: (out / name).read_bytes() for name in before} == before
    monkeypatch.setattr(count_ngrams, "source_hash", lambda entry: "another")
    with pytest.raises(TypeError):
        make(configs[2], out, manifest, threads=1)
    make(configs[2], out, manifest, threads=1, any_code=True)
    assert {name: (out / name).read_bytes() for name in before} == before


def test_a_table_that_a_bundle_brought_comes_back_whatever_is_here(folders, configs, tmp_path):
    out = tmp_path / configs[2].run_id
    shutil.copytree(folders[2], out)
    shutil.rmtree(out / ".state")
    RunFolder(out).keep_imported(hashes(out))
    for name in ARTIFACTS:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
    make(configs[2], out, tmp_path / "no manifest", threads=1)
    for name in ("status.json", "summary.csv", "checkpoints/model.safetensors"):
        assert (out / name).read_bytes() == (folders[2] / name).read_bytes()


@pytest.mark.parametrize(("key", "value"), [("order", 4), ("discount", 1.0), ("entries", 0)])
def test_a_wrong_config_is_refused(configs, key, value):
    with pytest.raises(ConfigError, match=f"kd.ngram.{key}"):
        dataclasses.replace(configs[2], **{key: value})


def test_the_arm_is_kd_on_ces_schedule_with_the_table_as_its_teacher(with_ngrams, tiny, configs):
    runs = [r for r in expansion.expand(with_ngrams, {}, configs[2].data.id) if r.arm == "ngram"]
    assert [(r.label, r.config.seed) for r in runs] == [(f"{n}-gram-first0.3", seed) for n in (2, 3) for seed in (0, 1)]
    for run in runs:
        kd = run.config.kd
        assert kd.teacher in {config.run_id for config in configs.values()}
        assert (kd.token_frac, kd.temperature, kd.post_stop_lr) == (0.3, 1.0, 1.0)
        ce = dataclasses.replace(run.config, kd=None)
        assert ce in [r.config for r in expansion.expand(tiny, {}, configs[2].data.id) if r.arm == "ce"]
    assert not expansion.tables(tiny)


def student(with_ngrams, manifest, order, folder, **changes):
    run = next(
        r for r in expansion.expand(with_ngrams, {}, manifest.parent.name) if r.label.startswith(f"{order}-gram")
    )
    kd = dataclasses.replace(run.config.kd, teacher=folder.name, **changes)
    return dataclasses.replace(run.config, kd=kd)


@pytest.mark.parametrize("order", [2, 3])
def test_kd_from_it_teaches_in_its_first_tokens(order, with_ngrams, manifest, folders, train, tmp_path):
    config = student(with_ngrams, manifest, order, folders[order])
    code, out = train(config, tmp_path, folders[order] / "checkpoints")
    assert code == 0
    columns, *lines = ((out / "steps.csv").read_text().split("\n"))[:-1]
    steps = [dict(zip(columns.split(","), line.split(","), strict=True)) for line in lines]
    active = [row for row in steps if row["kd_active"] == "1"]
    measured = [float(row["kd_share"]) for row in active if row["kd_share"]]
    assert len(measured) > 2 and all(0.3 < share < 0.8 for share in measured[1:])  # normalised from the second on
    shares = [sum(int(row["batch_tokens"]) for row in rows) for rows in (active, steps)]
    assert 0.3 <= shares[0] / shares[1] < 0.32
    assert float(active[-1]["loss_soft"]) < 0.7 * float(active[0]["loss_soft"])


def test_another_temperature_is_refused(with_ngrams, manifest, folders, train, tmp_path):
    config = student(with_ngrams, manifest, 2, folders[2], temperature=2.0)
    with pytest.raises(ConfigError, match="temperature"):
        train(config, tmp_path, folders[2] / "checkpoints")


def test_the_tail_is_the_loss_of_that_name(with_ngrams, manifest, folders, dataset):
    soft = {}
    for tail in ("ghost", "label", "renormalised"):
        config = student(with_ngrams, manifest, 2, folders[2], tail=tail)
        soft[tail] = Trainer(config, dataset, folders[2] / "checkpoints", "reference").train_step()["loss_soft"]
    assert len(set(soft.values())) == 3
