"""How far a campaign is: stages, runs in flight, the budget; and the report of what is there."""

import dataclasses
import fcntl
import io
import json
import os
import shutil
import time
from types import SimpleNamespace

import pytest
from configs import ROOT
from rich.console import Console
from test_analysis_synthetic import SyntheticCampaign, read_rows

from kdclimb import status
from kdclimb.__main__ import main
from kdclimb.analysis.so_far import report_so_far
from kdclimb.analysis.tables import RUN_COLUMNS, AnalysisError, read_csv
from kdclimb.jobs import FAILURES, JOB_COLUMNS, write_failures
from kdclimb.lease import GONE


class Halfway:
    """A synthetic campaign whose results are laid out as ./run lays them out."""

    def __init__(self, folder, **changes):
        self.made, self.results = SyntheticCampaign(folder, **changes), folder / "results"
        self.results.mkdir()
        (self.results / "runs").symlink_to(self.made.runs, target_is_directory=True)
        self.made.runs.mkdir()

    def state(self):
        return self.reader().read()

    def reader(self):
        out = self.results / "default"
        if self.made.out.is_dir() and not out.is_symlink():
            out.symlink_to(self.made.out, target_is_directory=True)
        return status.Reader(self.made.campaign, ROOT, self.results)

    def printed(self):
        console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(status.view(self.state()))
        return console.export_text()

    def page(self):
        found = self.state()
        folder = self.results / "default"
        path = report_so_far(self.made.campaign, found.planned.named, folder, self.results / "runs", found.words)
        return path.read_text().split("<script")[0]


@pytest.fixture
def halfway(tmp_path, monkeypatch, request):
    halfway = Halfway(tmp_path, **getattr(request, "param", {}))
    data = "unprepared"  # what the synthetic campaign's runs are expanded with
    monkeypatch.setattr(status, "results_data_id", lambda campaign, root, results: data)
    return halfway


def test_an_empty_campaign(halfway):
    text = halfway.printed()
    assert "0 of 10" in text and "budget: not set yet" in text and "no run is in flight" in text
    assert '<td class="left">the CE baseline' in halfway.page()


def test_after_the_baseline_the_budget_is_known_and_ce_is_shown(halfway):
    halfway.made.baseline()
    text = halfway.printed()
    assert "10 of 10" in text and "budget: 300 ms; no teacher selected yet" in text
    assert "best CE so far: 3.0000 nats (CE 300, 300 steps, seed 0)" in text
    page = halfway.page()
    assert 'data-chart="val_loss_steps"' in page and "the KD screen" in page
    assert "10 of 19 runs known so far have ended" in page


@pytest.mark.parametrize("halfway", [{"budget": {"horizon": 600}}], indirect=True)
def test_a_projected_budget_is_called_so(halfway):
    halfway.made.baseline()
    assert "budget: 600 ms (projected from 300-step runs); no teacher selected yet" in halfway.printed()
    assert "CE takes 6.00 s (projected from 300-step runs) over 600 steps (median of its seeds" in halfway.page()


def test_after_the_selection_the_page_shows_each_teacher_and_what_the_verdict_waits_for(halfway):
    halfway.made.baseline()
    page = halfway.page()
    assert 'id="teachers"' not in page and "tables/teachers.csv" in page
    halfway.made.teachers()
    page = halfway.page()
    assert 'id="teachers"' in page and 'class="tag selected"' in page and 'class="tag rejected"' in page
    assert "verdict.json, tables/compare.csv, tables/verdict.csv" in page and "tables/teachers.csv</span>" not in page
    assert "teacher_budget10_summary" not in page


def test_a_finished_campaign_has_no_stage_left(halfway):
    halfway.made.run_all()
    text = halfway.printed()
    assert "75 ms spent, 25%" in text and "at most" not in text
    assert not (halfway.made.out / "so_far").exists()  # status changes nothing


def test_the_page_so_far_of_a_finished_campaign_is_whole(halfway):
    halfway.made.run_all()
    page = halfway.page()
    assert 'data-cell="steps_saved"' in page and "KD pays in steps" in page and "not-there-yet" not in page
    made = [halfway.made.out / place for place in ("tables/teachers.csv", "so_far/tables/teachers.csv")]
    assert made[0].read_bytes() == made[1].read_bytes()


