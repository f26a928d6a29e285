"""Campaigns through a real Slurm: as typed, over the time limit, requeued, with a killed master, refused, failing."""

import json
import os
import re
import threading
from types import SimpleNamespace

import pytest
from checkouts import CANDIDATES, SMALL, jobs, overlay
from cluster import GPUS, Master, call, go_on, is_held
from configs import ROOT, merged

from kdclimb import campaign, expansion
from kdclimb.analysis.tables import RunFolder
from kdclimb.jobs import OF_THE_REQUEST

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

TOO_LARGE = {"num_layers": 40, "num_heads": 32, "head_dim": 64, "steps": 30}
OVER_LIMIT, WITHOUT_MASTER = 300, 200  # steps, of which some are left when the run is held


def one_run(master: Master, steps: int, **changes) -> tuple[str, list[str]]:
    """The id of a campaign's CE run of so many steps with seed 0, and the arguments that make it alone."""
    changes = {"train": {"horizons": [steps], "seeds": [0]}, "data": {"max_epochs": 1000}} | changes
    tiny = campaign.load(merged("tests/tiny.yaml", changes), ROOT)
    run_id = expansion.expand(tiny, {}, campaign.data_id(tiny, ROOT))[0].run_id
    return run_id, [f"results/runs/{run_id}/status.json", *overlay(master, "one", **changes)]


def test_training_jobs_ask_for_a_gpu_and_go_to_the_nodes_that_have_one(tmp_path, cluster, prepared):
    """First, while no other job is there: each node has one."""
    master = Master(tmp_path / "kdclimb", data=prepared)
    master.edit("slurm/config.yaml", "gpu_type: default", "gpu_type: fake")
    master.begin("results/tiny/ce/timing.csv", *overlay(master, "gpu", device="cuda", cluster={"tokens_per_job": 0}))
    master.wait_for("two jobs that have a node", lambda: len(cluster.placed(master.path)) > 1)
    nodes = cluster.placed(master.path)
    master.process.kill()
    assert set(nodes.values()) == set(GPUS)
    for job in nodes:
        assert "gres:gpu:fake:1" in call("scontrol", "show", "job", job)
    call("scancel", *(job for job, _ in cluster.jobs("PENDING", "RUNNING")))


@pytest.fixture(scope="module")
def started(tmp_path_factory, cluster, prepared):
    """Masters that wait for Slurm side by side: the tiny campaign's, one whose run is over its time limit, one with a
    candidate that needs too much memory, and one that asks for what no node has.
    """

    def checkout(name, **options):
        return Master(tmp_path_factory.mktemp(name) / "kdclimb", **options)

    typed = checkout("typed", threads=len(os.sched_getaffinity(0)))  # as many as the local runs
    typed.begin(*overlay(typed, "small", **SMALL))
    over, large = checkout("over", partition="others", minutes=1, data=prepared), checkout("large", partition="others")
    over.run_id, arguments = one_run(over, OVER_LIMIT)
    over.begin(*arguments)
    threading.Thread(target=hold_until_warned, args=(over,), daemon=True).start()
    changes = {"train": {"horizons": [75], "seeds": [0]}, "teacher": {"candidates": [*CANDIDATES[:1], TOO_LARGE]}}
    large.begin("results/tiny/teacher/projected.json", *overlay(large, "large", **changes))
    refused = checkout("refused", data=prepared)
    refused.edit("slurm/config.yaml", "gpu_type: default", "gpu_type: h100")
    refused.run_id, refused.arguments = one_run(refused, 50, device="cuda")
    refused.begin(*refused.arguments)
    yield SimpleNamespace(typed=typed, over=over, large=large, refused=refused)
    for master in (typed, over, large, refused):
        master.process.kill()


def hold_until_warned(master: Master) -> None:
    """Have a run do nothing until Slurm tells it that its time is over."""
    trainer = master.hold(master.run_id, "step 0/")
    master.wait_for("Slurm's warning", lambda: not is_held(trainer))
    go_on(trainer)


