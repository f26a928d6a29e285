"""The trainer: repeatable, resumable to the bit, and every ending a result that says why."""

import csv
import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from configs import ROOT, merged
from safetensors.torch import load_file

from kdclimb import campaign, expansion, schedule
from kdclimb import lease as lease_module
from kdclimb import model as model_module
from kdclimb import optim as optim_module
from kdclimb import run as run_module
from kdclimb import train as train_module
from kdclimb.analysis import tables
from kdclimb.artifacts import ARTIFACTS, STEP_COLUMNS, SUMMARY_COLUMNS, VAL_COLUMNS, RunFolder, hashes, sha256
from kdclimb.attention import Documents
from kdclimb.config import ConfigError
from kdclimb.count_ngrams import make
from kdclimb.data import Dataset
from kdclimb.model import compile_layer
from kdclimb.run import EXIT_INTERRUPTED
from kdclimb.train import SHARE_EVERY, Trainer, compiled_graphs
from kdclimb.write_cache import write


def pick(runs, arm, seed=0):
    return next(r.config for r in runs if r.arm == arm and r.config.seed == seed)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_result(a, b, ignore=()):
    """steps.csv, val.csv, summary.csv and weights equal to the byte."""
    for name in ("steps.csv", "val.csv"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    kept = [{k: v for k, v in rows(x / "summary.csv")[0].items() if k not in ignore} for x in (a, b)]
    assert kept[0] == kept[1]
    weights = "checkpoints/model.safetensors"
    assert (a / weights).read_bytes() == (b / weights).read_bytes()


@pytest.fixture(scope="module")
def kd_run(tiny_runs, train, teacher_folder, tmp_path_factory):
    code, out = train(pick(tiny_runs, "kd"), tmp_path_factory.mktemp("kd"), teacher_folder)
    assert code == 0
    return out


def test_a_run_leaves_its_artifacts(kd_run, teacher_folder):
    for name in (*ARTIFACTS, "train.log"):
        assert (kd_run / name).exists(), name
    steps, vals, summary = (rows(kd_run / f"{name}.csv") for name in ("steps", "val", "summary"))
    assert list(steps[0]) == STEP_COLUMNS and list(vals[0]) == VAL_COLUMNS and list(summary[0]) == SUMMARY_COLUMNS
    assert [int(r["step"]) for r in steps] == list(range(1, 76))
    assert [int(r["step"]) for r in vals] == [0, 25, 50, 75]
    assert int(steps[-1]["tokens"]) == 38 * 256 + 37 * 512  # two equal stages of 75 steps
    status, teacher = (json.loads(path.read_text()) for path in (kd_run / "status.json", teacher_folder / "model.json"))
    assert status["status"] == "ok" and status["teacher_sha256"] == teacher["weights_sha256"]
    assert {*status["wall_s"]} == {"set_up", "checkpoints", "training", "artifacts"}
    assert min(status["wall_s"].values()) >= 0 and status["wall_s"]["training"] > 0
    assert float(summary[0]["final_val"]) == float(vals[-1]["val_loss"]) < float(vals[0]["val_loss"])
    assert float(vals[0]["val_loss"]) == pytest.approx(math.log(384), abs=0.05)  # an untrained student guesses


def test_the_time_of_a_part_is_without_that_of_the_parts_within_it(monkeypatch):
    readings = iter([0.0, 1.0, 3.0, 10.0, 20.0, 25.0])
    monkeypatch.setattr(run_module.time, "perf_counter", lambda: next(readings))
    attempt = SimpleNamespace(wall={}, nested=0.0)
    part = functools.partial(run_module._Attempt._part, attempt)
    with part("training"), part("checkpoints"):
        pass
    with part("checkpoints"):
        pass
    assert attempt.wall == {"training": 8.0, "checkpoints": 7.0}


def test_a_run_whose_weights_nobody_wants_keeps_none_until_somebody_does(tiny_runs, train, tmp_path):
    probe, student = (pick(tiny_runs, arm) for arm in ("probe", "ce"))
    _, whole = train(probe, tmp_path / "whole")

    def ran(**options):
        code, out = train(probe, tmp_path, **options)
        attempts = int((out / ".state/attempts").read_text())
        return code, attempts, sorted(path.name for path in (out / "checkpoints").iterdir())

    both = ["model.json", "model.safetensors"]
    assert ran(weights=False) == (0, 1, [])
    folder = tmp_path / probe.run_id
    assert (folder / "steps.csv").read_bytes() == (whole / "steps.csv").read_bytes()
    grown = dataclasses.replace(student, grown_from=probe.run_id)
    with pytest.raises(ValueError, match=f"`weights` kept none of it: .*retry --run {probe.run_id}"):
        train(grown, tmp_path / "grown", folder / "checkpoints")
    assert ran(weights=False) == (0, 1, [])  # brought back
    assert ran(any_weights=True) == (0, 1, [])  # wanted, but not needed
    assert ran() == (0, 2, both)
    assert ran(weights=False) == (0, 2, both)  # what is there stays


def test_first_log_line_reproduces_the_run_without_torchs_compiler(kd_run, manifest, teacher_folder, tmp_path):
    """A CPU has no use for that, and its import takes a second and a half."""
    command = (kd_run / "train.log").read_text().splitlines()[0]
    assert str(kd_run / "config.json") in command
    out = tmp_path / kd_run.name
    command = command.replace(f"--out {kd_run}", f"--out {out}")
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(command, shell=True, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_result(kd_run, out)
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "torch" in imported and "torch._dynamo" not in imported


def test_kd_is_alive_and_its_columns_are_filled_while_it_is(kd_run):
    steps, vals = rows(kd_run / "steps.csv"), rows(kd_run / "val.csv")
    active = [r for r in steps if r["kd_active"] == "1"]
    measured = [r for r in active if (int(r["step"]) - 1) % SHARE_EVERY == 0]
    assert measured and all(0.05 < float(r["kd_share"]) < 0.95 for r in measured)
    assert all(r["kd_share"] == "" for r in active if r not in measured)
    assert all(float(r["loss_soft"]) > 0 and float(r["kd_norm"]) > 0 for r in active)
    assert all(r["loss_soft"] == r["kd_norm"] == r["kd_share"] == "" for r in steps if r["kd_active"] == "0")
    assert all(float(r["teacher_kl"]) >= 0 for r in vals)
    stop = rows(kd_run / "summary.csv")[0]["kd_stop_step"]
    assert len(active) == (int(stop) if stop else 75)


def test_a_head_at_zero_has_no_share_and_the_next_ones_have(tiny_runs, manifest, teacher_folder):
    config = pick(tiny_runs, "kd")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, untie_frac=0.0))
    trainer = Trainer(config, Dataset(manifest), teacher_folder, "reference")
    steps = [trainer.train_step() for _ in range(SHARE_EVERY + 1)]
    assert [i for i, row in enumerate(steps) if "kd_share" in row] == [SHARE_EVERY]
    assert 0.05 < steps[SHARE_EVERY]["kd_share"] < 0.95


