"""Synthetic run folders and a synthetic campaign, in the trainer's formats, for the tests of the analysis."""

import csv
import dataclasses
import json
import runpy
import statistics
import sys
from pathlib import Path

import pytest
import yaml
from configs import merged

from kdclimb import campaign as campaigns
from kdclimb import expansion
from kdclimb.analysis.budget import PROFILE_COLUMNS
from kdclimb.analysis.details import OUTPUTS as DETAILS
from kdclimb.analysis.report import INPUTS
from kdclimb.analysis.tables import RunFolder
from kdclimb.artifacts import SUMMARY_COLUMNS
from kdclimb.config import RunConfig
from kdclimb.schedule import batch_tokens

ROOT = Path(__file__).resolve().parents[2]
VAL_HEADER = "step tokens train_time_ms val_loss teacher_kl kd_active".split()
STEPS_HEADER = (
    "step tokens train_time_ms lr_mult batch_tokens window_short window_long loss_hard loss_soft kd_norm kd_share "
    "kd_active grad_norm"
).split()


def make_config(horizon=100, seed=0, kd=None, boost=None, clock="measured", batch_tokens=(1000,), stop_step=None):
    """A small valid RunConfig. `kd` overrides keys of a KD config; None is CE."""
    values = {
        "model": merged()["student"]
        | {
            "vocab_size": 512,
            "num_layers": 1,
            "num_heads": 2,
            "head_dim": 16,
            "bigram_vocab_size": 2,
            "untie_frac": 1.0,
        },
        "data": {"id": "text-512-000000000000", "vocab_size": 512},
        "optim": merged()["optim"],
        "schedule": {
            "horizon": horizon,
            "stop_step": stop_step or horizon,
            "batch_tokens": list(batch_tokens),
            "batch_lr": [1.0] * len(batch_tokens),
            "micro_batch_tokens": 500,
            "max_doc_tokens": 100,
            "cooldown_frac": 0.6,
            "lr_floor": 0.1,
            "lr_table": [],
            "extension_frac": 0.0,
            "windows": [],
            "extension_windows": [],
            "final_windows": [],
            "mtp_weights": [[1.0]],
            "head_dtype": "same",
            "lr_boost": boost and dict(zip(("mult", "hold_frac", "drop_frac"), boost, strict=True)),
        },
        "validation": {"every": 25, "tokens": 1000, "slabs": False, "stop_at": None},
        "attention": {"backend": "auto", "require_flash_attn": False},
        "kd": None,
        "lr_policy": None,
        "grown_from": None,
        "label_smoothing": 0.0,
        "seed": seed,
        "device": "cpu",
        "clock": clock,
        "modelled_tflops": 0.05 if clock == "modelled" else 0.0,
        "anchor_steps": 0 if clock == "modelled" else 30,
    }
    if kd is not None:
        values["kd"] = {
            "teacher": "teacher",
            "random_teacher": False,
            "infer_only": False,
            "alpha": 0.5,
            "alpha_schedule": "constant",
            "temperature": 1.0,
            "dynamic_norm": True,
            "norm_floor": 0.05,
            "norm_max": 20.0,
            "token_frac": 1.0,
            "every": 1,
            "micro_batches": 0,
            "token_stride": 1,
            "cache": None,
            "compile_teacher": True,
            "teacher_dtype": "same",
            "logits_mib": 0,
            "token_gate": "none",
            "token_gate_frac": 0.5,
            "top_k": 0,
            "tail": "ghost",
            "stop_mode": "val_margin",
            "stop_margin": 0.05,
            "stop_min_step": 25,
            "stop_consecutive": 2,
            "stop_frac": 0.5,
            "teacher_val": None,
            "post_stop_lr": 0.7,
            "post_stop_blend_steps": 10,
        } | kd
    return RunConfig.from_dict(values)


