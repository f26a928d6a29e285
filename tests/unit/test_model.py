"""Attention, model and schedule."""

import dataclasses
import itertools
import math

import pytest
import torch
from configs import ROOT, merged

from kdclimb import campaign, expansion, schedule
from kdclimb.attention import Documents, Span, attention
from kdclimb.config import BoostConfig, ConfigError
from kdclimb.model import GPT, bigram_hash, compile_layer, look_up, rotary, rotary_tables
from kdclimb.train import compiled_graphs


def dense_truth(q, k, v, starts, scale, window=-1):
    """Attention document by document, spelt out."""
    out, bounds = torch.zeros_like(v), [*starts, len(q)]
    for a, b in zip(bounds[:-1], bounds[1:], strict=True):
        for h in range(q.shape[1]):
            scores = scale * q[a:b, h] @ k[a:b, h].T
            place = torch.arange(b - a)
            distance = place[:, None] - place
            hidden = (distance < 0) | (distance > (window if window >= 0 else b - a))
            scores = scores.masked_fill(hidden, -math.inf)
            out[a:b, h] = scores.softmax(-1) @ v[a:b, h]
    return out


@pytest.mark.parametrize("window", [-1, 0, 5, 64])
@pytest.mark.parametrize("starts", [[0], [0, 1, 2, 30], [0, 17, 18, 40, 63]])
def test_reference_attention_sees_its_own_document_and_window_only(starts, window):
    torch.manual_seed(0)
    q, k, v = (torch.randn(64, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    upstream = torch.randn(64, 2, 8, dtype=torch.float64)
    documents = Documents.of(starts, 64, "cpu")
    ours = attention(q, k, v, documents, Span.of(window, 0.3), "reference")
    truth = dense_truth(q, k, v, starts, 0.3, window)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
    for mine, true in zip(
        torch.autograd.grad(ours, (q, k, v), upstream), torch.autograd.grad(truth, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-11)


def test_unknown_backend_is_refused():
    q = torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match="backend: 'magic'"):
        attention(q, q, q, Documents.of([0], 4, "cpu"), Span.of(-1, 1.0), "magic")


def model(tiny, **changes):
    config = next(r.config.model for r in expansion.expand(tiny, {}) if r.arm == "ce")
    torch.manual_seed(0)
    return GPT(dataclasses.replace(config, **changes), backend="reference", compute_dtype=torch.float32)


def awake(gpt):
    """A model starts with zeros in places where nothing would flow; give every weight something."""
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return gpt


def test_a_token_depends_on_its_documents_past_alone(tiny):
    gpt = awake(model(tiny, key_offset=False))  # which lets a document's first token see the one before it
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
    d, heads, layers, attending, vocab = 32, 2, 4, 3, 384
    assert gpt.params_active() == (layers * 8 + attending * 4) * d * d + vocab * d
    tables, gates = 512 * d + 2 * vocab * d, (attending + 2) * heads * 12 + 2 * 12
    factors = 3 * layers + 2 * attending + 3  # of the residual stream; of the attention's weights; smear, skip, backout
    assert gpt.params_stored() == gpt.params_active() + tables + gates + factors  # tied: no second table
    forward = 2 * gpt.params_active() + 4 * d * (2 * 32 + 32 + 32)  # paired heads see two entries a token
    assert gpt.flops_per_token(32, backward=False) == forward
    assert gpt.flops_per_token(32, backward=True) == 3 * forward
    gpt.set_windows((8, 16), (16,))
    assert gpt.flops_per_token(32, backward=False) == forward - 4 * d * (56 + 16 + 16)


def test_windows_reach_as_far_as_they_say(tiny):
    """Changing a token changes what sees it, layer by layer, and nothing beyond."""
    alone = {"skip": (), "backout": (), "smear": False, "key_offset": False, "bigram_vocab_size": 0}
    layers = {"attention_free_layers": (0,), "long_layers": (1,), "paired_layers": (), "value_layers": ()}
    gpt = awake(model(tiny, **alone, **layers))
    gpt.set_windows((2, 5), (5,))  # layer 1 sees 5 back, layers 2 and 3 see 2
    tokens = torch.randint(0, 384, (40,))
    documents = Documents.of([0], 40, "cpu")
    before = gpt(tokens, documents)
    tokens[10] = (tokens[10] + 1) % 384
    changed = (gpt(tokens, documents) != before).any(dim=-1).nonzero().flatten().tolist()
    assert changed == list(range(10, 10 + 5 + 2 + 2 + 1))


def test_paired_heads_see_both_keys_of_their_pair(tiny):
    """Head h of token t is entry 2t + h // (H / 2); so the second of a pair sees the first's key of its own token."""
    heads, d, tokens = 4, 4, 9
    torch.manual_seed(0)
    q, k, v = (torch.randn(tokens, heads, d, dtype=torch.float64) for _ in range(3))
    documents = Documents.of([0, 4], tokens, "cpu")
    seen = [y.reshape(2 * tokens, heads // 2, d) for y in (q, k, v)]
    ours = attention(*seen, documents.doubled, Span.of(3, 0.5), "reference").view(tokens, heads, d)
    for t, h in itertools.product(range(tokens), range(heads)):
        half, slot = divmod(h, heads // 2)
        entries = [(s, g) for s in range(tokens) for g in (slot, slot + heads // 2)]
        place = {(s, g): 2 * s + g // (heads // 2) for s, g in entries}
        visible = [e for e in entries if 0 <= 2 * t + half - place[e] <= 3 and (e[0] < 4) == (t < 4)]
        weights = torch.stack([0.5 * q[t, h] @ k[s, g] for s, g in visible]).softmax(0)
        truth = sum(w * v[s, g] for w, (s, g) in zip(weights, visible, strict=True))
        torch.testing.assert_close(ours[t, h], truth)


def test_value_gates_see_what_they_say(tiny):
    for kind, sees_value in (("hidden", False), ("both", True)):
        gpt = awake(model(tiny, value_gate=kind))
        layer = max(tiny.student.value_layers) if tiny.student.value_layers[-1] >= 0 else gpt.config.num_layers - 1
        block, d = gpt.blocks[layer], gpt.config.dim
        x, value = torch.randn(5, d), torch.randn(5, d)
        half = block.value_gate.shape[1] // 2
        inputs = torch.cat([x[:, :half], value[:, :half]], dim=1) if sees_value else x[:, : 2 * half]
        torch.testing.assert_close(block.gate_value(x, value), 2 * (inputs @ block.value_gate.T).sigmoid())
    assert model(tiny, value_gate="both").value_embeds["0"].detach().std().item() == pytest.approx(0.01, rel=0.1)
    assert not model(tiny, value_gate="hidden").value_embeds["0"].any()


def test_half_of_each_head_turns_and_by_yarn_less_so_where_it_turns_seldom(tiny):
    config = dataclasses.replace(
        next(r.config.model for r in expansion.expand(tiny, {}) if r.arm == "ce"), head_dim=128
    )
    base, factor = rotary(config, (384,))
    assert len(base) == 64 and not base[32:].any() and factor == 1.0
    whole, base = base, base[:32]
    assert base[0] == 1.0 and base[-1] == pytest.approx(1 / 1024)
    scales = [0.1 * rotary(config, (384, 896, 1408, 1664)[:n])[1] for n in (1, 2, 3, 4)]
    assert scales == pytest.approx([0.1, 0.117, 0.127, 0.132], abs=1e-3)  # the speedrun's
    stretched = rotary(config, (384, 896))[0][:32] / base
    turns = 384 * base / (2 * math.pi)
    assert (stretched[turns > 32] == 1).all() and stretched[turns < 1].numpy() == pytest.approx(384 / 896)
    assert rotary(dataclasses.replace(config, yarn=False), (384, 896))[1] == 1.0
    cos, sin = rotary_tables(5, 4, whole, torch.float64)
    assert (cos[..., 32:] == 1).all() and (sin[..., 32:] == 0).all()
    assert torch.equal(sin[2, :, 0], torch.tensor([4.0, 5.0, 4.0, 5.0], dtype=torch.float64).sin())


def test_all_of_each_head_turns_where_the_config_says_so(tiny):
    gpt = model(tiny, half_rotary=False, key_offset=False)
    pairs = gpt.config.head_dim // 2
    assert gpt.frequencies.numpy() == pytest.approx([1024 ** (-i / (pairs - 1)) for i in range(pairs)])
    with pytest.raises(ConfigError, match="key_offset: True is not allowed; allowed: false with half_rotary: false"):
        model(tiny, half_rotary=False)


def test_scores_grow_with_queries_and_keys_only_without_their_norm(tiny):
    for qk_norm in (True, False):
        gpt = awake(model(tiny, qk_norm=qk_norm))
        tokens, documents = torch.randint(0, 384, (40,)), Documents.of([0], 40, "cpu")
        before = gpt(tokens, documents)
        with torch.no_grad():
            gpt.blocks[1].q.mul_(3.0)
        assert torch.allclose(gpt(tokens, documents), before, atol=1e-4) == qk_norm


def test_the_lookups_gradient_is_autograds_and_adds_up(tiny):
    table, other = (torch.nn.Parameter(torch.arange(20.0).view(5, 4)) for _ in range(2))
    for rows in (torch.tensor([1, 3, 1]), torch.tensor([0, 1, 1])):
        upstream = torch.randn(3, 4)
        (look_up(table, rows, torch.float32) * upstream).sum().backward()
        (other[rows] * upstream).sum().backward()
    torch.testing.assert_close(table.grad, other.grad)


def test_layers_compile_whole_once_for_each_kind_and_not_again_for_new_windows(tiny, cpu_varlen):
    """Through the operator that GPUs use."""
    plain, compiled = (awake(model(tiny)) for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    compiled.backend = "torch_varlen"
    compiled._layer = compile_layer(backend="aot_eager")
    before, counts = compiled_graphs(), []
    for windows, longs, starts in (((4, 8), (8,), [0, 17]), ((6, 12), (8, 12), [0, 5]), ((6, 12), (8, 12), [0, 9])):
        tokens = torch.randint(0, 384, (40,))
        for gpt in (plain, compiled):
            gpt.set_windows(windows, longs)
            gpt.zero_grad()
            bounds = torch.tensor([*starts, 40], dtype=torch.int32)
            gpt(tokens, Documents(bounds, 40, 40)).square().mean().backward()
        counts.append(compiled_graphs() - before)
        for (name, ours), theirs in zip(compiled.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert counts == [4, 4, 4]  # of four layers no two are of one kind


def test_tying_follows_untie_frac(tiny):
    assert model(tiny, untie_frac=0.0).head is not None
    tied = model(tiny, untie_frac=0.5)
    assert tied.head_weight is tied.embed and tied.untie_step(75) == 38
    assert model(tiny, untie_frac=1.0).untie_step(75) is None
    assert model(tiny, untie_frac=0.68).untie_step(150) == 102  # whose product lies above 102
    assert model(tiny, untie_frac=0.6667).untie_step(155) == 104


def test_lr_schedule_by_hand():
    config = campaign.load(merged({"train": {"batch_tokens": [2048, 4096], "batch_lr": [1.0, 1.5]}}), ROOT)
    sched = next(r.config.schedule for r in expansion.expand(config, {}) if r.arm == "ce")
    sched = dataclasses.replace(sched, horizon=100, cooldown_frac=0.4, lr_floor=0.1)
    assert [schedule.batch_tokens(sched, s) for s in (0, 49, 50, 99)] == [2048, 2048, 4096, 4096]
    assert [schedule.base_lr(sched, s) for s in (0, 49, 50, 60)] == [1.0, 1.0, 1.5, 1.5]
    assert schedule.base_lr(sched, 80) == pytest.approx(1.5 * 0.5 + 0.1 * 0.5)
    assert schedule.base_lr(sched, 100) == pytest.approx(0.1)
    without = dataclasses.replace(sched, cooldown_frac=0.0, extension_frac=0.1)
    assert [schedule.base_lr(without, s) for s in (0, without.scheduled - 1, 99)] == [1.0, 1.5, 0.1]
    table = dataclasses.replace(sched, lr_table=((0.0, 1.0), (0.07, 0.5)), batch_lr=(1.0, 1.0))
    assert [schedule.base_lr(table, s) for s in (6, 7)] == [1.0, 0.5]


def test_the_legacy_table_is_a_schedule_at_any_horizon():
    config = campaign.load(merged("config/legacy_lr.yaml"), ROOT)
    sched = next(r.config.schedule for r in expansion.expand(config, {}) if r.arm == "ce")
    steps = {0: 1e-3, 2000: 5e-4, 2600: 2e-4, 3200: 1e-4, 3600: 7e-5, 4200: 3e-5, 5200: 1e-5, 6000: 8e-6, 7000: 7e-6}
    steps |= {8000: 5e-6, 9000: 3e-6, 10500: 1e-6}
    whole = dataclasses.replace(sched, horizon=12000)
    for before, (step, lr) in zip([1e-3, *steps.values()], steps.items(), strict=False):
        assert 1e-3 * schedule.base_lr(whole, step) == pytest.approx(lr)
        assert not step or 1e-3 * schedule.base_lr(whole, step - 1) == pytest.approx(before)
    short = dataclasses.replace(sched, horizon=120, batch_lr=(1.5,))
    assert [schedule.base_lr(short, step) for step in (0, 19, 20, 119)] == pytest.approx([1.5, 1.5, 0.75, 0.0015])


def test_the_extension_is_spent_at_the_floor_and_the_rest_of_the_schedule_ends_before_it():
    config = campaign.load(merged("config/h100.yaml", {"device": "cpu"}), ROOT)
    sched = next(
        r.config.schedule for r in expansion.expand(config, {}) if r.arm == "ce" and r.config.schedule.horizon == 1555
    )
    assert sched.scheduled == 1515 and sched.stop_step == 1555
    assert [schedule.stage(sched, s) for s in (504, 505, 1009, 1010, 1554)] == [0, 1, 1, 2, 2]
    assert schedule.base_lr(sched, 504) == 1.0 and schedule.base_lr(sched, 681) == 1.52
    assert schedule.base_lr(sched, 682) < 1.52
    assert [schedule.base_lr(sched, s) for s in (1515, 1554)] == [sched.lr_floor] * 2 < [schedule.base_lr(sched, 1514)]


def test_a_stage_begins_at_the_step_nearest_to_its_share_of_the_schedule():
    config = campaign.load(merged("config/seed155.yaml", {"device": "cpu"}), ROOT)
    sched = next(
        r.config.schedule for r in expansion.expand(config, {}) if r.arm == "ce" and r.config.schedule.horizon == 155
    )
    assert [schedule.stage(sched, s) for s in (0, 51, 52, 102, 103, 154)] == [0, 0, 1, 1, 2, 2]  # 51.7 and 103.3
    assert schedule.total_tokens(sched) == 52 * 131072 + 51 * 262144 + 52 * 393216
    extended = dataclasses.replace(sched, horizon=157, extension_frac=0.0127)
    for config, steps in itertools.product((sched, extended), (0, 51, 52, 103, 104, 155)):
        assert schedule.total_tokens(config, steps) == sum(schedule.batch_tokens(config, i) for i in range(steps))


def test_windows_go_by_stages_and_yarn_remembers_the_long_ones():
    config = campaign.load(merged("config/h100.yaml", {"device": "cpu"}), ROOT)
    sched = next(
        r.config.schedule for r in expansion.expand(config, {}) if r.arm == "ce" and r.config.schedule.horizon == 1555
    )
    assert schedule.windows(sched, 0) == ((128, 384), (384,))
    assert schedule.windows(sched, 505) == ((384, 896), (384, 896))
    assert schedule.windows(sched, 1514) == ((640, 1408), (384, 896, 1408))
    assert schedule.windows(sched, 1515) == ((768, 1664), (384, 896, 1408, 1664))
    assert schedule.windows(sched, 1555) == ((768, 2560), (384, 896, 1408, 1664))
    assert (
        schedule.windows(dataclasses.replace(sched, windows=(), extension_windows=(), final_windows=()), 3)[0] is None
    )
    assert schedule.mtp_weights(sched, 0) == [1.0, 0.5, 0.25]
    assert schedule.mtp_weights(sched, 303) == pytest.approx([1.0, 0.5, 0.25 * (1 - 3 * 303 / 1515)])
    assert schedule.mtp_weights(sched, 505) == [1.0, 0.5]
    assert schedule.mtp_weights(sched, 1009) == pytest.approx([1.0, 0.5 * (2 - 3 * 1009 / 1515)])
    assert schedule.mtp_weights(sched, 1010) == schedule.mtp_weights(sched, 1554) == [1.0]
    one = dataclasses.replace(sched, mtp_weights=((1.0, 0.5),))
    assert schedule.mtp_weights(one, 0) == schedule.mtp_weights(one, 1554) == [1.0, 0.5]


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


def test_momentum_keeps_rising_where_the_ramps_overlap(tiny):
    ramps = {"momentum_warmup": 300, "momentum_cooldown": 50, "momentum_ramp_frac": 2.0}
    muon = dataclasses.replace(tiny.optim.muon, momentum=0.95, momentum_min=0.85, **ramps)
    values = [schedule.momentum(muon, 157, step) for step in range(157)]
    assert values == pytest.approx([0.85 + 0.1 * step / 300 for step in range(157)])


def test_three_lr_phases_of_kd(tiny_runs):
    run = next(r.config for r in tiny_runs if r.arm == "kd")
    sched = dataclasses.replace(
        run.schedule,
        horizon=100,
        batch_tokens=(128,),
        batch_lr=(1.0,),
        windows=(),
        final_windows=(),
        mtp_weights=((1.0,),),
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