def test_ce_leaves_kd_cells_empty_and_costs_no_teacher_time(tiny_runs, train, kd_run, tmp_path):
    _, out = train(pick(tiny_runs, "control_boost"), tmp_path, policy=kd_run / "summary.csv")
    steps, vals, summary = (rows(out / f"{name}.csv") for name in ("steps", "val", "summary"))
    assert {r[c] for r in steps for c in ("loss_soft", "kd_norm", "kd_share", "kd_active")} == {""}
    assert {r[c] for r in vals for c in ("teacher_kl", "kd_active")} == {""}
    assert summary[0]["teacher_flops_per_token"] == ""
    # the modelled clock goes by each step's windows, so these FLOPs are a mean over them
    flops = float(summary[0]["tokens"]) * float(summary[0]["flops_per_token"])
    assert float(summary[0]["train_time_ms"]) == pytest.approx(flops / (0.001 * 1e9), rel=1e-9)
    # the modelled clock charges the teacher's forward pass for each KD step, and nothing else
    kd_summary, kd_steps = rows(kd_run / "summary.csv")[0], rows(kd_run / "steps.csv")
    kd_tokens = sum(int(r["batch_tokens"]) for r in kd_steps if r["kd_active"] == "1")
    extra = kd_tokens * float(kd_summary["teacher_flops_per_token"]) / (0.001 * 1e9)
    assert float(kd_summary["train_time_ms"]) - float(summary[0]["train_time_ms"]) == pytest.approx(extra, rel=1e-9)


