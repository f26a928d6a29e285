"""Top-k of a neural teacher and token gates, against whole logits; and that each does what it says in a run."""

import dataclasses

import pytest
import torch

from kdclimb.data import Dataset
from kdclimb.kernels import DenseTeacher, Softcap, SparseTeacher, distill_loss
from kdclimb.sparsify import entropies, gate, label_log_probs, top_k
from kdclimb.train import Trainer

T, V, D = 70, 50, 12
CAP = Softcap(23.0, 5.0, 7.5)


@pytest.fixture
def sides(monkeypatch):
    """(student hidden, head), the teacher, labels, and both sides' log-probabilities (T, V); chunks of few tokens."""
    monkeypatch.setattr("kdclimb.sparsify.chunk_tokens", lambda *_: 16)
    torch.manual_seed(0)
    hidden, head, theirs, their_head = (torch.randn(n, D) for n in (T, V, T, V))
    labels = torch.randint(V, (T,))
    return hidden, head, DenseTeacher(theirs, their_head, CAP), labels, logits(hidden, head), logits(theirs, their_head)


def logits(hidden, head):
    return CAP.a * torch.sigmoid((hidden @ head.T + CAP.b) / CAP.c)


def test_top_k_is_that_of_the_whole_distribution_at_the_temperature(sides):
    *_, teacher, _, _, whole = sides
    sparse = top_k(teacher, 5, 2.0, "label")
    values, ids = (whole / 2.0).log_softmax(dim=1).topk(5)
    assert torch.equal(sparse.ids, ids.int()) and sparse.tail == "label"
    torch.testing.assert_close(sparse.log_probs, values)


def test_top_k_of_all_words_is_the_dense_loss(sides):
    hidden, head, teacher, labels, *_ = sides
    options = {"soft_weight": 1.0, "hard_weight": 0.0, "temperature": 2.0, "student_softcap": CAP}
    dense, sparse = (
        distill_loss(hidden, head, target, labels, **options).soft
        for target in (teacher, top_k(teacher, 1000, 2.0, "ghost"))
    )
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-6)


def test_label_log_probs_and_entropies(sides):
    hidden, head, _, labels, ours, _ = sides
    log_probs = ours.log_softmax(dim=1)
    torch.testing.assert_close(label_log_probs(hidden, head, CAP, labels), log_probs[torch.arange(T), labels])
    torch.testing.assert_close(entropies(hidden, head, CAP), -(log_probs.exp() * log_probs).sum(dim=1))


def test_teacher_better_is_where_the_label_is_likelier_to_the_teacher(sides):
    hidden, head, teacher, labels, ours, theirs = sides
    ours, theirs = (x.log_softmax(dim=1)[torch.arange(T), labels] for x in (ours, theirs))
    kept = gate("teacher_better", 0.1, 1.0, hidden, head, CAP, teacher, labels)
    assert torch.equal(kept, theirs > ours) and 0 < kept.sum() < T
    sparse = top_k(teacher, 5, 1.0, "ghost")
    held = (sparse.ids == labels[:, None]).any(dim=1)
    kept = gate("teacher_better", 0.1, 1.0, hidden, head, CAP, sparse, labels)
    assert torch.equal(kept, held & (theirs > ours)) and 0 < kept.sum() < held.sum() < T
    nothing = SparseTeacher(sparse.ids, log_probs=torch.full_like(sparse.log_probs, -torch.inf))
    assert not gate("teacher_better", 0.1, 1.0, hidden, head, CAP, nothing, labels).any()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_teacher_better_compares_both_at_one_temperature(sides, temperature):
    hidden, head, teacher, labels, *logits = sides
    ours, theirs = ((x / temperature).log_softmax(dim=1)[torch.arange(T), labels] for x in logits)
    whole = top_k(teacher, len(head), temperature, "ghost")
    for target in (teacher, whole):
        kept = gate("teacher_better", 0.1, temperature, hidden, head, CAP, target, labels)
        assert torch.equal(kept, theirs > ours)
    himself = DenseTeacher(hidden, head, CAP)
    assert not gate("teacher_better", 0.1, temperature, hidden, head, CAP, himself, labels).any()


def test_student_entropy_keeps_the_share_that_is_least_certain(sides):
    hidden, head, teacher, labels, *_ = sides
    kept = gate("student_entropy", 0.3, 1.0, hidden, head, CAP, teacher, labels)
    entropy = entropies(hidden, head, CAP)
    assert kept.sum() == round(0.3 * T) and entropy[kept].min() > entropy[~kept].max()
    assert gate("none", 0.3, 1.0, hidden, head, CAP, teacher, labels) is None


def first_steps(config, dataset, teacher_folder, **changes):
    config = dataclasses.replace(config, kd=dataclasses.replace(config.kd, **changes))
    trainer = Trainer(config, dataset, teacher_folder, "reference")
    return [trainer.train_step() for _ in range(3)]


@pytest.fixture(scope="module")
def first(tiny_runs, manifest, teacher_folder):
    config = next(run.config for run in tiny_runs if run.arm == "kd")
    return lambda **changes: first_steps(config, Dataset(manifest), teacher_folder, **changes)


def test_a_gate_is_in_the_loss_and_in_its_column(first):
    plain, better, unsure = first(), first(token_gate="teacher_better"), first(token_gate="student_entropy")
    assert all("kd_kept" not in row for row in plain)
    assert all(0.0 < row["kd_kept"] < 1.0 for row in better)
    assert all(row["kd_kept"] == pytest.approx(0.5, abs=0.02) for row in unsure[1:])
    assert len({rows[1]["loss_soft"] for rows in (plain, better, unsure)}) == 3
    assert len({rows[0]["loss_hard"] for rows in (plain, better, unsure)}) == 1


def test_top_k_of_a_neural_teacher_in_a_run(first):
    plain, whole, few = first(), first(top_k=10_000), first(top_k=8)
    for name in ("loss_soft", "loss_hard", "grad_norm"):
        assert [row[name] for row in whole] == pytest.approx([row[name] for row in plain], rel=1e-3)
    assert all(row["loss_soft"] < 0.98 * dense["loss_soft"] for row, dense in zip(few, plain, strict=True))
