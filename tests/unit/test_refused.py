"""Runs that Slurm would not take: what is heard of them in Snakemake's log, and their results."""

import json
import logging

import pytest
from test_analysis_synthetic import make_config

from kdclimb.analysis.tables import RUN_COLUMNS, RunFolder, read_csv, write_csv
from kdclimb.lease import Lease
from kdclimb.refused import Refusals, write_refused

SAID = "sbatch: error: Batch job submission failed: Requested node configuration is not available"


def error(said, run_id, **more):
    """An error of a job as Snakemake's logger has it, in the words of the executor plugin."""
    message = f"SLURM sbatch failed. The error message was '{said}'.\n    sbatch call:\n        sbatch --parsable\n"
    output = [f"results/runs/{run_id}/config.json", f"results/runs/{run_id}/status.json"]
    return logging.makeLogRecord({"rule_msg": message, "output": output} | more)


def test_requests_that_are_refused_as_such_are_heard():
    heard = Refusals()
    heard.handle(error(f"sbatch: warning\n{SAID}", "a"))
    heard.handle(error("sbatch: error: Unable to contact slurm controller (connect failure)", "b"))
    heard.handle(error(SAID, "c"))
    heard.handle(error(SAID, "c", rule_msg="SLURM-job '7' failed, SLURM status is: 'FAILED'."))
    heard.handle(error(SAID, "d", output=["results/tiny/kd/batches/1of2.csv"]))
    heard.handle(logging.makeLogRecord({"msg": "no error of a job"}))
    assert heard.said == {"a": f"sbatch: warning {SAID}"}


def test_a_refused_run_is_a_row_of_the_run_table(tmp_path):
    config = make_config()
    out = tmp_path / config.run_id
    assert write_refused(config, out, SAID)
    run = RunFolder.read(f"screen|T1|{out}")
    assert not run.ok and run.steps == run.val == []
    write_csv(tmp_path / "runs.csv", RUN_COLUMNS, [run.row()])
    (row,) = read_csv(tmp_path / "runs.csv", RUN_COLUMNS)
    assert (row["status"], row["reason"], row["log_tail"]) == ("refused", f"refused by Slurm: {SAID}", SAID)
    assert not write_refused(config, out, "again")


@pytest.mark.parametrize("killed", [["Slurm job 1 was ended: OUT_OF_MEMORY"], ["Slurm job 1 was ended: TIMEOUT"]])
def test_tries_before_the_refusal_are_told(tmp_path, killed):
    config = make_config()
    out = tmp_path / config.run_id
    (out / ".state").mkdir(parents=True)
    with Lease(out / ".state/lease.json", None) as held:
        held.killed = killed
    (out / "train.log").write_text("attempt 1\n")
    assert write_refused(config, out, SAID)
    found = json.loads((out / "status.json").read_text())
    assert found["status"] == ("oom" if "MEMORY" in killed[0] else "failed")
    assert found["reason"] == f"{killed[0]}; refused by Slurm: {SAID}" and found["log_tail"] == "attempt 1"
