"""The seed's numbers, read again: which comparisons are matched, and what the matched ones say."""

import csv
import re
import shutil

import pytest
from configs import ROOT

from kdclimb.__main__ import main
from kdclimb.analysis import reread

SEED = ROOT / "examples/seed"


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    out = tmp_path_factory.mktemp("seed")
    assert main(["reread", str(SEED), "--out", str(out)]) == 0
    return out


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def verdict(seed, run_id, against):
    return next(r for r in rows(seed / "claims.csv") if (r["run_id"], r["against"]) == (run_id, against))


def test_the_headline_compared_an_ended_schedule_with_an_unfinished_one(seed):
    found = verdict(seed, "kd_s1a_4", "CE reference@150")
    assert (found["matched"], found["val_delta"], found["time_ratio"]) == ("0", "", "")
    assert "kd_s1a_4 at step 155 of 155, CE reference@150 at step 150 of 1515" in found["verdict"]


def test_its_matched_comparison_is_much_smaller_and_of_one_run(seed):
    found = verdict(seed, "kd_s1a_4", "long CE")
    assert found["matched"] == "1" and float(found["val_delta"]) == pytest.approx(4.0861 - 4.1248)
    assert found["time_ratio"] == "" and "one run of each, so nothing is shown" in found["verdict"]
    assert (found["steps_worth_low"], found["steps_worth_high"]) == ("0.0", "")  # beyond CE's longest run


def test_a_difference_within_the_noise_is_called_so_and_has_its_worth_in_steps(seed):
    found = verdict(seed, "KD_topk256_s2", "long CE")
    assert "no more than two runs of the same thing differ by (0.0095)" in found["verdict"]
    assert float(found["steps_worth_low"]) == pytest.approx(-0.9, abs=0.1)
    assert float(found["time_ratio"]) == pytest.approx(135373 / 107242)
    after = verdict(seed, "KD full (post-patch)", "CE 80")
    assert float(after["steps_worth_low"]) == pytest.approx(1.1, abs=0.1) and "1.07 times its time" in after["verdict"]


def test_provisional_runs_are_compared_with_nothing(seed):
    for run_id in ("KD V01", "KD F01"):
        found = verdict(seed, run_id, "CE reference")
        assert found["matched"] == "0" and f"{run_id} is provisional" in found["verdict"]


def test_teachers_stand_against_the_seeds_budget(seed):
    teachers = {row["run_id"]: row for row in rows(seed / "teachers.csv")}
    assert {round(float(row["budget_ms"]) + 0.01) for row in teachers.values()} == {69402}
    within = {name for name, row in teachers.items() if row["within_budget"] == "1" and row["status"] == "complete"}
    assert len(within) == 4 and "teacher_budget10_ckpt_L3_H6_D128_250_20260214T212840Z" in within
    assert "archival, so no candidate" in teachers["teacher25m_ce_20260213T2241Z_teacher25m_ce"]["verdict"]


def test_the_page_holds_every_claim_and_every_number(seed):
    page = (seed / "index.html").read_text()
    for row in rows(SEED / "claims.csv"):
        assert row["claim"].replace("'", "&#x27;") in page
    assert page.count("<tr") >= len(rows(SEED / "runs.csv"))
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?:https?:)?//""", page)


def test_where_runs_end_is_fitted_for_one_student(seed):
    ends = rows(seed / "ends.csv")
    points = [row for row in ends if row["seed"]]
    assert {row["horizon"] for row in points if row["arm"] == "ce"} == {
        "60",
        "80",
        "155",
    }  # not the other student's 1555
    assert sum(row["arm"] == "kd" for row in points) == 9
    fitted = [float(row["fitted"]) for row in ends if not row["seed"]]
    assert fitted == sorted(fitted, reverse=True) == [4.9544, 4.6666, 4.1248]


def test_the_sum_of_the_claims_is_said_and_drawn(seed):
    found, page = rows(seed / "claims.csv"), (seed / "index.html").read_text()
    clear = [row for row in found if row["matched"] == "1" and abs(float(row["val_delta"])) > float(row["noise"] or 0)]
    better = sum(float(row["val_delta"]) < 0 for row in clear)
    assert f"Nothing is shown:</b> 10 of {len(found)} comparisons are matched" in page
    assert f"{better} in favour of the claim&rsquo;s run, {len(clear) - better} against it" in page
    assert page.count('data-chart="') == 4 == len(list((seed / "figures").glob("*.svg")))


def test_a_claim_on_an_unknown_run_is_refused(tmp_path, capsys):
    shutil.copytree(SEED, tmp_path / "seed")
    with (tmp_path / "seed/claims.csv").open("a") as file:
        file.write("something,kd_s1a_5,long CE\n")
    assert main(["reread", str(tmp_path / "seed"), "--out", str(tmp_path / "out")]) == 1
    assert "'kd_s1a_5' is no run of runs.csv" in capsys.readouterr().err


def run(**values):
    row = dict.fromkeys(reread.RUN_COLUMNS) | {"run_id": "A", "status": "complete", "horizon": 100, "step": 100}
    return row | {"student_params_m": 1.0} | values


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, ""),
        ({"status": "archival"}, "B is archival"),
        ({"horizon": 200, "step": 200}, "their schedules differ: A at step 100 of 100, B at step 200 of 200"),
        ({"step": 90}, "not at their ends: A at step 100 of 100, B at step 90 of 100"),
        ({"horizon": None}, "their schedules differ: A at step 100 of 100, B at step 100 of an unknown number"),
        ({"student_params_m": 2.0}, "their students differ"),
    ],
)
def test_mismatches(values, reason):
    assert "; ".join(reread.mismatches(run(), run(run_id="B") | values)) == reason
