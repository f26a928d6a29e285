"""Attention, model and schedule."""

import dataclasses
import math

import pytest
import torch
from configs import ROOT, merged

from kdclimb import campaign, schedule
from kdclimb.attention import Documents, attention
from kdclimb.config import BoostConfig
from kdclimb.model import GPT, bigram_hash


def dense_truth(q, k, v, starts, scale):
    """Attention document by document, spelt out."""
    out, bounds = torch.zeros_like(v), [*starts, len(q)]
    for a, b in zip(bounds[:-1], bounds[1:], strict=True):
        for h in range(q.shape[1]):
            scores = scale * q[a:b, h] @ k[a:b, h].T
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
            out[a:b, h] = scores.softmax(-1) @ v[a:b, h]
    return out


@pytest.mark.parametrize("starts", [[0], [0, 1, 2, 30], [0, 17, 18, 40, 63]])
def test_reference_attention_sees_its_own_document_only(starts):
    torch.manual_seed(0)
    q, k, v = (torch.randn(64, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    upstream = torch.randn(64, 2, 8, dtype=torch.float64)
    documents = Documents.of(starts, 64, "cpu")
    ours = attention(q, k, v, documents, 0.3, "reference")
    truth = dense_truth(q, k, v, starts, 0.3)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
    for mine, true in zip(
        torch.autograd.grad(ours, (q, k, v), upstream), torch.autograd.grad(truth, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-11)


def test_unknown_backend_is_refused():
    q = torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match="backend: 'magic'"):
        attention(q, q, q, Documents.of([0], 4, "cpu"), 1.0, "magic")


def model(tiny, **changes):
    config = next(r.config.model for r in campaign.expand(tiny, {}) if r.arm == "ce")
    torch.manual_seed(0)
    return GPT(dataclasses.replace(config, **changes), backend="reference", compute_dtype=torch.float32)


def awake(gpt):
    """A model starts with zeros in places where nothing would flow; give every weight something."""
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return gpt


def test_a_token_depends_on_its_documents_past_alone(tiny):
    gpt = awake(model(tiny))
    tokens = torch.randint(0, 384, (40,))
    documents = Documents.of([0, 15], 40, "cpu")
    before = gpt(tokens, documents)
    for changed, same in ((39, range(39)), (20, range(20)), (3, range(16, 40))):
        other = tokens.clone()
        other[changed] = (other[changed] + 1) % 384
        after = gpt(other, documents)
        assert torch.equal(before[list(same)], after[list(same)]), changed
        assert not torch.equal(before[changed], after[changed])


def test_bigram_rows_stay_in_their_table_and_2_rows_carry_nothing():
    tokens = torch.randint(0, 50257, (1000,))
    for rows in (2, 512, 251520):
        hashed = bigram_hash(tokens, rows)
        assert hashed.min() >= 0 and hashed[1:].max() < rows - 1 and hashed[0] == rows - 1
    assert bigram_hash(tokens, 2)[1:].unique().tolist() == [0]


def test_active_parameters_are_what_a_token_is_multiplied_with(tiny):
    gpt = model(tiny)
    d, layers, vocab = 32, 2, 384
    assert gpt.params_active() == layers * 12 * d * d + vocab * d
    assert gpt.params_stored() == gpt.params_active() + 512 * d + layers  # tied: no second table
    forward = 2 * gpt.params_active() + 4 * layers * d * 32
    assert gpt.flops_per_token(32, backward=False) == forward
    assert gpt.flops_per_token(32, backward=True) == 3 * forward


def test_tying_follows_untie_frac(tiny):
    assert model(tiny, untie_frac=0.0).head is not None
    tied = model(tiny, untie_frac=0.5)
    assert tied.head_weight is tied.embed and tied.untie_step(75) == 38
    assert model(tiny, untie_frac=1.0).untie_step(75) is None


def test_lr_schedule_by_hand():
    config = campaign.load(merged({"train": {"batch_tokens": [2048, 4096], "batch_lr": [1.0, 1.5]}}), ROOT)
    sched = next(r.config.schedule for r in campaign.expand(config, {}) if r.arm == "ce")
    sched = dataclasses.replace(sched, horizon=100, cooldown_frac=0.4, lr_floor=0.1)
    assert [schedule.batch_tokens(sched, s) for s in (0, 49, 50, 99)] == [2048, 2048, 4096, 4096]
    assert [schedule.base_lr(sched, s) for s in (0, 49, 50, 60)] == [1.0, 1.0, 1.5, 1.5]
    assert schedule.base_lr(sched, 80) == pytest.approx(1.5 * 0.5 + 0.1 * 0.5)
    assert schedule.base_lr(sched, 100) == pytest.approx(0.1)


def test_the_extension_is_spent_at_the_floor_and_the_rest_of_the_schedule_ends_before_it():
    config = campaign.load(merged("config/h100.yaml", {"device": "cpu"}), ROOT)
    sched = next(
        r.config.schedule for r in campaign.expand(config, {}) if r.arm == "ce" and r.config.schedule.horizon == 1555
    )
    assert sched.scheduled == 1515 and sched.stop_step == 1555
    assert [schedule.stage(sched, s) for s in (504, 505, 1009, 1010, 1554)] == [0, 1, 1, 2, 2]
    assert schedule.base_lr(sched, 504) == 1.0 and schedule.base_lr(sched, 681) == 1.52
    assert schedule.base_lr(sched, 682) < 1.52
    assert [schedule.base_lr(sched, s) for s in (1515, 1554)] == [sched.lr_floor] * 2 < [schedule.base_lr(sched, 1514)]


@pytest.mark.parametrize(("horizon", "warmup", "cooldown"), [(20, 4, 4), (155, 31, 31), (1515, 300, 50)])
def test_momentum_warms_up_and_cools_down_at_every_horizon(tiny, horizon, warmup, cooldown):
    ramps = {"momentum_warmup": 300, "momentum_cooldown": 50, "momentum_ramp_frac": 0.2}
    muon = dataclasses.replace(tiny.optim.muon, momentum=0.95, momentum_min=0.85, **ramps)
    values = [schedule.momentum(muon, horizon, step) for step in range(horizon)]
    assert values[0] == pytest.approx(0.85) and values[-1] == pytest.approx(0.85 + 0.1 / cooldown)
    assert values[warmup // 2] == pytest.approx(0.85 + 0.1 * (warmup // 2) / warmup)
    assert values[warmup : horizon - cooldown + 1] == pytest.approx([0.95] * (horizon - warmup - cooldown + 1))
    assert max(values[:warmup] + values[horizon - cooldown + 1 :]) < 0.95
    flat = dataclasses.replace(muon, momentum_warmup=0, momentum_cooldown=0)
    assert {schedule.momentum(flat, horizon, step) for step in range(horizon)} == {0.95}


def test_three_lr_phases_of_kd(tiny_runs):
    run = next(r.config for r in tiny_runs if r.arm == "kd")
    sched = dataclasses.replace(
        run.schedule,
        horizon=100,
        batch_tokens=(128,),
        batch_lr=(1.0,),
        cooldown_frac=0.0,
        lr_boost=BoostConfig(3.0, 0.2, 0.4),
    )
    kd = dataclasses.replace(run.kd, post_stop_lr=0.5, post_stop_blend_steps=4)

    def mult(step, stop):
        return schedule.lr_mult(sched, kd, step, stop)

    assert [mult(s, None) for s in (0, 19, 30, 40, 99)] == pytest.approx([3.0, 3.0, 2.0, 1.0, 1.0])  # A
    assert mult(10, 10) == pytest.approx(1.0 - 0.5 / 4)  # B: the boost is gone at once, the tail blends in
    assert [mult(s, 10) for s in (13, 50)] == pytest.approx([0.5, 0.5])  # C
    assert schedule.lr_mult(sched, dataclasses.replace(kd, post_stop_blend_steps=0), 10, 10) == pytest.approx(0.5)
    assert schedule.lr_mult(sched, None, 10, None) == pytest.approx(3.0)  # the control without KD
