"""Campaigns through a real Slurm: as typed, over the time limit, requeued, with a killed master, refused, failing."""

import json
import os
import re
from types import SimpleNamespace

import pytest
from checkouts import CANDIDATES, SMALL, jobs, overlay
from cluster import NODES, Master, call

from kdclimb.analysis.tables import RunFolder
from kdclimb.jobs import OF_THE_REQUEST

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

TOO_LARGE = {"num_layers": 40, "num_heads": 32, "head_dim": 64, "steps": 30}
OVER_LIMIT, WITHOUT_MASTER = 3000, 1300  # steps of some 25 ms; the first must take more than a minute on any machine


def one_run(master: Master, steps: int, **changes) -> tuple[str, list[str]]:
    """The id of a campaign's CE run of so many steps with seed 0, and the arguments that make it alone."""
    changes = {"train": {"horizons": [steps], "seeds": [0]}, "data": {"max_epochs": 1000}} | changes
    configfiles = overlay(master, "one", **changes)
    (run_id,) = {r for r in ids_of(master.dry_run("results/tiny/ce/timing.csv", *configfiles)) if "-s0-" in r}
    return run_id, [f"results/runs/{run_id}/status.json", *configfiles]


def ids_of(output: str) -> list[str]:
    return [line.split("=")[1] for line in output.splitlines() if line.startswith("    wildcards: run=")]


def test_training_jobs_ask_for_a_gpu_and_go_to_the_nodes_that_have_one(tmp_path, cluster, finished):
    """First, while no other job is there: each node has one."""
    master = Master(tmp_path / "kdclimb", finished=finished)
    master.edit("slurm/config.yaml", "gpu_type: default", "gpu_type: fake")
    configfiles = overlay(master, "gpu", device="cuda")
    process = master.start("results/tiny/ce/timing.csv", *configfiles)
    master.wait_for("two jobs that have a node", lambda: len(cluster.placed(master.path)) > 1)
    nodes = cluster.placed(master.path)
    process.kill()
    assert set(nodes.values()) == set(NODES)
    for job in nodes:
        assert "gres:gpu:fake:1" in call("scontrol", "show", "job", job)
    call("scancel", *nodes)


@pytest.fixture(scope="module")
def started(tmp_path_factory, cluster, finished):
    """Masters that wait for Slurm while the other tests run: one whose run is over its time limit, one with a candidate
    that needs too much memory, and one that asks for what no node has.
    """

    def checkout(name, **options):
        return Master(tmp_path_factory.mktemp(name) / "kdclimb", node="node1", finished=finished, **options)

    over, large, refused = checkout("over", minutes=1), checkout("large"), checkout("refused")
    over.run_id, arguments = one_run(over, OVER_LIMIT)
    over.process = over.start(*arguments)
    changes = {"teacher": {"candidates": [*CANDIDATES[:1], TOO_LARGE]}}
    large.process = large.start("results/tiny/teacher/projected.json", *overlay(large, "large", **changes))
    refused.edit("slurm/config.yaml", "gpu_type: default", "gpu_type: h100")
    refused.run_id, refused.arguments = one_run(refused, 50, device="cuda")
    refused.process = refused.start(*refused.arguments)
    yield SimpleNamespace(over=over, large=large, refused=refused)
    for master in (over, large, refused):
        master.process.kill()


def end(master: Master) -> str:
    """The output of a master that was started."""
    return master.process.communicate(timeout=400)[0]


def test_the_tiny_campaign_as_typed_has_the_tables_of_a_local_one(tmp_path, cluster, finished, small, started):
    master = Master(tmp_path / "slurm", threads=len(os.sched_getaffinity(0)))  # as many as the local runs
    output = master.run(*overlay(master, "small", cluster={"points_per_job": 2}, **SMALL), timeout=800)
    ours = [line for line in output.splitlines() if line.startswith("kdclimb: ")]
    assert ours[0] == "kdclimb: campaign tiny on cpu, through Slurm, at most 8 jobs at a time"
    assert ours[1].startswith("kdclimb: to train") and output.index(ours[1]) < output.index("has been submitted")
    submitted = [comment for _, comment in cluster.jobs(folder=master.path)]
    assert submitted.count("rule_data") == 1 and submitted.count("rule_train_batch_wildcards_screen-1of1") == 1
    assert {comment.split("_wildcards")[0] for comment in submitted} == {"rule_data", "rule_train", "rule_train_batch"}
    assert len(submitted) == output.count("has been submitted") == 1 + (3 + 1) + 1 + 1 + 3 + 1 + 5
    assert {r for r in jobs(output)} - {"data", "train", "train_batch"} == set(jobs(finished.output)) - {
        "data",
        "train",
    }
    tables = {name: text for name, text in master.tables().items() if not name.startswith("batches/")}
    expected = small.tables()
    assert tables.keys() == expected.keys()
    assert [name for name in expected if tables[name] != expected[name]] == []


def test_a_lost_nodes_run_goes_on_and_a_killed_masters_result_is_taken(tmp_path, cluster, finished, started):
    master = Master(tmp_path / "kdclimb", node="node2", finished=finished)
    run_id, arguments = one_run(master, WITHOUT_MASTER)
    process = master.start(*arguments)
    folder = master.path / "results/runs" / run_id
    master.wait_for("a state to go on from", (folder / ".state/resume.safetensors").is_file)
    job = cluster.job(run_id, "RUNNING")
    cluster.lose("node2")
    master.wait_for("the requeued job", lambda: "resumed at step" in master.read(folder / "train.log"))
    process.kill()
    process.communicate()
    assert "RUNNING" in call("squeue", "--noheader", f"--jobs={job}", "--format=%T")
    call(master.path / ".venv/bin/snakemake", "--unlock", *arguments[1:], cwd=master.path)
    output = master.run(*arguments)
    assert output.count("has been submitted") == 1 and f"--dependency=afterany:{job}" in output
    assert master.attempts()[run_id] == 2  # the start, and the one after the requeue: nothing was trained again
    assert master.summary(run_id)["broken"] == "1"


def test_what_no_node_has_is_refused_with_its_reason(started):
    refused, output = started.refused, end(started.refused)
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
    output = end(started.large)
    assert started.large.process.returncode == 0, output
    assert output.count("failed, SLURM status is: ") == 2 and "external_jobid: " in output
    assert "Exceeded job memory limit" in output  # of Slurm's log, which the terminal shows
    projected = json.loads((started.large.path / "results/tiny/teacher/projected.json").read_text())
    assert len(projected["survivors"]) == 1
    (reason,) = projected["rejected"].values()
    assert len(re.findall(r"Slurm job \d+ was ended: ", reason)) == 2 and reason.startswith("no OOM fallback: ")
    assert "Exceeded job memory limit" in reason  # though Slurm's state, without cgroups, is FAILED


def test_a_run_over_its_time_limit_goes_on_and_finishes(started):
    over, output = started.over, end(started.over)
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
