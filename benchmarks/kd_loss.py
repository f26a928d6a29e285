"""The KD loss beside its peers: forward and backward from hidden states, on one GPU, in one process, interleaved.

python benchmarks/kd_loss.py --tokens 49152 --vocab 50304 --width 768 --out results/bench

Every arm starts from the same bf16 hidden states and heads. Times and memory hold forward and backward; memory is the
peak above the inputs. Errors are relative, in the Frobenius norm, against float64 of what that arm means to compute:
where a peer knows no softcap, the loss without one. A peer that is not installed is named and left out.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Rows, extra_gib, interleaved
from kdclimb.kernels import DenseTeacher, Softcap, SparseTeacher, distill_loss

CAP = Softcap(23.0, 5.0, 7.5)
GAP = 1.0  # standard deviation of teacher logits less student logits
LOGIT_STD = 2.2
CHUNK = 4096  # of the peers that let it be chosen


@dataclass
class Problem:
    hidden: torch.Tensor
    head: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_head: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def make(cls, tokens: int, vocab: int, width: int) -> Problem:
        def normal(*shape, std=1.0):
            return (torch.randn(*shape, device="cuda") * std).bfloat16()

        torch.manual_seed(0)
        hidden, head = normal(tokens, width), normal(vocab, width, std=LOGIT_STD / width**0.5)
        teacher_head = head + normal(vocab, width, std=GAP / width**0.5)
        labels = torch.randint(0, vocab, (tokens,), device="cuda")
        return cls(
            hidden.requires_grad_(), head.requires_grad_(), hidden.detach().clone(), teacher_head.detach(), labels
        )

    def clear(self) -> None:
        self.hidden.grad = self.head.grad = None


# ---- arms -------------------------------------------------------------------------------------------
# Each takes a Problem and gives a function without arguments that returns the loss to call backward on.


def ours(problem: Problem, kind="kd", **options):
    target, soft_weight = None, 0.5
    if kind == "kd":
        target = DenseTeacher(problem.teacher_hidden, problem.teacher_head, CAP)
    elif kind == "ce":
        soft_weight = 0.0
    else:
        target = sparse_target(problem, kind)

    def call():
        return distill_loss(
            problem.hidden,
            problem.head,
            target,
            problem.labels,
            hard_weight=0.5 if soft_weight else 1.0,
            soft_weight=soft_weight,
            student_softcap=CAP,
            implementation="triton",
            **options,
        ).total

    return call


def sparse_target(problem: Problem, kind: str) -> SparseTeacher:
    """The teacher's 64 likeliest words, or 50 draws from it in 16 places (rarer ones dropped, as a cache would)."""
    values, ids = [], []
    for rows in torch.arange(len(problem.labels), device="cuda").split(4096):
        logits = capped(problem.teacher_hidden[rows] @ problem.teacher_head.T)
        if kind == "top64":
            top = torch.log_softmax(logits, dim=-1).topk(64)
            values.append(top.values)
            ids.append(top.indices)
        else:
            drawn = torch.multinomial(torch.softmax(logits, dim=-1), 50, replacement=True)
            counts = torch.zeros_like(logits).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=logits.dtype))
            top = counts.topk(16)
            values.append(top.values)
            ids.append(top.indices)
    ids, values = torch.cat(ids), torch.cat(values)
    return SparseTeacher(ids, log_probs=values) if kind == "top64" else SparseTeacher(ids, counts=values)


def capped(logits):
    return CAP.a * torch.sigmoid((logits.float() + CAP.b) / CAP.c)


def plain(hidden, head, teacher_hidden, teacher_head, labels):
    """Sums over the tokens of CE and KL in plain PyTorch, on softcapped fp32 logits from bf16 products."""
    student, teacher = capped(hidden @ head.T), capped(teacher_hidden @ teacher_head.T)
    kl = F.kl_div(F.log_softmax(student, -1), F.log_softmax(teacher, -1), log_target=True, reduction="sum")
    return 0.5 * F.cross_entropy(student, labels, reduction="sum") + 0.5 * kl


