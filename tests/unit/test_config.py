"""Configs: what is refused and how, what is shipped, and that schema, file and dataclasses say the same."""

import contextlib
import dataclasses
import json
import typing

import pytest
import yaml
from configs import ROOT, merged

from kdclimb import campaign, expansion, sections
from kdclimb.config import ConfigError, RunConfig, build

SHAPE = {"num_layers": 1, "num_heads": 2, "head_dim": 8, "steps": 60}
SHIPPED = ["config/h100.yaml", "config/legacy_lr.yaml", "config/seed155.yaml", "tests/tiny.yaml"]


def with_value(key: str, value) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("kd.alpa", 1, ["kd.alpa: unknown key", "alpha"]),
        ("colour", 1, ["colour: unknown key", "campaign"]),
        ("data.text.seeds", 1, ["data.text.seeds: unknown key"]),
        ("kd.alpha", "x", ["kd.alpha: 'x'", "number"]),
        ("kd.alpha", 0, ["kd.alpha: 0"]),
        ("train.seeds", [0, True], ["train.seeds[1]: True", "integer"]),
        ("train.horizons", [], ["train.horizons"]),
        ("train.horizons", [300, 75], ["train.horizons", "ascending"]),
        ("train.horizons", [25, 75], ["train.horizons", "50"]),
        ("student.num_heads", 3, ["student.num_heads: 3", "2"]),
        ("student.head_dim", 30, ["student.head_dim: 30", "4"]),
        (
            "teacher.candidates",
            [{"num_layers": 1, "num_heads": 3, "head_dim": 8, "steps": 60}],
            ["teacher.candidates[0]", "3"],
        ),
        ("teacher.candidates", [{"num_layers": 1, "num_heads": 2, "head_dim": 8}], ["teacher.candidates[0]", "steps"]),
        ("teacher.candidates", [SHAPE | {"batch_tokens": [1024] * 2}], ["candidates[0].batch_tokens", "1 stages"]),
        ("teacher.candidates", [SHAPE | {"batch_lr": [1.0] * 3}], ["candidates[0].batch_lr", "1 stages"]),
        ("teacher.candidates", [SHAPE | {"batch_tokens": [1500]}], ["candidates[0].batch_tokens: 1500", "(1024)"]),
        ("teacher.probe_steps", 100, ["teacher.candidates[0].steps", "teacher.probe_steps"]),
        ("validation.every", 50, ["validation.every: 50", "25", "exploratory"]),
        ("budget.fraction", 0.2, ["budget.fraction: 0.2", "0.1", "teacher.exploratory"]),
        ("kd.dynamic_norm", False, ["kd.dynamic_norm: False", "kd.exploratory"]),
        ("kd.grid.drop_frac", [0.1], ["kd.grid.drop_frac", "hold_frac"]),
        ("kd.isolate_steps", 1000, ["kd.isolate_steps: 1000", "50"]),
        ("kd.screen_seed", 1, ["kd.screen_seed: 1", "train.seeds"]),
        ("train.batch_tokens", [100], ["train.batch_tokens: 100", "micro_batch_tokens"]),
        ("train.batch_lr", [1.0, 2.0], ["train.batch_lr", "batch_tokens"]),
        ("train.max_doc_tokens", 4096, ["train.max_doc_tokens: 4096", "1024"]),
        ("campaign", "../x", ["campaign: '../x'"]),
        ("campaign", "runs", ["campaign: 'runs'"]),
        ("data.text.files", ["nope.txt"], ["data.text.files[0]: 'nope.txt'"]),
        ("data.vocab_size", 100000, ["data.vocab_size: 100000", "65536"]),
        ("student.softcap", [23, 5], ["student.softcap"]),
        ("optim.muon.momentum", 1.0, ["optim.muon.momentum: 1.0", "exclusiveMaximum 1"]),
        ("optim.muon.lr_mults", [{"matrix": "mlp", "mult": 2.0}], ["optim.muon.lr_mults[0].matrix: 'mlp'", "down"]),
        ("validation.stop_at", 4.0, ["validation.stop_at: 4.0", "null", "exploratory"]),
        ("train.lr_table", [[0.1, 1.0]], ["train.lr_table", "from 0.0 on"]),
        ("train.lr_table", [[0.0, 1.0], [0.5, 0.1], [0.4, 0.1]], ["train.lr_table", "ascending"]),
        ("budget.clock", "sundial", ["budget.clock: 'sundial'", "measured"]),
    ],
)
def test_bad_config_names_key_value_and_what_is_allowed(key, value, said):
    with pytest.raises(ConfigError) as error:
        campaign.load(merged(with_value(key, value)), ROOT)
    for text in said:
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "arms"),
    [
        ("budget.fraction", 0.2, ["teacher"]),
        ("kd.dynamic_norm", False, ["kd"]),
        ("validation.every", 20, ["kd", "teacher"]),
        ("validation.stop_at", 4.0, ["kd", "teacher"]),
    ],
)
def test_exploratory_lifts_a_lock_and_the_campaign_says_so(key, value, arms):
    lifted = merged(with_value(key, value), *({arm: {"exploratory": True}} for arm in arms))
    assert campaign.load(lifted, ROOT).exploratory
    assert not campaign.load(merged(), ROOT).exploratory


