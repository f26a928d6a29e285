"""The benchmarks that have a tiny form run on a CPU, so that one is not found broken on a GPU."""

import csv
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import kd_step, pilot, pilot_tables

ROOT = Path(__file__).resolve().parents[2]


def test_kd_step_times_each_way_that_targets_come(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["kd_step.py", "--toy", "--rounds", "2", "--commit", "none", "--out", str(tmp_path)]
    )
    kd_step.main()
    with (tmp_path / "kd_step.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "ratio_to_ce" and row["arm"] == "kdclimb"]
    modes = [dict(pair.split("=") for pair in row["case"].split(";"))["mode"] for row in rows]
    assert modes == ["ce", "dense", "hidden", "top_k", "samples", "infer"]
    assert all(float(row["value"]) > 0 for row in rows)


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_block_of_the_pilot_goes_on_and_its_tables_are_those_of_its_runs(tmp_path, monkeypatch, manifest):
    overlay = tmp_path / "overlay.yaml"
    candidates = [{"num_layers": 1, "num_heads": 2, "head_dim": 8, "steps": steps} for steps in (6, 8)]
    ngram = {"orders": [2, 3], "contexts": 300, "entries": 16}
    kd = {"exploratory": True, "alpha_schedule": "linear", "dynamic_norm": False, "stop_mode": "none", "ngram": ngram}
    train = {"horizons": [50], "extension_frac": 0.0}
    overlay.write_text(yaml.safe_dump({"teacher": {"candidates": candidates}, "train": train, "kd": kd}))
    monkeypatch.setattr(pilot, "prepared", lambda *_: manifest)
    monkeypatch.setattr(pilot, "WORK", tmp_path / "runs")
    files = ["--configfile", str(ROOT / "tests/tiny.yaml"), str(overlay)]

    def block(*arms):
        monkeypatch.setattr(sys, "argv", ["pilot.py", *files, "--out", str(tmp_path / "blocks/0"), "--arms", *arms])
        pilot.main()
        return read(tmp_path / "blocks/0/runs.csv")

    with pytest.raises(SystemExit, match="teacher2: teacher.candidates has 2 entries"):
        block("teacher2:0.5")
    first = block("ce", "bigram:0.5")
    assert [row["arm"] for row in first] == ["ce", "bigram", "bigram:0.5"]
    shutil.rmtree(tmp_path / "runs")  # as on another day; what the block has is not trained again
    wrongs = "ce:norm dense dense:0.5:0.5:0.5 dense:0.5:none dense:0.5:hidden:samples huge:0.5 teacher:0.5 grown"
    for wrong in (*wrongs.split(), "grown:ce", "grown:small:0.5"):
        with pytest.raises(SystemExit, match=f"--arms {wrong}: no such arm"):
            block("ce:boost", wrong)
    caches = "dense:0.5:norm:samples", "dense:0.5:norm:top_k"
    arms = "dense:0.5:0.7", *caches, "trigram:0.5:norm", "ce:plain", "bigram:0.5:plain", "ce:no_mtp"
    arms += ("ce:long", "dense:0.5:norm:long", "ce:half:cool", "dense:0.5:norm:half:cool")
    arms += ("dense:0.5:norm:one:better:no_mtp:boost",)
    rows = block("ce", "bigram:0.5", *arms)
    assert rows[:3] == first
    assert [row["arm"] for row in rows[3:] if row["seed"]] == list(arms)
    loss = {row["arm"]: float(row["final_val"]) for row in rows}
    gain = {row["arm"]: row["gain"] for row in rows}
    assert gain["ce"] == gain["ce:plain"] == gain["ce:no_mtp"] == gain["teacher"] == ""
    assert float(gain["dense:0.5:norm:long"]) == loss["ce:long"] - loss["dense:0.5:norm:long"]
    assert {row["steps"] for row in rows if row["arm"].endswith("long")} == {"75"}  # 25 * 256 + 25 * 512 tokens by 256
    assert {row["steps"] for row in rows if "half" in row["arm"]} == {"150"}
    assert float(gain["dense:0.5:norm:half:cool"]) == loss["ce:half:cool"] - loss["dense:0.5:norm:half:cool"]
    assert float(gain[arms[-1]]) == loss["ce:no_mtp"] - loss[arms[-1]]
    assert float(gain["bigram:0.5:plain"]) == loss["ce:plain"] - loss["bigram:0.5:plain"]
    assert float(gain["dense:0.5:0.7"]) == loss["ce"] - loss["dense:0.5:0.7"]
    assert all(float(row["kd_share_first"]) > 0 for row in rows if row["teacher"])
    cost = {row["arm"]: float(row["teacher_ms"]) for row in rows if row["teacher"]}
    assert all(cost[arm] > cost["dense:0.5:0.7"] for arm in caches)  # the cache is part of it


def test_the_pilots_savings_have_intervals_from_three_pairs_on():
    assert pilot_tables.interval([1.0, 2.0]) == (None, None)
    low, high = pilot_tables.interval([1.0, 2.0, 3.0])
    assert (low + high) / 2 == 2.0 and high - low == pytest.approx(2 * 4.302652729911275 / 3**0.5)
