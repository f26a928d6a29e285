"""distill_loss against a float64 truth, and the properties that no reference can share a mistake with.

The Triton kernels run here in triton's interpreter (see tests/conftest.py), on few tokens and words.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from kdclimb.kernels import DenseTeacher, DynamicNorm, Softcap, SparseTeacher, distill_loss, fused
from kdclimb.kernels.chunked import LOGITS_MIB, chunk_tokens
from kdclimb.kernels.reference import cap as apply_cap

# the interpreter's numpy speaks up about lanes that a mask drops
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
SIGMOID, TANH = Softcap(23.0, 5.0, 7.5), Softcap.tanh(12.0)
TARGETS = ["dense", "ghost", "label", "renormalised", "counts", None]
MTP = [1.0, 0.5, 0.25]
ENTRIES = 5


class Case:
    """One random problem, whose values bf16 can hold, so that only the arithmetic differs between dtypes."""

    def __init__(
        self, tokens=24, vocab=301, d=16, d_teacher=24, cap=SIGMOID, kind="dense", scale=0.3, gap=None, seed=0
    ):
        self.generator = torch.Generator().manual_seed(seed)
        self.kind, self.cap = kind, cap
        self.hidden, self.head = self.normal(tokens, d), self.normal(vocab, d, scale=scale)
        if gap is None:
            self.teacher = self.normal(tokens, d_teacher), self.normal(vocab, d_teacher, scale=scale)
        else:
            self.teacher = self.hidden, (self.head + gap / d**0.5 * self.normal(vocab, d)).bfloat16().double()
        self.labels = torch.randint(0, vocab, (tokens,), generator=self.generator)
        self.labels[1::7] = -100
        ids = torch.stack([torch.randperm(vocab, generator=self.generator)[:ENTRIES] for _ in range(tokens)])
        fresh = ~(ids == self.labels[:, None]).any(dim=1) & (self.labels >= 0)
        ids[fresh & (torch.arange(tokens) % 2 == 0), 0] = self.labels[fresh & (torch.arange(tokens) % 2 == 0)]
        self.ids = ids
        self.log_probs = torch.log_softmax(2 * self.normal(tokens, ENTRIES + 3), dim=1)[:, :ENTRIES]
        self.counts = torch.randint(0, 9, (tokens, ENTRIES), generator=self.generator)
        self.counts[:, 0] += 1

    def normal(self, *shape, scale=1.0):
        values = scale * torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return values.bfloat16().double()

    def target(self, dtype):
        if self.kind is None:
            return None
        if self.kind == "dense":
            return DenseTeacher(self.teacher[0].to(dtype), self.teacher[1].to(dtype), self.cap)
        if self.kind == "counts":
            return SparseTeacher(self.ids, counts=self.counts)
        return SparseTeacher(self.ids, log_probs=self.log_probs, tail=self.kind)

    def run(self, implementation, dtype=torch.float64, upstream=3.0, **options):
        """(loss, dh, dw) with gradients in float64."""
        hidden, head = (t.to(dtype).clone().requires_grad_() for t in (self.hidden, self.head))
        options = {"hard_weight": 0.4, "soft_weight": 0.6 if self.kind else 0.0, "student_softcap": self.cap} | options
        loss = distill_loss(hidden, head, self.target(dtype), self.labels, implementation=implementation, **options)
        (upstream * loss.total).backward()
        return loss, hidden.grad.double(), head.grad.double()

    def plain(self, **options):
        """(dh, dw) of plain PyTorch: bf16 operands, fp32 logits, bf16 gradients of the logits."""
        hidden, head = (t.bfloat16().requires_grad_() for t in (self.hidden, self.head))
        logits = (hidden.detach().float() @ head.detach().float().T).requires_grad_()
        eye = torch.eye(len(self.head), dtype=torch.float32)
        target = self.target(torch.float32)
        options = {"hard_weight": 0.4, "soft_weight": 0.6 if self.kind else 0.0, "student_softcap": self.cap} | options
        loss = distill_loss(logits, eye, target, self.labels, implementation="reference", **options)
        (3.0 * loss.total).backward()
        grad = logits.grad.bfloat16()
        return (grad @ head).double(), (grad.T @ hidden).double()


def relative(value, truth):
    return ((value - truth).norm() / truth.norm()).item()


# ---- against the float64 truth ------------------------------------------------------------------

CASES = [
    dict(kind=kind, cap=cap, temperature=temperature)
    for kind, cap, temperature in [
        *itertools.product(["dense"], [None, SIGMOID, TANH], [1.0, 2.0, 3.5]),
        *itertools.product(["ghost", "label", "renormalised", "counts"], [None, SIGMOID], [1.0, 2.0]),
        *itertools.product([None], [None, SIGMOID], [1.0]),
    ]
]


@pytest.mark.parametrize("mtp", [None, MTP], ids=["one label", "mtp"])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_torch_equals_autograd_in_float64(options, mtp):
    case = Case(tokens=70, kind=options["kind"], cap=options["cap"])
    options = {"temperature": options["temperature"], "mtp_weights": mtp, "norm": DynamicNorm(0.05, 20.0, "exact")}
    truth, truth_dh, truth_dw = case.run("reference", **options)
    loss, dh, dw = case.run("torch", logits_mib=0, **options)  # 64 tokens a chunk, and a ragged one
    for name in ("total", "hard", "soft", "norm_factor"):
        torch.testing.assert_close(getattr(loss, name), getattr(truth, name), rtol=1e-7, atol=1e-8)
    # sparse probabilities are fp32 on both sides; a dense teacher's are not
    tolerance = 1e-11 if case.kind == "dense" else 1e-6
    assert relative(dh, truth_dh) < tolerance and relative(dw, truth_dw) < tolerance


@pytest.mark.parametrize("options", CASES, ids=str)
def test_triton_is_as_exact_as_plain_pytorch(options):
    case = Case(kind=options["kind"], cap=options["cap"])
    given = {"temperature": options["temperature"]}
    loss, dh, dw = case.run("triton", torch.bfloat16, **given)
    truth, truth_dh, truth_dw = case.run("reference", **given)
    assert loss.implementation == "triton"
    assert loss.hard.item() == pytest.approx(truth.hard.item(), rel=1e-5)
    # 24 tokens: a token's own rounding of 1e-4 is not averaged away yet
    assert loss.soft.item() == pytest.approx(truth.soft.item(), rel=2e-5, abs=2e-5)
    if case.kind in ("dense", None):
        for mine, plain, true in zip((dh, dw), case.plain(**given), (truth_dh, truth_dw)):
            assert relative(mine, true) <= 3 * relative(plain, true)
    assert relative(dh, truth_dh) < 7e-3 and relative(dw, truth_dw) < 7e-3


@pytest.mark.parametrize("cap", [None, SIGMOID])
def test_triton_stays_exact_where_student_and_teacher_nearly_agree(cap):
    case = Case(tokens=64, vocab=1000, d=64, cap=cap, gap=0.1)
    given = {"hard_weight": 0.0, "soft_weight": 1.0}
    loss, *gradients = case.run("triton", torch.bfloat16, **given)
    truth, *true_gradients = case.run("reference", **given)
    assert loss.soft.item() == pytest.approx(truth.soft.item(), rel=1e-5, abs=2e-6)
    # 16-bit logits of bf16's kind are more than 10 times further off
    for mine, plain, true in zip(gradients, case.plain(**given), true_gradients):
        assert relative(mine, true) <= 3 * relative(plain, true)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (Case(tokens=1), {}),
        (Case(vocab=128), {}),
        (Case(tokens=40, vocab=2048, d=40), {"mtp_weights": MTP}),
        (Case(tokens=33), {"token_stride": 3}),
        (Case(tokens=33, kind="ghost"), {"soft_mask": torch.arange(33) % 4 == 1}),
        (Case(tokens=33), {"soft_mask": torch.zeros(33, dtype=torch.bool)}),
        (Case(tokens=33), {"soft_mask": torch.arange(33) % 3 == 1, "norm": DynamicNorm(0.05, 20.0, "exact")}),
        (Case(kind="label"), {"mtp_weights": MTP}),
        (Case(), {"norm": DynamicNorm(0.05, 20.0, "exact"), "measure_share": True}),
        (Case(kind="ghost"), {"norm": DynamicNorm(0.05, 20.0, "exact"), "measure_share": True}),
        (Case(), {"norm": DynamicNorm(0.05, 20.0, "chunk")}),
        (Case(scale=20.0), {}),
        (Case(scale=20.0, cap=None), {}),
    ],
)
def test_triton_agrees_with_torch(case, options):
    if case.hidden.abs().max() and case.head.abs().max() > 30 and case.cap is None:
        tolerance = 2e-2  # logits of several hundred: 16 bits for each tile's range
    else:
        tolerance = 8e-3
    norm = options.get("norm")
    truth, truth_dh, truth_dw = case.run("torch", **options)
    if norm is not None:
        norm.factor = None
    loss, dh, dw = case.run("triton", torch.bfloat16, **options)
    assert loss.hard.item() == pytest.approx(truth.hard.item(), rel=1e-4)
    assert loss.soft.item() == pytest.approx(truth.soft.item(), rel=1e-4, abs=2e-5)
    assert loss.norm_factor.item() == pytest.approx(truth.norm_factor.item(), rel=1e-3)
    assert loss.kd_share.item() == pytest.approx(truth.kd_share.item(), rel=1e-2, nan_ok=True)
    assert relative(dh, truth_dh) < tolerance and relative(dw, truth_dw) < tolerance


def test_the_reference_passes_gradcheck():
    case = Case(tokens=4, vocab=11, d=4, kind="dense")
    inputs = [t.clone().requires_grad_() for t in (case.hidden, case.head)]

    def total(hidden, head):
        options = {"soft_weight": 0.6, "temperature": 2.0, "student_softcap": case.cap, "mtp_weights": MTP}
        return distill_loss(
            hidden, head, case.target(torch.float64), case.labels, implementation="reference", **options
        ).total

    assert torch.autograd.gradcheck(total, inputs)


# ---- properties -----------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize(
    ("implementation", "dtype"), [("torch", torch.float64), ("triton", torch.bfloat16)], ids=["torch", "triton"]
)


@BOTH
@pytest.mark.parametrize("cap", [None, SIGMOID, TANH])
def test_student_equal_to_teacher_has_no_kl_and_no_soft_gradient(implementation, dtype, cap):
    case = Case(d_teacher=16, cap=cap)
    case.teacher = case.hidden, case.head
    loss, dh, dw = case.run(implementation, dtype, hard_weight=0.0, soft_weight=1.0, temperature=2.0)
    limit = 1e-12 if dtype == torch.float64 else 2e-6
    assert abs(loss.soft.item()) < limit
    assert dh.abs().max() < limit and dw.abs().max() < limit


@BOTH
@pytest.mark.parametrize("kind", TARGETS)
def test_gradient_rows_over_the_vocabulary_sum_to_zero_without_a_cap(implementation, dtype, kind):
    # with head = identity dh is the logits' gradient, and softmax gradients sum to 0 in each row
    case = Case(tokens=20, vocab=256, d=256, d_teacher=8, cap=None, kind=kind)
    case.head = torch.eye(256, dtype=torch.float64)
    _, grad, _ = case.run(implementation, dtype, temperature=1.0)
    size = grad.abs().sum(dim=1)
    assert size.max() > 1e-3
    # counts and renormalised entries have fp32 probabilities; bf16 gradients are rounded one by one
    limit = 3e-3 if dtype == torch.bfloat16 else 1e-6 if kind not in ("dense", None) else 1e-13
    assert (grad.sum(dim=1).abs() <= limit * size.clamp_min(1e-30)).all()


@BOTH
def test_all_tokens_ignored_gives_zero_and_zero_gradient(implementation, dtype):
    for kind in TARGETS:
        case = Case(kind=kind)
        case.labels[:] = -100
        loss, dh, dw = case.run(implementation, dtype)
        assert loss.total.item() == loss.hard.item() == loss.soft.item() == 0.0
        assert dh.abs().max() == 0 and dw.abs().max() == 0


@BOTH
def test_gradients_scale_with_what_comes_from_above(implementation, dtype):
    case = Case()
    once, twice = case.run(implementation, dtype, upstream=1.0), case.run(implementation, dtype, upstream=2.0)
    assert all(torch.equal(2 * a, b) for a, b in zip(once[1:], twice[1:]))


def test_temperature_squared_keeps_the_soft_gradient_at_high_temperature():
    # for large T the gradient of T^2 KL tends to the centred logit difference over V, whatever T
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(20, 301, generator=generator, dtype=torch.float64) for _ in range(2))
    eye = torch.eye(301, dtype=torch.float64)
    difference = logits - teacher
    expected = (difference - difference.mean(dim=1, keepdim=True)) / 301 / 20
    for temperature in (300.0, 3000.0):
        hidden = logits.clone().requires_grad_()
        loss = distill_loss(
            hidden,
            eye,
            DenseTeacher(teacher, eye, None),
            torch.arange(20),
            hard_weight=0.0,
            soft_weight=1.0,
            temperature=temperature,
        )
        loss.total.backward()
        torch.testing.assert_close(hidden.grad, expected, rtol=3e-2, atol=1e-6)


def test_a_hand_worked_value():
    # one token, two words: logits (log 3, 0) give p = (3/4, 1/4); the teacher has q = (1/2, 1/2)
    eye = torch.eye(2, dtype=torch.float64)
    logits = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    target = DenseTeacher(torch.zeros_like(logits), eye, None)
    loss = distill_loss(logits, eye, target, torch.tensor([0]), hard_weight=1.0, soft_weight=1.0)
    assert loss.hard.item() == pytest.approx(math.log(4 / 3))
    assert loss.soft.item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert loss.total.item() == pytest.approx(loss.hard.item() + loss.soft.item())


def test_kl_sees_the_capped_logits():
    case = Case(tokens=33)
    loss, *_ = case.run("torch", hard_weight=0.0, soft_weight=1.0)
    kept = case.labels != -100

    def log_softmax(hidden, head):
        return F.log_softmax(23 * torch.sigmoid((hidden @ head.T + 5) / 7.5), dim=-1)[kept]

    student, teacher = log_softmax(case.hidden, case.head), log_softmax(*case.teacher)
    expected = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    assert loss.soft.item() == pytest.approx(expected.item(), rel=1e-12)


def test_tanh_cap_is_the_tanh():
    logits = torch.linspace(-40, 40, 50, dtype=torch.float64)
    torch.testing.assert_close(apply_cap(logits, TANH), 12.0 * torch.tanh(logits / 12.0))


def test_sampled_targets_have_the_exact_gradient_on_average():
    case = Case(tokens=6, vocab=40, d_teacher=16)
    exact = case.run("torch", hard_weight=0.0, soft_weight=1.0)[1]
    probs = torch.softmax(apply_cap(case.teacher[0] @ case.teacher[1].T, case.cap), dim=-1)
    every_word = torch.arange(40).expand(6, 40).contiguous()
    total, draws = torch.zeros_like(exact), 400
    generator = torch.Generator().manual_seed(1)
    for _ in range(draws):
        drawn = torch.multinomial(probs, 12, replacement=True, generator=generator)
        case.kind, case.ids, case.counts = "counts", every_word, F.one_hot(drawn, 40).sum(dim=1)
        total += case.run("torch", hard_weight=0.0, soft_weight=1.0)[1]
    single = case.run("torch", hard_weight=0.0, soft_weight=1.0)[1]
    assert relative(total / draws, exact) < 3 * relative(single, exact) / draws**0.5


def test_ghost_and_full_support_meet_the_exact_loss():
    # with all words among the entries nothing is left for a tail, and the sparse loss is the dense one
    case = Case(tokens=12, vocab=60)
    dense = case.run("torch", temperature=2.0)
    case.ids = torch.arange(60).expand(12, 60).contiguous()
    case.log_probs = torch.log_softmax(apply_cap(case.teacher[0] @ case.teacher[1].T, case.cap) / 2.0, dim=-1)
    for case.kind in ("ghost", "label", "renormalised"):
        sparse = case.run("torch", temperature=2.0)
        assert sparse[0].soft.item() == pytest.approx(dense[0].soft.item(), rel=1e-4)
        assert relative(sparse[1], dense[1]) < 1e-4


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_a_student_that_is_sure_of_the_entries_keeps_a_finite_ghost(implementation):
    """In fp32 one less what the entries have is 0 or noise, below what the student leaves to all other words."""
    logits = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    logits[:, :ENTRIES] += 22.0
    logits = logits.bfloat16()
    log_probs = torch.full((8, ENTRIES), math.log(0.999 / ENTRIES))
    found = {}
    dtypes = {"reference": torch.float64, "torch": torch.float32, "triton": torch.bfloat16}
    for with_ in ("reference", implementation):
        dtype = dtypes[with_]
        hidden = torch.eye(8, 16, dtype=dtype).requires_grad_()
        head = torch.cat([logits.T, torch.zeros(64, 8)], dim=1).to(dtype)
        target = SparseTeacher(torch.arange(ENTRIES).repeat(8, 1), log_probs=log_probs)
        options = {"hard_weight": 0.0, "soft_weight": 1.0, "implementation": with_}
        loss = distill_loss(hidden, head, target, torch.zeros(8, dtype=torch.long), **options)
        loss.total.backward()
        found[with_] = loss.soft.item(), hidden.grad
    (truth, gradient), (soft, fast) = found["reference"], found[implementation]
    assert soft == pytest.approx(truth, rel=0.1)
    atol = (
        1e-4 if implementation == "torch" else 1e-2
    )  # sums of logits near 22, each times what bf16 holds of a probability
    torch.testing.assert_close(fast.double(), gradient, rtol=1e-2, atol=atol)


def test_multi_token_weights_reach_ahead_and_stop_at_the_end():
    eye, logits = torch.eye(5, dtype=torch.float64), torch.zeros(3, 5, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2])
    loss = distill_loss(logits, eye, None, labels, mtp_weights=[1.0, 0.5])
    assert loss.hard.item() == pytest.approx(math.log(5) * (3 * 1.0 + 2 * 0.5) / 3)


# ---- normalisation ----------------------------------------------------------------------------------


def test_lagged_norm_uses_the_call_before_and_is_bounded():
    case = Case(tokens=60, cap=None)
    norm = DynamicNorm(floor=1e-6, largest=1e9)
    first = case.run("torch", norm=norm)[0]
    assert first.norm_factor.item() == 1.0
    assert norm.factor.item() == pytest.approx((first.hard / first.soft).item())
    second = case.run("torch", norm=norm)[0]
    assert second.norm_factor.item() == pytest.approx((first.hard / first.soft).item())
    assert second.total.item() == pytest.approx(second.hard.item())  # both parts are as large as the hard loss
    case.teacher = case.hidden, case.head
    bounded = DynamicNorm(floor=0.05, largest=20.0)
    case.run("torch", norm=bounded)
    assert case.run("torch", norm=bounded)[0].norm_factor.item() == 20.0


@pytest.mark.parametrize("mode", ["exact", "chunk"])
def test_exact_and_chunk_norm_use_their_own_ratio(mode):
    case = Case(tokens=60)
    loss = case.run("torch", norm=DynamicNorm(1e-6, 1e9, mode))[0]
    assert loss.norm_factor.item() == pytest.approx((loss.hard / loss.soft).item())


def test_chunk_norm_scales_each_chunk_by_itself():
    case = Case(tokens=128)
    case.labels[:] = 1
    halves = [slice(0, 64), slice(64, 128)]
    loss, dh, _ = case.run("torch", norm=DynamicNorm(1e-6, 1e9, "chunk"), logits_mib=0)
    hidden, teacher = case.hidden, case.teacher
    for half in halves:
        case.hidden, case.teacher, case.labels = hidden[half], (teacher[0][half], teacher[1]), torch.ones(64).long()
        alone = case.run("torch", norm=DynamicNorm(1e-6, 1e9, "exact"))
        torch.testing.assert_close(dh[half], alone[1] / 2)  # half of the tokens, in a mean over all
    assert loss.norm_factor.item() > 0


@BOTH
def test_kd_share_is_the_gradients_share_at_the_hidden_states(implementation, dtype):
    case = Case(tokens=30)
    share = case.run(implementation, dtype, measure_share=True)[0].kd_share.item()
    hard = case.run(implementation, dtype, soft_weight=0.0)[1].norm()
    soft = case.run(implementation, dtype, hard_weight=0.0)[1].norm()
    assert share == pytest.approx((soft / (soft + hard)).item(), rel=1e-2)
    assert math.isnan(case.run(implementation, dtype)[0].kd_share.item())


# ---- the operator -------------------------------------------------------------------------------------


@BOTH
def test_it_compiles_without_a_graph_break(implementation, dtype):
    case = Case()

    def total(hidden, head):
        target = case.target(dtype)
        options = {"soft_weight": 0.6, "student_softcap": case.cap, "mtp_weights": [1.0, 0.5]}
        return distill_loss(hidden, head, target, case.labels, implementation=implementation, **options).total

    inputs = [t.to(dtype).requires_grad_() for t in (case.hidden, case.head)]
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")(*inputs)
    compiled.backward()
    assert compiled.item() == pytest.approx(total(*inputs).item())
    assert inputs[0].grad.abs().max() > 0


def test_operands_need_not_be_contiguous():
    case = Case(tokens=20)
    straight = case.run("triton", torch.bfloat16)[1]
    case.hidden, case.head = case.hidden.T.contiguous().T, case.head.T.contiguous().T
    case.teacher = tuple(t.T.contiguous().T for t in case.teacher)
    assert torch.equal(case.run("triton", torch.bfloat16)[1], straight)


def test_without_gradients_only_losses_come_back():
    case = Case()
    truth = case.run("triton", torch.bfloat16)[0]
    with torch.no_grad():
        loss = distill_loss(
            case.hidden.bfloat16(),
            case.head.bfloat16(),
            case.target(torch.bfloat16),
            case.labels,
            hard_weight=0.4,
            soft_weight=0.6,
            student_softcap=case.cap,
            implementation="triton",
        )
    assert not loss.total.requires_grad and loss.total.item() == pytest.approx(truth.total.item(), rel=1e-6)


@pytest.mark.parametrize(("tokens", "vocab"), [(49152, 50304), (49152, 128256), (16384, 50304), (1000, 2048), (5, 7)])
def test_chunks_fit_the_memory_and_cover_the_tokens(tokens, vocab):
    for device, size in (("cuda", 2), ("cpu", 4)):
        rows = chunk_tokens(tokens, vocab, size, LOGITS_MIB[device])
        assert 1 <= rows <= tokens
        assert rows <= 64 or 2 * rows * vocab * size <= LOGITS_MIB[device] * 2**20


def test_bad_input_is_refused_by_name():
    case = Case(tokens=10)
    hidden, head, labels, target = case.hidden, case.head, case.labels, case.target(torch.float64)

    def refused(match, *, hidden=hidden, head=head, target=target, labels=labels, **options):
        with pytest.raises(ValueError, match=match):
            distill_loss(hidden, head, target, labels, **options)

    refused("not bfloat16", implementation="triton")
    refused("implementation: 'cuda'", implementation="cuda")
    refused("teacher head", target=DenseTeacher(case.teacher[0], case.teacher[1][:-1], None))
    refused("the teacher has 9 tokens", target=DenseTeacher(case.teacher[0][:-1], case.teacher[1], None))
    refused("needs a target", target=None, soft_weight=0.5)
    refused("labels is", labels=labels[:-1])
    refused("labels is torch.int32", labels=labels.int())
    refused("student_head is", head=head[:, :-1])
    refused("student_hidden is", hidden=hidden[0])
    refused("a float dtype", head=head.long())
    refused("temperature", temperature=0.0)
    refused("token_stride", token_stride=0)
    refused("soft_mask", soft_mask=torch.ones(10))
    refused("head_dtype: 'fp4'", head_dtype="fp4")
    refused("head_dtype: 'fp8' needs", head_dtype="fp8", implementation="torch")
    refused("either log_probs or counts", target=SparseTeacher(case.ids))
    refused("the teacher's ids", target=SparseTeacher(case.ids[:-1], counts=case.counts))
    entropy = torch.zeros(len(case.ids))
    refused("the teacher's entropy", target=SparseTeacher(case.ids, counts=case.counts, entropy=entropy[:-1]))
    refused("the teacher's entropy", target=SparseTeacher(case.ids, log_probs=case.log_probs, entropy=entropy))
    refused("tail: 'uniform'", target=SparseTeacher(case.ids, log_probs=case.log_probs, tail="uniform"))
    refused("has no chunks", implementation="reference", norm=DynamicNorm(0.05, 20.0, "chunk"))
    with pytest.raises(ValueError, match="norm mode: 'ema'"):
        DynamicNorm(0.05, 20.0, "ema")


def test_triton_says_why_it_cannot_run(monkeypatch):
    bf16 = [t.bfloat16() for t in (Case().hidden, Case().head)]
    assert fused.why_not(*bf16, None, SIGMOID, 1.0) is None
    assert "range" in fused.why_not(*bf16, None, Softcap.tanh(30.0), 0.5)
    assert "multiple of 8" in fused.why_not(bf16[0][:, :12], bf16[1][:, :12], None, None, 1.0)
    monkeypatch.setattr(fused, "INTERPRETED", False)
    assert "NVIDIA GPU" in fused.why_not(*bf16, None, SIGMOID, 1.0)
    monkeypatch.setattr(fused, "triton", None)
    assert "not installed" in fused.why_not(*bf16, None, SIGMOID, 1.0)
