"""Eight bits: products of a teacher at work, and its cached hidden states, against float64."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from configs import ROOT, merged

from kdclimb import campaign, expansion, write_cache
from kdclimb.artifacts import seal
from kdclimb.attention import Documents
from kdclimb.cache import DESCRIPTION, TargetCache
from kdclimb.config import ConfigError
from kdclimb.data import Dataset
from kdclimb.kernels import fp8
from kdclimb.model import GPT, compile_layer
from kdclimb.ngram import NgramTable
from kdclimb.teacher import in_dtype
from kdclimb.train import Trainer, compiled_graphs

HALF_STEP = 2.0**-4  # of a number with 3 bits behind its leading one


def relative(value, truth):
    return ((value.double() - truth).norm() / truth.norm()).item()


def test_each_value_keeps_its_leading_bits_whatever_the_other_rows_hold():
    torch.manual_seed(0)
    x = torch.randn(40, 64, dtype=torch.float64) * torch.logspace(-4, 4, 40, dtype=torch.float64)[:, None]
    x[7] = 0.0
    back = fp8.by_rows(x).to(torch.float64)
    normal = x.abs() > x.abs().amax(dim=1, keepdim=True) * 2.0**-6 / fp8.E4M3_MAX
    assert ((back - x).abs()[normal] <= HALF_STEP * x.abs()[normal] * (1 + 1e-6)).all()
    assert back[7].eq(0).all() and normal.double().mean() > 0.95
    one_scale = x.abs().amax() / fp8.E4M3_MAX  # what a single one makes of the small rows
    assert relative((x[0] / one_scale).to(torch.float8_e4m3fn).double() * one_scale, x[0]) > 0.5


def test_a_product_is_that_of_the_rounded_operands():
    torch.manual_seed(0)
    x, weight = torch.randn(50, 64), torch.randn(32, 64)
    rounded = fp8.by_rows(weight)
    out = fp8.product(x, rounded)
    assert out.dtype == torch.bfloat16
    exact = fp8.by_rows(x).to(torch.float64) @ rounded.to(torch.float64).T
    assert relative(out, exact) < 2.0**-8  # bf16's
    assert 0.005 < relative(out, x.double() @ weight.double().T) < 0.05


@pytest.fixture
def shape(tiny_runs):
    """A model config of four layers of different kinds."""
    config = next(run.config.model for run in tiny_runs if run.arm == "ce")
    return dataclasses.replace(config, num_heads=2, head_dim=32)


def test_a_rounded_model_is_near_the_same_in_float64(shape):
    torch.manual_seed(0)
    model = GPT(shape, backend="reference", compute_dtype=torch.bfloat16).requires_grad_(False)
    for p in model.parameters():  # a model starts with zeros where nothing would flow
        p.add_(0.1 * torch.randn_like(p))
    exact = GPT(shape, backend="reference", compute_dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    tokens, documents = torch.randint(0, 384, (128,)), Documents.of([0, 50], 128, "cpu")
    truth = exact(tokens, documents).detach()
    plain = relative(model(tokens, documents), truth)
    model.round_matrices()
    assert plain < relative(model(tokens, documents), truth) < 0.2


def test_a_rounded_model_compiles_whole_once_for_each_kind_of_layer(shape, cpu_varlen):
    torch.manual_seed(0)
    config = dataclasses.replace(shape, num_layers=6, value_layers=(), long_layers=(), paired_layers=())
    config = dataclasses.replace(config, attention_free_layers=(5,), skip=(), backout=())
    plain, compiled = (
        GPT(config, backend=backend, compute_dtype=torch.bfloat16).requires_grad_(False)
        for backend in ("reference", "torch_varlen")
    )
    for p in plain.parameters():
        p.add_(0.1 * torch.randn_like(p))
    compiled.load_state_dict(plain.state_dict())
    compiled._layer = compile_layer(backend="aot_eager")
    before = compiled_graphs()
    for gpt in (plain, compiled):
        gpt.round_matrices()
    for start in (10, 17):
        tokens = torch.randint(0, 384, (40,))
        documents = Documents(torch.tensor([0, start, 40], dtype=torch.int32), 40, 40)
        torch.testing.assert_close(compiled(tokens, documents), plain(tokens, documents), rtol=0.02, atol=0.02)
    assert compiled_graphs() - before == 3  # the first, whose x is x0, those like it, and the one without attention


def test_where_it_cannot_run_the_key_is_named(shape):
    model = GPT(shape, backend="reference", compute_dtype=torch.bfloat16)
    assert in_dtype(model, "same") is model and not model.blocks[0].rounded
    with pytest.raises(ConfigError, match="kd.teacher_dtype: 'fp8' .* needs an NVIDIA GPU"):
        in_dtype(model, "fp8")
    with pytest.raises(ConfigError, match="kd.teacher_dtype: 'fp8' .* has no layers"):
        in_dtype(object.__new__(NgramTable), "fp8")


@pytest.mark.parametrize("section", [{"kd": {"teacher_dtype": "fp8"}}, {"train": {"head_dtype": "fp8"}}])
def test_a_campaign_on_a_cpu_refuses_them(section):
    (name, keys), *_ = section.items()
    with pytest.raises(ConfigError, match=f"{name}.{next(iter(keys))}: 'fp8' .* same with device: cpu"):
        campaign.load(merged("tests/tiny.yaml", section), ROOT)


def test_capabilities_and_widths_that_lack_it_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "9.0" in fp8.why_not("cuda", 768)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert fp8.why_not("cuda", 768) is None and "24" in fp8.why_not("cuda", 24)


@pytest.fixture
def cached(manifest, tiny_runs, teacher_folder, tmp_path):
    """make(dtype) -> (run config, cache config, the written cache's folder)."""
    teacher = next(run for run in tiny_runs if run.arm == "teacher")
    decisions = {"projected": {"survivors": [teacher.label]}, "selected": {"run_id": teacher.run_id}}

    def make(dtype):
        kd = {"cache": "hidden", "cache_dtype": dtype, "token_frac": 0.05}
        config = campaign.load(merged("tests/tiny.yaml", {"kd": kd}), ROOT)
        data = manifest.parent.name
        run = next(run for run in expansion.expand(config, decisions, data) if run.arm == "screen").config
        cache = expansion.caches(config, decisions, data)[run.kd.cache]
        folder = tmp_path / cache.cache_id
        write_cache.write(cache, folder, manifest, teacher_folder, threads=1)
        return run, cache, folder

    return make


def test_cached_states_in_8_bits_teach_nearly_as_the_teacher_does(cached, manifest, teacher_folder):
    (run, cache, folder), (_, wide, _) = cached("fp8"), cached("bf16")
    assert cache.cache_id != wide.cache_id
    dataset = Dataset(manifest)
    trainer = Trainer(run, dataset, teacher_folder, "reference", folder)
    online = dataclasses.replace(run, kd=dataclasses.replace(run.kd, cache=None))
    truth = Trainer(online, dataset, teacher_folder, "reference")
    stream = dataset.train_stream(run.seed, run.schedule.max_doc_tokens)
    batch = stream.next_batch(run.schedule.micro_batch_tokens, "cpu")
    target, exact = trainer.kd.target(batch, 0), truth.kd.target(batch, 0)
    assert target.hidden.dtype == torch.float32
    assert 0.005 < relative(target.hidden, exact.hidden.double()) < 0.04
    rows = [[t.train_step() for _ in range(3)] for t in (trainer, truth)]
    for name, rel in {"loss_hard": 5e-3, "loss_soft": 3e-2}.items():
        cheap, dear = ([row[name] for row in arm] for arm in rows)
        assert cheap == pytest.approx(dear, rel=rel), name
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.bin")}
    tokens, width = cache.micro_batches * cache.micro_batch_tokens, truth.kd.teacher.config.dim
    assert sizes == {"hidden.bin": tokens * width, "scale.bin": 4 * tokens}


def test_a_cache_by_another_arithmetic_is_stale(cached, manifest, teacher_folder):
    run, _, folder = cached("bf16")
    description = json.loads((folder / DESCRIPTION).read_text())
    description["config"]["teacher_dtype"] = "fp8"
    (folder / DESCRIPTION).write_text(json.dumps(seal(description)))
    teacher = SimpleNamespace(config=SimpleNamespace(dim=16))
    with pytest.raises(ValueError, match="stale: (id|teacher_dtype)"):
        TargetCache(folder, run, teacher, {})
