"""Jobs that left no result: what is heard of them in Snakemake's log; and runs that Slurm would not take."""

import errno
import json
import logging

import pytest
from snakemake_interface_logger_plugins.common import LogEvent
from test_analysis_synthetic import make_config

from kdclimb import jobs
from kdclimb.analysis.tables import RUN_COLUMNS, RunFolder, read_csv, write_csv
from kdclimb.artifacts import RunFolder as Folder
from kdclimb.artifacts import needs_room
from kdclimb.jobs import JOB_COLUMNS, JobErrors, read_failures, write_failures, write_refused
from kdclimb.lease import Lease

SAID = "sbatch: error: Batch job submission failed: Requested node configuration is not available"


def error(said, run_id, **more):
    """An error of a job as Snakemake's logger has it, in the words of the executor plugin."""
    more = {"event": LogEvent.JOB_ERROR, "rule_name": "train", "log": []} | more
    message = f"SLURM sbatch failed. The error message was '{said}'.\n    sbatch call:\n        sbatch --parsable\n"
    output = [f"results/runs/{run_id}/config.json", f"results/runs/{run_id}/status.json"]
    return logging.makeLogRecord({"rule_msg": message, "output": output} | more)


def test_requests_that_are_refused_as_such_are_heard():
    heard = JobErrors()
    heard.handle(error(f"sbatch: warning\n{SAID}", "a"))
    heard.handle(error("sbatch: error: Unable to contact slurm controller (connect failure)", "b"))
    heard.handle(error(SAID, "c"))
    heard.handle(error(SAID, "c", rule_msg="SLURM-job '7' failed, SLURM status is: 'FAILED'."))
    heard.handle(error(SAID, "d", rule_name="train_batch", output=["results/tiny/batches/screen-1of2.csv"]))
    heard.handle(logging.makeLogRecord({"msg": "no error of a job"}))
    heard.handle(error(SAID, "e", event=LogEvent.JOB_INFO, rule_msg=None))  # of a job that starts
    assert "results/runs/e/status.json" not in heard.failed
    refused = {made: failure.refusal for made, failure in heard.failed.items() if failure.refusal}
    batch = "results/tiny/batches/screen-1of2.csv"
    assert refused == {"results/runs/a/status.json": f"sbatch: warning {SAID}", batch: SAID}


@pytest.mark.parametrize(
    ("said", "reason", "job"),
    [
        (
            "SLURM-job '7' failed, SLURM status is: 'TIMEOUT'. Detailed",
            "Slurm job 7 was ended: TIMEOUT (too long)",
            "7",
        ),
        (None, "its command failed", ""),
        (
            "SLURM sbatch failed. The error message was 'sbatch: error: Unable to\ncontact slurm controller'.\n",
            "sbatch failed: sbatch: error: Unable to contact slurm controller",
            "",
        ),
    ],
)
def test_a_failed_job_has_its_reason_its_slurm_id_and_the_end_of_its_log(said, reason, job, tmp_path):
    logs = [tmp_path / "none.log", tmp_path / "rule.log", tmp_path / "7.log"]
    logs[1].write_text("step 1\n\ninterrupted\n")
    logs[2].write_text("slurmstepd-node1: error: too long\nslurmstepd: error: *** JOB 7 ON node1 CANCELLED ***\n")
    heard, out = JobErrors(), ["results/caches/a"]
    for _ in range(2):
        heard.handle(error("", "", rule_name="kd_cache", rule_msg=said, output=out, log=[*map(str, logs)]))
    (failure,) = heard.failed.values()
    assert failure.row(["x", "y"]) == {
        "rule": "kd_cache",
        "made": "results/caches/a",
        "run_ids": "x y",
        "attempts": 2,
        "reason": reason,
        "slurm_job": job,
        "log_tail": "step 1\ninterrupted",
    }


def test_the_table_of_failed_jobs_holds_what_is_still_missing(tmp_path):
    made = [tmp_path / name for name in "abc"]
    table, nothing = tmp_path / "logs/failed.csv", dict.fromkeys(JOB_COLUMNS, "")
    assert write_failures(table, []) == [] and not table.exists()
    write_failures(table, [nothing | {"made": str(path), "attempts": 1} for path in made[:2]])
    made[0].touch()
    rows = write_failures(table, [nothing | {"made": str(made[2]), "attempts": 1}])
    assert [row["made"] for row in rows] == [row["made"] for row in read_failures(table)] == [*map(str, made[1:])]
    (row,) = write_failures(table, [], lambda made: made.endswith("c"))  # the other is no longer asked for
    assert row["made"] == str(made[2]) and [row["made"] for row in read_failures(table)] == [str(made[2])]
    made[2].touch()
    assert write_failures(table, []) == [] and not table.exists()


