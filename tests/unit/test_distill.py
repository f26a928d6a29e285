"""Teachers that describe themselves, and the KD controller."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from kdclimb import distill, schedule
from kdclimb.artifacts import seal, write_json
from kdclimb.data import Dataset
from kdclimb.distill import KDController
from kdclimb.kernels import DenseTeacher, distill_loss
from kdclimb.teacher import checkpoint_facts, load_teacher, random_teacher
from kdclimb.train import Trainer

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
    with pytest.raises(ValueError, match="model.safetensors: damaged"):
        load_teacher(copy, val_batches, {}, **OPTIONS)


@pytest.mark.parametrize(("key", "value"), [("data_hash", "x"), ("tokenizer_sha256", "x"), ("max_doc_tokens", 3)])
def test_a_teacher_of_other_data_is_refused(copy, val_batches, dataset, kd_config, key, value):
    description = json.loads((copy / "model.json").read_text()) | {key: value}
    write_json(copy / "model.json", seal(description))
    with pytest.raises(ValueError, match=key):
        load_teacher(copy, val_batches, checkpoint_facts(kd_config, dataset), **OPTIONS)


def test_a_teacher_that_scores_otherwise_is_refused(copy, val_batches):
    description = json.loads((copy / "model.json").read_text())
    description["model"]["softcap"] = [10.0, 5.0, 7.5]
    write_json(copy / "model.json", seal(description))
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


def test_kd_stops_once_within_the_margin_twice_and_not_before_its_step(kd_config):
    kd = controller(kd_config, stop_margin=0.05, stop_min_step=25, stop_consecutive=2)
    assert not kd.observe(24, VAL - 1.0)  # too early, and so no first of two
    assert not kd.observe(25, VAL + 0.05)
    assert not kd.observe(50, VAL + 0.051)  # not near enough: the one before was noise
    assert not kd.observe(75, VAL + 0.05)
    assert kd.active
    assert "within 0.05 of the teacher's" in kd.observe(100, VAL + 0.05)
    assert kd.stop_step == 100 and not kd.active
    assert not kd.observe(125, VAL - 1.0) and kd.stop_step == 100  # off for good


def test_a_given_reference_moves_the_stop_and_does_not_prevent_it(kd_config):
    kd = controller(kd_config, stop_margin=0.0, stop_consecutive=1, teacher_val=VAL - 0.5)
    assert not kd.observe(50, VAL) and kd.observe(75, VAL - 0.5)


def test_kd_stops_by_tokens_by_step_or_not_at_all(kd_config):
    sched = kd_config.schedule  # 75 steps: 38 of 256 tokens, then 37 of 512
    kd = controller(kd_config, token_frac=0.25, stop_mode="none")
    tokens = 0.25 * (38 * 256 + 37 * 512)
    assert not kd.advance(20, tokens - 1) and kd.active
    assert "0.25 of the tokens" in kd.advance(28, tokens) and kd.stop_step == 28
    kd = controller(kd_config, stop_mode="step", stop_frac=0.2)
    assert not kd.advance(14, 0) and not kd.observe(25, VAL - 9.0)
    assert "0.2 of the horizon" in kd.advance(15, 0) and kd.stop_step == 15
    kd = controller(kd_config, stop_mode="none")
    assert not kd.observe(50, VAL - 9.0) and not kd.advance(74, 1000) and kd.active
    control = controller(kd_config, infer_only=True, stop_mode="step", stop_frac=0.0, token_frac=0.1)
    assert not control.advance(sched.horizon, 10**9) and control.active


@pytest.mark.parametrize(
    ("horizon", "frac"), [(100, 0.07), (100, 0.55), (50, 0.14), (150, 0.34), (200, 0.28), (100, 0.5)]
)
def test_kd_has_the_steps_that_its_share_names(kd_config, horizon, frac):
    """0.07 * 100 is more than 7, which is no reason for an eighth step."""
    sched = dataclasses.replace(kd_config.schedule, horizon=horizon, stop_step=horizon, batch_tokens=(256, 256))
    for changes in ({"token_frac": frac, "stop_mode": "none"}, {"stop_mode": "step", "stop_frac": frac}):
        config = dataclasses.replace(kd_config.kd, **changes)
        kd = KDController(config, None, VAL, sched)
        first = next(step for step in range(horizon) if kd.advance(step, 256 * step))
        assert first == round(frac * horizon) == schedule.kd_tokens(sched, config) / 256


def test_alpha_that_follows_the_lr_is_whole_at_its_largest(kd_config):
    sched = dataclasses.replace(kd_config.schedule, lr_table=((0.0, 3.0), (0.5, 1.0)), batch_lr=(1.0, 1.0))
    for each in (sched, dataclasses.replace(kd_config.schedule, cooldown_frac=0.9, batch_lr=(1.0, 1.7))):
        kd = KDController(dataclasses.replace(kd_config.kd, alpha=0.6, alpha_schedule="lr"), None, VAL, each)
        assert max(kd.alpha(step, 0) for step in range(each.horizon)) == pytest.approx(0.6)


def test_a_teacher_for_some_steps_and_micro_batches(kd_config):
    kd = controller(kd_config, every=3, micro_batches=2)
    assert [kd.micro_batches(step, 4) for step in range(7)] == [2, 0, 0, 2, 0, 0, 2]
    assert kd.micro_batches(0, 1) == 1 and controller(kd_config, micro_batches=0).micro_batches(0, 4) == 4
    kd.stop_step = 3
    assert kd.micro_batches(3, 4) == 0


def test_alphas_schedules_by_hand(kd_config):
    kd = controller(kd_config, alpha=0.6, alpha_schedule="linear", token_frac=0.5)
    assert [kd.alpha(0, share * kd.kd_tokens) for share in (0.0, 0.5, 1.0, 1.5)] == pytest.approx([0.6, 0.3, 0.0, 0.0])
    kd = controller(kd_config, alpha=0.6, alpha_schedule="lr")
    left = (1 - 38 / 75) / kd_config.schedule.cooldown_frac  # of its cooldown, when the stage at 1.2 begins
    most = 1.2 * left + 0.1 * (1 - left)  # its largest LR; it was 1, and falls to the floor of 0.1
    assert left < 1 < most and [kd.alpha(step, 0) for step in (0, 75)] == pytest.approx([0.6 / most, 0.6 * 0.1 / most])
    assert controller(kd_config, alpha=0.6, alpha_schedule="constant").alpha(70, 10**9) == 0.6


def gradient(config, dataset, teacher_folder, order):
    """Of the first step, whose two micro-batches are read in this order."""
    trainer = Trainer(config, dataset, teacher_folder, "reference")
    batches = [trainer.stream.next_batch(128, "cpu") for _ in order]
    left = iter(order)
    trainer.stream = SimpleNamespace(next_batch=lambda *_: batches[next(left)])
    trainer.optimizers.step = lambda *_, **__: None
    trainer.train_step()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def test_micro_batches_without_a_teacher_weigh_as_much_as_those_with_one(dataset, teacher_folder, kd_config):
    """Whichever of two has the teacher: on average half the dense KD gradient and half that of CE."""
    plain = dataclasses.replace(kd_config.kd, dynamic_norm=False)  # a factor from the step before would lag
    configs = {n: dataclasses.replace(kd_config, kd=dataclasses.replace(plain, micro_batches=n)) for n in (0, 1)}
    first, second = (gradient(configs[1], dataset, teacher_folder, order) for order in ((0, 1), (1, 0)))
    dense = gradient(configs[0], dataset, teacher_folder, (0, 1))
    ce = gradient(dataclasses.replace(kd_config, kd=None), dataset, None, (0, 1))
    torch.testing.assert_close((first + second) / 2, (dense + ce) / 2, rtol=1e-4, atol=1e-6)
    assert (first - second).norm() > 0.05 * dense.norm() < (dense - ce).norm()


def test_strided_tokens_have_the_dense_gradient_on_average():
    """Over all offsets of the stride."""
    torch.manual_seed(0)
    head, labels = torch.randn(20, 6), torch.randint(20, (12,))
    teacher = DenseTeacher(torch.randn(12, 5), torch.randn(20, 5), None)
    hidden = torch.randn(12, 6, requires_grad=True)

    def of(mask):
        loss = distill_loss(hidden, head, teacher, labels, hard_weight=0.5, soft_weight=0.5, soft_mask=mask)
        return torch.autograd.grad(loss.total, hidden)[0]

    strided = [of(torch.arange(12) % 3 == offset) for offset in range(3)]
    torch.testing.assert_close(torch.stack(strided).mean(dim=0), of(None))


def test_a_given_chunk_size_changes_nothing_but_memory(tiny_runs, dataset, teacher_folder, kd_config):
    rows = []
    for mib in (0, 1):
        config = dataclasses.replace(kd_config, kd=dataclasses.replace(kd_config.kd, logits_mib=mib))
        with pytest.MonkeyPatch.context() as patch:
            seen = []
            patch.setattr(distill, "distill_loss", lambda *a, seen=seen, **o: seen.append(o) or distill_loss(*a, **o))
            rows.append(Trainer(config, dataset, teacher_folder, "reference").train_step())
        assert {options["logits_mib"] for options in seen} == {mib or None}
    assert rows[0]["loss_soft"] == pytest.approx(rows[1]["loss_soft"], rel=1e-5)


@pytest.mark.parametrize("compiled", [True, False])
def test_the_teacher_is_compiled_unless_told_otherwise(compiled, dataset, teacher_folder, kd_config, monkeypatch):
    config = dataclasses.replace(kd_config, kd=dataclasses.replace(kd_config.kd, compile_teacher=compiled))
    trainer = Trainer(config, dataset, teacher_folder, "reference")
    trainer.options["compiled"], asked = True, []
    monkeypatch.setattr("kdclimb.train.load_teacher", lambda *_, **options: asked.append(options["compiled"]))
    trainer._load_teacher()
    assert asked == [compiled]


VAL = 5.0  # nats: the teacher's


def controller(kd_config, **changes):
    return KDController(dataclasses.replace(kd_config.kd, **changes), None, VAL, kd_config.schedule)


def test_controller_state_survives_json_to_the_bit(kd_config):
    kd, other = (controller(kd_config) for _ in range(2))
    kd.norm.factor = torch.tensor(1 / 3)
    kd.stop_step, kd.streak = 50, 1
    other.load_state(json.loads(json.dumps(kd.state())), "cpu")
    assert other.norm.factor.equal(kd.norm.factor) and (other.stop_step, other.streak) == (50, 1)