def write_run(runs, config, val=(), step_ms=10.0, status="ok", reason="", shares=(), **summary):
    """Write the folder of a run under `runs`, and return it.

    `val` lists (step, loss); `step_ms` is the time of each step, or a list of them; `shares` the kd_share
    of the first steps, where 0 is a step without KD, as are all later ones; `summary` overrides cells of summary.csv.
    """
    folder = Path(runs) / config.run_id
    (folder / "checkpoints").mkdir(parents=True)
    weights = ("checkpoints/model.safetensors", "checkpoints/model.json")
    for name in ("train.log", "val_loss.png", "step_time.png", *weights):
        (folder / name).write_text("x")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "status.json").write_text(json.dumps({"status": status, "reason": reason}))
    schedule, done = config.schedule, status == "ok"
    durations = step_ms if isinstance(step_ms, list) else [step_ms] * (schedule.stop_step if done else 0)
    tokens, times, steps = [0], [0.0], []
    for i, duration in enumerate(durations):
        batch = batch_tokens(schedule, i)
        tokens.append(tokens[-1] + batch)
        times.append(times[-1] + duration)
        share = shares[i] if i < len(shares) else ""
        active = "" if config.kd is None else int(bool(share) or config.kd.infer_only)
        steps.append([i + 1, tokens[-1], times[-1], 1.0, batch, 1, 1, 5.0, "", "", share, active, 1.0])
    active = "" if config.kd is None else 1
    _write(folder / "steps.csv", STEPS_HEADER, steps)
    _write(folder / "val.csv", VAL_HEADER, [[s, tokens[s], times[s], loss, "", active] for s, loss in val])
    kind = "ce" if config.kd is None else "random_teacher" if config.kd.random_teacher else "kd"
    row = dict.fromkeys(SUMMARY_COLUMNS, "") | {"run_id": config.run_id, "arm": kind, "seed": config.seed}
    row |= {"status": status, "clock": config.clock}
    if done:
        losses = [loss for step, loss in val if step]
        row |= {"device": "cpu", "threads": 2, "shared_device": 0, "code_hash": "c0de00000000", "data_hash": "0123"}
        row |= {"steps": len(durations), "tokens": tokens[-1], "train_time_ms": times[-1], "broken": 0}
        row |= {"step_ms_median": statistics.median(durations) if durations else ""}
        row |= {"params_stored": 2000000, "params_active": 1000000, "flops_per_token": 6000000.0}
        row |= {"anchor_before_ms": 10.0, "anchor_after_ms": 10.0} if config.anchor_steps else {}
        row |= {"best_val": min(losses, default=""), "final_val": losses[-1] if losses else ""}
    row |= summary
    _write(folder / "summary.csv", SUMMARY_COLUMNS, [[row[column] for column in SUMMARY_COLUMNS]])
    return folder