def test_a_lost_nodes_run_goes_on_and_a_killed_masters_result_is_taken(tmp_path, cluster, prepared, started):
    master = Master(tmp_path / "kdclimb", partition="lost", data=prepared)
    run_id, arguments = one_run(master, WITHOUT_MASTER)
    master.begin(*arguments)
    folder = master.path / "results/runs" / run_id
    master.wait_for("a state to go on from", (folder / ".state/resume.safetensors").is_file)
    job = cluster.job(run_id, "RUNNING")
    cluster.lose("node4")
    trainer = master.hold(run_id, "resumed at step")
    master.process.kill()
    master.process.wait()
    assert "RUNNING" in call("squeue", "--noheader", f"--jobs={job}", "--format=%T")
    call(master.path / ".venv/bin/snakemake", "--unlock", *arguments[1:], cwd=master.path)
    master.begin(*arguments)
    master.wait_for("the second master's job", lambda: cluster.job(run_id, "PENDING"))
    go_on(trainer)
    output = master.end()
    assert master.process.returncode == 0, output
    assert output.count("has been submitted") == 1 and f"--dependency=afterany:{job}" in output
    assert master.attempts()[run_id] == 2  # the start, and the one after the requeue: nothing was trained again
    assert master.summary(run_id)["broken"] == "1"


def test_the_tiny_campaign_as_typed_has_the_tables_of_a_local_one(cluster, started, request):
    small = request.getfixturevalue("small")  # made while Slurm is at work
    master, output = started.typed, started.typed.end()
    assert master.process.returncode == 0, output
    ours = [line for line in output.splitlines() if line.startswith("kdclimb: ")]
    assert ours[0] == "kdclimb: campaign tiny on cpu, through Slurm, at most 8 jobs at a time"
    assert ours[1].startswith("kdclimb: to train") and output.index(ours[1]) < output.index("has been submitted")
    submitted = [comment for _, comment in cluster.jobs(folder=master.path)]
    batches = [f"rule_train_batch_wildcards_{stage}-1of1" for stage in "ce isolate screen kd controls".split()]
    alone = [comment for comment in submitted if comment.startswith("rule_train_wildcards_")]
    assert len(alone) == 4  # CE's screen, probe, teacher, CE with KD's LR
    named = [comment.rpartition("-")[0] if "train_batch" in comment else comment for comment in submitted]
    assert sorted(named) == sorted(["rule_data", *batches, *alone])
    assert output.count("has been submitted") == len(submitted)
    assert set(jobs(output)) == set(jobs(small.output))
    tables, expected = master.tables(), small.tables()
    assert tables.keys() == expected.keys()
    assert [name for name in expected if tables[name] != expected[name]] == []


def test_what_no_node_has_is_refused_with_its_reason(started):
    refused, output = started.refused, started.refused.end()
    assert refused.process.returncode != 0
    assert "SLURM sbatch failed" in output and "--gpus=h100:1" in output
    assert "kdclimb retry --status refused" in output
    row = RunFolder.read(f"ce|CE 50|{refused.path / 'results/runs' / refused.run_id}").row()  # of the run table
    assert (
        row["status"] == "refused" and row["log_tail"] in row["reason"] and row["log_tail"] in " ".join(output.split())
    )
    assert any(known in row["reason"] for known in OF_THE_REQUEST)
    assert "Nothing to be done" in refused.dry_run(*refused.arguments)  # a result, without which the campaign goes on


def test_a_candidate_out_of_memory_does_not_stop_the_campaign(started):
    output = started.large.end()
    assert started.large.process.returncode == 0, output
    assert output.count("failed, SLURM status is: ") == 2 and "external_jobid: " in output
    assert "Exceeded job memory limit" in output  # of Slurm's log, which the terminal shows
    projected = json.loads((started.large.path / "results/tiny/teacher/projected.json").read_text())
    assert len(projected["survivors"]) == 1
    (reason,) = projected["rejected"].values()
    assert len(re.findall(r"Slurm job \d+ was ended: ", reason)) == 2 and reason.startswith("no OOM fallback: ")
    assert "Exceeded job memory limit" in reason  # though Slurm's state, without cgroups, is FAILED


def test_a_run_over_its_time_limit_goes_on_and_finishes(started):
    over, output = started.over, started.over.end()
    assert over.process.returncode == 0, output
    folder = over.path / "results/runs" / over.run_id
    interrupted = re.findall(r"interrupted: at step (\d+)", output)  # of Slurm's log, which the terminal shows
    (resumed,) = re.findall(r"resumed at step (\d+)", (folder / "train.log").read_text())
    assert interrupted[-1] == resumed
    assert int(over.summary(over.run_id)["broken"]) == len(set(interrupted))
    steps = (folder / "steps.csv").read_text().splitlines()
    assert len(steps) == 1 + OVER_LIMIT  # each step once
    times = [float(line.split(",")[2]) for line in steps[1:]]
    assert times == sorted(times) and times[-1] == float(over.summary(over.run_id)["train_time_ms"])
