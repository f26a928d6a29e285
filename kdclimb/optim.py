"""NorMuon for the matrices of the blocks, Adam for all else, as the speedrun's records use them.

Muon: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; its orthogonalisation here by Polar
Express (arXiv 2505.16932), its second moment by NorMuon (arXiv 2510.05491); cautious decay: arXiv 2510.12402.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from kdclimb.config import MuonConfig, OptimConfig
from kdclimb.model import COMPILE_OPTIONS, GPT

SAFETY = 1.02  # room above the largest singular value for bf16's rounding
COEFFICIENTS = {  # a, b, c of x <- a x + b (x x^T) x + c (x x^T)^2 x, one row an iteration
    # The paper's recipe for 5 iterations from singular values of 1e-3 to 1, cushion 0.02, safety 1.02; test_optim.py
    # works them out again.
    "polar_express": (
        (8.15655452, -22.48329293, 15.87876992),
        (4.04292994, -2.80891747, 0.50001785),
        (3.89166780, -2.77248415, 0.50606482),
        (3.28575366, -2.36812949, 0.46449024),
        (2.34654133, -1.70978284, 0.42323551),
    ),
    "newton_schulz": ((3.4445, -4.7750, 2.0315),) * 5,  # Muon's own
}


def orthogonalize(x: Tensor, coefficients: tuple, dtype: torch.dtype) -> Tensor:
    """(N, r, c) matrices, each with its singular values brought near 1; computed, and returned, in `dtype`."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # so that x x^T is the smaller of the two squares
    x = (x / (SAFETY * torch.linalg.matrix_norm(x, keepdim=True) + 1e-6)).to(dtype)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def normalize(update: Tensor, second: Tensor, beta2: float) -> Tensor:
    """Divide each row (column, if they are more) by its running root mean square; each matrix keeps its Frobenius norm.

    `second`, (N, r, 1) or (N, 1, c), is updated in place. Its bias needs no correction, since the norm is kept.
    """
    mean_square = update.square().mean(-1 if second.shape[-1] == 1 else -2, keepdim=True)
    second.lerp_(mean_square, 1.0 - beta2)
    scale = second.clamp_min(1e-10).rsqrt()
    scaled = (mean_square * scale.square()).sum((-2, -1), keepdim=True)
    kept = mean_square.sum((-2, -1), keepdim=True) / scaled.clamp_min(1e-10)  # a zero update stays zero
    return update * (scale * kept.sqrt())


def muon_step(
    params: list[Tensor],
    grads: list[Tensor],
    average: Tensor,
    second: Tensor | None,
    mults: Tensor,
    lr: Tensor,
    momentum: Tensor,
    decay: Tensor,
    config: OptimConfig,
    dtype: torch.dtype,
) -> None:
    """Step N matrices of one shape (r, c) as one batch, in place. It compiles whole, and never waits for the device.

    average: (N, r, c), the gradients' moving average. second: see `normalize`. mults: (N, 1, 1), each matrix's LR
    multiplier. lr, momentum, decay: 0-d, so that a new value is no new graph; the weights shrink by decay * mult.
    """
    muon = config.muon
    grad = torch.stack(grads)
    average.lerp_(grad, 1.0 - momentum)
    update = orthogonalize(torch.lerp(grad, average, momentum), COEFFICIENTS[muon.orthogonalize], dtype).float()
    if second is not None:
        update = normalize(update, second, muon.beta2)
    update = update * lr
    if muon.weight_decay > 0:
        weights = torch.stack(params)
        shrink = decay * weights
        update = update + (torch.where(update * weights >= 0, shrink, 0.0) if config.cautious_decay else shrink)
    torch._foreach_sub_(params, list((update * mults).unbind()))


def adam_decay(param: Tensor, grad: Tensor, average: Tensor, decay: Tensor, beta1: float, cautious: bool) -> None:
    """What Adam's step leaves out, to be done before it: shrink `param` by `decay`, 0-d; compiles as `muon_step` does.

    Cautious: only where Adam is about to shrink it too. Its update has the sign of its new first moment, which
    is worked out here from the present one, `average`.
    """
    if cautious:
        agrees = torch.lerp(average, grad, 1.0 - beta1) * param > 0
        param.mul_(torch.where(agrees, 1.0 - decay, 1.0))
    else:
        param.mul_(1.0 - decay)


@functools.cache  # so that a run which is reset after its warm-up meets the same graphs again
def _compiled(function):
    return torch.compile(function, fullgraph=True, dynamic=False, options=COMPILE_OPTIONS)


class Matrices:
    """The matrices of one shape, and what Muon remembers of them."""

    def __init__(self, named: dict[str, nn.Parameter], config: MuonConfig):
        self.params = list(named.values())
        rows, columns = self.params[0].shape
        self.name = f"{rows}x{columns}"
        self.average = torch.zeros_like(torch.stack(self.params), requires_grad=False)
        self.second = self.average.mean(-1 if rows >= columns else -2, keepdim=True) if config.normuon else None
        by_name = {entry.matrix: entry.mult for entry in config.lr_mults}
        mults = [by_name.get(name.rsplit(".", 1)[-1], 1.0) * math.sqrt(max(1.0, rows / columns)) for name in named]
        self.mults = torch.tensor(mults, device=self.average.device)[:, None, None]

    def buffers(self) -> dict[str, Tensor]:
        buffers = {"average": self.average, "second": self.second}
        return {f"muon.{self.name}.{key}": buffer for key, buffer in buffers.items() if buffer is not None}


