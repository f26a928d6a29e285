"""Two at once: a table read while it is written, and campaigns that share what they train."""

import subprocess
import sys
import time

import pytest
from checkouts import Checkout, overlay
from configs import ROOT
from test_kills import SMALL

from kdclimb.analysis.tables import read_csv, write_csv

WRITE = """
import sys
from pathlib import Path
from kdclimb.analysis.tables import write_csv
for number in range(150):
    write_csv(Path(sys.argv[1]), ["a", "b"], [{"a": number, "b": number}] * (1 + number % 50))
"""


def test_a_table_that_is_written_anew_while_it_is_read_is_whole_and_not_called_damaged(tmp_path):
    path, seen = tmp_path / "compare.csv", set()
    write_csv(path, ["a", "b"], [{"a": 0, "b": 0}])
    writer = subprocess.Popen([sys.executable, "-c", WRITE, path], cwd=ROOT)
    while writer.poll() is None:
        rows = read_csv(path, ["a", "b"])
        assert len({(row["a"], row["b"]) for row in rows}) == 1 and rows[0]["a"] == rows[0]["b"]
        assert len(rows) == 1 + rows[0]["a"] % 50
        seen.add(rows[0]["a"])
    assert writer.returncode == 0 and len(seen) > 5


@pytest.mark.faults
def test_campaigns_that_share_their_results_come_one_after_the_other(tmp_path):
    """Two checkouts, one results folder: the second is refused, and then trains nothing that the first has trained."""
    (tmp_path / "shared").mkdir()
    first, second = (Checkout(tmp_path / name / "kdclimb") for name in ("a", "b"))
    for checkout in (first, second):
        (checkout.path / "results").symlink_to(tmp_path / "shared")
    process = first.start(*overlay(first, "small", campaign="a", **SMALL))
    while not list(tmp_path.glob("shared/data/*/manifest.json")):
        assert process.poll() is None
        time.sleep(0.1)
    arguments = overlay(second, "small", campaign="b", **SMALL)
    assert "another checkout works with the same results" in second.run(*arguments, code=1)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    trained, tables = first.attempts(), first.tables("a")
    second.run(*arguments)
    assert second.attempts() == trained and second.tables("b").keys() == tables.keys()
    same = [name for name, content in second.tables("b").items() if content == tables[name]]
    assert {"ce/timing.csv", "kd/full.csv", "tables/compare.csv", "verdict.json"} <= set(same)