def test_ce_with_kds_lr_follows_it_through_the_stop_and_the_tail(tiny_runs, train, kd_run, tmp_path):
    config = pick(tiny_runs, "control_boost")
    _, out = train(config, tmp_path, policy=kd_run / "summary.csv")
    taught, alone = ([row["lr_mult"] for row in rows(folder / "steps.csv")] for folder in (kd_run, out))
    assert taught == alone
    stop = int(rows(kd_run / "summary.csv")[0]["kd_stop_step"])
    assert stop < len(alone)  # so that there is a tail
    with pytest.raises(ValueError, match="no --policy file"):
        train(config, tmp_path / "none")
    other = dataclasses.replace(config, lr_policy=dataclasses.replace(config.lr_policy, run="kd-other"))
    with pytest.raises(ValueError, match="which lr_policy names"):
        train(other, tmp_path / "other", policy=kd_run / "summary.csv")


@pytest.mark.parametrize("untie_frac", [0.0, 0.5, 1.0])
def test_a_grown_student_starts_where_its_teacher_ended(tiny_runs, train, tmp_path, untie_frac):
    """All parts on, those too of which each layer has a number, and the student's head free as its teacher's is."""
    base, tiny = pick(tiny_runs, "ce"), pick(tiny_runs, "teacher")
    model = dataclasses.replace(base.model, untie_frac=untie_frac)
    alike = {name: getattr(model, name) for name in ("num_heads", "head_dim", "untie_frac")}
    schedule = dataclasses.replace(base.schedule, windows=(), final_windows=(), stop_step=40)
    config = dataclasses.replace(base, model=model, schedule=schedule)
    small = dataclasses.replace(config, model=dataclasses.replace(tiny.model, num_layers=1, **alike))
    _, taught = train(small, tmp_path)
    grown = dataclasses.replace(config, grown_from=small.run_id)
    code, out = train(grown, tmp_path, taught / "checkpoints")
    vals, last = rows(out / "val.csv"), rows(taught / "val.csv")[-1]
    assert float(vals[0]["val_loss"]) == pytest.approx(float(last["val_loss"]), abs=1e-4)
    assert code == 0 and float(vals[-1]["val_loss"]) < float(vals[0]["val_loss"])
    wide = dataclasses.replace(grown, model=dataclasses.replace(model, head_dim=20))
    with pytest.raises(ValueError, match="controls.growth: the student can't start from"):
        train(wide, tmp_path, taught / "checkpoints")


def test_the_anchor_brackets_a_measured_run_and_changes_nothing_else(tiny_runs, train, tmp_path):
    config = dataclasses.replace(pick(tiny_runs, "ce"), clock="measured", modelled_tflops=0.0)
    runs = [train(dataclasses.replace(config, anchor_steps=n), tmp_path)[1] for n in (0, 3)]
    cells = [rows(out / "summary.csv")[0] for out in runs]
    assert cells[0]["anchor_before_ms"] == cells[0]["anchor_after_ms"] == ""
    assert float(cells[1]["anchor_before_ms"]) > 0 < float(cells[1]["anchor_after_ms"])
    losses = [[row["val_loss"] for row in rows(out / "val.csv")] for out in runs]
    assert losses[0] == losses[1]  # not even the random state


class Killed(BaseException):
    pass


@pytest.mark.parametrize("arm", ["kd", "ce"])
@pytest.mark.parametrize("kill_at", [10, 25, 40, 60])
def test_a_killed_run_resumes_to_the_same_bytes(
    arm, kill_at, tiny_runs, train, teacher_folder, kd_run, tmp_path, monkeypatch
):
    config = (
        pick(tiny_runs, arm) if arm == "kd" else pick([r for r in tiny_runs if r.config.schedule.horizon == 75], arm)
    )
    teacher = teacher_folder if arm == "kd" else None
    whole = kd_run if arm == "kd" else train(config, tmp_path / "whole")[1]
    step = Trainer.train_step

    def killing(self, **options):
        if self.step == kill_at:
            raise Killed  # nothing is caught or written on the way out, as with SIGKILL
        return step(self, **options)

    monkeypatch.setattr(Trainer, "train_step", killing)
    with pytest.raises(Killed):
        train(config, tmp_path / "cut", teacher)
    monkeypatch.undo()
    code, out = train(config, tmp_path / "cut", teacher)
    assert code == 0
    assert_same_result(whole, out, ignore=("broken",))
    assert rows(out / "summary.csv")[0]["broken"] == ("0" if kill_at <= 10 else "1")


