"""Which GPUs of a machine a workflow uses, and that two jobs never take the same one."""

import os
import subprocess
import sys

import pytest
from configs import ROOT, merged

from kdclimb import campaign, gpus

TWO = "GPU-aa, NVIDIA H200\nGPU-bb, NVIDIA H200\nGPU-cc, Quadro\n"
JOB = """
import os
from kdclimb import gpus
gpus.take_one("cuda")
print(os.environ.get(gpus.VISIBLE), flush=True)
input()
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine(what nvidia-smi lists, its exit code), with lock files of its own."""
    (tmp_path / "tmp").mkdir()
    for name, value in {"PATH": str(tmp_path), "TMPDIR": str(tmp_path / "tmp")}.items():
        monkeypatch.setenv(name, value)
    for name in (gpus.VISIBLE, "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)

    def lists(text, code=0):
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\nprintf '%s' '{text}'\nexit {code}\n")
        script.chmod(0o755)

    return lists


def test_what_a_workflow_may_use(machine, monkeypatch):
    assert gpus.usable() == []  # no driver
    machine("No devices were found\n", 6)
    assert gpus.usable() == []
    machine(TWO)
    assert gpus.usable() == ["GPU-aa", "GPU-bb"]  # of one kind
    monkeypatch.setenv(gpus.VISIBLE, "1, 2")
    assert gpus.usable() == ["1", "2"]
    monkeypatch.setenv(gpus.VISIBLE, "")
    assert gpus.usable() == []


@pytest.mark.parametrize(
    ("visible", "names"),
    [("0", ["0"]), ("GPU-bb,GPU-aa", ["GPU-bb", "GPU-aa"]), (" MIG-1 ", ["MIG-1"]), ("1,-1,0", ["1"])]
    + [(hidden, []) for hidden in ("", ",", " ", "-1", "-1,0", "NoDevFiles")],
)
def test_the_variable_is_read_as_cuda_reads_it_and_auto_goes_by_it(machine, monkeypatch, visible, names):
    machine(TWO)
    assert campaign.load(merged(), ROOT).device == "cuda"
    monkeypatch.setenv(gpus.VISIBLE, visible)
    assert gpus.usable() == names
    assert campaign.load(merged(), ROOT).device == ("cuda" if names else "cpu")
    assert campaign.load(merged({"device": "cuda"}), ROOT).device == "cuda"  # the run says that there is none


def start():
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", JOB], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipe)


def test_each_job_takes_a_gpu_of_its_own_and_gives_it_back(machine):
    machine(TWO)
    jobs = [start()]
    names = [jobs[0].stdout.readline().strip()]
    jobs.append(start())
    names.append(jobs[1].stdout.readline().strip())
    assert names == ["GPU-aa", "GPU-bb"]
    jobs.append(start())
    assert jobs[2].stdout.readline().strip() == "GPU-aa"  # all are held: shared, which the runs' status says
    jobs[1].kill()
    jobs[1].wait()
    jobs.append(start())
    assert jobs[3].stdout.readline().strip() == "GPU-bb"
    for job in jobs:
        job.communicate("\n")


@pytest.mark.parametrize("listed, slurm", [("GPU-aa, NVIDIA H200\n", None), (TWO, "7")])
def test_one_gpu_and_slurms_choice_stay_as_they_are(machine, monkeypatch, listed, slurm):
    machine(listed)
    if slurm:
        monkeypatch.setenv("SLURM_JOB_ID", slurm)
    gpus.take_one("cuda")
    assert gpus.VISIBLE not in os.environ


def test_a_cpu_takes_none(machine):
    machine(TWO)
    gpus.take_one("cpu")
    assert gpus.VISIBLE not in os.environ
