"""distill_loss against a float64 truth, and the properties that no reference can share a bug with."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from kdclimb.kernels import DenseTeacher, DynamicNorm, Softcap, distill_loss
from kdclimb.kernels.chunked import chunk_tokens

CAP = Softcap(23.0, 5.0, 7.5)
VOCAB = 701
CHUNK = chunk_tokens(VOCAB, torch.device("cpu"))
# a ragged last chunk, a full one, one row, fewer rows than a chunk
TOKENS = [2 * CHUNK + 37, CHUNK, 1, 41]


def make(tokens, dtype=torch.float64, d=24, d_teacher=12, ignore_every=7, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, head = normal(tokens, d), 0.3 * normal(VOCAB, d)
    teacher_hidden, teacher_head = normal(tokens, d_teacher), 0.3 * normal(VOCAB, d_teacher)
    labels = torch.randint(0, VOCAB, (tokens,), generator=generator)
    labels[1::ignore_every] = -100
    tensors = (hidden.to(dtype), head.to(dtype), teacher_hidden.to(dtype), teacher_head.to(dtype))
    return *tensors, labels


def gradients(hidden, head, target, labels, *, upstream=1.0, **options):
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    loss = distill_loss(hidden, head, target, labels, **options)
    (upstream * loss.total).backward()
    return loss, hidden.grad, head.grad


@pytest.mark.parametrize(("tokens", "temperature", "cap"), list(itertools.product(TOKENS, [1.0, 2.0], [None, CAP])))
def test_chunked_equals_autograd_in_float64(tokens, temperature, cap):
    hidden, head, teacher_hidden, teacher_head, labels = make(tokens)
    results = []
    for implementation in ("torch", "reference"):
        target = DenseTeacher(teacher_hidden, teacher_head, cap)
        options = {"hard_weight": 0.4, "soft_weight": 0.6, "temperature": temperature, "student_softcap": cap}
        norm = DynamicNorm(0.05, 20.0)
        results.append(
            gradients(hidden, head, target, labels, upstream=3.0, norm=norm, implementation=implementation, **options)
        )
    (loss, dh, dw), (truth, truth_dh, truth_dw) = results
    for name in ("total", "hard", "soft", "norm_factor"):
        torch.testing.assert_close(getattr(loss, name), getattr(truth, name), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(dh, truth_dh, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(dw, truth_dw, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_error_is_at_most_three_times_plain_torchs(dtype):
    inputs = make(CHUNK + 5)
    options = {"hard_weight": 0.4, "soft_weight": 0.6, "temperature": 2.0, "student_softcap": CAP}

    def run(cast, implementation):
        *tensors, labels = inputs
        hidden, head, teacher_hidden, teacher_head = (t.to(cast) for t in tensors)
        target = DenseTeacher(teacher_hidden, teacher_head, CAP)
        return gradients(hidden, head, target, labels, implementation=implementation, **options)[1:]

    truth, plain, ours = run(torch.float64, "reference"), run(dtype, "reference"), run(dtype, "torch")
    for true, reference, mine in zip(truth, plain, ours, strict=True):
        allowed = 3 * (reference.double() - true).norm()
        assert (mine.double() - true).norm() <= allowed


def test_student_equal_to_teacher_has_no_kl_and_no_soft_gradient():
    hidden, head, *_, labels = make(CHUNK + 5)
    target = DenseTeacher(hidden, head, CAP)
    loss, dh, dw = gradients(
        hidden, head, target, labels, hard_weight=0.0, soft_weight=1.0, temperature=2.0, student_softcap=CAP
    )
    assert abs(loss.soft.item()) < 1e-12
    assert dh.abs().max() < 1e-12 and dw.abs().max() < 1e-12


def test_gradient_rows_over_the_vocabulary_sum_to_zero_without_a_cap():
    # with head = identity dh is the logits' gradient, and softmax gradients sum to 0 in each row
    logits, teacher_logits = make(50, d=VOCAB)[0], make(50, d=VOCAB, seed=1)[0]
    labels = torch.arange(50)
    eye = torch.eye(VOCAB, dtype=torch.float64)
    _, grad, _ = gradients(
        logits, eye, DenseTeacher(teacher_logits, eye, None), labels, soft_weight=0.7, temperature=2.0
    )
    assert grad.abs().max() > 1e-4
    assert grad.sum(dim=1).abs().max() < 1e-14


def test_temperature_squared_keeps_the_soft_gradient_at_high_temperature():
    # for large T the gradient of T^2 KL tends to the centred logit difference over V, whatever T
    logits, teacher_logits = make(20, d=VOCAB)[0], make(20, d=VOCAB, seed=1)[0]
    eye = torch.eye(VOCAB, dtype=torch.float64)
    difference = logits - teacher_logits
    expected = (difference - difference.mean(dim=1, keepdim=True)) / VOCAB / 20
    labels = torch.arange(20)
    target = DenseTeacher(teacher_logits, eye, None)
    for temperature in (300.0, 3000.0):
        grad = gradients(logits, eye, target, labels, hard_weight=0.0, soft_weight=1.0, temperature=temperature)[1]
        torch.testing.assert_close(grad, expected, rtol=3e-2, atol=1e-6)


def test_a_hand_worked_value():
    # one token, two words: logits (log 3, 0) give p = (3/4, 1/4); the teacher has q = (1/2, 1/2)
    eye = torch.eye(2, dtype=torch.float64)
    logits = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    target = DenseTeacher(torch.zeros_like(logits), eye, None)
    loss = distill_loss(logits, eye, target, torch.tensor([0]), hard_weight=1.0, soft_weight=1.0)
    assert loss.hard.item() == pytest.approx(math.log(4 / 3))
    assert loss.soft.item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert loss.total.item() == pytest.approx(loss.hard.item() + loss.soft.item())


def test_all_tokens_ignored_gives_zero_and_zero_gradient():
    hidden, head, teacher_hidden, teacher_head, labels = make(40)
    target = DenseTeacher(teacher_hidden, teacher_head, CAP)
    loss, dh, dw = gradients(hidden, head, target, torch.full_like(labels, -100), soft_weight=0.5, student_softcap=CAP)
    assert loss.total.item() == loss.hard.item() == loss.soft.item() == 0.0
    assert dh.abs().max() == 0 and dw.abs().max() == 0


def test_kl_sees_the_capped_logits():
    hidden, head, teacher_hidden, teacher_head, labels = make(33, ignore_every=1000)
    target = DenseTeacher(teacher_hidden, teacher_head, CAP)
    loss = distill_loss(hidden, head, target, labels, soft_weight=1.0, student_softcap=CAP)

    def log_softmax(h, w):
        return F.log_softmax(23 * torch.sigmoid((h @ w.T + 5) / 7.5), dim=-1)

    kept = labels != -100
    student, teacher = log_softmax(hidden, head)[kept], log_softmax(teacher_hidden, teacher_head)[kept]
    expected = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    assert loss.soft.item() == pytest.approx(expected.item(), rel=1e-12)


def test_dynamic_norm_is_lagged_scale_free_and_bounded():
    hidden, head, teacher_hidden, teacher_head, labels = make(60)
    target = DenseTeacher(teacher_hidden, teacher_head, None)
    options = {"hard_weight": 0.5, "soft_weight": 0.5}
    norm = DynamicNorm(floor=1e-6, largest=1e9)
    first = distill_loss(hidden, head, target, labels, norm=norm, **options)
    assert first.norm_factor.item() == pytest.approx((first.hard / first.soft).item())
    assert first.total.item() == pytest.approx(first.hard.item())  # both halves are as large as the hard loss
    second = distill_loss(0.5 * hidden, head, target, labels, norm=norm, **options)
    assert second.norm_factor.item() == first.norm_factor.item()
    assert norm.factor.item() == pytest.approx((second.hard / second.soft).item())
    close = DenseTeacher(hidden + 1e-4, head, None)
    bounded = distill_loss(hidden, head, close, labels, norm=DynamicNorm(floor=0.05, largest=20.0), **options)
    assert bounded.norm_factor.item() == 20.0


def test_kd_share_is_the_gradient_share_on_the_logits():
    logits, teacher_logits = make(30, d=VOCAB)[0], make(30, d=VOCAB, seed=1)[0]
    eye, labels = torch.eye(VOCAB, dtype=torch.float64), torch.arange(30)
    target = DenseTeacher(teacher_logits, eye, None)
    loss = gradients(logits, eye, target, labels, hard_weight=0.3, soft_weight=0.7)[0]
    hard = gradients(logits, eye, target, labels, hard_weight=0.3, soft_weight=0.0)[1].norm()
    soft = gradients(logits, eye, target, labels, hard_weight=0.0, soft_weight=0.7)[1].norm()
    assert loss.kd_share.item() == pytest.approx((soft / (soft + hard)).item())


def test_bad_input_is_refused_by_name():
    hidden, head, teacher_hidden, teacher_head, labels = make(10)
    target = DenseTeacher(teacher_hidden, teacher_head, None)
    with pytest.raises(ValueError, match="triton"):
        distill_loss(hidden, head, target, labels, implementation="triton")
    with pytest.raises(ValueError, match="teacher head"):
        distill_loss(hidden, head, DenseTeacher(teacher_hidden, teacher_head[:-1], None), labels)
    with pytest.raises(ValueError, match="needs a target"):
        distill_loss(hidden, head, None, labels, soft_weight=0.5)
    with pytest.raises(ValueError, match="labels"):
        distill_loss(hidden, head, target, labels[:-1])
    with pytest.raises(ValueError, match="temperature"):
        distill_loss(hidden, head, target, labels, temperature=0.0)