def test_a_config_that_an_old_job_deletes_during_the_run_is_there_in_the_end(
    tiny_runs, train, teacher_folder, kd_run, tmp_path, monkeypatch
):
    """As its Snakemake does with the outputs of a failed job, on a node that Slurm lost but that lives on."""
    config = pick(tiny_runs, "kd")
    step = Trainer.train_step

    def deleting(self, **options):
        if self.step == 31:
            (tmp_path / config.run_id / "config.json").unlink()
        return step(self, **options)

    monkeypatch.setattr(Trainer, "train_step", deleting)
    code, out = train(config, tmp_path, teacher_folder)
    assert code == 0
    assert_same_result(kd_run, out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_at_the_next_step_and_the_run_goes_on_from_there(
    number, tiny_runs, train, teacher_folder, kd_run, tmp_path, monkeypatch
):
    config = pick(tiny_runs, "kd")
    step = Trainer.train_step

    def interrupted(self, **options):
        if self.step == 31:
            os.kill(os.getpid(), number)
        return step(self, **options)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    code, out = train(config, tmp_path, teacher_folder)
    assert code == EXIT_INTERRUPTED and not (out / "status.json").exists()
    monkeypatch.undo()
    assert train(config, tmp_path, teacher_folder)[0] == 0
    assert "resumed at step 32" in (out / "train.log").read_text()
    assert_same_result(kd_run, out, ignore=("broken",))


@pytest.mark.parametrize(("state", "status"), [("FAILED", "failed"), ("OUT_OF_MEMORY", "oom")])
def test_killed_tries_without_progress_become_a_result(state, status, tiny_runs, train, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(self, **options):
        raise Killed

    config = pick(tiny_runs, "ce")
    monkeypatch.setattr(lease_module.Lease, "__exit__", lambda *_: None)  # as after SIGKILL
    monkeypatch.setattr(lease_module, "job_state", lambda job: state)
    monkeypatch.setattr(Trainer, "train_step", killed)
    for job in ("1", "2"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        with pytest.raises(Killed):
            train(config, tmp_path, give_up=True)  # one killed try is not enough
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    code, out = train(config, tmp_path, give_up=True)
    found = json.loads((out / "status.json").read_text())
    assert code == 0 and found["status"] == rows(out / "summary.csv")[0]["status"] == status
    assert found["reason"].startswith(f"Slurm job 1 was ended: {state}; Slurm job 2 was ended: {state}")
    assert ("lower train.micro_batch_tokens" in found["reason"]) == (status == "oom")
    said = f"before this: Slurm job 1 was ended: {state}; if the kernel lacked memory, lower train.micro_batch_tokens"
    assert (out / "train.log").read_text().count(said) == 1


def test_a_run_stops_when_its_master_is_gone(tiny_runs, train, tmp_path, monkeypatch):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    monkeypatch.setenv("KDCLIMB_MASTER", str(gone.pid))
    assert train(pick(tiny_runs, "ce"), tmp_path)[0] == EXIT_INTERRUPTED


def test_a_complete_run_comes_back_without_training(kd_run, tiny_runs, train, teacher_folder, tmp_path, monkeypatch):
    out = tmp_path / kd_run.name
    shutil.copytree(kd_run, out)
    for name in ARTIFACTS:  # as Snakemake does before it starts a job again
        target = out / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    monkeypatch.setattr(Trainer, "train_step", None)
    assert train(pick(tiny_runs, "kd"), tmp_path, teacher_folder)[0] == 0
    assert_same_result(kd_run, out)


@pytest.mark.parametrize("part", ["config", "code", "data", "teacher", "torch", "device", "threads"])
def test_a_finished_run_stands_whatever_it_ran_on_and_not_for_what_else_differs(part, kd_run, tmp_path):
    folder = RunFolder(shutil.copytree(kd_run, tmp_path / kd_run.name))
    key = json.loads((folder.state / "complete/key.json").read_text())["key"]
    assert len(key) == 7 and folder.restore_complete(key, any_code=False)
    stands = folder.restore_complete(key | {part: "another"}, any_code=False)
    assert stands is (part in ("torch", "device", "threads"))


def imported(kd_run, folder, damaged=False):
    """A copy of the run as if a bundle had brought it, but for its weights, and Snakemake had begun to make it anew."""
    out = shutil.copytree(kd_run, folder / kd_run.name)
    shutil.rmtree(out / ".state")
    (out / "checkpoints/model.safetensors").unlink()
    (out / "checkpoints/model.safetensors.elsewhere").touch()
    files = {name: digest for name, digest in hashes(out).items() if not name.endswith(".elsewhere")}
    RunFolder(out).keep_imported(files | {"status.json": "0" if damaged else sha256(out / "status.json")})
    for name in ARTIFACTS:
        target = out / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    (out / "train.log").write_text("")
    return out


def test_a_run_that_a_bundle_brought_comes_back_where_it_could_not_be_made(kd_run, tiny_runs, tmp_path):
    """There are neither data nor its teacher."""
    out = imported(kd_run, tmp_path)
    options = {"threads": 7, "any_code": False, "last_attempt": True}
    assert run_module.run(pick(tiny_runs, "kd"), out, tmp_path / "no manifest", None, **options) == 0
    names = [name for name in (*ARTIFACTS, "train.log") if name != "checkpoints"]
    assert {name: (out / name).read_bytes() for name in names} == {name: (kd_run / name).read_bytes() for name in names}
    found = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert found == ["model.json", "model.safetensors.elsewhere"] and not (out / ".state/attempts").exists()


def test_of_an_imported_run_nothing_damaged_comes_back(kd_run, tiny_runs, train, teacher_folder, tmp_path, capsys):
    out = imported(kd_run, tmp_path, damaged=True)
    assert train(pick(tiny_runs, "kd"), tmp_path, teacher_folder)[0] == 0
    assert "status.json: damaged" in capsys.readouterr().err and (out / ".state/attempts").read_text() == "1"
    assert_same_result(kd_run, out)


@pytest.mark.parametrize("frozen", [False, True])
def test_changed_code_trains_again_unless_frozen(
    frozen, kd_run, tiny_runs, train, teacher_folder, tmp_path, monkeypatch
):
    shutil.copytree(kd_run, tmp_path / kd_run.name)
    monkeypatch.setattr(run_module, "source_hash", lambda entry: "another")
    trained = []
    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self, **o: trained.append(1) or step(self, **o))
    assert train(pick(tiny_runs, "kd"), tmp_path, teacher_folder, any_code=frozen)[0] == 0
    assert bool(trained) is not frozen


def test_a_run_ends_where_two_validations_reached_its_goal(tiny_runs, train, tmp_path):
    config = pick(tiny_runs, "ce")
    longer = dataclasses.replace(config.schedule, horizon=100, stop_step=100)
    goal = dataclasses.replace(config.validation, every=10, stop_at=4.6)
    code, out = train(dataclasses.replace(config, schedule=longer, validation=goal), tmp_path)
    vals = [(int(row["step"]), float(row["val_loss"])) for row in rows(out / "val.csv")]
    assert code == 0 and json.loads((out / "status.json").read_text())["status"] == "ok"
    assert [loss <= 4.6 for _, loss in vals] == [False] * (len(vals) - 2) + [True, True] and vals[-1][0] < 100
    assert (out / "checkpoints/model.safetensors").is_file() and rows(out / "summary.csv")[0]["steps"] == str(
        vals[-1][0]
    )


def test_divergence_is_a_result_with_its_reason(tiny_runs, train, tmp_path):
    config = pick(tiny_runs, "ce")
    adam = dataclasses.replace(config.optim.adam, lr=1e30)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, adam=adam))
    code, out = train(config, tmp_path)
    status = json.loads((out / "status.json").read_text())
    assert code == 0 and status["status"] == "diverged" and "nan" in status["reason"]
    assert list((out / "checkpoints").iterdir()) == []
    assert rows(out / "summary.csv")[0]["final_val"] != ""  # what it had before it diverged


