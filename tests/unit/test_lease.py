"""Leases: what a job waits for, and what it learns of how the one before it ended."""

import subprocess

import pytest

from kdclimb import lease
from kdclimb.config import ConfigError
from kdclimb.lease import GONE, Lease, queued_jobs


@pytest.fixture
def slurm(monkeypatch):
    """A Slurm that answers from `states`: {job: its states, one for each look}; an unknown job is gone."""
    states, naps = {}, []

    def squeue(*options):
        job = next(option.split("=")[1] for option in options if option.startswith("--jobs="))
        if job not in states:
            return subprocess.CompletedProcess([], 1, "", "slurm_load_jobs error: Invalid job id specified")
        left = states[job]
        return subprocess.CompletedProcess([], 0, (left.pop(0) if len(left) > 1 else left[0]) + "\n", "")

    monkeypatch.setattr(lease, "_squeue", squeue)
    monkeypatch.setattr(lease.time, "sleep", naps.append)
    return states, naps


def leave(path, monkeypatch, job, progress=None):
    """A lease as a killed job leaves it."""
    monkeypatch.setenv("SLURM_JOB_ID", job)
    Lease(path, progress).__enter__()


def take(path, monkeypatch, job, progress=None):
    monkeypatch.setenv("SLURM_JOB_ID", job)
    with Lease(path, progress) as held:
        return held.killed


def test_an_orderly_end_leaves_nothing_to_wait_for(tmp_path, monkeypatch, slurm):
    assert take(tmp_path / "lease.json", monkeypatch, "1") == []
    assert take(tmp_path / "lease.json", monkeypatch, "2") == []


def test_a_live_job_is_waited_for(tmp_path, monkeypatch, slurm):
    states, naps = slurm
    leave(tmp_path / "lease.json", monkeypatch, "1")
    states["1"] = ["RUNNING", "COMPLETING", "COMPLETED"]
    take(tmp_path / "lease.json", monkeypatch, "2")
    assert len(naps) == 2


def test_killed_jobs_are_counted_until_the_run_comes_further(tmp_path, monkeypatch, slurm):
    states, path = slurm[0], tmp_path / "lease.json"
    leave(path, monkeypatch, "1", progress=5)
    states["1"] = ["OUT_OF_MEMORY"]
    monkeypatch.setenv("SLURM_JOB_ID", "2")
    Lease(path, 5).__enter__()
    assert take(path, monkeypatch, "3", progress=5) == [
        "Slurm job 1 was ended: OUT_OF_MEMORY",
        f"Slurm job 2 was ended: {GONE}",
    ]
    assert take(path, monkeypatch, "4", progress=6) == []


def test_slurms_own_log_says_why_where_the_state_does_not(tmp_path, monkeypatch, slurm):
    """Without cgroups and accounting, a job that the memory watch killed has FAILED."""
    log = tmp_path / "1.log"
    log.write_text(
        "a line of the run\n"
        "slurmstepd-node1: error: StepId=1.0 exceeded memory limit (4636672000 > 4194304000), being killed\n"
        "slurmstepd-node1: error: Exceeded job memory limit\n"
        "slurmstepd-node1: error: *** JOB 1 ON node1 CANCELLED AT 2026-11-24T22:11:57 ***\n"
    )
    show = f"#!/bin/sh\n[ \"$3\" = 1 ] && echo 'JobId=1 JobName=a' && echo '   StdOut={log}'\n"
    (tmp_path / "scontrol").write_text(show)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for job in ("1", "2"):
        leave(tmp_path / "lease.json", monkeypatch, job)
        slurm[0][job] = ["FAILED"]
        killed = take(tmp_path / "lease.json", monkeypatch, "3")
    assert killed == ["Slurm job 1 was ended: FAILED (Exceeded job memory limit)", "Slurm job 2 was ended: FAILED"]
    assert lease.status_of(killed) == "oom" and lease.status_of(killed[1:]) == "failed"
    assert lease.status_of(["Slurm job 1 was ended: OUT_OF_MEMORY"]) == "oom"


@pytest.mark.parametrize("state", ["PREEMPTED", "NODE_FAIL", "CANCELLED"])
def test_what_says_nothing_of_the_run_is_not_counted(tmp_path, monkeypatch, slurm, state):
    leave(tmp_path / "lease.json", monkeypatch, "1")
    slurm[0]["1"] = [state]
    assert take(tmp_path / "lease.json", monkeypatch, "2") == []


def test_a_requeued_job_is_its_own_predecessor(tmp_path, monkeypatch, slurm):
    leave(tmp_path / "lease.json", monkeypatch, "1")
    slurm[0]["1"] = ["RUNNING"]
    assert take(tmp_path / "lease.json", monkeypatch, "1") == [] and slurm[1] == []


def test_a_killed_process_without_slurm_is_counted(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    Lease(tmp_path / "lease.json", None).__enter__()
    with Lease(tmp_path / "lease.json", None) as held:
        assert len(held.killed) == 1 and "was killed" in held.killed[0]


def test_a_slurm_that_does_not_answer_is_told(tmp_path, monkeypatch):
    leave(tmp_path / "lease.json", monkeypatch, "1")
    silent = subprocess.CompletedProcess([], 1, "", "Unable to contact slurm controller")
    monkeypatch.setattr(lease, "_squeue", lambda *_: silent)
    with pytest.raises(ConfigError, match="held by Slurm job 1.*Unable to contact.*delete that file"):
        take(tmp_path / "lease.json", monkeypatch, "2")


def test_jobs_that_an_earlier_master_left(tmp_path, monkeypatch):
    listed = {"7": (tmp_path, "a"), "8": (tmp_path, "b"), "9": ("/elsewhere", "a")}
    lines = [f"{job}|{folder}|rule_train_wildcards_{run}" for job, (folder, run) in listed.items()]
    states = {"7": "RUNNING", "8": "COMPLETED"}

    def squeue(*options):
        job = next((option.split("=")[1] for option in options if option.startswith("--jobs=")), None)
        return subprocess.CompletedProcess([], 0, "\n".join(lines) if job is None else states[job], "")

    monkeypatch.setattr(lease, "_squeue", squeue)
    monkeypatch.setattr(lease.shutil, "which", lambda name: name)
    assert queued_jobs(tmp_path, "rule_train_wildcards_a") == ["7"]
    assert queued_jobs(tmp_path, "rule_train_wildcards_b") == []  # ended meanwhile
