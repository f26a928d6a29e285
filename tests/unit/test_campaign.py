"""The expansion of a config into runs: pure, complete, and sharing what is the same."""

import dataclasses
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import yaml
from configs import ROOT, merged

from kdclimb import campaign, expansion, sections
from kdclimb.artifacts import write_json
from kdclimb.config import ConfigError, PolicyConfig
from kdclimb.schedule import total_tokens
from kdclimb.shards import write_shard


def expand_all(config):
    names = [c.name for c in config.teacher.candidates]
    decisions = {"projected": {"survivors": names}}
    teacher = next(r for r in expansion.expand(config, decisions) if r.arm == "teacher").run_id
    points = [p.name for p in expansion.grid_points(config.kd.grid)]
    decisions |= {
        "selected": {"run_id": teacher, "train_time_ms": 0.1, "budget_ms": 0.1},
        "promoted": {"points": points[-1:], "ce_point": "LR1.4"},
    }
    return expansion.expand(config, decisions)


def arms(runs):
    counts = {}
    for run in runs:
        counts[run.arm] = counts.get(run.arm, 0) + 1
    return counts


def test_default_campaign_has_the_runs_it_should_and_at_most_55():
    config = campaign.load(merged({"device": "cpu"}), ROOT)
    assert arms(expansion.expand(config, {})) == {"ce": 10, "ce_screen": 4, "probe": 5}
    runs = expand_all(config)
    assert len({run.run_id for run in runs}) <= 55
    controls = {"control_boost": 3, "control_random": 1, "control_tuned": 3, "control_smooth": 3, "control_extra": 3}
    expected = {"ce": 10, "ce_screen": 4, "probe": 5, "teacher": 5, "isolate": 4, "screen": 4, "kd": 9}
    assert arms(runs) == expected | controls


def shared(overlay):
    """({job: its runs' arms}, tokens of each job, runs in no job) of a campaign, all decisions taken."""
    config = campaign.load(merged({"device": "cpu"}, overlay), ROOT)
    runs = expand_all(config)
    jobs = expansion.shared_jobs(config, runs)
    inside = [run.run_id for members in jobs.values() for run in members]
    assert len(inside) == len(set(inside))
    tokens = {
        name: sum(total_tokens(run.config.schedule, run.config.schedule.stop_step) for run in members)
        for name, members in jobs.items()
    }
    return jobs, tokens, {run.run_id for run in runs} - set(inside)


def choices(schema, path=()):
    """(path, value) of each value of each key of the schema that has a list of them."""
    for value in schema.get("enum", ()):
        yield path, value
    for key, inner in schema.get("properties", {}).items():
        yield from choices(inner, (*path, key))


SCHEMA = yaml.safe_load((ROOT / "config/schema.yaml").read_text())


@pytest.mark.parametrize(
    ("path", "value"), [pytest.param(*c, id=".".join([*c[0], str(c[1])])) for c in choices(SCHEMA)]
)
def test_a_choice_is_refused_at_once_or_has_all_its_runs(path, value):
    """Before anything runs, not once a teacher is selected."""
    overlay = value
    for key in reversed(path):
        overlay = {key: overlay}
    try:
        config = campaign.load(merged("tests/tiny.yaml", overlay), ROOT)
    except ConfigError as error:
        assert str(error).startswith(path[0])
    else:
        expand_all(config)


@pytest.mark.parametrize(
    ("overlay", "error"),
    [
        ({"kd": {"cache": "top_k"}}, "kd.top_k: 0 is not allowed"),
        ({"kd": {"cache": "top_k", "top_k": 1000}}, "kd.top_k: 1000 is not allowed; .* vocabulary's 384"),
        ({"student": {"bigram_vocab_size": 1}}, "^student.bigram_vocab_size: 1"),
        ({"teacher": {"bigram_vocab_size": 1}}, "^teacher.bigram_vocab_size: 1"),
        ({"student": {"skip": [2, 0]}}, "^student.skip"),
        ({"campaign": "README.md"}, "campaign"),
        ({"data": {"source": "shards", "shards": {"train": "docs", "val": "docs"}}}, "data.shards.train: 'docs'"),
    ],
)
def test_what_would_fail_later_is_refused_by_its_key(overlay, error):
    with pytest.raises(ConfigError, match=error):
        config = campaign.load(merged("tests/tiny.yaml", overlay), ROOT)
        campaign.data_id(config, ROOT)