@pytest.mark.parametrize("where", ["__init__", "train_step"])
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("9 GiB"), MemoryError("9 GiB"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_running_out_of_memory_is_a_result_that_names_the_key(where, error, tiny_runs, train, tmp_path, monkeypatch):
    def no_memory(self, *args, **options):
        raise error

    monkeypatch.setattr(Trainer, where, no_memory)
    code, out = train(pick(tiny_runs, "ce"), tmp_path)
    status = json.loads((out / "status.json").read_text())
    assert code == 0 and status["status"] == "oom" and "train.micro_batch_tokens" in status["reason"]


def test_an_unexpected_failure_is_tried_again_and_then_a_result(tiny_runs, train, tmp_path, monkeypatch):
    def broken(self, **options):
        raise RuntimeError("the disk of theseus")

    monkeypatch.setattr(Trainer, "train_step", broken)
    code, out = train(pick(tiny_runs, "ce"), tmp_path, last_attempt=False)
    assert code == 1 and not (out / "status.json").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert train(pick(tiny_runs, "ce"), tmp_path)[0] == 0
    status = json.loads((out / "status.json").read_text())
    assert status["status"] == "failed" and "theseus" in status["reason"] and status["attempts"] == 2
    row = tables.RunFolder.read(f"ce|CE 50|{out}").row()  # as tables/runs.csv has it
    assert (row["status"], row["reason"], row["slurm_job"]) == ("failed", "RuntimeError: the disk of theseus", "7")
    assert row["log_tail"].splitlines()[-2:] == [row["reason"], f"failed: {row['reason']}"]
    assert "Traceback" in (out / "train.log").read_text()
    assert rows(out / "steps.csv") == []


def test_a_folder_with_another_config_is_refused(tiny_runs, train, tmp_path):
    config = pick(tiny_runs, "ce")
    out = tmp_path / config.run_id
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config.to_dict() | {"seed": 7}))
    with pytest.raises(ConfigError, match="holds another config"):
        train(config, tmp_path)