def test_a_decision_of_another_version_is_named(halfway):
    halfway.made.run_all()
    path = halfway.made.out / "budget.json"
    decision = json.loads(path.read_text())
    del decision["projected_from"]
    path.with_name(".budget.json.sha256").unlink(missing_ok=True)
    path.write_text(json.dumps(decision))
    with pytest.raises(AnalysisError, match="budget.json: lacks projected_from"):
        halfway.page()


def test_a_run_in_flight_has_its_step_loss_and_time_left(halfway):
    halfway.made.baseline()
    run = next(run for run in halfway.made.expanded("ce") if run.config.schedule.horizon == 300)
    folder = halfway.made.runs / run.run_id
    (folder / "status.json").unlink()
    (folder / ".state").mkdir()
    (folder / ".state/lease.json").write_text('{"held": true, "job": null}')
    (folder / "train.log").write_text(
        "command\nattempt 1: {}\nstep 0/300 val_loss 6.0\nstep 100/300 val_loss 5.0000 1.0 s\n"
    )
    os.utime(folder / ".state/lease.json", (1000, 1000))
    os.utime(folder / "train.log", (1060, 1060))
    with (folder / ".state/lock").open("w") as lock:
        assert halfway.state().flying == []  # a lease of a process that is gone
        fcntl.flock(lock, fcntl.LOCK_EX)
        (flying,) = halfway.state().flying
        assert (flying.run.run_id, flying.step, flying.total, flying.val_loss) == (run.run_id, 100, 300, 5.0)
        assert flying.left == 120.0  # a third of it took 60 s
        text = halfway.printed()
        assert "100/300" in text and "00:02:00" in text and "9 of 10" in text


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(1.0, "00:00:01"), (86399.9, "23:59:59"), (29.5 * 3600, "1 d 05:30:00"), (40 * 86400.0, "40 d 00:00:00")],
)
def test_the_time_left_has_its_days(halfway, seconds, shown):
    run = halfway.made.expanded("ce")[0]
    flying = [status.Progress(run, 50, 100, 5.0, seconds)]  # half of it took as long as is left
    (table,) = status._flying(dataclasses.replace(halfway.state(), flying=flying))
    assert [*table.columns[-1].cells] == [shown]


def test_a_lease_of_a_slurm_job_counts_while_that_lives_and_slurm_is_not_asked_each_time(halfway, monkeypatch):
    halfway.made.baseline()
    run = next(run for run in halfway.made.expanded("ce") if run.config.schedule.horizon == 300)
    folder, asked, now = halfway.made.runs / run.run_id, [], [1000 * status.ASKED_EVERY]
    (folder / "status.json").unlink()
    (folder / ".state").mkdir()
    states = {"4711": ["RUNNING", "NODE_FAIL"], "4712": [GONE], "4713": [OSError("squeue does not answer")]}

    def job_state(job):
        asked.append(job)
        found = states[job].pop(0)
        if isinstance(found, OSError):
            raise found
        return found

    monkeypatch.setattr(status, "job_state", job_state)
    monkeypatch.setattr(status, "time", SimpleNamespace(monotonic=lambda: now[0]))
    status._lives.cache_clear()
    reader = halfway.reader()

    def flying(job, later=0.0):
        (folder / ".state/lease.json").write_text(json.dumps({"held": True, "job": job}))
        now[0] += later
        return len(reader.read().flying)

    assert [flying("4711"), flying("4711", 0.9 * status.ASKED_EVERY)] == [1, 1] and asked == ["4711"]
    assert flying("4711", status.ASKED_EVERY) == 0 and asked == ["4711", "4711"]
    assert (flying("4712"), flying("4713")) == (0, 1)


def test_a_run_that_failed_is_counted(halfway):
    halfway.made.edit = lambda run: (
        {"status": "oom", "reason": "9 GiB", "val": [], "step_ms": []} if run.arm == "probe" else {}
    )
    halfway.made.baseline()
    halfway.made.flags("probe")
    row = next(line for line in halfway.printed().splitlines() if line.startswith("teacher probes"))
    assert row.split()[-1] == "6"