def test_short_runs_of_a_stage_share_jobs_that_take_about_as_long():
    jobs, _, alone = shared({})
    config = campaign.load(merged({"device": "cpu"}), ROOT)
    teachers = {run.run_id for run in expand_all(config) if run.arm == "teacher"}
    assert {name.split("-")[0] for name in jobs} == {
        *("ce", "ce_screen", "probe", "isolate", "screen", "kd", "controls", "control_boost")
    }
    assert alone == teachers and all(len({run.run_id for run in members}) > 1 for members in jobs.values())
    jobs, tokens, alone = shared({"cluster": {"tokens_per_job": 200_000}})
    assert (
        alone == teachers and len([name for name in jobs if name.startswith("kd-")]) == 4
    )  # of 705 steps of 1,024 tokens
    for stage in ("ce", "kd", "controls"):
        sizes = [size for name, size in tokens.items() if name.startswith(f"{stage}-")]
        assert len(sizes) > 1 and max(sizes) < 1.5 * 200_000 and min(sizes) > 0.5 * 200_000, stage
    jobs, tokens, alone = shared({"cluster": {"tokens_per_job": 80_000}})  # horizons of 51,200 share, longer ones don't
    assert max(run.config.schedule.stop_step for members in jobs.values() for run in members) == 75
    assert len(alone - teachers) == 3 * 6 + 1  # at 110 steps and more, and a control that is the only short one
    assert shared({"cluster": {"tokens_per_job": 0}})[0] == {}


def test_points_of_a_screen_share_jobs_by_their_number_and_a_job_has_room_for_so_many_configs():
    jobs, _, _ = shared({"cluster": {"points_per_job": 3, "tokens_per_job": 0}})
    assert {name[:-13]: len(members) for name, members in jobs.items()} == {"screen-1of2": 2, "screen-2of2": 2}
    other, _, _ = shared({"kd": {"alpha": 0.3}, "cluster": {"points_per_job": 3, "tokens_per_job": 0}})
    assert not other.keys() & jobs.keys()  # other runs, so that a checkpoint's new decision makes a new job
    grid = {"temperature": [1 + i / 20 for i in range(40)], "lr_boost": [1.5]}
    jobs, _, _ = shared({"kd": {"grid": grid}, "cluster": {"tokens_per_job": 10**9}})
    points = [members for name, members in jobs.items() if name.startswith("screen-")]
    assert [len(members) for members in points] == [20, 20]
    assert max(sum(len(run.config.canonical()) for run in members) for members in jobs.values()) < 100_000


def test_student_is_the_same_in_ce_and_kd_arms(tiny_runs):
    student = [r.config for r in tiny_runs if r.arm not in ("probe", "teacher", "ce_screen", "control_tuned")]
    for field in ("model", "data", "optim", "validation", "device", "clock"):
        assert len({getattr(config, field) for config in student}) == 1, field
    assert {config.label_smoothing for config in student} == {0.0, 0.1}
    schedules = {dataclasses.replace(c.schedule, lr_boost=None, horizon=0, stop_step=0) for c in student}
    assert len(schedules) == 1


def test_grid_points_without_a_boost_are_one_whatever_hold_and_drop():
    grid = sections.GridSection((1.0,), (), (), (1.0, 2.0), (0.1, 0.2), (0.3, 0.4))
    names = [p.name for p in expansion.grid_points(grid)]
    assert names == ["T1"] + [f"T1-boost2-hold{h:g}-drop{d:g}" for h in (0.1, 0.2) for d in (0.3, 0.4)]


def test_the_grid_varies_alpha_and_the_tokens_with_kd_where_it_names_them(tiny):
    grid = dataclasses.replace(
        tiny.kd.grid, temperature=(1.0,), lr_boost=(1.0,), alpha=(0.3, 0.7), token_frac=(0.5, 1.0)
    )
    wide = dataclasses.replace(tiny, kd=dataclasses.replace(tiny.kd, grid=grid))
    names = [p.name for p in expansion.grid_points(grid)]
    assert names == [f"T1-a{alpha:g}-first{first:g}" for alpha in (0.3, 0.7) for first in (0.5, 1.0)]
    runs = expand_all(wide)
    screened = {r.label: (r.config.kd.alpha, r.config.kd.token_frac) for r in runs if r.arm == "screen"}
    assert screened == dict(zip(names, [(0.3, 0.5), (0.3, 1.0), (0.7, 0.5), (0.7, 1.0)], strict=True))
    for arm in ("kd", "control_random"):
        assert {(r.config.kd.alpha, r.config.kd.token_frac) for r in runs if r.arm == arm} == {(0.7, 1.0)}
    named_none = {(r.config.kd.alpha, r.config.kd.token_frac) for r in expand_all(tiny) if r.arm in ("screen", "kd")}
    assert named_none == {(tiny.kd.alpha, tiny.kd.token_frac)}