def test_measured_time_leaves_validation_and_warm_up_out(tiny_runs, train, tmp_path, monkeypatch):
    config = dataclasses.replace(pick(tiny_runs, "ce"), clock="measured", modelled_tflops=0.0)
    now = [0.0]
    monkeypatch.setattr(train_module.time, "perf_counter", lambda: now[0])
    step, validate = Trainer.train_step, Trainer.validate

    def timed(seconds, function):
        def call(self, *args, **options):
            now[0] += seconds
            return function(self, *args, **options)

        return call

    monkeypatch.setattr(Trainer, "train_step", timed(0.5, step))
    monkeypatch.setattr(Trainer, "validate", timed(100.0, validate))
    _, out = train(config, tmp_path)
    steps = rows(out / "steps.csv")
    assert [float(r["train_time_ms"]) for r in steps[:3]] == [500.0, 1000.0, 1500.0]
    assert float(rows(out / "summary.csv")[0]["step_ms_median"]) == 500.0


def test_warm_up_changes_nothing(tiny_runs, train, tmp_path):
    modelled = pick(tiny_runs, "ce")
    measured = dataclasses.replace(modelled, clock="measured", modelled_tflops=0.0)
    (_, a), (_, b) = train(modelled, tmp_path), train(measured, tmp_path)
    timeless = [[{k: v for k, v in r.items() if k != "train_time_ms"} for r in rows(x / "steps.csv")] for x in (a, b)]
    assert timeless[0] == timeless[1]
    weights = [load_file(x / "checkpoints/model.safetensors") for x in (a, b)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


@pytest.mark.parametrize(
    ("changes", "reached"),
    [
        ({}, {(0, 1), (1, 1), (0, 0), (1, 0)}),
        ({"every": 4}, {(0, 1), (1, 1), (0, 0), (1, 0)}),
        ({"token_frac": 0.2}, {(0, 1), (0, 0), (1, 0)}),  # KD ends in the first stage
    ],
    ids=str,
)
def test_warm_up_reaches_each_stage_with_and_without_a_teacher(
    changes, reached, tiny_runs, manifest, teacher_folder, monkeypatch
):
    config = pick(tiny_runs, "kd")
    config = dataclasses.replace(config, kd=dataclasses.replace(config.kd, **changes))
    seen, step = set(), Trainer.train_step

    def noting(self):
        stage = schedule.stage(config.schedule, self.step)
        row = step(self)
        seen.add((stage, row["kd_active"]))
        return row

    monkeypatch.setattr(Trainer, "train_step", noting)
    trainer = Trainer(config, Dataset(manifest), teacher_folder, "reference")
    trainer.warm_up()
    assert seen == reached and (trainer.step, trainer.tokens, trainer.kd.stop_step) == (0, 0, None)
    seen.clear()
    trainer.config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, stop_step=20))
    trainer.warm_up()
    assert {stage for stage, _ in seen} == {0}  # a probe ends before the second