class Adam:
    """Torch's fused Adam by its function, as torch's class imports the compiler, a second and a half.

    Groups are dicts of params, betas and lr; `state` has each parameter's moments under torch's names.
    """

    def __init__(self, groups: list[dict]):
        self.param_groups = groups
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    def step(self) -> None:
        """Step all that have a gradient, and take it away."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            states = [self.state[p] or self._start(p) for p in params]
            moments = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
            beta1, beta2 = group["betas"]
            adam(
                params, [p.grad for p in params], *moments, [], [state["step"] for state in states], fused=True,
                amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=0.0, eps=1e-10, maximize=False,
            )  # fmt: skip
            for p in params:
                p.grad = None

    def _start(self, p: Tensor) -> dict[str, Tensor]:
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        self.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        return self.state[p]


class Optimizers:
    """The two optimisers as one: `step`, `untie`, and a state of plain tensors for resuming."""

    def __init__(self, model: GPT, config: OptimConfig, *, compiled: bool = False):
        self.model, self.config = model, config
        self.device = model.embed.device
        named, kinds = dict(model.named_parameters()), model.kinds()
        shapes: dict[torch.Size, dict[str, nn.Parameter]] = {}
        for name, kind in kinds.items():
            if kind == "matrix":
                shapes.setdefault(named[name].shape, {})[name] = named[name]
        self.matrices = [Matrices(group, config.muon) for group in shapes.values()]
        groups = [
            {
                "params": [named[name] for name, kind in kinds.items() if kind in group.kinds],
                "betas": (group.beta1, group.beta2),
                "config": group,
            }
            for group in config.adam.groups
        ]
        self.adam = Adam(groups)
        self._muon_step, self._adam_decay = muon_step, adam_decay
        if compiled:
            self._muon_step, self._adam_decay = _compiled(muon_step), _compiled(adam_decay)

    @torch.no_grad()
    def step(self, step: int, *, lr_mult: float, base_mult: float, momentum: float) -> None:
        """Update the matrices, and at the end of each `adam.every` steps all else, by the sum of their gradients.

        Every LR is times `lr_mult`. Weight decay goes by the LR times `base_mult`, the schedule without KD's phases:
        a boost must not decay more.
        """
        muon, dtype = self.config.muon, self.model.compute_dtype
        values = muon.lr * lr_mult, momentum, muon.weight_decay * (muon.lr * base_mult) ** 2
        scalars = [self._scalar(value) for value in values]
        for group in self.matrices:
            grads = [p.grad for p in group.params]
            self._muon_step(group.params, grads, group.average, group.second, group.mults, *scalars, self.config, dtype)
            for p in group.params:
                p.grad = None
        if (step + 1) % self.config.adam.every == 0:
            self._adam_step(lr_mult, base_mult)

    def _scalar(self, value: float) -> Tensor:
        # by way of float64, so that a senseless LR squared becomes inf, and the run diverges, where float32 would raise
        return torch.full((), value, dtype=torch.float64, device=self.device).float()

    def _adam_step(self, lr_mult: float, base_mult: float) -> None:
        for group in self.adam.param_groups:
            config, base_lr = group["config"], self.config.adam.lr * group["config"].lr_mult
            group["lr"] = base_lr * lr_mult
            strength = self.config.adam.weight_decay * config.decay_mult * (base_lr * base_mult) ** 2
            decay = self._scalar(strength)
            for p in group["params"] if strength > 0 else ():
                state = self.adam.state[p]
                average = state["exp_avg"] if state else torch.zeros_like(p)  # Adam makes its own in its first step
                self._adam_decay(p, p.grad, average, decay, config.beta1, self.config.cautious_decay)
        self.adam.step()

    def untie_step(self, horizon: int) -> int | None:
        """The step before which the head unties: the first from the model's on at which Adam has stepped on all."""
        step, every = self.model.untie_step(horizon), self.config.adam.every
        return None if step is None else math.ceil(step / every) * every

    def untie(self) -> None:
        """Untie the head; it takes a copy of the embedding's Adam state, so that neither starts cold."""
        assert self.model.embed.grad is None, "gradients of the tied weights wait for Adam"
        head = self.model.untie()
        next(group for group in self.adam.param_groups if "head" in group["config"].kinds)["params"].append(head)
        if state := self.adam.state.get(self.model.embed):
            self.adam.state[head] = {name: value.clone() for name, value in state.items()}

    def grad_norm(self) -> Tensor:
        """Norm of all gradients; those of Adam's parameters are sums since its last step."""
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))

    def state_tensors(self) -> dict[str, Tensor]:
        """All that the next step depends on, by name: both optimisers' moments, and gradients that wait for Adam."""
        tensors = {name: buffer for group in self.matrices for name, buffer in group.buffers().items()}
        for name, p in self.model.named_parameters():
            tensors |= {f"adam.{name}.{field}": value for field, value in self.adam.state.get(p, {}).items()}
            if p.grad is not None:
                tensors[f"grad.{name}"] = p.grad
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take what `state_tensors` gave, after the weights, and the untying, are in place."""
        named = dict(self.model.named_parameters())
        for group in self.matrices:
            for name, buffer in group.buffers().items():
                buffer.copy_(tensors[name])
        for name, value in tensors.items():
            kind, rest = name.split(".", 1)
            if kind == "adam":
                parameter, field = rest.rsplit(".", 1)
                self.adam.state[named[parameter]][field] = value
            elif kind == "grad":
                named[rest].grad = value