def test_decisions_of_another_config_expand_to_nothing(tiny):
    stale = {"projected": {"survivors": ["L9-H9-D9-9"]}, "selected": {"run_id": "gone"}, "promoted": {"points": ["T9"]}}
    assert set(arms(expansion.expand(tiny, stale))) == {"ce", "ce_screen", "probe"}


def test_one_temperature_changes_only_its_point(tiny):
    changed = campaign.load(merged("tests/tiny.yaml", {"kd": {"grid": {"temperature": [1.0, 3.0]}}}), ROOT)
    before, after = ({r.run_id for r in expand_all(c) if r.arm == "screen"} for c in (tiny, changed))
    assert len(before & after) == 1 and len(after - before) == 1
    rest = [{r.run_id for r in expansion.expand(c, {}) if r.arm != "screen"} for c in (tiny, changed)]
    assert rest[0] == rest[1]


def test_data_id_follows_the_text_but_not_the_unused_source(tiny, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one\n\f\ntwo")

    def data_id(**data):
        overlay = {"data": {"text": {"files": ["a.txt"]}, **data}}
        return campaign.data_id(campaign.load(merged("tests/tiny.yaml", overlay), tmp_path), tmp_path)

    first = data_id()
    assert data_id(shards={"train": "elsewhere/*.bin"}) == first
    assert data_id(vocab_size=400) != first
    text.write_text("one\n\f\nthree")
    assert data_id() != first


def test_results_are_read_without_the_shards_that_they_were_made_from(tmp_path):
    overlay = {"data": {"source": "shards", "vocab_size": 50304, "shards": {"train": "t*.bin", "val": "v*.bin"}}}
    config = campaign.load(merged("tests/tiny.yaml", overlay), tmp_path)
    shards = [tmp_path / "t1.bin", tmp_path / "v1.bin"]
    for shard in shards:
        write_shard(shard, np.arange(9, dtype=np.uint16))

    def known(results="results"):
        return campaign.results_data_id(config, tmp_path, tmp_path / results)

    def keep_manifest(name, spec):
        (tmp_path / "results/data" / name).mkdir(parents=True)
        write_json(tmp_path / "results/data" / name / "manifest.json", {"spec": spec})

    first, spec = campaign.data_id(config, tmp_path), campaign.data_spec(config, tmp_path)
    keep_manifest(first, spec)
    keep_manifest("of-other-globs", spec | {"train": "u*.bin"})
    for shard in shards:
        shard.unlink()
    assert known() == first != campaign.data_id(config, tmp_path)
    write_shard(shards[0], np.arange(8, dtype=np.uint16))  # other tokens are here: not those
    assert known() == campaign.data_id(config, tmp_path) != first
    shutil.copytree(tmp_path / "results", tmp_path / "record")
    assert known("record") == first  # whatever tokens are here
    shards[0].unlink()
    keep_manifest("of-other-contents", spec | {"fingerprint": "0"})  # which of the two?
    assert known() == campaign.data_id(config, tmp_path) != first
    (tmp_path / "results/data" / first / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="manifest.json: not the manifest of prepared data"):
        known()


def test_control_boost_has_the_lr_policy_of_its_kd_runs_but_no_kd(tiny_runs):
    kd = [r.config for r in tiny_runs if r.arm == "kd" and r.config.schedule.horizon == 75]
    controls = [r.config for r in tiny_runs if r.arm == "control_boost"]
    assert [dataclasses.replace(c, kd=None) for c in kd] == [dataclasses.replace(c, lr_policy=None) for c in controls]
    for taught, control in zip(kd, controls, strict=True):
        assert control.lr_policy == PolicyConfig(taught.run_id, taught.kd.post_stop_lr, taught.kd.post_stop_blend_steps)
    assert all(c.schedule.lr_boost is not None for c in controls)


@pytest.mark.parametrize("decided", [{}, {"projected": {"survivors": []}}, {"selected": {"run_id": None}}])
def test_without_a_teacher_there_is_no_kd(tiny, decided):
    assert set(arms(expansion.expand(tiny, decided))) == {"ce", "ce_screen", "probe"}


def test_smaller_batches_are_of_as_many_tokens():
    batches = {"batch_tokens": [256, 512], "batch_lr": [1.0, 1.2], "micro_batch_tokens": 128}
    overlay = {"train": batches | {"horizons": [50, 75]}, "controls": {"smaller_batches": 0.5}}
    runs = expand_all(campaign.load(merged("tests/tiny.yaml", overlay), ROOT))
    ce = next(r.config.schedule for r in runs if r.arm == "ce" and r.config.schedule.horizon == 75)
    smaller = [r.config for r in runs if r.arm == "control_batch"]
    assert [config.seed for config in smaller] == [0, 1] and {config.kd for config in smaller} == {None}
    schedule = smaller[0].schedule
    assert (schedule.horizon, schedule.batch_tokens) == (150, (128, 256))
    assert schedule.batch_lr == pytest.approx((0.5**0.5, 1.2 * 0.5**0.5))
    assert total_tokens(schedule, 150) == pytest.approx(total_tokens(ce, 75), abs=256)
    for wrong in (0.25, 0.3):
        overlay["controls"]["smaller_batches"] = wrong
        with pytest.raises(ConfigError, match=f"controls.smaller_batches: {wrong} .*train.micro_batch_tokens .128"):
            campaign.load(merged("tests/tiny.yaml", overlay), ROOT)


def test_extra_steps_are_worth_the_teachers_time(tiny):
    """A teacher of 60 % of a budget of 10 %: CE goes on for 6 % of its longest horizon, 75 steps."""
    name = tiny.teacher.candidates[0].name
    survivors = {"projected": {"survivors": [name]}}
    teacher = next(r for r in expansion.expand(tiny, survivors) if r.arm == "teacher").run_id
    selected = {"run_id": teacher, "train_time_ms": 600.0, "budget_ms": 1000.0}
    point = expansion.grid_points(tiny.kd.grid)[0].name
    runs = expansion.expand(tiny, survivors | {"selected": selected, "promoted": {"points": [point]}})
    extra = [r for r in runs if r.arm == "control_extra"]
    assert [(r.label, r.config.schedule.horizon, r.config.kd) for r in extra] == [("4 more steps", 79, None)] * 2


def test_extra_steps_are_worth_the_teachers_time_under_a_projected_budget_too():
    """The same teacher, of a budget that is of 750 steps: CE goes on for 6 % of these."""
    config = campaign.load(merged("tests/tiny.yaml", {"budget": {"horizon": 750}}), ROOT)
    runs = expansion.Expansion(config, "unprepared").extended({"train_time_ms": 600.0, "budget_ms": 1000.0})
    assert {(r.label, r.config.schedule.horizon) for r in runs} == {("45 more steps", 120)}


def test_extra_steps_that_parts_of_a_campaign_trained_are_kept():
    controls = {"extra_steps_each": [4, 6]}
    config = campaign.load(merged("tests/tiny.yaml", {"controls": controls}), ROOT)
    runs = expansion.Expansion(config, "unprepared").extended({"train_time_ms": 600.0, "budget_ms": 1000.0})
    assert [(r.label, r.config.seed, r.config.schedule.horizon) for r in runs] == [
        ("4 to 6 more steps", config.train.seeds[0], 79),
        ("4 to 6 more steps", config.train.seeds[1], 81),
    ]
    for wrong in ({"extra_steps_each": [4]}, {"extra_steps_each": [4, 6], "extra_steps": False}):
        with pytest.raises(ConfigError, match=r"extra_steps_each: \[4.* one number for each of the 2 train.seeds"):
            campaign.load(merged("tests/tiny.yaml", {"controls": wrong}), ROOT)


@pytest.mark.parametrize(
    ("overlay", "allowed"),
    [
        ({"budget": {"horizon": 74}}, r"null, or at least the last of train\.horizons \(75\)"),
        (
            {
                "budget": {"horizon": 750},
                "baseline": {"source": "log", "log": "README.md"},
                "controls": {"extra_steps": False},
            },
            "null under baseline.source: log, whose time is that of its own run",
        ),
    ],
)
def test_a_budgets_horizon_is_no_shorter_than_the_runs_and_no_logs(overlay, allowed):
    with pytest.raises(ConfigError, match=rf"budget\.horizon: {overlay['budget']['horizon']} is not.*{allowed}"):
        campaign.load(merged("tests/tiny.yaml", overlay), ROOT)
    campaign.load(merged("tests/tiny.yaml", {"budget": {"horizon": 75}}), ROOT)


def test_controls_can_be_left_out():
    off = {
        "ce_grid": {"lr_mult": []},
        "lr_policy": False,
        "label_smoothing": 0.0,
        "extra_steps": False,
        "random_teacher": False,
    }
    config = campaign.load(merged({"device": "cpu", "controls": off}), ROOT)
    assert not [arm for arm in arms(expand_all(config)) if arm.startswith("control")]


def test_what_the_screen_chose_is_judged_with_other_seeds(tiny_runs):
    seeds = {arm: {r.config.seed for r in tiny_runs if r.arm == arm} for arm in ("screen", "kd", "control_random")}
    assert seeds["screen"] == seeds["control_random"] == {100} and not seeds["screen"] & seeds["kd"]


def test_a_candidate_may_have_its_own_batches():
    shape = {"num_layers": 1, "num_heads": 2, "head_dim": 8, "steps": 26}
    own = [shape, shape | {"batch_tokens": [128, 128]}, shape | {"batch_tokens": [128, 256], "batch_lr": [0.7, 1.0]}]
    config = campaign.load(merged("tests/tiny.yaml", {"teacher": {"candidates": own}}), ROOT)
    found = {run.label: run.config.schedule for run in expand_all(config) if run.arm == "teacher"}
    assert {name: (s.batch_tokens, s.batch_lr) for name, s in found.items()} == {
        "L1-H2-D8-26": ((256, 512), (1.0, 1.2)),
        "L1-H2-D8-26-B128": ((128, 128), (1.0, 1.2)),
        "L1-H2-D8-26-B128.256-LR0.7.1.0": ((128, 256), (0.7, 1.0)),
    }


def test_parts_of_a_campaign_name_its_runs_and_one_teacher():
    def ids(seeds, **teacher):
        overlay = {"campaign": "part", "train": {"seeds": seeds}, "teacher": teacher}
        return {run.run_id for run in expand_all(campaign.load(merged("tests/tiny.yaml", overlay), ROOT))}

    assert ids([3], seed=0) | ids([4], seed=0) == ids([3, 4], seed=0) == ids([4, 3], seed=0)
    assert ids([3]) == ids([3], seed=3) and ids([3]) | ids([4]) != ids([3, 4])


@pytest.mark.parametrize(
    ("weights", "unkept"),
    [
        ("all", set()),
        ("full", {"probe", "isolate", "screen", "ce_screen", "control_random"}),
        ("teachers", {"ce", "ce_screen", "probe", "isolate", "screen", "kd"}),
    ],
)
def test_whose_weights_are_kept(weights, unkept):
    config = campaign.load(merged("tests/tiny.yaml", {"weights": weights}), ROOT)
    runs = [run for run in expand_all(config) if weights == "full" or not run.arm.startswith("control_")]
    arms = {run.run_id: {other.arm for other in runs if other.run_id == run.run_id} for run in runs}
    assert {"ce", "ce_screen"} in arms.values()  # of which the one keeps what the other would not
    assert expansion.without_weights(config, runs) == {run_id for run_id, those in arms.items() if those <= unkept}


def test_a_grown_student_needs_candidates_that_fit_into_it():
    with pytest.raises(ConfigError, match="controls.growth: True is not allowed.*L1-H2-D32-26 is none"):
        campaign.load(merged({"device": "cpu", "controls": {"growth": True}}), ROOT)
    shapes = [{"num_layers": 1, "num_heads": 4, "head_dim": 32, "steps": 50}]
    overlay = {"device": "cpu", "controls": {"growth": True}, "teacher": {"candidates": shapes}}
    runs = expand_all(campaign.load(merged(overlay), ROOT))
    teacher = next(r.run_id for r in runs if r.arm == "teacher")
    grown = [r.config for r in runs if r.arm == "control_growth"]
    assert len(grown) == 3 and {(c.grown_from, c.kd) for c in grown} == {(teacher, None)}


@pytest.mark.parametrize(
    ("of_teacher", "value_layers", "attention_free_layers", "fits"),
    [([0], [0, 1], [], True), ([0], [1], [], False), ([], [1], [0], False), ([], [1], [2], True)],
)
def test_a_grown_student_needs_its_teachers_layers(of_teacher, value_layers, attention_free_layers, fits):
    shapes = [{"num_layers": 1, "num_heads": 4, "head_dim": 32, "steps": 50}]
    student = {"value_layers": value_layers, "attention_free_layers": attention_free_layers}
    teacher = {"candidates": shapes, "value_layers": of_teacher}
    overlay = {"device": "cpu", "controls": {"growth": True}, "teacher": teacher, "student": student}
    with nullcontext() if fits else pytest.raises(ConfigError, match="teacher.value_layers among the student's"):
        campaign.load(merged(overlay), ROOT)