def test_two_runs_at_once_mark_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module.DeviceLease.__init__.__globals__["tempfile"], "gettempdir", lambda: str(tmp_path))
    with run_module.DeviceLease("cpu test") as first:
        assert not first.shared()
        with run_module.DeviceLease("cpu test") as second:
            assert first.shared() and second.shared()
    with run_module.DeviceLease("cpu test") as third:
        assert not third.shared()


def test_a_finished_run_leaves_the_device_however_it_ends(tiny_runs, train, tmp_path, monkeypatch):
    error = torch.OutOfMemoryError("kept, with its traceback and all that its frames hold")

    def fail(self, **options):
        raise error

    monkeypatch.setattr(Trainer, "train_step", fail)
    # of its own, since a campaign beside the tests holds the machine's
    monkeypatch.setattr(run_module.DeviceLease.__init__.__globals__["tempfile"], "gettempdir", lambda: str(tmp_path))
    _, out = train(pick(tiny_runs, "ce"), tmp_path)
    with run_module.DeviceLease(json.loads((out / "status.json").read_text())["device"]) as lease:
        assert not lease.refused


def test_a_folder_is_held_by_one_process(tmp_path):
    code = (
        "import sys; from pathlib import Path; from kdclimb.artifacts import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).lock(): print('in', flush=True)"
    )
    with RunFolder(tmp_path).lock():
        other = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(timeout=1.0)
    assert other.communicate(timeout=20)[0] == "in\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_cuda_without_a_gpu_is_refused(tiny_runs, train, tmp_path):
    config = dataclasses.replace(pick(tiny_runs, "ce"), device="cuda")
    with pytest.raises(ConfigError, match="device: cuda is asked for"):
        train(config, tmp_path)


def test_a_failure_keeps_nothing_of_an_earlier_result(kd_run, tiny_runs, train, teacher_folder, tmp_path, monkeypatch):
    out = tmp_path / kd_run.name
    shutil.copytree(kd_run, out)
    monkeypatch.setattr(run_module, "source_hash", lambda entry: "another")  # so that it is trained again
    monkeypatch.setattr(Trainer, "train_step", lambda self, **options: 1 / 0)
    assert train(pick(tiny_runs, "kd"), tmp_path, teacher_folder, last_attempt=False)[0] == 1
    assert not (out / "status.json").exists()
    assert train(pick(tiny_runs, "kd"), tmp_path, teacher_folder)[0] == 0
    assert json.loads((out / "status.json").read_text())["status"] == "failed"
    assert list((out / "checkpoints").iterdir()) == [] and rows(out / "steps.csv") == []


SPARSE = {"every": 2, "micro_batches": 1, "token_stride": 2, "token_gate": "teacher_better"}
MODES = {  # where the targets come from, and which steps and tokens have them
    "teacher": {},
    "hidden": {"cache": "hidden"},
    "top_k": {"cache": "top_k", "top_k": 20, **SPARSE},
    "samples": {"cache": "samples", "micro_batches": 1},
    "ngram": {"ngram": {"orders": [3], "token_frac": [1.0]}},
}


@pytest.fixture
def taught(tiny_runs, manifest, teacher_folder, tmp_path):
    """taught(source) -> (KD config, teacher folder, cache folder) with the teacher itself, its cache, or n-grams."""

    def of(source):
        config = campaign.load(merged("tests/tiny.yaml", {"kd": MODES[source]}), ROOT)
        teacher, data = pick(tiny_runs, "teacher"), manifest.parent.name
        (label,) = (run.label for run in tiny_runs if run.arm == "teacher")
        selected = {"run_id": teacher.run_id, "train_time_ms": 0.1, "budget_ms": 0.1}
        decisions = {"projected": {"survivors": [label]}, "selected": selected}
        decisions["promoted"] = {"points": [expansion.grid_points(config.kd.grid)[0].name]}
        if source == "ngram":
            (table,) = expansion.tables(config, data)
            make(table.config, tmp_path / table.run_id, manifest, threads=1)
            runs = expansion.expand(config, decisions, data)
            return pick(runs, "ngram"), tmp_path / table.run_id / "checkpoints", None
        run = pick(expansion.expand(config, decisions, data), "kd")
        if run.kd.cache is None:
            return run, teacher_folder, None
        cache = expansion.caches(config, decisions, data)[run.kd.cache]
        write(cache, tmp_path / cache.cache_id, manifest, teacher_folder, threads=1)
        return run, teacher_folder, tmp_path / cache.cache_id

    return of


