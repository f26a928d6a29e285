"""The benchmarks that have a tiny form run on a CPU, so that one is not found broken on a GPU."""

import csv
import sys

from benchmarks import kd_step


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
