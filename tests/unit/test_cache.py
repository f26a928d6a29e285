"""Caches of a teacher's targets: the same KD as with the teacher itself, and refused where they don't fit."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from configs import ROOT, merged
from test_damage import DAMAGE

from kdclimb import campaign, evaluate, expansion, write_cache
from kdclimb.artifacts import ABSENT, WEIGHTS_ELSEWHERE, DiskFull, seal, write_json
from kdclimb.cache import DESCRIPTION, TargetCache
from kdclimb.config import ConfigError
from kdclimb.data import Dataset
from kdclimb.kernels import DenseTeacher, SparseTeacher, distill_loss
from kdclimb.sparsify import sample
from kdclimb.stop import EXIT_INTERRUPTED
from kdclimb.teacher import read_description
from kdclimb.train import Trainer

SHORT = {"token_frac": 0.1, "cache": "hidden", "top_k": 384, "samples": 200}


@pytest.fixture(scope="module")
def expanded(manifest, tiny_runs):
    """cached(kind, **kd) -> (the screened run with KD from a cache, the cache's config)."""
    selected = next(run.run_id for run in tiny_runs if run.arm == "teacher")
    name = next(run.label for run in tiny_runs if run.arm == "teacher")
    decisions = {"projected": {"survivors": [name]}, "selected": {"run_id": selected}}

    def cached(kind, **kd):
        kd = SHORT | {"cache": kind} | kd
        if kind == "hidden":
            kd["top_k"] = 0
        config = campaign.load(merged("tests/tiny.yaml", {"kd": kd}), ROOT)
        data = manifest.parent.name
        run = next(run for run in expansion.expand(config, decisions, data) if run.arm == "screen")
        return run.config, expansion.caches(config, decisions, data)[run.config.kd.cache]

    return cached


@pytest.fixture(scope="module")
def caches(expanded, manifest, teacher_folder, tmp_path_factory):
    """{kind: (run config, cache folder)}."""
    made = {}
    for kind in ("hidden", "top_k", "samples"):
        run, cache = expanded(kind)
        folder = tmp_path_factory.mktemp("caches") / cache.cache_id
        write_cache.write(cache, folder, manifest, teacher_folder, threads=1)
        made[kind] = run, folder
    return made


@pytest.fixture(scope="module")
def dataset(manifest):
    return Dataset(manifest)


def first_steps(trainer, steps=4):
    return [trainer.train_step() for _ in range(steps)]


@pytest.fixture
def trainers(caches, dataset, teacher_folder):
    """both(kind) -> a trainer with the cache and one with the teacher itself."""

    def both(kind):
        run, folder = caches[kind]
        online = dataclasses.replace(run, kd=dataclasses.replace(run.kd, cache=None))
        return Trainer(run, dataset, teacher_folder, "reference", folder), Trainer(
            online, dataset, teacher_folder, "reference"
        )

    return both


def test_cached_hidden_states_are_those_of_the_teacher_to_bf16(trainers):
    cached, online = trainers("hidden")
    stream = cached.dataset.train_stream(cached.config.seed, 64)
    for place in range(cached.cache.config.micro_batches):
        target, truth = cached.cache.target(place, "cpu"), online.kd.target(stream.next_batch(128, "cpu"), place)
        assert isinstance(target, DenseTeacher) and target.hidden.dtype == torch.float32
        assert torch.equal(target.hidden, truth.hidden.bfloat16().float())


@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_kd_from_a_cache_is_kd_from_the_teacher_to_rounding(kind, trainers):
    cached, online = (first_steps(trainer) for trainer in trainers(kind))
    for name, rel in {"loss_hard": 5e-4, "loss_soft": 2e-3, "grad_norm": 2e-3}.items():
        assert [row[name] for row in cached] == pytest.approx([row[name] for row in online], rel=rel), name


def test_cached_samples_are_unbiased(trainers):
    """The means of gradient and loss over many caches' worth of draws are the exact ones, and one draw's are not."""
    cached, _ = trainers("samples")
    assert cached.cache.target(0, "cpu").counts.sum(dim=1).eq(200).all()
    torch.manual_seed(0)
    teacher = DenseTeacher(torch.randn(6, 5), torch.randn(20, 5), None)
    generator = torch.Generator().manual_seed(0)
    hidden, head, labels = torch.randn(6, 4), torch.randn(20, 4), torch.zeros(6, dtype=torch.int64)

    def gradient_and_loss(target):
        leaf = hidden.clone().requires_grad_()
        loss = distill_loss(leaf, head, target, labels, hard_weight=0.0, soft_weight=1.0, temperature=2.0)
        loss.total.backward()
        return leaf.grad, loss.soft

    found = [gradient_and_loss(sample(teacher, 10, 2.0, generator)) for _ in range(600)]
    for exact, draws in zip(gradient_and_loss(teacher), map(torch.stack, zip(*found)), strict=True):
        deviation = (draws.mean(dim=0) - exact).norm() / exact.norm()
        one = (draws - exact).flatten(1).norm(dim=1).mean() if exact.dim() else (draws - exact).abs().mean()
        assert deviation < 3 * one / exact.norm() / 600**0.5 < one / exact.norm() / 5


def test_kd_from_samples_weighs_as_kd_from_the_teacher(trainers):
    cached, online = (first_steps(trainer, 6) for trainer in trainers("samples"))
    for name in ("loss_soft", "kd_norm"):
        assert [row[name] for row in cached] == pytest.approx([row[name] for row in online], rel=0.05), name


def test_a_run_with_a_cache_resumes_and_stops_as_one_without(trainers):
    cached, _ = trainers("hidden")
    silent = SimpleNamespace(update=lambda n: None, report=lambda text: None)
    cached.train(lambda: None, lambda: False, silent)
    active = [row["step"] for row in cached.steps if row["kd_active"]]
    tokens = 0.1 * sum([25 * 256, 25 * 512])
    assert len(active) == -(-tokens // 256) and cached.kd.stop_step == len(active)
    assert cached.cache.config.micro_batches == len(active) * 2


def test_a_cache_of_one_step_is_enough_to_warm_up(expanded, manifest, dataset, teacher_folder, tmp_path):
    run, cache = expanded("hidden", token_frac=0.001)
    assert cache.micro_batches == 2
    write_cache.write(cache, tmp_path / cache.cache_id, manifest, teacher_folder, threads=1)
    trainer = Trainer(run, dataset, teacher_folder, "reference", tmp_path / cache.cache_id)
    trainer.warm_up()
    assert [row["kd_active"] for row in first_steps(trainer, 1)] == [1] and trainer.kd.advance(1, 256)


def test_micro_batches_are_read_in_any_order(caches, trainers):
    cache = trainers("top_k")[0].cache
    forth = [cache.target(place, "cpu").ids for place in range(4)]
    back = [cache.target(place, "cpu").ids for place in (3, 1, 0, 2)]
    assert all(torch.equal(back[i], forth[place]) for i, place in enumerate((3, 1, 0, 2)))
    with pytest.raises(ValueError, match="is asked"):
        cache.target(cache.config.micro_batches, "cpu")


def test_the_modelled_clock_charges_what_is_left_of_the_teacher(trainers):
    for kind, part in (("hidden", "head"), ("top_k", "nothing")):
        cached, online = trainers(kind)
        config = online.kd.teacher.config
        left = 2 * config.dim * config.vocab_size if part == "head" else 0
        assert cached.flops_per_token()[1] == left < online.flops_per_token()[1]


class Killed(BaseException):
    """Ends a pass as SIGKILL does: nothing is caught, nothing more is written."""


@pytest.fixture
def again(caches, expanded, manifest, teacher_folder, tmp_path, monkeypatch):
    """again(kind, kill=None, stop=None) -> (exit code, the cache's folder, how many micro-batches the teacher made), of
    one more pass over `kind` in tmp_path, which is killed in the micro-batch `kill`, or asked to stop before `stop`.
    """

    def call(kind, kill=None, stop=None):
        (_, folder), (_, cache) = caches[kind], expanded(kind)
        made = []

        def target(teacher, batch):
            if kill is not None and len(made) == 1 + kill:  # the first is the warm-up
                raise Killed
            made.append(batch)
            return evaluate.teacher_target(teacher, batch)

        monkeypatch.setattr(write_cache, "teacher_target", target)
        monkeypatch.setattr(write_cache.StopRequests, "asked", lambda self: stop is not None and len(made) > stop)
        code = write_cache.write(cache, tmp_path / folder.name, manifest, teacher_folder, threads=1)
        return code, tmp_path / folder.name, len(made) - 1

    return call


def same(folder, other):
    """Whether two caches are equal to the byte, but for what the description says of time."""
    names = {file.name for file in folder.iterdir()}
    told = [json.loads((f / DESCRIPTION).read_text()) for f in (folder, other)]
    for description in told:
        for key in ("cost_ms", "broken", "sha256"):
            del description[key]
    files = names - {DESCRIPTION}
    return (
        names == {file.name for file in other.iterdir()}
        and told[0] == told[1]
        and all((folder / name).read_bytes() == (other / name).read_bytes() for name in files)
    )


@pytest.mark.parametrize("kind", ["hidden", "top_k", "samples"])
def test_a_pass_that_is_stopped_or_killed_goes_on_and_is_the_same_to_the_byte(kind, caches, again, monkeypatch):
    whole = caches[kind][1]
    code, folder, made = again(kind, stop=3)
    assert (code, made) == (EXIT_INTERRUPTED, 3) and not folder.exists()
    monkeypatch.setattr(write_cache, "SAVE_SECONDS", -1.0)
    with pytest.raises(Killed):
        again(kind, kill=4)
    monkeypatch.setattr(write_cache, "SAVE_SECONDS", 30.0)
    code, folder, made = again(kind)
    total = len(json.loads((whole / DESCRIPTION).read_text())["checksums"]["hidden" if kind == "hidden" else "ids"])
    assert (code, made) == (0, total - 7) and same(folder, whole)
    assert json.loads((folder / DESCRIPTION).read_text())["broken"] == 2


def test_a_whole_cache_whose_output_was_deleted_is_back_without_the_teacher(caches, again):
    """As by Snakemake, for a job whose end a killed master did not see."""
    _, folder, _ = again("hidden")
    shutil.rmtree(folder)
    code, folder, made = again("hidden")
    assert (code, made) == (0, 0) and same(folder, caches["hidden"][1])
    reader = (folder / "hidden.bin").open("rb")
    (folder.with_name(f".{folder.name}") / "state.json").unlink()
    assert again("hidden")[0] == 0 and same(folder, caches["hidden"][1])
    assert reader.read() == (folder / "hidden.bin").read_bytes()  # what is read is not written to


def test_a_pass_that_is_killed_before_its_first_state_begins_again(caches, again):
    with pytest.raises(Killed):
        again("hidden", kill=4)
    assert again("hidden")[0] == 0 and same(again("hidden")[1], caches["hidden"][1])


@pytest.mark.parametrize(("at", "kept"), [(0, 0), (-1, 4), (None, 3)])
def test_a_pass_goes_on_from_its_last_micro_batch_that_is_whole(at, kept, caches, again, capsys):
    _, folder, _ = again("hidden", stop=5)
    file = folder.with_name(f".{folder.name}") / "files/hidden.bin"
    raw = bytearray(file.read_bytes())
    if at is None:
        del raw[3 * len(raw) // 5 + 7 :]
    else:
        raw[at] ^= 1
    file.write_bytes(raw)
    code, folder, made = again("hidden")
    total = len(json.loads((folder / DESCRIPTION).read_text())["checksums"]["hidden"])
    assert (code, made) == (0, total - kept) and same(folder, caches["hidden"][1])
    assert f"damaged from micro-batch {kept} on" in capsys.readouterr().out


def test_a_damaged_state_costs_the_pass_and_no_more(caches, again, capsys):
    _, folder, _ = again("hidden", stop=5)
    state = folder.with_name(f".{folder.name}") / "state.json"
    state.write_text(state.read_text().replace("0", "1", 1))
    code, folder, _ = again("hidden")
    assert code == 0 and same(folder, caches["hidden"][1])
    assert f"{state}: damaged" in capsys.readouterr().out


@pytest.fixture
def copied(caches, tmp_path):
    """(run config, a copy of the hidden states' cache, free to change)."""
    run, folder = caches["hidden"]
    return run, shutil.copytree(folder, tmp_path / folder.name)


@pytest.fixture
def opened(dataset, teacher_folder):
    def open_(run, folder):
        online = dataclasses.replace(run, kd=dataclasses.replace(run.kd, cache=None))
        teacher = Trainer(online, dataset, teacher_folder, "reference").teacher[0]
        expected = {"teacher_sha256": read_description(teacher_folder)["weights_sha256"], "data_hash": dataset.hash}
        return TargetCache(folder, run, teacher, expected)

    return open_


def test_a_truncated_cache_is_refused(copied, opened):
    run, folder = copied
    opened(run, folder)
    file = folder / "hidden.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match="truncated"):
        opened(run, folder)
    (folder / DESCRIPTION).unlink()
    with pytest.raises(ValueError, match="no whole cache"):
        opened(run, folder)


def test_a_damaged_cache_is_refused_where_it_is_read(copied, opened):
    run, folder = copied
    raw = bytearray((folder / "hidden.bin").read_bytes())
    raw[-1] ^= 1
    (folder / "hidden.bin").write_bytes(raw)
    cache = opened(run, folder)
    cache.target(0, "cpu")
    with pytest.raises(ValueError, match="is damaged"):
        cache.target(cache.config.micro_batches - 1, "cpu")


@pytest.mark.parametrize("way", DAMAGE)
def test_no_damage_to_a_cache_is_taught_from(way, caches, opened, tmp_path):
    """Any file of any kind of cache: refused when it is opened, or where it is read, and named."""
    for run, folder in caches.values():
        copied, rng = shutil.copytree(folder, tmp_path / folder.name), random.Random(way)
        for file in sorted(copied.iterdir()):
            whole = file.read_bytes()
            file.write_bytes(DAMAGE[way](whole, rng))
            with pytest.raises(ValueError, match=file.name):
                cache = opened(run, copied)
                for place in range(cache.config.micro_batches):
                    cache.target(place, "cpu")
            file.write_bytes(whole)


@pytest.mark.parametrize("key", ["teacher_sha256", "data_hash"])
def test_a_cache_of_another_teacher_or_other_data_is_stale(key, copied, opened):
    run, folder = copied
    description = json.loads((folder / DESCRIPTION).read_text()) | {key: "x"}
    write_json(folder / DESCRIPTION, seal(description))
    with pytest.raises(ValueError, match=f"stale: {key}"):
        opened(run, folder)


def test_a_cache_for_another_run_is_stale(caches, copied, opened):
    run, folder = copied
    with pytest.raises(ValueError, match="stale: seed"):
        opened(dataclasses.replace(run, seed=1), folder)
    sparse, its_folder = caches["top_k"]
    warmer = dataclasses.replace(sparse, kd=dataclasses.replace(sparse.kd, temperature=3.0))
    with pytest.raises(ValueError, match="stale: temperature"):
        opened(warmer, its_folder)
    with pytest.raises(ValueError, match="stale: id"):
        opened(sparse, folder)


def test_a_run_that_needs_a_cache_says_so(caches, train, teacher_folder, tmp_path):
    run, _ = caches["hidden"]
    with pytest.raises(ValueError, match="no --cache"):
        train(run, tmp_path, teacher_folder)
    with pytest.raises(ValueError, match="no whole cache"):
        train(run, tmp_path, teacher_folder, cache=tmp_path / "none")


def test_cost_and_size_are_told(caches, expanded, train, teacher_folder, tmp_path, capsys):
    run, folder = caches["hidden"]
    code, out = train(run, tmp_path, teacher_folder, cache=folder)
    columns, row = (out / "summary.csv").read_text().splitlines()
    cells = dict(zip(columns.split(","), row.split(","), strict=True))
    cost = json.loads((folder / DESCRIPTION).read_text())["cost_ms"]
    assert code == 0 and float(cells["kd_cache_ms"]) == cost > 0
    _, cache = expanded("hidden")
    capsys.readouterr()
    write_cache.announce(cache, 16, tmp_path)
    tokens = cache.micro_batches * 128
    assert f"{tokens * 32 / 1e9:.3f} GB at 32 bytes a token" in capsys.readouterr().out


def test_a_full_disk_is_refused_before_anything_is_written(expanded, tmp_path, monkeypatch):
    monkeypatch.setattr(write_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30 + 1000))
    with pytest.raises(ConfigError, match="kd.cache: hidden takes"):
        write_cache.announce(expanded("hidden")[1], 16, tmp_path)


def test_runs_of_a_horizon_and_seed_share_a_cache_of_hidden_states(tiny_runs, manifest):
    config = campaign.load(merged("tests/tiny.yaml", {"kd": {"cache": "hidden"}}), ROOT)
    (teacher,) = (run for run in tiny_runs if run.arm == "teacher")
    points = [point.name for point in expansion.grid_points(config.kd.grid)]
    selected = {"run_id": teacher.run_id, "train_time_ms": 0.1, "budget_ms": 0.1}
    decisions = {"projected": {"survivors": [teacher.label]}, "selected": selected}
    decisions["promoted"] = {"points": points}
    runs = expansion.expand(config, decisions, manifest.parent.name)
    reading = {run.config.kd.cache for run in runs if run.config.kd and run.config.kd.cache}
    assert reading == set(expansion.caches(config, decisions, manifest.parent.name)) and len(reading) == 5
    isolates = {run.label: run.config.kd for run in runs if run.arm == "isolate"}
    assert isolates["CE + KD loss"] == dataclasses.replace(isolates["CE + KD"], cache=isolates["CE + KD loss"].cache)
    for run in runs:
        if run.arm == "isolate":
            continue
        kd = run.config.kd
        online = kd is None or kd.infer_only or kd.random_teacher
        assert online == (kd is None or kd.cache is None)
    assert not expansion.caches(campaign.load(merged("tests/tiny.yaml"), ROOT), decisions, manifest.parent.name)


@pytest.mark.parametrize(
    ("kd", "said"),
    [({"cache": "top_k", "top_k": 0}, "kd.top_k: 0"), ({"cache": "samples", "samples": 256}, "kd.samples: 256")],
)
def test_wrong_caches_are_refused(kd, said, expanded):
    with pytest.raises(ConfigError, match=said):
        expanded(kd.pop("cache"), **kd)


def test_sampled_targets_are_counts_of_different_words():
    torch.manual_seed(0)
    teacher = DenseTeacher(torch.randn(50, 5), torch.randn(20, 5), None)
    target = sample(teacher, 30, 1.0, torch.Generator().manual_seed(0))
    assert isinstance(target, SparseTeacher) and target.counts.sum(dim=1).eq(30).all()
    truth = torch.distributions.Categorical(logits=teacher.hidden @ teacher.head.T).entropy()
    torch.testing.assert_close(target.entropy, truth)
    for ids, counts in zip(target.ids.tolist(), target.counts.tolist(), strict=True):
        used = [word for word, count in zip(ids, counts, strict=True) if count]
        assert len(used) == len(set(used))


def test_a_disk_that_fills_while_a_cache_is_written_leaves_none(
    caches, expanded, manifest, teacher_folder, small_disk, monkeypatch
):
    _, cache = expanded("hidden")
    folder, other = small_disk / cache.cache_id, small_disk / "another's"
    monkeypatch.setattr(write_cache, "announce", lambda *_: other.write_bytes(bytes(240 * 1024)))  # after it was asked
    with pytest.raises(DiskFull, match="hidden.bin: no room on its disk"):
        write_cache.write(cache, folder, manifest, teacher_folder, threads=1)
    assert not (folder / DESCRIPTION).exists()
    other.unlink()
    monkeypatch.setattr(write_cache, "announce", lambda *_: None)
    write_cache.write(cache, folder, manifest, teacher_folder, threads=1)
    assert (folder / "hidden.bin").read_bytes() == (caches["hidden"][1] / "hidden.bin").read_bytes()


def test_a_cache_that_a_bundle_left_behind_is_stood_in_for_again_where_finished_runs_read_it(tmp_path):
    """Snakemake deletes its folder for whatever makes it older than teacher or data, such as an edit of code."""
    out, teacher, reader = (tmp_path / "results" / name for name in ("caches/samples-0", "runs/teacher", "runs/kd-0"))
    for folder in (out.parent, teacher / "checkpoints", reader):
        folder.mkdir(parents=True)
    (reader / "config.json").write_text(json.dumps({"kd": {"cache": out.name}}))
    flags = [
        "--config",
        "{}",
        "--out",
        out,
        "--manifest",
        "none",
        "--teacher",
        teacher / "checkpoints",
        "--threads",
        "1",
    ]
    command = [sys.executable, ROOT / "workflow/scripts/kd_cache.py", *flags]

    def stood_in():
        code = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True).returncode
        there = sorted(path.name for path in out.glob("*"))
        assert there == ([ABSENT] if code == 0 else [])
        return code == 0

    assert not stood_in()  # neither a reader that ended nor a teacher whose weights are known to be elsewhere
    (reader / "status.json").write_text("{}")
    assert not stood_in()
    (teacher / "checkpoints" / WEIGHTS_ELSEWHERE).write_text("")
    assert stood_in()
    shutil.rmtree(out)
    (teacher / "checkpoints/model.safetensors").write_text("")  # it can be made now
    assert not stood_in()