def _write(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def run_folder(runs, arm, label, config, **kwargs):
    """Write a run and read it back as the analysis does."""
    return RunFolder.read(f"{arm}|{label}|{write_run(runs, config, **kwargs)}")


def read_rows(path):
    """The rows of a CSV as text, read without the code under test."""
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def run_script(name, *flags):
    """Run workflow/scripts/<name>.py with these flags; returns its exit code."""
    argv, sys.argv = sys.argv, [f"{name}.py", *map(str, flags)]
    try:
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(ROOT / "workflow" / "scripts" / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv = argv
    return exit_.value.code


# A campaign by the numbers. Every curve falls on a straight line from 6 nats, so that each crossing of the
# target can be worked out by hand: CE falls 0.01 a step, and so on.
FALL = {
    "ce": 0.010,
    "ce_screen": 0.009,
    "probe": 0.010,
    "teacher": 0.020,
    "isolate": 0.010,
    "screen": 0.016,
    "kd": 0.016,
}
FALL |= {"control_boost": 0.011, "control_random": 0.004, "control_smooth": 0.010, "control_extra": 0.0095}
FALL |= {"control_batch": 0.006}
STEP_MS = {"probe": 1.0, "teacher": 1.0, "isolate": 11.0, "screen": 12.0, "kd": 12.0, "control_random": 12.0}


SHAPES = [(1, 2, 75), (1, 2, 100), (1, 4, 50), (2, 2, 75), (2, 4, 75), (4, 4, 150)]  # layers, heads and steps
PINNED = {
    "anchor": {"max_drift": 0.25},
    "controls": {"lr_policy": True, "label_smoothing": 0.1, "extra_steps": True, "random_teacher": True},
    "verdict": {
        "targets": [4.8, 3.5],
        "confidence": 0.95,
        "p_value": 0.01,
        "power": 0.8,
        "amortize": 10,
    },  # what the numbers rest on; the rest is the default config's
    "train": {"horizons": [75, 150, 300], "seeds": [0, 1, 2], "batch_tokens": [2048], "batch_lr": [1.0]},
    "validation": {"every": 25},
    "teacher": {
        "probe_steps": 10,
        "candidates": [dict(num_layers=n, num_heads=h, head_dim=32, steps=steps) for n, h, steps in SHAPES],
    },
    "kd": {
        "alpha": 0.5,
        "isolate_steps": 20,
        "screen_seed": 100,
        "grid": {
            "temperature": [1.0, 2.0],
            "alpha": [],
            "token_frac": [],
            "lr_boost": [1.0, 1.5],
            "hold_frac": [0.15],
            "drop_frac": [0.35],
        },
    },
}


class SyntheticCampaign:
    """A campaign over made-up runs: every script in the workflow's order, fed as the workflow feeds it."""

    def __init__(self, folder, clock="measured", **changes):
        settings = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
        for section, values in PINNED.items():
            settings[section] |= values
        for section, values in changes.items():
            settings[section] |= values
        settings["device"], settings["budget"]["clock"] = "cpu", clock
        self.campaign = campaigns.load(settings, ROOT)
        self.runs, self.out = Path(folder) / "runs", Path(folder) / "campaign"
        self.clock, self.edit = clock, lambda run: {}  # `edit` may override what write_run is given for a run

    def expanded(self, *arms):
        runs = expansion.expand(self.campaign, campaigns.read_decisions(self.out))
        return [run for run in runs if not arms or run.arm in arms]

    def flags(self, *arms):
        flags = []
        for run in self.expanded(*arms):
            if not (self.runs / run.run_id).exists():
                write_run(self.runs, run.config, **(self.synthetic(run) | self.edit(run)))
            flags += ["--run", f"{run.arm}|{run.label}|{self.runs / run.run_id}"]
        return flags

    def synthetic(self, run):
        last = run.config.schedule.stop_step
        steps = [*range(0, last, 25), last]
        fall, kd = FALL[run.arm], run.config.kd
        if run.label == "LR1":
            fall = FALL["ce"]  # the same run
        if run.arm in ("screen", "kd"):
            fall -= 0.002 * (kd.temperature - 1)  # so that T1 beats T2
            fall -= 0.001 * (run.config.schedule.lr_boost is None)  # and a boost beats none
        if run.arm == "teacher" and run.config.model.num_layers == 1:
            fall = 0.015 if run.config.model.num_heads == 2 else 0.024
        val = [(step, 6.0 - fall * step) for step in steps]
        values = {"val": val, "step_ms": STEP_MS.get(run.arm, 10.0)}
        if run.arm in ("probe", "teacher") and run.config.model.num_layers == 4:
            values["step_ms"] = 5.0
        if kd is not None and not kd.infer_only:
            values |= {"shares": [0.5] * 20, "kd_stop_step": 50}
        return values

    def path(self, name):
        return self.out / name

    def script(self, name, *flags):
        assert run_script(name, *flags) == 0, name

    def baseline(self):
        self.script("ce_baseline", *self.flags("ce"), "--log", "", "--out", self.path("ce/timing.csv"))
        horizon = self.campaign.budget.horizon
        flags = "--timing", self.path("ce/timing.csv"), "--fraction", "0.1", "--horizon", horizon or 0
        self.script("budget", *flags, *(self.flags("ce") if horizon else ()), "--out", self.path("budget.json"))

    def teachers(self):
        p = self.path
        budget = "--budget", p("budget.json")
        self.script("teacher_probe", *self.flags("probe"), "--out", p("teacher/probe.csv"))
        probed = "--probe", p("teacher/probe.csv"), *budget, "--out", p("teacher/projected.json")
        self.script("filter_projected", *probed)
        self.script("teacher_train", *self.flags("teacher"), "--out", p("teacher/trained.csv"))
        trained = "--trained", p("teacher/trained.csv"), *budget
        self.script("filter_measured", *trained, "--out", p("teacher/measured.json"))
        filters = "--projected", p("teacher/projected.json"), "--measured", p("teacher/measured.json")
        self.script("teacher_select", *trained, *filters, "--out", p("teacher/selected.json"))
        fixed = "--fixed", json.dumps(self.campaign.verdict.targets)
        self.script("target", "--selected", p("teacher/selected.json"), *fixed, "--out", p("target.json"))

    def students(self):
        p = self.path
        target = "--target", p("target.json")
        self.script("kd_isolates", *self.flags("isolate"), "--out", p("kd/isolates.csv"))
        self.script("kd_screen", *self.flags("screen"), *target, "--out", p("kd/screen.csv"))
        self.script("kd_screen", *self.flags("ce_screen"), *target, "--out", p("ce/screen.csv"))
        screens = "--screen", p("kd/screen.csv"), "--ce-screen", p("ce/screen.csv")
        self.script("kd_promote", *screens, "--promote", "1", "--out", p("kd/promoted.json"))
        self.script("kd_full", *self.flags("kd"), *target, "--out", p("kd/full.csv"))
        arms = ("boost", "random", "smooth", "batch", "extra")
        controls = self.flags(*(f"control_{arm}" for arm in arms))
        self.script("controls", *controls, *target, "--out", p("controls.csv"))

    def profile(self):
        """kd/profile.csv, which the workflow makes only if it is asked for."""
        shares, step = {"data": 0.1, "student": 0.3, "backward": 0.6}, STEP_MS["isolate"]
        rows = [
            [run.label, run.run_id, part, share * step, share * step, share, step, 0, "cpu", 2]
            for run in self.expanded("isolate")
            for part, share in shares.items()
        ]
        _write(self.path("kd/profile.csv"), PROFILE_COLUMNS, rows)

    def conclude(self):
        p = self.path
        decisions = "--budget", p("budget.json"), "--selected", p("teacher/selected.json"), "--target", p("target.json")
        filters = [f"--{name}={p(f'teacher/{name}.json')}" for name in ("projected", "measured")]
        filters += [f"--probe={p('teacher/probe.csv')}", f"--trained={p('teacher/trained.csv')}"]
        outputs = [f"--out-{name}={p(f'tables/{name}.csv')}" for name in ("curves", "runs", "compare", "teachers")]
        outputs += [f"--out-{name.replace('_', '-')}={p(f'tables/{name}.csv')}" for name in ("reached", "break_even")]
        outputs += [f"--out-tests={p('tables/verdict.csv')}", f"--out-trend={p('tables/steps_saved_trend.csv')}"]
        rules = dataclasses.asdict(self.campaign.verdict) | {"max_drift": self.campaign.anchor.max_drift}
        outputs += [f"--rules={json.dumps(rules)}", f"--ce-screen={p('ce/screen.csv')}"]
        outputs += [f"--out-tuning={p('tables/tuning.csv')}"]
        outputs += [f"--out-verdict={p('verdict.json')}", "--promoted", p("kd/promoted.json"), "--clock", self.clock]
        outputs += ["--screen", p("kd/screen.csv"), f"--out-stop={p('tables/stop_conditions.csv')}"]
        outputs += [f"--out-summary={p('tables/teacher_budget10_summary.csv')}"]
        self.script("compare", *self.flags(), *decisions, *filters, *outputs)
        self.script("ledger", *self.flags(), "--target", p("target.json"), "--out", p("tables/ledger.csv"))
        details = [f"--out-{name.replace('_', '-')}={p(f'tables/{name}.csv')}" for name in DETAILS]
        found = "--compare", p("tables/compare.csv"), "--tests", p("tables/verdict.csv"), "--verdict", p("verdict.json")
        found += "--trend", p("tables/steps_saved_trend.csv"), "--break-even", p("tables/break_even.csv")
        found += "--tuning", p("tables/tuning.csv"), "--teachers", p("tables/teachers.csv")
        self.script("details", *self.flags(), *decisions, *found, "--confidence", "0.95", *details)
        out = "--campaign", "default", "--figures", p("figures"), "--out", p("report/index.html")
        self.script(
            "report", *(f"--{name.replace('_', '-')}={path}" for name, path in self.report_files().items()), *out
        )

    def report_files(self):
        """{name: path} of what the report reads."""
        places = {"timing": "ce/timing.csv", "selected": "teacher/selected.json", "controls": "controls.csv"}
        places |= {"ce_screen": "ce/screen.csv"}
        places |= {name: f"kd/{name}.csv" for name in ("isolates", "profile", "screen", "full")}
        places |= {name: f"{name}.json" for name in ("budget", "target", "verdict")}
        names = {"tests": "verdict", "trend": "steps_saved_trend", "stop": "stop_conditions"}
        names |= {"summary": "teacher_budget10_summary"}
        return {name: self.path(places.get(name, f"tables/{names.get(name, name)}.csv")) for name in INPUTS}

    def run_all(self):
        self.baseline()
        self.teachers()
        self.students()
        self.conclude()

    def json(self, name):
        return json.loads(self.path(name).read_text())


def test_builder_writes_what_was_asked(tmp_path):
    config = make_config(horizon=50, seed=3)
    run = run_folder(tmp_path, "ce", "CE 50", config, val=[(0, 6.0), (25, 5.0), (50, 4.5)], step_ms=2.0)
    assert (run.run_id, run.horizon, run.ok) == (config.run_id, 50, True)
    assert [row["train_time_ms"] for row in run.val] == [0.0, 50.0, 100.0]
    assert run.steps[-1]["tokens"] == 50000
