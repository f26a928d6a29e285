"""Several runs in one job: each as it is alone, and none at the mercy of another."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from configs import ROOT

from kdclimb.stop import EXIT_INTERRUPTED

SCRIPT = ROOT / "workflow/scripts/train_batch.py"


@pytest.fixture
def batch(tmp_path, manifest):
    """batch.start(configs, *flags) -> a process that trains them under tmp_path; its CSV, log and the runs' folders."""

    def start(configs, *flags):
        command = [
            sys.executable,
            SCRIPT,
            "--manifest",
            manifest,
            "--threads",
            "1",
            "--out",
            made.csv,
            "--log",
            made.log,
        ]
        command += ["--configs", *(config.canonical() for config in configs), *flags]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    made = SimpleNamespace(csv=tmp_path / "batch.csv", log=tmp_path / "batch.log", runs=tmp_path / "results/runs")
    made.start = start
    return made


@pytest.fixture(scope="session")
def probes(tiny_runs):
    return [run.config for run in tiny_runs if run.arm == "probe"]


@pytest.fixture(scope="session")
def baseline(tiny_runs):
    return next(run.config for run in tiny_runs if run.arm == "ce")


def end(process, code):
    _, said = process.communicate(timeout=120)
    assert process.returncode == code, said
    return said


def attempts(folder):
    return int((folder / ".state/attempts").read_text())


def wait_until(found):
    until = time.monotonic() + 60
    while not found():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_runs_that_share_a_job_are_as_they_are_alone(batch, probes, train, tmp_path):
    said = end(batch.start(probes, "--no-weights", probes[-1].run_id), 0)
    with batch.csv.open(newline="") as file:
        assert [*csv.DictReader(file)] == [{"run_id": config.run_id, "status": "ok"} for config in probes]
    for config in probes:
        _, alone = train(config, tmp_path / "alone")
        weights, kept = "checkpoints/model.safetensors", config is not probes[-1]
        assert (batch.runs / config.run_id / weights).is_file() == kept
        for name in ("steps.csv", "val.csv", "summary.csv", *[weights] * kept):
            assert (batch.runs / config.run_id / name).read_bytes() == (alone / name).read_bytes(), name
        assert f"{config.run_id}: step 5/5 val_loss" in said
    begun = [f"{config.run_id}: begun; its log is results/runs/{config.run_id}/train.log" for config in probes]
    assert batch.log.read_text().splitlines() == begun


def test_a_run_that_fails_takes_no_other_along_and_those_are_not_trained_again(batch, probes):
    wrong = batch.runs / probes[0].run_id / "config.json"
    wrong.parent.mkdir(parents=True)
    wrong.write_text("{}")
    assert "holds another config" in end(batch.start(probes), 1)
    assert f"{probes[0].run_id}: train: results/runs/" in batch.log.read_text() and not batch.csv.exists()
    others = [batch.runs / config.run_id for config in probes[1:]]
    status = [json.loads((folder / "status.json").read_text())["status"] for folder in others]
    assert status == ["ok"] * len(others)
    made = [(folder / "checkpoints").stat().st_mtime_ns for folder in others]
    wrong.unlink()
    end(batch.start(probes), 0)
    assert batch.csv.is_file() and [attempts(folder) for folder in others] == [1] * len(others)
    assert [(folder / "checkpoints").stat().st_mtime_ns for folder in others] == made  # nor made to look newer


def test_finished_runs_stand_with_other_threads_and_when_weights_are_wanted(batch, probes):
    kept_none = batch.runs / probes[-1].run_id
    end(batch.start(probes[1:], "--no-weights", kept_none.name), 0)
    others = [batch.runs / config.run_id for config in probes[1:]]
    made = {file: file.stat().st_mtime_ns for folder in others for file in folder.glob("*.csv")}
    said = end(batch.start(probes, "--threads", "2"), 0)  # as when a run has joined them since
    assert attempts(batch.runs / probes[0].run_id) == 1 and f"{probes[0].run_id}: step 5/5" in said
    assert [attempts(folder) for folder in others] == [1] * len(others) and said.count("already complete") == 2
    assert {file: file.stat().st_mtime_ns for file in made} == made and not [*(kept_none / "checkpoints").iterdir()]


def test_a_run_that_is_killed_takes_no_other_along(batch, baseline, probes):
    process = batch.start([baseline, probes[0]])
    folder = batch.runs / baseline.run_id
    wait_until((folder / ".state/resume.safetensors").is_file)
    os.kill(json.loads((folder / ".state/lease.json").read_text())["process"], signal.SIGKILL)
    end(process, 1)
    assert f"{baseline.run_id}: ended with exit code -9" in batch.log.read_text()
    assert (batch.runs / probes[0].run_id / "status.json").is_file()
    end(batch.start([baseline, probes[0]]), 0)
    assert "resumed at step" in (folder / "train.log").read_text()


@pytest.mark.parametrize("all_of_it", [True, False])
def test_a_signal_ends_the_run_at_its_next_step_and_the_job(all_of_it, batch, baseline, probes):
    """To all processes, as from a terminal or Slurm; to the run alone, as its own Ctrl-C would be."""
    process = batch.start([baseline, probes[0]])
    folder = batch.runs / baseline.run_id
    wait_until((folder / ".state/resume.safetensors").is_file)
    if all_of_it:
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(json.loads((folder / ".state/lease.json").read_text())["process"], signal.SIGTERM)
    assert "interrupted: at step" in end(process, EXIT_INTERRUPTED)
    assert not (batch.runs / probes[0].run_id).exists() and not batch.csv.exists()
    assert batch.log.read_text().splitlines()[1:] == ["interrupted; start it again to go on"]
    end(batch.start([baseline, probes[0]]), 0)
    assert "resumed at step" in (folder / "train.log").read_text()
