"""On an NVIDIA GPU: the attention backend, the loss in bf16, and whole runs with a teacher. ./test -m gpu

Needs neither Snakemake nor the network, so that it also runs on a bare GPU machine with pytest.
"""

import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from kdclimb.attention import Documents, attention
from kdclimb.config import DataRef, KDConfig, ModelConfig, OptimConfig, RunConfig, ScheduleConfig, ValidationConfig
from kdclimb.data import prepare
from kdclimb.kernels import DenseTeacher, Softcap, distill_loss
from kdclimb.run import run

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parent.parent.parent
CAP = Softcap(23.0, 5.0, 7.5)


def error(value, truth):
    return (value.double() - truth).norm() / truth.norm()


@pytest.mark.parametrize("starts", [[0], [0, 5, 700, 701, 1500]])
def test_varlen_attention_against_float64(starts):
    torch.manual_seed(0)
    q, k, v, upstream = (torch.randn(2048, 6, 128, device="cuda", dtype=torch.float64) for _ in range(4))
    documents = Documents.of(starts, 2048, "cuda")

    def run_as(dtype, backend):
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out = attention(*inputs, documents, 0.1, backend)
        return [out, *torch.autograd.grad(out, inputs, upstream.to(dtype))]

    truth = run_as(torch.float64, "reference")
    plain, ours = run_as(torch.bfloat16, "reference"), run_as(torch.bfloat16, "torch_varlen")
    for mine, reference, true in zip(ours, plain, truth, strict=True):
        assert error(mine, true) <= 3 * error(reference, true)


@pytest.mark.parametrize(("tokens", "temperature"), [(4096, 1.0), (3001, 2.0)])
def test_loss_in_bf16_against_float64_at_the_real_vocabulary(tokens, temperature):
    torch.manual_seed(0)
    vocab, d = 50304, 768
    hidden, head = torch.randn(tokens, d, device="cuda"), 0.05 * torch.randn(vocab, d, device="cuda")
    teacher_hidden, teacher_head = (
        torch.randn(tokens, 384, device="cuda"),
        0.05 * torch.randn(vocab, 384, device="cuda"),
    )
    labels = torch.randint(0, vocab, (tokens,), device="cuda")
    labels[::9] = -100
    # all start from the same bf16 values, so that only the arithmetic differs
    tensors = [t.bfloat16() for t in (hidden, head, teacher_hidden, teacher_head)]

    def run_as(dtype, implementation):
        h, w, th, tw = (t.to(dtype) for t in tensors)
        h.requires_grad_()
        w.requires_grad_()
        loss = distill_loss(
            h,
            w,
            DenseTeacher(th, tw, CAP),
            labels,
            hard_weight=0.5,
            soft_weight=0.5,
            temperature=temperature,
            student_softcap=CAP,
            implementation=implementation,
        )
        (2.0 * loss.total).backward()
        return loss, h.grad, w.grad

    truth, plain, ours = (
        run_as(torch.float64, "reference"),
        run_as(torch.bfloat16, "reference"),
        run_as(torch.bfloat16, "torch"),
    )
    for mine, reference, true in zip(ours[1:], plain[1:], truth[1:], strict=True):
        assert error(mine, true) <= 3 * error(reference, true)
    assert ours[0].hard.item() == pytest.approx(truth[0].hard.item(), rel=1e-3)
    assert ours[0].soft.item() == pytest.approx(truth[0].soft.item(), rel=1e-2)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "text"
    files = ["data/devils-dictionary.txt.xz"]
    prepare({"source": "text", "vocab_size": 512, "files": files, "val_fraction": 0.2, "seed": 0}, out, ROOT)
    return out / "manifest.json"


def config(num_layers=4, num_heads=4, horizon=60, kd=None, clock="measured"):
    return RunConfig(
        model=ModelConfig(512, num_layers, num_heads, 32, 1024, 0.5, (23.0, 5.0, 7.5)),
        data=DataRef("text", 512),
        optim=OptimConfig(0.02, 0.95, 0.0, 0.01, 0.8, 0.95, 1.0),
        schedule=ScheduleConfig(horizon, horizon, (2048, 4096), (1.0, 1.2), 2048, 128, 0.5, 0.1, None),
        validation=ValidationConfig(25, 4096),
        kd=kd,
        seed=0,
        device="cuda",
        clock=clock,
        modelled_tflops=0.0 if clock == "measured" else 1.0,
    )


def train(run_config, manifest, folder, teacher=None):
    out = folder / run_config.run_id
    assert run(run_config, out, manifest, teacher, threads=4, any_code=False, last_attempt=True) == 0
    status = json.loads((out / "status.json").read_text())
    assert status["status"] == "ok", status
    with (out / "summary.csv").open() as file:
        (summary,) = csv.DictReader(file)
    with (out / "val.csv").open() as file:
        return out, status, summary, list(csv.DictReader(file))


def test_ce_teacher_and_kd_run_on_the_gpu(manifest, tmp_path):
    _, status, summary, vals = train(config(), manifest, tmp_path)
    assert status["attention"] == "torch_varlen" and status["device"] == torch.cuda.get_device_name()
    assert float(summary["final_val"]) < float(vals[0]["val_loss"]) - 1.0
    assert float(summary["peak_alloc_gib"]) > 0 and float(summary["train_time_ms"]) > 0
    teacher, *_ = train(config(num_layers=1, num_heads=2), manifest, tmp_path)
    kd = KDConfig(teacher.name, False, False, 0.5, 1.0, True, 0.05, 20.0, 0.05, 25, 0.7, 10)
    out, _, kd_summary, kd_vals = train(config(kd=kd), manifest, tmp_path, teacher / "checkpoints")
    # teacher_kl at step 0 is against an untrained student; KD brings it down
    assert float(kd_vals[-1]["teacher_kl"]) < float(kd_vals[0]["teacher_kl"])
    with (out / "steps.csv").open() as file:
        active = [row for row in csv.DictReader(file) if row["kd_active"] == "1"]
    assert active and all(0.05 < float(row["kd_share"]) < 0.95 for row in active)
    print("\nCE", {k: summary[k] for k in ("final_val", "step_ms_median", "peak_alloc_gib", "mfu")})
    print("KD", {k: kd_summary[k] for k in ("final_val", "step_ms_median", "peak_alloc_gib", "kd_stop_step")})


def test_running_out_of_memory_is_a_result(manifest, tmp_path):
    huge = config()
    huge = dataclasses.replace(huge, model=dataclasses.replace(huge.model, bigram_vocab_size=2**28))
    out = tmp_path / huge.run_id
    assert run(huge, out, manifest, None, threads=4, any_code=False, last_attempt=True) == 0
    status = json.loads((out / "status.json").read_text())
    assert status["status"] == "oom" and "train.micro_batch_tokens" in status["reason"]
