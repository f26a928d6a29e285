"""A tiny campaign, its prepared data, and a trainer call, for the unit tests."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from configs import ROOT, merged, prepare_tiny

from kdclimb import campaign, expansion
from kdclimb.attention import Documents, Span, attention
from kdclimb.run import run


@pytest.fixture(scope="session")
def tiny():
    return campaign.load(merged("tests/tiny.yaml"), ROOT)


@pytest.fixture(scope="session")
def manifest(tmp_path_factory):
    return prepare_tiny(tmp_path_factory.mktemp("prepared"))[1]


@pytest.fixture(scope="session")
def tiny_runs(tiny, manifest):
    """All runs of the tiny campaign, as if the first candidate were selected and T1 promoted."""
    name = tiny.teacher.candidates[0].name
    data = manifest.parent.name
    teacher = next(r for r in expansion.expand(tiny, {"projected": {"survivors": [name]}}, data) if r.arm == "teacher")
    point = expansion.grid_points(tiny.kd.grid)[0].name
    decisions = {
        "projected": {"survivors": [name]},
        "selected": {"run_id": teacher.run_id, "train_time_ms": 0.1, "budget_ms": 0.1},
        "promoted": {"points": [point]},
    }
    return expansion.expand(tiny, decisions, data)


@pytest.fixture(scope="session")
def train(manifest):
    """train(config, folder, teacher=None) -> (exit code, the run's folder)."""

    def call(config, folder, teacher=None, **options):
        out = folder / config.run_id
        options = {"threads": 1, "any_code": False, "last_attempt": True} | options
        return run(config, out, manifest, teacher, **options), out

    return call


@pytest.fixture(scope="session")
def teacher_folder(tiny_runs, train, tmp_path_factory):
    """The trained tiny teacher's checkpoint."""
    config = next(r.config for r in tiny_runs if r.arm == "teacher")
    code, out = train(config, tmp_path_factory.mktemp("teacher"))
    assert code == 0
    return out / "checkpoints"


@pytest.fixture
def cpu_varlen():
    """The attention operator of GPUs gets a kernel for CPUs, made of the reference."""
    with torch.library._scoped_library("kdclimb", "IMPL") as library:
        library.impl("varlen_attention", _varlen, "CPU")
        library.impl("varlen_attention_backward", _varlen_backward, "CPU")
        yield


def _varlen(q, k, v, cu_seqlens, max_len, window, scale, backend):
    out = attention(q, k, v, Documents(cu_seqlens, max_len, len(q)), Span(window, scale), "reference")
    return out.contiguous(), q.new_empty(q.shape[1], q.shape[0])


def _varlen_backward(grad, q, k, v, out, log_norm, cu_seqlens, max_len, window, scale, backend):
    def gradients():
        inputs = [t.detach().requires_grad_() for t in (q, k, v)]
        out = attention(*inputs, Documents(cu_seqlens, max_len, len(q)), Span(window, scale), "reference")
        return tuple(g.contiguous() for g in torch.autograd.grad(out, inputs, grad))

    with ThreadPoolExecutor(1) as pool:  # inside an operator's kernel this thread has no autograd
        return pool.submit(gradients).result()
