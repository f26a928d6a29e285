"""docs/records: a campaign's record is enough to make its tables, figures and report again; the README quotes it."""

import filecmp
import shutil

import pytest
from configs import ROOT
from test_analysis_synthetic import read_rows

from kdclimb.__main__ import main
from kdclimb.analysis.tables import write_csv
from kdclimb.jobs import JOB_COLUMNS

RECORDS = ROOT / "docs/records"
SEED155 = RECORDS / "seed155"
OF_CAMPAIGNS = ("seed155", "early")
OF_PLACES = {"ledger.csv", "run_pages.csv"}  # name the folders of the runs


@pytest.mark.parametrize("name", OF_CAMPAIGNS)
def test_a_record_is_made_again_from_its_runs_to_the_byte(tmp_path, name):
    """Also where no token is: a record has hashes of them alone."""
    copy = tmp_path / "record"
    shutil.copytree(RECORDS / name, copy)
    made = copy / name
    kept = sorted(path.name for path in (made / "tables").glob("*.csv"))
    shutil.move(made / "tables", tmp_path / "tables")
    shutil.move(made / "figures", tmp_path / "figures")
    shutil.move(made / "verdict.json", tmp_path / "verdict.json")
    assert main(["report", "--results", str(copy), "--configfile", str(copy / "config.yaml")]) == 0
    again = made / "so_far"
    _, different, missing = filecmp.cmpfiles(tmp_path / "tables", again / "tables", kept, shallow=False)
    assert (set(different), missing) == (OF_PLACES, [])
    assert (again / "verdict.json").read_bytes() == (tmp_path / "verdict.json").read_bytes()
    figures = sorted(path.name for path in (tmp_path / "figures").glob("*.svg"))
    assert figures and filecmp.cmpfiles(tmp_path / "figures", again / "figures", figures, shallow=False)[1:] == ([], [])


def test_a_job_that_failed_is_told_also_where_all_runs_have_ended(tmp_path):
    copy = tmp_path / "record"
    shutil.copytree(SEED155, copy)
    job = dict.fromkeys(JOB_COLUMNS, "") | {"rule": "report", "made": str(copy / "none"), "reason": "the disk was full"}
    write_csv(copy / "seed155/logs/failed_jobs.csv", JOB_COLUMNS, [job | {"attempts": 1}])
    assert main(["report", "--results", str(copy), "--configfile", str(copy / "config.yaml")]) == 0
    page = (copy / "seed155/so_far/report/index.html").read_text()
    assert "the job report left no" in page and "the disk was full" in page


@pytest.mark.parametrize("name", OF_CAMPAIGNS)
def test_a_record_is_small(name):
    made_again = RECORDS / name / name / "so_far"  # by whoever has followed the record's README here
    kept = [path for path in (RECORDS / name).rglob("*") if path.is_file() and not path.is_relative_to(made_again)]
    assert sum(path.stat().st_size for path in kept) < 10e6


@pytest.mark.parametrize(
    ("name", "row"),
    [(name, row) for name in OF_CAMPAIGNS for row in read_rows(RECORDS / name / name / "tables/break_even.csv")],
    ids=lambda value: value if isinstance(value, str) else value["target"],
)
def test_the_readmes_results_are_the_records(name, row):
    tested = [
        test
        for test in read_rows(RECORDS / name / name / "tables/verdict.csv")
        if (test["measure"], test["arm"], test["against"]) == ("crossing", "kd", "ce")
        and test["target"] == row["target"]
    ]
    cells = [f"{float(row['target_value']):.4g}", f"{float(row['ce_time_ms']) / 1000:.1f} s"]
    for cost in ("steps", "time_ms", "time_with_teacher_ms", "time_amortized_ms"):
        (test,) = (test for test in tested if test["cost"] == cost)
        share, low, high = (100 * float(test[f"saved_share{end}"]) for end in ("", "_low", "_high"))
        cells.append(f"{share:+.0f} % ({low:+.0f} to {high:+.0f})")
    assert f"| {' | '.join(cells)} |" in (ROOT / "README.md").read_text()