def plain_ce(hidden, head, labels):
    return F.cross_entropy(capped(hidden @ head.T), labels)


def compiled(problem: Problem):
    function = torch.compile(plain, dynamic=False)
    inputs = (problem.hidden, problem.head, problem.teacher_hidden, problem.teacher_head, problem.labels)
    return lambda: function(*inputs) / len(problem.labels)


def checkpointed(problem: Problem):
    function = torch.compile(plain, dynamic=False)

    def call():
        total = 0.0
        for rows in torch.arange(len(problem.labels), device="cuda").split(CHUNK):
            part = slice(int(rows[0]), int(rows[0]) + len(rows))
            inputs = (problem.hidden[part], problem.head, problem.teacher_hidden[part], problem.teacher_head)
            total = total + checkpoint(function, *inputs, problem.labels[part], use_reentrant=False)
        return total / len(problem.labels)

    return call


def compiled_ce(problem: Problem):
    function = torch.compile(plain_ce, dynamic=False)
    return lambda: function(problem.hidden, problem.head, problem.labels)


def liger_jsd(problem: Problem):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    soft, hard = LigerFusedLinearJSD(jsd_beta=0.0), LigerFusedLinearCrossEntropyLoss()

    def call():
        kl = soft(problem.hidden, problem.head, problem.teacher_hidden, problem.teacher_head, None)
        return 0.5 * hard(problem.head, problem.hidden, problem.labels) + 0.5 * kl

    return call


def liger_loss():
    """Liger's chunked CE + KL, half of each: a function of hidden states, head, the teacher's two, and labels."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.0, compiled=True, chunk_size=CHUNK
    )

    def call(*inputs):
        out = loss(*inputs)
        return out[0] if isinstance(out, tuple) else out

    return call


def liger_chunked(problem: Problem):
    call = liger_loss()
    return lambda: call(problem.hidden, problem.head, problem.teacher_hidden, problem.teacher_head, problem.labels)


def liger_ce(problem: Problem):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda: loss(problem.head, problem.hidden, problem.labels)


def fla_kl(problem: Problem):
    from fla.modules import FusedKLDivLoss

    loss = FusedKLDivLoss()
    return lambda: loss(problem.hidden, problem.teacher_hidden, problem.head, problem.teacher_head)


def quack_ce(problem: Problem):
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda: chunked_linear_cross_entropy(problem.hidden, problem.head, problem.labels, chunk_size=CHUNK)


@dataclass(frozen=True)
class Arm:
    """How an arm is called, what of the loss it computes, and whether with the softcap."""

    name: str
    package: str
    make: object
    case: dict
    hard: float = 0.5
    soft: float = 0.5
    capped: bool = True

    @property
    def label(self) -> str:
        return self.name + "".join(f" {key}={value}" for key, value in self.case.items())


ARMS = [
    Arm("kdclimb", "", ours, {"loss": "kd", "logits_mib": 1600}),
    Arm("kdclimb", "", lambda p: ours(p, logits_mib=824), {"loss": "kd", "logits_mib": 824}),
    Arm("kdclimb", "", lambda p: ours(p, head_dtype="fp8"), {"loss": "kd", "head": "fp8"}),
    Arm("kdclimb", "", lambda p: ours(p, "top64"), {"loss": "top64"}),
    Arm("kdclimb", "", lambda p: ours(p, "sampled"), {"loss": "sampled"}),
    Arm("kdclimb", "", lambda p: ours(p, "ce"), {"loss": "ce"}, hard=1.0, soft=0.0),
    Arm("torch.compile", "torch", compiled, {"loss": "kd"}),
    Arm("checkpointed chunks", "torch", checkpointed, {"loss": "kd", "chunk": CHUNK}),
    Arm("liger jsd + flce", "liger-kernel", liger_jsd, {"loss": "kd"}, capped=False),
    Arm("liger chunked", "liger-kernel", liger_chunked, {"loss": "kd", "chunk": CHUNK}, capped=False),
    Arm("fla kl", "fla-core", fla_kl, {"loss": "kl"}, hard=0.0, soft=1.0, capped=False),
    Arm("torch.compile", "torch", compiled_ce, {"loss": "ce"}, hard=1.0, soft=0.0),
    Arm("liger flce", "liger-kernel", liger_ce, {"loss": "ce"}, hard=1.0, soft=0.0, capped=False),
    Arm("quack", "quack-kernels", quack_ce, {"loss": "ce", "chunk": CHUNK}, hard=1.0, soft=0.0, capped=False),
]


# ---- measuring --------------------------------------------------------------------------------------


def four_products(problem: Problem, chunk: int):
    """cuBLAS's time for the four matrix products of exact KD, at a chunk size: the floor of any unfused method."""
    hidden, head = problem.hidden.detach(), problem.head.detach()
    logits = torch.empty(min(chunk, len(hidden)), len(head), device="cuda", dtype=torch.bfloat16)
    dh, dw = torch.empty_like(hidden), torch.zeros(head.shape, device="cuda")
    # gradients as they are: most of them tiny, which costs less power than random logits
    grad = torch.softmax(hidden[: len(logits)].float() @ head.float().T, dim=-1).bfloat16()

    def call():
        for start in range(0, len(hidden), chunk):
            rows = slice(start, min(start + chunk, len(hidden)))
            size = rows.stop - start
            torch.mm(hidden[rows], head.T, out=logits[:size])
            torch.mm(problem.teacher_hidden[rows], problem.teacher_head.T, out=logits[:size])
            torch.mm(grad[:size], head, out=dh[rows])
            torch.addmm(dw, grad[:size].T, hidden[rows], out_dtype=torch.float32, out=dw)

    return call