def test_a_table_of_failed_jobs_that_has_no_room_is_said(tmp_path, monkeypatch, capsys):
    def full(path, *_):
        with needs_room(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jobs, "write_csv", full)
    rows = [dict.fromkeys(JOB_COLUMNS, "") | {"made": str(tmp_path / "a")}]
    assert write_failures(tmp_path / "failed.csv", rows) == rows
    said = capsys.readouterr().err
    assert said.startswith(f"kdclimb: {tmp_path}/failed.csv: ") and "no room on its disk" in said


def test_a_refused_run_is_a_row_of_the_run_table(tmp_path):
    config = make_config()
    out = tmp_path / config.run_id
    assert write_refused(config, out, SAID, at_once=True)
    run = RunFolder.read(f"screen|T1|{out}")
    assert not run.ok and run.steps == run.val == []
    write_csv(tmp_path / "runs.csv", RUN_COLUMNS, [run.row()])
    (row,) = read_csv(tmp_path / "runs.csv", RUN_COLUMNS)
    assert (row["status"], row["reason"], row["log_tail"]) == ("refused", f"refused by Slurm: {SAID}", SAID)
    assert not write_refused(config, out, "again", at_once=True)
    Folder(out).keep_imported({})  # as if a bundle had brought it
    before = (out / "status.json").read_bytes()
    (out / "status.json").unlink()  # as Snakemake does before it asks for the job
    assert not write_refused(config, out, "again", at_once=True) and (out / "status.json").read_bytes() == before


def test_a_job_that_was_to_make_no_file_leaves_none_missing():
    heard = JobErrors()
    heard.emit(error("", "", rule_name="fetch_shards", rule_msg=None, output=[]))
    assert heard.failed == {}


def command_error(code, *made):
    """What Snakemake logs of a command right before the error of its job."""
    words = f"RuleException:\nCommand 'set -euo pipefail;  exec env python x.py --out {' '.join(made)}'"
    return logging.makeLogRecord({"event": LogEvent.ERROR, "msg": f"{words} returned non-zero exit status {code}."})


def test_a_job_that_was_interrupted_did_not_fail():
    heard, batch = JobErrors(), "results/tiny/batches/ce-1of1-0f.csv"
    heard.handle(command_error(75, batch))
    heard.handle(command_error(1, "results/runs/a/status.json"))
    for said in ("interrupted; the next start goes on from what it did", "its command failed"):  # a retry, which failed
        heard.handle(error("", "a", rule_msg=None))
        heard.handle(error("", "", rule_name="train_batch", rule_msg=None, output=[batch]))
        reasons = {made: failure.reason for made, failure in heard.failed.items()}
        assert reasons["results/runs/a/status.json"] == "its command failed"
        assert reasons[batch] == said


@pytest.mark.parametrize("killed", [["Slurm job 1 was ended: OUT_OF_MEMORY"], ["Slurm job 1 was ended: TIMEOUT"]])
def test_tries_before_the_refusal_are_told(tmp_path, killed):
    config = make_config()
    out = tmp_path / config.run_id
    (out / ".state").mkdir(parents=True)
    with Lease(out / ".state/lease.json", None) as held:
        held.killed = killed
    (out / "train.log").write_text("attempt 1\n")
    assert write_refused(config, out, SAID, at_once=False)
    found = json.loads((out / "status.json").read_text())
    assert found["status"] == ("oom" if "MEMORY" in killed[0] else "failed")
    assert found["reason"] == f"{killed[0]}; refused by Slurm: {SAID}" and found["log_tail"] == "attempt 1"


def test_a_run_that_was_out_of_time_before_it_was_refused_can_go_on(tmp_path):
    heard, ended = JobErrors(), "SLURM-job '7' failed, SLURM status is: 'TIMEOUT'."
    for record in (error("", "a", rule_msg=ended), error(SAID, "a"), error(SAID, "a"), error(SAID, "b")):
        heard.handle(record)
    after, at_once = heard.failed.values()
    assert (after.refusal, after.at_once, at_once.at_once) == (SAID, False, True)
    config = make_config()
    assert not write_refused(config, tmp_path / config.run_id, after.refusal, after.at_once)
    assert not (tmp_path / config.run_id / "status.json").exists()