def test_missing_key_is_named():
    config = merged()
    del config["kd"]["alpha"]
    with pytest.raises(ConfigError, match=r"kd\.alpha: this key is missing"):
        campaign.load(config, ROOT)


def test_run_config_survives_json_and_its_id_depends_on_every_field(tiny_runs):
    config = next(r.config for r in tiny_runs if r.arm == "control_random")  # it has all sections
    model = dataclasses.replace(config.model, key_offset=False)  # which half_rotary: false does not allow
    config = dataclasses.replace(config, model=model)
    assert RunConfig.from_dict(yaml.safe_load(config.canonical())) == config
    seen = {config.run_id}
    for path, changed in _each_field_changed(config):
        assert changed.run_id not in seen, path
        seen.add(changed.run_id)


def test_keys_that_came_later_are_in_no_config_that_leaves_them_alone(tiny_runs):
    config = next(r.config for r in tiny_runs if r.arm == "ce")
    later = {"qk_norm": False, "half_rotary": False}
    assert not {*later, "deterministic"} & {*config.to_dict(), *config.to_dict()["model"]}
    changed = dataclasses.replace(config, model=dataclasses.replace(config.model, key_offset=False, **later))
    assert later.items() <= changed.to_dict()["model"].items()
    assert RunConfig.from_dict(changed.to_dict()) == changed


def test_a_fixed_order_is_another_run_on_a_gpu_alone():
    def first(device, deterministic):
        changes = {"device": device, "train": {"deterministic": deterministic}}
        return expansion.expand(campaign.load(merged("tests/tiny.yaml", changes), ROOT), {})[0].config

    default, fixed = first("cuda", False), first("cuda", True)
    assert "deterministic" not in default.to_dict() and fixed.deterministic
    for config in (default, fixed):
        assert RunConfig.from_dict(config.to_dict()) == config
    assert default.run_id != fixed.run_id
    assert first("cpu", False) == first("cpu", True)


def _each_field_changed(value, path=""):
    for field in dataclasses.fields(value):
        old, name = getattr(value, field.name), f"{path}.{field.name}"
        if dataclasses.is_dataclass(old):
            for inner, new in _each_field_changed(old, name):
                yield inner, dataclasses.replace(value, **{field.name: new})
        elif isinstance(old, tuple) and old and dataclasses.is_dataclass(old[-1]):
            for inner, new in _each_field_changed(old[-1], f"{name}[-1]"):
                yield inner, dataclasses.replace(value, **{field.name: (*old[:-1], new)})
        else:
            yield name, _first_allowed(value, field.name, _others(old))


def _others(old):
    """Other values of the same type, of which some may be no valid ones."""
    if isinstance(old, tuple):
        return [(*old[:-1], new) for new in _others(old[-1])] if old else [((0.0, 2.0),), (2, 4)]
    if isinstance(old, bool):
        return [not old]
    if old is None:
        return [4.5]
    return (
        [old * 2, "reference", "both"]
        if isinstance(old, str)
        else [old / 2 or 0.5]
        if isinstance(old, float)
        else [old + 2, 2 * old, old + 1, old - 1, old - 2]
    )


def _first_allowed(value, name, candidates):
    for new in candidates:
        with contextlib.suppress(ConfigError):
            changed = dataclasses.replace(value, **{name: new})
            if changed != value:
                return changed
    pytest.fail(f"{name}: none of {candidates} is allowed")


