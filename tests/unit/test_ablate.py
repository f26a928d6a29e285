"""The ablation of benchmarks/ablate.py: its parts, going on where it stopped, and its table."""

import pytest
from configs import merged

from benchmarks import ablate
from benchmarks.common import read_rows
from kdclimb.configfiles import read_config

SHARED = (  # what no run is without: shapes, lengths, rates; and what the regime leaves at its default
    "student.num_layers", "student.num_heads", "student.head_dim", "student.attention_scale", "train.horizons",
    "train.seeds", "train.micro_batch_tokens", "train.lr_floor", "train.lr_table", "train.head_dtype",
    "train.deterministic", "optim.muon.lr", "optim.muon.momentum", "optim.muon.momentum_warmup",
    "optim.muon.momentum_cooldown", "optim.muon.momentum_ramp_frac", "optim.muon.beta2", "optim.adam.lr",
)  # fmt: skip


def keys(values, where: str) -> list[str]:
    if not isinstance(values, dict):
        return [where]
    return [key for name, value in values.items() for key in keys(value, f"{where}.{name}")]


@pytest.fixture(scope="module")
def full() -> dict:
    return read_config(ablate.CONFIGS)


def test_each_part_is_another_run_of_the_same_campaign(full):
    ids = {part: ablate.ce(ablate.without(full, part), 0, "data").run_id for part in ablate.PARTS}
    assert len(set(ids.values())) == len(ids)
    assert ids[ablate.ALL] == ablate.ce(full, 0, "data").run_id


def test_each_key_belongs_to_a_part_or_to_what_no_run_is_without(full):
    there = [key for name in ("student", "train", "optim") for key in keys(full[name], name)]
    switched = {key for part in ablate.PARTS.values() for key in part}
    assert sorted(there) == sorted([*switched, *SHARED])


@pytest.fixture
def tiny_values(monkeypatch, manifest):
    """The tiny campaign's config, its data prepared already."""
    monkeypatch.setattr(ablate, "prepared", lambda loaded, data: manifest)
    return merged("tests/tiny.yaml", {"train": {"horizons": [50]}, "validation": {"tokens": 256}})


def test_it_goes_on_with_what_is_missing(tiny_values, tmp_path, capsys):
    out = tmp_path / "ablation.csv"
    assert not ablate.ablate(tiny_values, [ablate.ALL, "smear"], [0], out, seconds=0.0)
    rows = read_rows(out)
    assert [(row["part"], row["step"]) for row in rows] == [(ablate.ALL, step) for step in ("0", "25", "50")]
    assert "1 runs are left, the next one without smear" in capsys.readouterr().out
    assert ablate.ablate(tiny_values, [ablate.ALL, "smear"], [0], out, seconds=60.0)
    assert read_rows(out)[:3] == rows
    assert [row["keys"] for row in read_rows(out)[3:]] == ["student.smear=false"] * 3
    before = out.stat().st_mtime_ns
    assert ablate.ablate(tiny_values, [ablate.ALL, "smear"], [0], out, seconds=0.0)
    assert out.stat().st_mtime_ns == before


def test_a_run_that_diverges_is_a_row(tiny_values, tmp_path, monkeypatch):
    huge = {"optim.muon.lr": 1e30, "optim.adam.lr": 1e30}
    monkeypatch.setitem(ablate.PARTS, "smear", huge)
    out = tmp_path / "ablation.csv"
    assert ablate.ablate(tiny_values, ["smear"], [0], out, seconds=60.0)
    assert read_rows(out)[-1]["val_loss"] == "nan"


def test_the_table_pairs_seeds(tmp_path):
    def run(part, seed, losses, train_s):
        return [
            {"part": part, "keys": "k", "seed": seed, "step": i, "val_loss": loss, "train_s": train_s}
            for i, loss in enumerate(losses)
        ]

    rows = run(ablate.ALL, "0", [9.0, 3.8], 10.0) + run(ablate.ALL, "1", [9.0, 3.6], 10.0)
    rows += run("skip", "0", [9.0, 3.9], 9.0) + run("skip", "1", [9.0, 3.8], 9.0)
    rows += run("smear", "0", [9.0, 4.0], 11.0) + run("YaRN", "7", [9.0, 4.0], 11.0) + run("backout", "0", [3.7], "")
    _, _, first, *lines = ablate.table(rows).splitlines()
    assert first == "| with all parts | | 3.7000 | | 1 | 2 |"
    assert lines == [
        "| smear | `k` | 4.0000 | +0.2000 | 1.100 | 1 |",
        "| skip | `k` | 3.8500 | +0.1500 ± 0.0500 | 0.900 | 2 |",
        "| backout | `k` | 3.7000 | -0.1000 | - | 1 |",
    ]
    with pytest.raises(SystemExit, match="no run with all parts"):
        ablate.table(run("skip", "0", [3.9], 9.0))


def test_the_methods_have_the_table_of_the_record():
    """docs/METHODS.md states numbers that a file holds, since readers look for them there: they are that file's."""
    rows = read_rows(ablate.ROOT / "docs/records/bench/ablation.csv")
    assert ablate.table(rows) in (ablate.ROOT / "docs/METHODS.md").read_text()
