"""SIGKILL at random moments, to the trainer and to the master: the tables are those of what nobody touched."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import yaml
from checkouts import ROOT, Checkout, overlay
from configs import prepare_tiny
from training import start_training, train

KILLS = 10  # in each campaign
LONGEST = 12.0  # seconds between two of them, at most
CANDIDATES = yaml.safe_load((ROOT / "tests/tiny.yaml").read_text())["teacher"]["candidates"]
SMALL = {
    "train": {"horizons": [50], "seeds": [0]},
    "teacher": {"candidates": CANDIDATES[:1]},
    "kd": {"grid": {"temperature": [1.0], "lr_boost": [1.0]}},
    "controls": {"label_smoothing": 0.0, "extra_steps": False, "random_teacher": False},
    "cluster": {"tokens_per_job": 0},  # a trainer for each run
}


def test_a_trainer_killed_at_random_moments_ends_with_the_same_tables(made, tmp_path):
    results, manifest, config = made
    out, rng = tmp_path / config.run_id, random.Random(0)
    for _ in range(3):
        process = start_training(config, out, manifest)
        try:
            process.wait(timeout=rng.uniform(1.0, 6.0))
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
    last = start_training(config, out, manifest)
    assert last.communicate()[1] is not None and last.returncode == 0
    assert_same_run(results, config, out)


def test_two_trainers_of_one_run_make_one_result(made, tmp_path):
    results, manifest, config = made
    out = tmp_path / config.run_id
    both = [start_training(config, out, manifest) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("already complete" in text for text in said) == 1
    assert (out / ".state/attempts").read_text() == "1"
    assert_same_run(results, config, out)


KILLED_IN_A_SAVE = """
import json, os, signal, sys
from pathlib import Path
from configs import prepare_tiny
from training import train
from kdclimb import artifacts
from kdclimb.config import RunConfig
config, out, name = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
sync = artifacts.sync
artifacts.sync = lambda path: os.kill(os.getpid(), signal.SIGKILL) if name in path.name else sync(path)
train(RunConfig.from_dict(config), out, Path(sys.argv[4])) if config else prepare_tiny(out)
"""


def killed_in_a_save(name, out, config=None, manifest=None):
    """Train `config` into `out`, or without one prepare the tiny data there; SIGKILL once a file `name` is written, and
    has no name yet.
    """
    command = [sys.executable, "-c", KILLED_IN_A_SAVE, json.dumps(config and config.to_dict()), out, name]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([*command, str(manifest)], cwd=ROOT, env=environment).returncode == -signal.SIGKILL


def unfinished(out) -> set[str]:
    """Names, without the process's number, of files that have not got their own yet."""
    return {file.name.rsplit(".", 2)[0] for file in out.rglob(".*.tmp")}


def test_what_a_kill_in_a_save_leaves_is_gone_with_the_next_try(made, tmp_path):
    results, manifest, config = made
    out = tmp_path / config.run_id
    for name in ("resume.safetensors", "model.safetensors", "steps.csv"):
        killed_in_a_save(name, out, config, manifest)
        assert unfinished(out) == {f".{name}"}
    assert train(config, out, manifest) == 0
    assert not unfinished(out)
    assert_same_run(results, config, out)


def test_what_a_kill_in_a_shard_leaves_is_gone_with_the_next_try(made, tmp_path):
    killed_in_a_save("train_000000.bin", tmp_path)
    assert unfinished(tmp_path) == {".train_000000.bin"}
    _, manifest = prepare_tiny(tmp_path)
    assert not unfinished(tmp_path)
    assert manifest.read_bytes() == made[1].read_bytes()


def assert_same_run(results, config, out):
    for name in ("steps.csv", "val.csv", "checkpoints/model.safetensors"):
        assert (out / name).read_bytes() == (results / "runs" / config.run_id / name).read_bytes(), name


# ---- the long form ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The small campaign, untouched."""
    checkout = Checkout(tmp_path_factory.mktemp("unbroken") / "kdclimb")
    checkout.run(*overlay(checkout, "small", **SMALL))
    return checkout.tables()


def trainers(folder) -> list[int]:
    """Processes of train.py in a checkout."""
    found = []
    for process in os.listdir("/proc"):
        try:
            if os.path.samefile(f"/proc/{process}/cwd", folder):
                words = open(f"/proc/{process}/cmdline", "rb").read().split(b"\0")  # noqa: SIM115
                if b"workflow/scripts/train.py" in words[1:2]:
                    found.append(int(process))
        except OSError:  # no process, or gone meanwhile
            continue
    return found


def start_quietly(checkout, arguments):
    """./run in a session of its own; its output goes nowhere, since what a killed one leaves still writes."""
    return subprocess.Popen(
        ["./run", *arguments], cwd=checkout.path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True, env={k: v for k, v in os.environ.items() if not k.startswith(("KDCLIMB", "SNAKEMAKE"))},
    )  # fmt: skip


def kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it ended just now
        os.kill(process, signal.SIGKILL)


@pytest.mark.faults
def test_campaigns_killed_at_random_moments_end_with_the_same_tables(pytestconfig, unbroken, tmp_path):
    first, totals = pytestconfig.getoption("--first"), {"master": 0, "trainer": 0}
    for number in range(first, first + pytestconfig.getoption("--campaigns")):
        checkout = Checkout(tmp_path / f"{number}" / "kdclimb")
        arguments, rng = overlay(checkout, "small", **SMALL), random.Random(number)
        kills = dict.fromkeys(totals, 0)
        process = start_quietly(checkout, arguments)
        while sum(kills.values()) < KILLS:
            time.sleep(rng.uniform(1.0, LONGEST))
            if process.poll() is not None:
                if process.returncode == 0:
                    break  # it has ended, between kills
                process = start_quietly(checkout, arguments)  # its run was killed twice, so it gave up
                continue
            victims = trainers(checkout.path)
            who = "trainer" if victims and rng.random() < 0.5 else "master"
            kill(victims[0] if who == "trainer" else process.pid)
            kills[who] += 1
            if who == "master":
                process.wait()
                process = start_quietly(checkout, arguments)
        process.wait(timeout=600)
        checkout.run(*arguments)
        tables = checkout.tables()
        assert tables.keys() == unbroken.keys()
        assert [name for name in tables if tables[name] != unbroken[name]] == [], number
        for who in totals:
            totals[who] += kills[who]
        pytestconfig.measured.append(f"campaign {number}: killed {kills}, same tables")