def truth(problem: Problem, arm: Arm) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients in float64, by the chunked torch implementation, which the tests hold to plain autograd."""
    hidden, head = (t.detach().double().requires_grad_() for t in (problem.hidden, problem.head))
    cap = CAP if arm.capped else None
    target = DenseTeacher(problem.teacher_hidden.double(), problem.teacher_head.double(), cap)
    options = {"hard_weight": arm.hard, "soft_weight": arm.soft, "student_softcap": cap, "logits_mib": 2048}
    distill_loss(hidden, head, target, problem.labels, implementation="torch", **options).total.backward()
    return hidden.grad.float(), head.grad.float()


def error(value: torch.Tensor, true: torch.Tensor) -> float:
    return ((value.float() - true).norm() / true.norm()).item()


def measure(rows: Rows, tokens: int, vocab: int, width: int, rounds: int, chosen: list[str]) -> None:
    problem = Problem.make(tokens, vocab, width)
    shape = {"T": tokens, "V": vocab, "d": width, "dtype": "bf16"}
    calls, memory, truths, errors = {}, {}, {}, {}
    for arm in ARMS:
        if chosen and not any(word in arm.label for word in chosen):
            continue
        try:
            loss = arm.make(problem)

            def call(loss=loss):
                problem.clear()
                loss().backward()

            for _ in range(3):
                call()
            problem.clear()
            memory[arm.label] = extra_gib(call)
        except (ImportError, PackageNotFoundError) as missing:
            print(f"{arm.label}: not installed ({missing})", flush=True)
            continue
        except Exception as failure:  # a peer's failure is a finding, not the end
            problem.clear()
            torch.cuda.empty_cache()
            print(f"{arm.label}: failed ({type(failure).__name__}: {str(failure)[:200]})", flush=True)
            continue
        key = (arm.hard, arm.soft, arm.capped)
        if arm.case["loss"] not in ("top64", "sampled"):
            if key not in truths:
                truths[key] = truth(problem, arm)
            call()
            errors[arm.label] = [error(t.grad, true) for t, true in zip((problem.hidden, problem.head), truths[key])]
        calls[arm.label] = call
        problem.clear()
        torch.cuda.empty_cache()
    truths.clear()
    chunk = min(tokens, 8192)
    calls["gemm4"] = four_products(problem, chunk)
    calls["gemm4"]()
    times = interleaved(calls, rounds)
    rows.add("cublas", shape | {"loss": "gemm4", "chunk": chunk}, ms=times["gemm4"])
    for arm in ARMS:
        if arm.label in calls:
            name = f"{arm.name} {version(arm.package)}" if arm.package else arm.name
            metrics = {
                "ms": times[arm.label],
                "extra_gib": memory[arm.label],
                "ratio_to_gemm4": times[arm.label] / times["gemm4"],
            }
            if arm.label in errors:
                metrics |= dict(zip(("rel_err_dh", "rel_err_dw"), errors[arm.label]))
            rows.add(name, shape | arm.case | {"softcap": "sigmoid" if arm.capped else "none"}, **metrics)


def plot(rows: Rows, path: Path) -> None:
    """Times of all arms at the first shape, with their memory; the dashed line is the four matrix products."""
    import matplotlib.pyplot as plt

    values: dict[tuple, dict] = {}
    for row in rows.rows:
        values.setdefault((row["arm"], row["case"]), {})[row["metric"]] = float(row["value"])
    shape = _part(rows.rows[0]["case"], "T", "V", "d")
    here = {key: metrics for key, metrics in values.items() if _part(key[1], "T", "V", "d") == shape}
    floor = next(metrics["ms"] for (arm, _), metrics in here.items() if arm == "cublas")
    bars = sorted(((m["ms"], m["extra_gib"], *key) for key, m in here.items() if "extra_gib" in m), reverse=True)
    figure, axis = plt.subplots(figsize=(9, 0.36 * len(bars) + 1.2))
    for place, (ms, gib, *_) in enumerate(bars):
        axis.barh(place, ms, color="tab:green" if bars[place][2] == "kdclimb" else "tab:grey")
        axis.text(ms, place, f" {ms:.1f} ms, {gib:.2f} GiB", va="center", fontsize=8)
    axis.axvline(floor, color="black", linestyle="--", linewidth=0.8)
    names = [f"{arm}: {_part(case, 'loss', 'head', 'logits_mib', 'softcap')}" for *_, arm, case in bars]
    axis.set_yticks(range(len(bars)), names, fontsize=8)
    axis.set(title=f"forward and backward, {shape}", xlabel="ms")
    axis.set_xlim(right=1.25 * bars[0][0])
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _part(case: str, *keys: str) -> str:
    return " ".join(part for part in case.split(";") if part.split("=")[0] in keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[49152])
    parser.add_argument("--vocab", type=int, nargs="+", default=[50304])
    parser.add_argument("--width", type=int, nargs="+", default=[768])
    parser.add_argument("--rounds", type=int, default=7, help="timings of each arm, whose median counts")
    parser.add_argument(
        "--arms", nargs="+", default=[], metavar="WORD", help="only arms whose label holds one of these"
    )
    parser.add_argument("--commit", help="for the CSV, where there is no git")
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="folder of kd_loss.csv and kd_loss.png")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("an NVIDIA GPU is needed: on a CPU these times mean nothing")
    rows = Rows("kd_loss", args.commit)
    for tokens, vocab, width in itertools.product(args.tokens, args.vocab, args.width):
        measure(rows, tokens, vocab, width, args.rounds, args.arms)
        torch._dynamo.reset()
        rows.write(args.out / "kd_loss.csv")
    plot(rows, args.out / "kd_loss.png")
    print(f"written: {args.out}/kd_loss.csv, {args.out}/kd_loss.png")


if __name__ == "__main__":
    main()
