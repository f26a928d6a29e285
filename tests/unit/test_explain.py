"""Every key is explained, in config/README.md and in the terminal; and plan counts what a config would run."""

import json
import subprocess
import sys

import pytest
import yaml
from configs import ROOT, merged
from test_analysis_synthetic import write_run

from kdclimb import campaign, expansion, explain, plan
from kdclimb.__main__ import main
from kdclimb.analysis.selection import PROBE_COLUMNS
from kdclimb.artifacts import write_csv
from kdclimb.config import ConfigError
from kdclimb.configfiles import read_config
from kdclimb.plan import this_device_kind
from kdclimb.provenance import device_kind

TINY = ["--configfile", str(ROOT / "tests/tiny.yaml")]
HERE = "cpu Abacus"  # the device kind that these tests pretend to run on


def leaves(config: dict, prefix: str = "") -> list[str]:
    """Dotted names of all values, read without the code under test."""
    found = []
    for key, value in config.items():
        found += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return found


def command(capsys, *argv) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of python -m kdclimb."""
    code = main([str(word) for word in argv])
    return code, *capsys.readouterr()


# ---- explain ------------------------------------------------------------------------------------


def test_readme_is_made_from_the_schema():
    text = (ROOT / "config/README.md").read_text()
    assert text == explain.readme(), "make it again: .venv/bin/python -m kdclimb explain --write"


def test_write_makes_the_readme_again(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(explain, "readme_path", lambda: tmp_path / "README.md")
    assert command(capsys, "explain", "--write")[0] == 0
    assert (tmp_path / "README.md").read_text() == (ROOT / "config/README.md").read_text()


def test_every_key_of_the_config_has_one_row_and_an_entry():
    rows = [line.split("|")[1].strip() for line in explain.readme().splitlines() if line.startswith("| `")]
    lists = {
        "teacher.candidates": ("num_layers", "num_heads", "head_dim", "steps", "batch_tokens", "batch_lr"),
        "optim.muon.lr_mults": ("matrix", "mult"),
        "optim.adam.groups": ("kinds", "lr_mult", "beta1", "beta2", "decay_mult"),
    }
    entries = [f"{name}[].{key}" for name, keys in lists.items() for key in keys]
    assert sorted(rows) == sorted(f"`{name}`" for name in leaves(merged()) + entries)
    for name in leaves(merged()) + entries:
        assert explain.explain(name, merged()).startswith(f"{name}: ")


def test_tables_have_as_many_cells_in_each_row():
    rows = [line for line in explain.readme().splitlines() if line.startswith("|")]
    assert {row.replace("\\|", "").count("|") for row in rows} == {len(explain.COLUMNS) + 1}


@pytest.mark.parametrize(
    ("key", "row"),
    [
        ("kd.stop_margin", "number, at least 0 | nats | `0.05` | KD_STOP_MARGIN | With val_margin: KD stops once"),
        ("kd.alpha", "number, above 0, at most 1 | fraction of the loss | `0.5` | 1 - KD_ALPHA | Weight of the KD"),
        ("train.seeds", "list, 1 or more, all different, each: integer, at least 0 | | `[0, 1, 2]` | | Seeds of"),
        (
            "student.softcap",
            "null, or list, exactly 3, each: number | logits | `[23.0, 5.0, 7.5]` | | [a, b, c] of logits = a\\*s",
        ),
        ("budget.clock", "one of measured, modelled | | `measured` | | measured is"),
        (
            "teacher.candidates",
            "list, 1 or more, all different, each: the keys below | | 5 entries, in `config.yaml` |",
        ),
        (
            "validation.every",
            "integer, at least 1 | steps | `25` | VAL_LOSS_EVERY (0, never, is not allowed here) | Steps",
        ),
    ],
)
def test_rows_of_the_readme(key, row):
    (found,) = [line for line in explain.readme().splitlines() if line.startswith(f"| `{key}` |")]
    assert found.startswith(f"| `{key}` | {row}")


def test_locks_that_the_readme_names_are_the_ones_that_hold():
    locked = [key.name for key in explain.all_keys() if "lock" in key.spec]
    assert locked == ["validation.every", "validation.stop_at", "budget.fraction", "kd.dynamic_norm"]
    others = {"every": 30}, {"stop_at": 4.0}, {"fraction": 0.2}, {"dynamic_norm": False}
    for name, other in zip(locked, others, strict=True):
        with pytest.raises(ConfigError, match=rf"{name}.*locked"):
            campaign.load(merged({name.split(".")[0]: other}), ROOT)
        assert f"- `{name}`: " in explain.readme()
    assert f" {campaign.LOCKED_VALIDATION_EVERY}, unless" in explain.readme()
    assert f" at most {campaign.LOCKED_BUDGET_FRACTION}, unless" in explain.readme()


def test_mistakes_that_the_readme_shows_are_worded_as_the_real_ones():
    without = merged()
    del without["kd"]["alpha"]
    for shown, config in zip(explain.MISTAKES, (merged({"kd": {"alpa": 1}}), merged({"kd": {"alpha": "x"}}), without)):
        with pytest.raises(ConfigError) as error:
            campaign.load(config, ROOT)
        assert str(error.value).startswith(shown.removesuffix("..."))


def test_units_are_not_in_the_meaning_as_well():
    for key in explain.all_keys():
        assert f"({key.spec.get('unit')})" not in key.spec["description"], key.name


def test_a_leaf(capsys):
    code, out, err = command(capsys, "explain", "student.num_layers", "--configfile", ROOT / "config/h100.yaml")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "student.num_layers: Blocks.",
        "  value    11",
        "  default  3",
        "  unit     blocks",
        "  allowed  integer, at least 1",
        "  seed     MODEL_NUM_LAYERS",
    ]


def test_a_section_lists_its_keys_with_their_values(capsys):
    code, out, _ = command(capsys, "explain", "kd.grid", *TINY)
    assert code == 0
    assert [line.split(maxsplit=1) for line in out.splitlines()[2:]] == [
        ["kd.grid.temperature", "[1.0, 2.0]"],
        ["kd.grid.alpha", "[] fraction of the loss"],
        ["kd.grid.token_frac", "[] fraction of the tokens"],
        ["kd.grid.lr_boost", "[1.5] multiple of the base LR"],
        ["kd.grid.hold_frac", "[0.15] fraction of the horizon"],
        ["kd.grid.drop_frac", "[0.35] fraction of the horizon"],
    ]


def test_no_key_lists_the_top_level(capsys):
    code, out, _ = command(capsys, "explain")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(merged())


@pytest.mark.parametrize(
    "name", ["teacher.candidates.steps", "teacher.candidates[].steps", "teacher.candidates[1].steps"]
)
def test_a_key_of_a_lists_entries(capsys, name):
    code, out, _ = command(capsys, "explain", name, *TINY)
    assert code == 0
    assert "  value    [26, 50, 75]" in out.splitlines()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("kd.alpa", "kd.alpa: unknown key; nearest: kd.alpha"),
        ("temperature", "temperature: unknown key; nearest: kd.grid.temperature"),
        ("kd.temprature", "kd.temprature: unknown key; nearest: kd.grid.temperature"),
        ("kd.stop_margin.x", "kd.stop_margin.x: unknown key; nearest: kd.stop_margin"),
        (
            "zzz",
            "zzz: unknown key; the top level has: campaign, device, code, weights, paths, cluster, data, student",
        ),
    ],
)
def test_an_unknown_key_gets_the_nearest(capsys, name, said):
    code, out, err = command(capsys, "explain", name)
    assert (code, out) == (1, "")
    assert err.startswith(said) and err.count("\n") == 1


def test_a_wrong_config_can_still_be_asked_about(capsys, tmp_path):
    (tmp_path / "wrong.yaml").write_text("kd: 5\nstudent: {num_heads: 3}\n")
    for name, value in (("kd.alpha", "not set"), ("student.num_heads", "3")):
        code, out, _ = command(capsys, "explain", name, "--configfile", tmp_path / "wrong.yaml")
        assert code == 0 and f"  value    {value}" in out.splitlines()


@pytest.mark.parametrize("argv", [["explain", "kd.alpha", "--write"], ["plan", "kd"], ["plan", "--configfile"], []])
def test_wrong_usage_exits_with_2(capsys, argv):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2


# ---- merging ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overlays",
    [
        [],
        ["tests/tiny.yaml"],
        ["config/h100.yaml", "tests/tiny.yaml"],
        [{"train": {"horizons": [75]}, "kd": {"grid": {"temperature": [4.0]}}}, {"kd": {"alpha": 0.1}}],
        [{"kd": 5}, {"kd": {"alpha": 0.1}}],  # the last of them, under which Snakemake puts the default again
        [{"kd": None, "new": {"deep": {"er": 1}}}],
    ],
)
def test_configs_merge_as_in_snakemake(tmp_path, overlays):
    from snakemake.utils import update_config

    files, over = [], {}
    for i, overlay in enumerate(overlays):
        files.append(ROOT / overlay if isinstance(overlay, str) else tmp_path / f"{i}.yaml")
        if isinstance(overlay, dict):
            files[-1].write_text(yaml.safe_dump(overlay))
        update_config(over, yaml.safe_load(files[-1].read_text()))
    assert read_config(files) == merged(over)


@pytest.mark.parametrize("asked", [["plan"], ["explain", "kd"]])
@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "can't be read: No such file"), ("a: [", "not YAML: "), ("- 1", "holds no keys"), ("", "holds no keys")],
)
def test_a_config_file_that_is_none(capsys, tmp_path, asked, text, said):
    if text is not None:
        (tmp_path / "x.yaml").write_text(text)
    code, out, err = command(capsys, *asked, "--configfile", tmp_path / "x.yaml")
    assert (code, out) == (1, "")
    assert err.startswith(f"{tmp_path / 'x.yaml'}: {said}") and err.count("\n") == 1


# ---- plan ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setattr(plan, "this_device_kind", lambda device: HERE)


def planned(capsys, tmp_path, *more) -> list[str]:
    code, out, err = command(capsys, "plan", *TINY, *more, "--results", tmp_path)
    assert (code, err) == (0, "")
    return out.splitlines()


def row(lines: list[str], *start) -> list[str]:
    """The cells of the one table row that starts with these."""
    rows = [cells for line in lines if (cells := line.split())[: len(start)] == [str(cell) for cell in start]]
    assert len(rows) == 1, (start, rows)
    return rows[0]


def test_plan_without_results_counts_runs_and_tokens(capsys, tmp_path):
    # Stages of 256 and 512 tokens a step: 50 steps are 25 * 256 + 25 * 512 = 19,200 tokens; of 75, steps 0 to 37
    # are in the first stage: 38 * 256 + 37 * 512 = 28,672; 26 steps: 13 * 768 = 9,984.
    lines = planned(capsys, tmp_path)
    assert lines[0].startswith("campaign tiny: device cpu, clock modelled at 0.001 TFLOP/s, data text-384-")
    split = lines.index("After that, at most:")
    named, later = lines[:split], lines[split:]
    assert row(named, "ce", 50) == ["ce", "50", "3", "0", "19,200", "57,600", "-"]
    assert row(named, "ce", 75) == ["ce", "75", "2", "0", "28,672", "57,344", "-"]
    assert row(named, "probe") == ["probe", "5", "3", "0", "1,280", "3,840", "-"]
    assert row(later, "teacher", 26) == ["teacher", "26", "1", "0", "9,984", "9,984", "-"]
    assert row(later, "teacher", 75) == ["teacher", "75", "1", "0", "28,672", "28,672", "-"]
    assert row(later, "isolate") == ["isolate", "4", "3", "0", "1,024", "3,072", "-"]
    assert row(later, "screen") == ["screen", "50", "2", "0", "19,200", "38,400", "-"]
    assert row(later, "kd", 50) == ["kd", "50", "2", "0", "19,200", "38,400", "-"]
    assert row(later, "kd", 75) == ["kd", "75", "2", "0", "28,672", "57,344", "-"]
    assert row(later, "control_boost") == ["control_boost", "75", "2", "0", "28,672", "57,344", "-"]
    assert row(later, "control_random") == ["control_random", "50", "1", "0", "19,200", "19,200", "-"]
    assert row(later, "control_smooth") == ["control_smooth", "75", "2", "0", "28,672", "57,344", "-"]
    # A teacher at its budget is worth 8 more steps of 75; of 83, 42 are in the first stage: 42 * 256 + 41 * 512.
    assert row(later, "control_extra") == ["control_extra", "83", "2", "0", "31,744", "63,488", "-"]
    # 118,784 for CE and probes, 57,856 for teachers, 3,072 + 38,400 + 95,744 + 57,344 + 19,200 + 57,344 + 63,488 for
    # KD, and 19,200 + 57,344 for the second point of CE's screen, and CE at it.
    assert (
        "All together, at most: 30 runs (0 finished), 587,776 tokens, time -; 1 asked for by two stages, trained once."
    ) in lines
    assert (
        "Not decided yet: teachers, after the filter: at most 3, if all candidates survive it; "
        "KD, after the selection: at most 2 grid points, 1 promoted x 2 horizons x 2 seeds = 4 full runs; "
        "controls: 2 KD's LR without KD, 1 random teacher, 2 CE at its best point, 2 label smoothing, 2 extra steps."
    ) in lines


def test_the_costliest_points_are_those_with_a_boost(capsys, tmp_path):
    # Points T1, T1-boost, T2, T2-boost; two promoted: 8 KD, a control of its LR for each at the last horizon, 2 random
    # teachers.
    (tmp_path / "two.yaml").write_text("kd: {promote: 2, grid: {lr_boost: [1.0, 1.5]}}")
    lines = planned(capsys, tmp_path, *TINY, tmp_path / "two.yaml")
    assert (
        "at most 4 grid points, 2 promoted x 2 horizons x 2 seeds = 8 full runs; controls: 4 KD's LR without "
        "KD, 2 random teacher, 2 CE at its best point, 2 label smoothing, 2 extra steps."
    ) in "\n".join(lines)


def test_a_run_of_two_stages_is_counted_once(capsys, tmp_path):
    # An isolate as long as the first horizon is the CE run of the first seed. 50 * 3 - 4 * 3 steps more, less that run:
    # 587,776 - 3,072 + 2 * 19,200 tokens.
    (tmp_path / "long.yaml").write_text("kd: {isolate_steps: 50}")
    (total,) = [s for s in planned(capsys, tmp_path, *TINY, tmp_path / "long.yaml") if s.startswith("All together")]
    assert total == (
        "All together, at most: 29 runs (0 finished), 623,104 tokens, time -; 2 asked for by two stages, trained once."
    )


@pytest.fixture
def results(tmp_path):
    """Results of the tiny campaign under the measured clock: files for the first CE run at 50 steps (4 ms a step, 200
    ms), a diverged one, the probes, and the first candidate projected to survive.
    """
    (tmp_path / "measured.yaml").write_text("budget: {clock: measured}")
    config = campaign.load(merged("tests/tiny.yaml", {"budget": {"clock": "measured"}}), ROOT)
    runs = expansion.expand(config, {}, campaign.data_id(config, ROOT))
    write_run(tmp_path / "runs", runs[0].config, step_ms=4.0, device=HERE)
    probes = [run for run in runs if run.arm == "probe"]
    rows = []
    for probe, ms in zip(probes, (130.0, 500.0, None)):
        rows.append(dict.fromkeys(PROBE_COLUMNS, "") | {"candidate": probe.label, "run_id": probe.run_id})
        rows[-1]["projected_ms"] = ms
        write_run(tmp_path / "runs", probe.config, step_ms=5.0, device=HERE)
    write_csv(tmp_path / "tiny/teacher/probe.csv", list(PROBE_COLUMNS), rows)
    return tmp_path, runs


def measured(results) -> list:
    return [*TINY, results[0] / "measured.yaml"]


def decide(folder, **decisions):
    files = {"projected": "teacher/projected.json", "selected": "teacher/selected.json", "promoted": "kd/promoted.json"}
    for name, decision in decisions.items():
        (folder / "tiny" / files[name]).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tiny" / files[name]).write_text(json.dumps(decision))


def survivors(runs, *kept: int) -> dict:
    names = [run.label for run in runs if run.arm == "probe"]
    rejected = {name: "slow" for i, name in enumerate(names) if i not in kept}
    return {"survivors": [names[i] for i in kept], "rejected": rejected}


def test_times_come_from_finished_runs_probes_and_the_ce_speed(capsys, results):
    # CE at 50 steps: 200 ms for 19,200 tokens, so 96 tokens a ms. The other seeds are estimated at 200 ms each; at 75
    # steps, 28,672 / 96 = 298.67 ms a run; the isolates 1,024 / 96 = 10.67 ms each; the probes took 5 * 5 = 25 ms each.
    lines = planned(capsys, results[0], *measured(results))
    assert row(lines, "ce", 50)[2:] == ["3", "1", "19,200", "57,600", "600", "ms", "finished", "runs,", "CE", "speed"]
    assert row(lines, "ce", 75)[-4:] == ["597", "ms", "CE", "speed"]
    assert row(lines, "probe")[3:] == ["3", "1,280", "3,840", "75", "ms", "finished", "runs"]
    assert row(lines, "teacher", 26)[-3:] == ["130", "ms", "probes"]
    assert row(lines, "teacher", 50)[-3:] == ["500", "ms", "probes"]
    assert row(lines, "teacher", 75)[-1] == "-"
    assert row(lines, "isolate")[-4:] == ["32", "ms", "CE", "speed"]
    # 600 + 597.33 + 75 + 630 + 32 + 400 (screen) + 400 + 597.33 (KD) + 597.33 (boost) + 200 (random) + 597.33
    # (smoothing) + 661.33 (extra steps) + 200 (the second point of CE's screen) + 597.33 (CE at it) = 6,185 ms
    (total,) = [line for line in lines if line.startswith("All together")]
    assert total.endswith("587,776 tokens, time 6.18 s for 29 of them; 1 asked for by two stages, trained once.")
    assert "30 runs (4 finished)" in total
    assert f"CE speed: 10.4 ms per 1,000 tokens on {HERE}; while KD is active, a run takes longer than that." in lines


def test_the_plan_says_what_comes_to_the_training_time_on_the_wall(capsys, tmp_path):
    # 50 steps of 4 ms twice, in 0.5 s and in 0.3 s; the wall time of a third, which was broken, is that of its last try
    (tmp_path / "measured.yaml").write_text("budget: {clock: measured}")
    config = campaign.load(merged("tests/tiny.yaml", {"budget": {"clock": "measured"}}), ROOT)
    runs = [r.config for r in expansion.expand(config, {}, campaign.data_id(config, ROOT)) if r.arm == "ce"]
    walls = ({"warm_up": 0.1, "training": 0.4}, {"training": 0.3}, {"training": 9.0})
    for made, wall, broken in zip(runs, walls, (0, 0, 1)):
        folder = write_run(tmp_path / "runs", made, step_ms=4.0, device=HERE, broken=broken)
        (folder / "status.json").write_text(json.dumps({"status": "ok", "reason": None, "wall_s": wall}))
    told = "From its set-up to its last artifact a CE run took 2.00 times that on the wall."
    assert told in planned(capsys, tmp_path, *TINY, tmp_path / "measured.yaml")
    assert not [line for line in planned(capsys, tmp_path) if "on the wall" in line]  # the modelled clock is no time


def test_the_plan_on_a_cluster_leaves_no_run_out(tmp_path):
    ngram = {"orders": [2], "token_frac": [0.2], "entries": 16, "contexts": 300}
    config = campaign.load(merged("tests/tiny.yaml", {"kd": {"ngram": ngram}}), ROOT)
    told = plan.on_cluster(config, ROOT, tmp_path, 8).splitlines()[2:-1]
    planned = plan.what_runs(config, {}, campaign.data_id(config, ROOT))
    assert sum(int(line.split()[-4]) for line in told) == len({run.run_id for run in planned.named + planned.later})


def test_the_plan_on_a_cluster_shares_jobs_out(tmp_path):
    # Six screening points, each as long as the finished CE run, 5 h: two jobs of three points.
    changes = {
        "kd": {"grid": {"temperature": [1.0, 2.0, 3.0], "lr_boost": [1.5, 2.0]}},
        "cluster": {"points_per_job": 3, "tokens_per_job": 0},
    }
    config = campaign.load(merged("tests/tiny.yaml", changes), ROOT)
    runs = expansion.expand(config, {}, campaign.data_id(config, ROOT))
    write_run(tmp_path / "runs", runs[0].config, step_ms=360_000.0, device=HERE)
    one, two = (plan.on_cluster(config, ROOT, tmp_path, width).splitlines() for width in (1, 2))
    assert two[0] == "kdclimb: to train, with 2 jobs at a time and no time in the queue:"
    assert row(two, "ce,")[-2:] == ["-", "-"]  # of the probes no time is known
    # 30 h of points in two jobs and 3 * 1,024 / 19,200 * 5 h = 0.8 h of isolates: 15.4 h on two GPUs
    assert row(one, "isolate,")[-4:] == ["9", "5", "30.80", "30.80"]
    assert row(two, "isolate,")[-4:] == ["9", "5", "30.80", "15.40"]
    assert two[-1] == "  Times need probes or a finished CE run."


@pytest.mark.parametrize(
    "spoilt",
    [{"device": "cpu Other"}, {"shared_device": 1}, {"status": "failed", "train_time_ms": 200.0, "tokens": 19200}],
)
def test_times_that_are_not_fit_estimate_nothing_else(capsys, tmp_path, spoilt):
    (tmp_path / "measured.yaml").write_text("budget: {clock: measured}")
    config = campaign.load(merged("tests/tiny.yaml", {"budget": {"clock": "measured"}}), ROOT)
    first = expansion.expand(config, {}, campaign.data_id(config, ROOT))[0].config
    write_run(tmp_path / "runs", first, step_ms=4.0, **({"device": HERE} | spoilt))
    lines = planned(capsys, tmp_path, *TINY, tmp_path / "measured.yaml")
    assert row(lines, "ce", 75)[-1] == "-"
    assert row(lines, "ce", 50)[2:] == ["3", "1", "19,200", "57,600", "-"]
    assert "1 finished" in "\n".join(lines)


def test_a_kd_run_does_not_tell_the_ce_speed(capsys, tmp_path, tiny_kd_run):
    write_run(tmp_path / "runs", tiny_kd_run, step_ms=4.0, device=HERE)
    assert row(planned(capsys, tmp_path), "ce", 75)[-1] == "-"


@pytest.fixture
def tiny_kd_run():
    config = campaign.load(merged("tests/tiny.yaml"), ROOT)
    data = campaign.data_id(config, ROOT)
    decision = {"projected": {"survivors": [config.teacher.candidates[0].name]}}
    teacher = next(run.run_id for run in expansion.expand(config, decision, data) if run.arm == "teacher")
    runs = expansion.expand(config, decision | {"selected": {"run_id": teacher}}, data)
    return next(run.config for run in runs if run.arm == "screen")


def test_modelled_time_may_be_from_any_machine(capsys, tmp_path):
    config = campaign.load(merged("tests/tiny.yaml"), ROOT)
    first = expansion.expand(config, {}, campaign.data_id(config, ROOT))[0].config
    write_run(tmp_path / "runs", first, step_ms=4.0, device="cpu Other")
    lines = planned(capsys, tmp_path)
    assert row(lines, "ce", 75)[-4:] == ["597", "ms", "CE", "speed"]  # 2 * 28,672 tokens at 96 tokens a ms
    assert "CE speed: 10.4 ms per 1,000 tokens; while KD is active, a run takes longer than that." in lines


def test_probes_of_other_configs_are_not_used(capsys, results):
    folder = results[0]
    text = (folder / "tiny/teacher/probe.csv").read_text()
    (folder / "tiny/teacher/probe.csv").write_text(
        text.replace(next(r.run_id for r in results[1] if r.arm == "probe"), "x")
    )
    lines = planned(capsys, folder, *measured(results))
    assert row(lines, "teacher", 26)[-1] == "-"
    assert row(lines, "teacher", 50)[-3:] == ["500", "ms", "probes"]


def test_decisions_narrow_what_is_open(capsys, results):
    folder, runs = results
    decide(folder, projected=survivors(runs, 0, 1))
    lines = planned(capsys, folder, *measured(results))
    split = lines.index("After that, at most:")
    assert {line.split()[1] for line in lines[:split] if line.startswith("  teacher")} == {"26", "50"}
    assert not [line for line in lines[split:] if line.startswith("  teacher")]
    (undecided,) = [line for line in lines if line.startswith("Not decided yet")]
    assert undecided.startswith("Not decided yet: KD, after the selection: at most 2 grid points")


def test_all_decided(capsys, results):
    folder, runs = results
    config = campaign.load(merged("tests/tiny.yaml", {"budget": {"clock": "measured"}}), ROOT)
    decision = survivors(runs, 0)
    after = expansion.expand(config, {"projected": decision}, campaign.data_id(config, ROOT))
    selected = next(run.run_id for run in after if run.arm == "teacher")
    decide(folder, projected=decision, selected={"run_id": selected, "train_time_ms": 0.1, "budget_ms": 0.1})
    lines = planned(capsys, folder, *measured(results))
    (undecided,) = [line for line in lines if line.startswith("Not decided yet")]
    assert undecided == (
        "Not decided yet: KD, after the screening: at most 1 promoted x 2 horizons x 2 seeds = 4 full runs; "
        "controls: 2 KD's LR without KD, 1 random teacher, 2 CE at its best point, 2 label smoothing, 2 extra steps."
    )
    decide(folder, promoted={"points": [expansion.grid_points(config.kd.grid)[0].name]})
    lines = planned(capsys, folder, *measured(results))
    assert "All is decided." in lines and "After that, at most:" not in lines
    assert [line for line in lines if line.startswith("All together: 26 runs (4 finished)")]


@pytest.mark.parametrize("none", ["no survivor", "no teacher"])
def test_without_a_teacher_nothing_follows(capsys, results, none):
    folder, runs = results
    if none == "no survivor":
        decide(folder, projected=survivors(runs))
    else:
        decide(folder, projected=survivors(runs, 0), selected={"run_id": None})
    lines = planned(capsys, folder, *measured(results))
    assert "All is decided." in lines and not [line for line in lines if line.startswith("  screen")]


@pytest.mark.parametrize("stale", ["candidates", "teacher", "points", "promote"])
def test_a_decision_about_another_config_counts_as_not_taken(capsys, results, stale):
    folder, runs = results
    config = campaign.load(merged("tests/tiny.yaml", {"budget": {"clock": "measured"}}), ROOT)
    decision = survivors(runs, 0)
    after = expansion.expand(config, {"projected": decision}, campaign.data_id(config, ROOT))
    selected = {"run_id": next(run.run_id for run in after if run.arm == "teacher")}
    selected |= {"train_time_ms": 0.1, "budget_ms": 0.1}
    if stale == "candidates":
        decision["survivors"] = ["L9-H2-D8-26"]
    if stale == "teacher":
        selected["run_id"] = "kd-of-yore"
    points = {key: ["T9"] for key in ("candidates", "teacher", "points")}
    points["promote"] = [point.name for point in expansion.grid_points(config.kd.grid)]  # 2, where 1 may be
    decide(folder, projected=decision, selected=selected, promoted={"points": points[stale]})
    (undecided,) = [line for line in planned(capsys, folder, *measured(results)) if line.startswith("Not decided yet")]
    expected = {"candidates": "teachers", "teacher": "KD, after the selection", "points": "KD, after the screening"}
    expected["promote"] = expected["points"]
    assert undecided.startswith(f"Not decided yet: {expected[stale]}")


def test_a_wrong_config_is_said_as_it_is(capsys, tmp_path):
    (tmp_path / "wrong.yaml").write_text("kd: {alpha: 2}")
    code, out, err = command(capsys, "plan", "--configfile", tmp_path / "wrong.yaml")
    with pytest.raises(ConfigError) as error:
        campaign.load(merged({"kd": {"alpha": 2}}), ROOT)
    assert (code, out, err) == (1, "", f"{error.value}\n")


@pytest.mark.parametrize("text", ["{", "[]", '{"survivors": null}', '{"survivors": [], "rejected": 3}'])
def test_a_spoilt_decision_is_one_line(capsys, tmp_path, text):
    decide(tmp_path, projected={})
    (tmp_path / "tiny/teacher/projected.json").write_text(text)
    code, out, err = command(capsys, "plan", *TINY, "--results", tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith(str(tmp_path / "tiny")) and err.count("\n") == 1


def test_a_spoilt_run_is_left_out_and_named(capsys, results):
    folder, runs = results
    (folder / "runs" / runs[0].run_id / "summary.csv").write_text("")
    lines = planned(capsys, folder, *measured(results))
    assert row(lines, "ce", 50)[3] == "0"
    assert lines[-1].startswith(f"Run folders left out, since unreadable: 1; the first: {folder}/runs/{runs[0].run_id}")


def test_the_device_has_the_name_that_runs_record(monkeypatch, tmp_path):
    assert this_device_kind("cpu") == device_kind("cpu")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert this_device_kind("cuda") is None
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho GPU-a, NVIDIA H100 80GB HBM3\necho GPU-b, NVIDIA H100 80GB HBM3\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert this_device_kind("cuda") == "NVIDIA H100 80GB HBM3"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho no devices\nexit 9\n")
    assert this_device_kind("cuda") is None


def test_long_times_are_in_hours():
    assert [plan.show_time(ms) for ms in (400.0, 7_100_000.0, 9_000_000.0)] == ["400 ms", "7,100 s", "2.5 h"]


def test_the_commands_load_neither_torch_nor_snakemake(tmp_path):
    code = (
        "import sys; from kdclimb.__main__ import main; assert main(sys.argv[1:]) == 0;"
        "sys.exit(', '.join({'torch', 'snakemake', 'matplotlib'} & set(sys.modules)) or None)"
    )
    argv = [sys.executable, "-c", code, "plan", *TINY, "--results", str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