@pytest.mark.slow
@pytest.mark.parametrize("source", MODES)
def test_no_graph_is_made_inside_the_clock(source, taught, manifest, monkeypatch, cpu_varlen):
    """What a GPU compiles, here by a quick backend: over a reset, all stages, the untying and the end of KD."""
    config, teacher_folder, cache = taught(source)
    torch._dynamo.reset()  # else the graphs of the source before are taken
    quick = compile_layer("aot_eager")
    monkeypatch.setattr(model_module, "compile_layer", lambda: quick)
    options = {"fullgraph": True, "dynamic": False, "backend": "aot_eager"}
    monkeypatch.setattr(optim_module, "_compiled", functools.cache(lambda f: torch.compile(f, **options)))
    monkeypatch.setattr(Documents, "of", Documents.padded)
    config = dataclasses.replace(
        config, kd=dataclasses.replace(config.kd, stop_margin=9.0, stop_min_step=50, stop_consecutive=1)
    )
    kinds = [
        dataclasses.replace(group, kinds=tuple(k for k in group.kinds if k != "head"))
        for group in config.optim.adam.groups
    ]
    head = next(group for group in config.optim.adam.groups if "head" in group.kinds)
    groups = (*(group for group in kinds if group.kinds), dataclasses.replace(head, kinds=("head",), beta1=0.3))
    optim = dataclasses.replace(config.optim, adam=dataclasses.replace(config.optim.adam, groups=groups))
    config = dataclasses.replace(config, optim=optim)  # so that the untied head is no parameter like another
    trainer = Trainer(config, Dataset(manifest), teacher_folder, "torch_varlen", cache)
    before = compiled_graphs()
    trainer.options["compiled"] = True
    trainer.teacher = trainer._load_teacher()
    trainer.reset()
    trainer.warm_up()
    made, reported = compiled_graphs() - before, []
    trainer.train(lambda: None, lambda: False, SimpleNamespace(update=lambda n: None, report=reported.append))
    assert made > 4 and trainer.recompiles == 0
    assert trainer.model.head is not None and trainer.kd.stop_step == 50


def test_checkpoints_that_take_long_are_rarer(monkeypatch):
    now, made = [0.0], []

    def checkpoint():
        made.append(now[0])
        now[0] += 2.0

    monkeypatch.setattr(train_module.time, "perf_counter", lambda: now[0])
    paced = train_module.Paced(checkpoint, 0.3)
    for now[0] in (2.0, 5.0, 10.0, 26.0, 28.0, 60.0):
        paced()
    assert made == [5.0, 28.0, 60.0]  # the first after ten times what was expected


def test_label_smoothing_has_the_gradient_of_torchs(tiny_runs, manifest):
    config = pick(tiny_runs, "control_smooth")
    trainer = Trainer(config, Dataset(manifest), None, "reference")
    hidden = torch.randn(7, config.model.dim, requires_grad=True)
    labels = torch.randint(config.model.vocab_size, (7,))
    target, weights = trainer._uniform(hidden)
    head, cap = trainer.model.head_weight.detach().normal_(), trainer.model.softcap
    loss = train_module.distill_loss(hidden, head, target, labels, student_softcap=cap, **weights)
    a, b, c = config.model.softcap
    peer = torch.nn.functional.cross_entropy(
        a * torch.sigmoid((hidden @ head.T + b) / c), labels, label_smoothing=config.label_smoothing
    )
    grads = [torch.autograd.grad(value, hidden)[0] for value in (loss.total, peer)]
    torch.testing.assert_close(*grads)
    plain = torch.nn.functional.cross_entropy(a * torch.sigmoid((hidden @ head.T + b) / c), labels)
    assert loss.hard.item() == pytest.approx(plain.item())  # what steps.csv shows is not smoothed
