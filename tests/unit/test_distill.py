"""Teachers that describe themselves, and the KD controller."""

import dataclasses
import json
import shutil

import pytest
import torch

from kdclimb.data import Dataset
from kdclimb.distill import KDController
from kdclimb.teacher import checkpoint_facts, load_teacher, random_teacher

OPTIONS = {"device": "cpu", "backend": "reference", "compute_dtype": torch.float32}


@pytest.fixture(scope="module")
def dataset(manifest):
    return Dataset(manifest)


@pytest.fixture(scope="module")
def kd_config(tiny_runs):
    return next(r.config for r in tiny_runs if r.arm == "kd")


@pytest.fixture(scope="module")
def val_batches(dataset, kd_config):
    schedule = kd_config.schedule
    return dataset.val_batches(kd_config.validation.tokens, schedule.micro_batch_tokens, schedule.max_doc_tokens, "cpu")


@pytest.fixture
def copy(teacher_folder, tmp_path):
    return shutil.copytree(teacher_folder, tmp_path / "checkpoints")


def test_a_loaded_teacher_scores_what_it_scored(teacher_folder, val_batches, dataset, kd_config):
    teacher, val = load_teacher(teacher_folder, val_batches, checkpoint_facts(kd_config, dataset), **OPTIONS)
    assert val == json.loads((teacher_folder / "model.json").read_text())["final_val"]
    assert not any(p.requires_grad for p in teacher.parameters())


def test_other_weights_are_refused(copy, val_batches):
    raw = bytearray((copy / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (copy / "model.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match="not the weights"):
        load_teacher(copy, val_batches, {}, **OPTIONS)


@pytest.mark.parametrize(("key", "value"), [("data_hash", "x"), ("tokenizer_sha256", "x"), ("max_doc_tokens", 3)])
def test_a_teacher_of_other_data_is_refused(copy, val_batches, dataset, kd_config, key, value):
    description = json.loads((copy / "model.json").read_text()) | {key: value}
    (copy / "model.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=key):
        load_teacher(copy, val_batches, checkpoint_facts(kd_config, dataset), **OPTIONS)


def test_a_teacher_that_scores_otherwise_is_refused(copy, val_batches):
    description = json.loads((copy / "model.json").read_text())
    description["model"]["softcap"] = [10.0, 5.0, 7.5]
    (copy / "model.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="when it was saved"):
        load_teacher(copy, val_batches, {}, **OPTIONS)


def test_a_failed_teacher_run_is_named(tmp_path, val_batches):
    with pytest.raises(ValueError, match="no checkpoint there"):
        load_teacher(tmp_path, val_batches, {}, **OPTIONS)


def test_a_random_teacher_has_the_shape_but_not_the_knowledge(teacher_folder, val_batches):
    teacher, val = random_teacher(teacher_folder, 0, val_batches, **OPTIONS)
    trained, trained_val = load_teacher(teacher_folder, val_batches, {}, **OPTIONS)
    assert teacher.config == trained.config and val > trained_val + 1.0
    again, _ = random_teacher(teacher_folder, 0, val_batches, **OPTIONS)
    other, _ = random_teacher(teacher_folder, 1, val_batches, **OPTIONS)
    assert torch.equal(teacher.embed, again.embed) and not torch.equal(teacher.embed, other.embed)


def test_kd_stops_once_within_the_margin_and_not_before_its_step(kd_config, teacher_folder, val_batches):
    teacher, val = load_teacher(teacher_folder, val_batches, {}, **OPTIONS)
    config = dataclasses.replace(kd_config.kd, stop_margin=0.05, stop_min_step=25)
    kd = KDController(config, teacher, val)
    assert not kd.observe(24, val - 1.0)  # too early
    assert not kd.observe(25, val + 0.051)  # not near enough
    assert kd.active
    assert kd.observe(50, val + 0.05)
    assert kd.stop_step == 50 and not kd.active
    assert not kd.observe(75, val - 1.0) and kd.stop_step == 50  # off for good


def test_controller_state_survives_json_to_the_bit(kd_config, teacher_folder, val_batches):
    teacher, val = load_teacher(teacher_folder, val_batches, {}, **OPTIONS)
    kd, other = (KDController(kd_config.kd, teacher, val) for _ in range(2))
    kd.norm.factor = torch.tensor(1 / 3)
    kd.stop_step = 50
    other.load_state(json.loads(json.dumps(kd.state())), "cpu")
    assert other.norm.factor.equal(kd.norm.factor) and other.stop_step == 50