def test_what_a_failed_job_left_unfinished_is_shown_with_its_reason(halfway):
    halfway.made.baseline()
    run = next(run for run in halfway.made.expanded("ce") if run.config.schedule.horizon == 300)
    folder = halfway.made.runs / run.run_id
    (folder / "status.json").unlink()
    nothing = dict.fromkeys(JOB_COLUMNS, "")
    reason = {"reason": "Slurm job 7 was ended: TIMEOUT", "slurm_job": "7", "log_tail": "step 25\nat step 30"}
    jobs = [nothing | reason | {"rule": "train", "made": str(folder / "status.json"), "run_ids": run.run_id}]
    jobs += [nothing | {"rule": "kd_cache", "made": "results/caches/none", "reason": "refused by Slurm: too large"}]
    write_failures(halfway.made.out / FAILURES, jobs)
    assert "kd_cache left no results/caches/none: refused by Slurm: too large" in halfway.printed()
    page = halfway.page()
    assert "refused by Slurm: too large" in page and "Slurm job 7 was ended: TIMEOUT" in page
    assert "at step 30" in page and f'data-run="{run.run_id}"' in page
    tables = halfway.results / "default/so_far/tables"
    (row,) = (row for row in read_csv(tables / "runs.csv", RUN_COLUMNS) if row["status"] == "unfinished")
    assert (row["run_id"], row["slurm_job"], row["log_tail"]) == (run.run_id, "7", reason["log_tail"])
    (row,) = (row for row in read_rows(tables / "ledger.csv") if row["status"] == "unfinished")
    assert (row["run_id"], row["mode"], row["enters_claims"]) == (run.run_id, "ce_baseline", "no: unfinished")
    (folder / "status.json").write_text("{}")
    assert [job["rule"] for job in write_failures(halfway.made.out / FAILURES, [])] == ["kd_cache"]


def test_a_job_that_was_interrupted_is_no_alarm(halfway):
    nothing = dict.fromkeys(JOB_COLUMNS, "")
    reasons = {"a.csv": "interrupted; the next start goes on from what it did", "b.csv": "its command failed"}
    jobs = [nothing | {"rule": "train_batch", "made": made, "reason": reason} for made, reason in reasons.items()]
    found = dataclasses.replace(halfway.state(), failed=jobs)
    lines = {line.plain: line.style for line in status._failed(found)}
    assert lines == {
        "train_batch left no a.csv: interrupted; the next start goes on from what it did": "dim",
        "train_batch left no b.csv: its command failed": "red",
    }


def test_a_malformed_run_is_an_error_that_names_it(halfway):
    halfway.made.baseline()
    folder = next(iter(halfway.made.runs.iterdir()))
    (folder / "summary.csv").write_text("")
    with pytest.raises(ValueError, match=folder.name):
        halfway.state()
    shutil.rmtree(folder)


# ---- as it goes on


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(status.os, "nice", lambda more: more)  # the tests that follow keep their pace
    return Console(width=120, force_terminal=True, file=io.StringIO())


def sleep_by(sleep, monkeypatch) -> None:
    """In `status` alone: the thread of `waiting` sleeps by the same function."""
    monkeypatch.setattr(status, "time", SimpleNamespace(sleep=sleep, strftime=time.strftime, gmtime=time.gmtime))


def test_it_is_shown_anew_until_no_run_is_left(halfway, terminal, monkeypatch):
    halfway.made.baseline()
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        halfway.made.run_all()

    sleep_by(sleep, monkeypatch)
    found = status.watch(halfway.reader(), terminal, 7)
    text = terminal.file.getvalue()
    assert slept == [7] and found.over and "no teacher selected yet" in text and "read again every 7 s" in text


def test_ctrl_c_ends_it_with_what_was_seen_last(halfway, terminal, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    sleep_by(interrupt, monkeypatch)
    assert not status.watch(halfway.reader(), terminal, 5).over


def test_what_did_not_change_is_not_read_twice(halfway, monkeypatch):
    halfway.made.baseline()
    reader, read, flags = halfway.reader(), status.RunFolder.read, []
    monkeypatch.setattr(status.RunFolder, "read", lambda flag: flags.append(flag) or read(flag))
    first = reader.read()
    assert len(flags) == len(first.done) > 9
    flags.clear()
    assert reader.read().done == first.done and flags == []
    os.utime(first.done[0].folder / "status.json", (1, 1))
    reader.read()
    assert {flag.split("|")[2] for flag in flags} == {str(first.done[0].folder)}


def test_without_a_terminal_it_is_printed_once(tmp_path, capsys):
    assert main(["status", "--results", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "budget: not set yet" in text and "read again" not in text


@pytest.mark.parametrize("every", ["0", "-1", "nan", "inf", "often"])
def test_it_is_not_read_all_the_time(every, capsys):
    with pytest.raises(SystemExit):
        main(["status", "--every", every])
    assert "--every" in capsys.readouterr().err