def test_unknown_key_in_a_run_config_is_refused(tiny_runs):
    values = tiny_runs[0].config.to_dict() | {"extra": 1}
    with pytest.raises(ConfigError, match="extra: unknown key"):
        build(RunConfig, values)


def test_schema_defaults_are_config_yaml_and_properties_are_the_dataclasses():
    schema = yaml.safe_load((ROOT / "config/schema.yaml").read_text())
    _same(schema, sections.Campaign, merged(), "")


def _same(schema, cls, values, where):
    hints = typing.get_type_hints(cls)
    assert list(schema["properties"]) == list(hints), f"{where or 'top level'}: schema and {cls.__name__} differ"
    assert schema["additionalProperties"] is False, where
    for name, part in schema["properties"].items():
        assert part.get("description"), f"{where}.{name} has no description"
        if part.get("type") == "object":
            _same(part, hints[name], values[name], f"{where}.{name}")
        else:
            assert "default" in part, f"{where}.{name} has no default"
            assert part["default"] == values[name], f"{where}.{name}"
            if typing.get_origin(hints[name]) is tuple and dataclasses.is_dataclass(typing.get_args(hints[name])[0]):
                item = typing.get_args(hints[name])[0]
                assert list(part["items"]["properties"]) == list(typing.get_type_hints(item)), f"{where}.{name}"


@pytest.mark.parametrize("overlay", SHIPPED)
def test_shipped_overlays_load(overlay):
    campaign.load(merged(overlay), ROOT)


def test_h100_and_seed155_carry_the_seeds_student_and_teachers_and_one_recipe():
    h100, seed155 = (campaign.load(merged(f"config/{name}.yaml"), ROOT) for name in ("h100", "seed155"))
    promoted = json.loads((ROOT / "docs/records/seed155/seed155/kd/promoted.json").read_text())["points"]
    assert (h100.optim.adam.every, seed155.optim.adam.every) == (2, 1)
    assert h100.optim == dataclasses.replace(seed155.optim, adam=dataclasses.replace(seed155.optim.adam, every=2))
    assert h100.train.horizons[-1] == seed155.budget.horizon == 1555 and seed155.train.horizons == (100, 155, 200)
    assert h100.kd.grid.lr_boost == (1.0, 2.0, 3.0, 4.0) and set(seed155.kd.grid.lr_boost) < set(h100.kd.grid.lr_boost)
    for config in (h100, seed155):
        student = config.student
        assert (student.num_layers, student.num_heads, student.head_dim) == (11, 6, 128)
        assert (config.device, config.data.source, config.data.vocab_size) == ("cuda", "shards", 50304)
        assert "fineweb" in config.data.shards.train
        kd = config.kd
        assert (kd.alpha, kd.alpha_schedule, kd.token_frac, kd.stop_mode) == (0.7, "linear", 0.5, "none")
        assert promoted == [f"T1-a{kd.alpha:g}-first{kd.token_frac:g}"]  # what the record's campaign chose
        assert kd.dynamic_norm and not kd.exploratory and kd.post_stop_lr == 1.0
        assert kd.token_frac in (kd.grid.token_frac or (kd.token_frac,)) and 1.0 in kd.grid.temperature
        assert {"L3-H6-D128-250", "L12-H6-D8-155"} <= {c.name for c in config.teacher.candidates}
        assert config.teacher.bigram_vocab_size == 0  # the seed's 2 rows carry nothing
        assert config.train.windows == ((128, 384), (384, 896), (640, 1408)) and config.train.final_windows == (
            768,
            2560,
        )
        names = expansion.expand(config, {})
        model = next(r.config.model for r in names if r.arm == "ce")
        assert (model.long_layers, model.value_layers) == ((3, 10), (1, 2, 8, 9, 10))
        teacher = next(r.config.model for r in names if r.arm == "probe" and r.label == "L3-H6-D128-250")
        assert (teacher.long_layers, teacher.value_layers, teacher.paired_layers) == ((2,), (0, 1, 2), (0, 2))
        assert teacher.attention_free_layers == teacher.skip == teacher.backout == ()
        assert (config.budget.fraction, config.validation.every) == (0.10, 25)
