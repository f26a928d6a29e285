"""One chunk of the loss in plain torch, for any device and float dtype: what the CPU campaign runs."""

from __future__ import annotations

import torch
from torch import Tensor

from kdclimb.kernels.targets import Problem, Softcap


class TorchChunks:
    """load(rows), then losses() or gradients(). Logits are held in `wide` (fp32, or fp64 for fp64 inputs)."""

    def __init__(self, problem: Problem, wide: torch.dtype):
        self.problem, self.wide = problem, wide

    def load(self, rows: slice) -> None:
        """Logits and their normalisers of these tokens, and where a soft loss is taken: all of them, or a subset."""
        problem, labels = self.problem, self.problem.labels
        self.rows = rows
        self.ids, self.weights = labels.ids[rows], labels.weights[rows].to(self.wide)
        self.z = _cap((problem.hidden[rows] @ problem.head.T).to(self.wide), problem.softcap)
        largest = self.z.amax(dim=-1, keepdim=True)
        self.shifted = (self.z - largest).exp_()  # kept, as the exponential is what a chunk costs most beside products
        self.total = self.shifted.sum(dim=-1, keepdim=True)
        self.log_norm = largest + self.total.log()
        self.kept = labels.keep[rows].to(self.wide)
        self.subset = labels.keep[rows].nonzero().squeeze(1) if problem.needs_mask else None
        if problem.has_target:
            self._load_target()

    def _load_target(self) -> None:
        problem, tau = self.problem, self.problem.temperature
        if self.subset is None:
            self.soft_z, log_norm = self.z, self.log_norm
        else:
            self.soft_z, log_norm = self.z[self.subset], self.log_norm[self.subset]
            self.kept = self.kept[self.subset]
        self.log_norm_tau = log_norm if tau == 1 else torch.logsumexp(self.soft_z / tau, dim=-1, keepdim=True)
        if problem.entries is None:
            hidden = self._of_subset(problem.teacher_hidden).to(problem.hidden.dtype)
            teacher = _cap((hidden @ problem.teacher_head.T).to(self.wide), problem.teacher_softcap)
            self.teacher_log_norm = torch.logsumexp(teacher / tau, dim=-1)
            self.q = torch.exp(teacher / tau - self.teacher_log_norm[:, None])
            # KL without log q: sum_v q_v (z'_v - z_v) / T - lse(z'/T) + lse(z/T)
            self.difference = torch.linalg.vecdot(self.q, teacher - self.soft_z) / tau
        else:
            self.picked = self._of_subset(problem.entries.ids).long()
            self.q = self._of_subset(problem.entries.probs).to(self.wide)
            self.log_p = self.soft_z.gather(1, self.picked) / tau - self.log_norm_tau
            if problem.entries.rest is not None:
                self.rest = self._of_subset(problem.entries.rest).to(self.wide)
                self.rest_p = (1 - self.log_p.exp().sum(dim=-1)).clamp_min(torch.finfo(self.wide).eps)

    def _of_subset(self, values: Tensor) -> Tensor:
        return values[self.rows] if self.subset is None else values[self.rows][self.subset]

    def losses(self, hard: Tensor, soft: Tensor) -> None:
        """Fill `hard` and `soft` (C,) with each token's loss, 0 where it has none."""
        torch.sum(self.weights * (self.log_norm - self.z.gather(1, self.ids)), dim=1, out=hard)
        if not self.problem.has_target:
            return
        if self.problem.entries is None:
            kl = self.difference - self.teacher_log_norm + self.log_norm_tau.squeeze(1)
        else:
            kl = self._of_subset(self.problem.entries.constant) - (self.q * self.log_p).sum(dim=-1)
            if self.problem.entries.rest is not None:
                kl = kl - self.rest * self.rest_p.log()
        # where, not a product: a row without a target may hold anything
        kl = torch.where(self.kept > 0, self.problem.temperature**2 * kl, 0.0)
        soft[slice(None) if self.subset is None else self.subset] = kl.to(soft.dtype)

    def gradients(
        self, hard: Tensor, soft: Tensor, hard_scale: Tensor, soft_scale: Tensor, apart: bool
    ) -> list[Tensor]:
        """The chunk's gradients on the raw logits (C, V), [both] or, `apart`, [hard, soft]; fills the losses too."""
        self.losses(hard, soft)
        cap_, dtype = self.problem.softcap, self.problem.hidden.dtype
        z = self.z if cap_ is None else self.z - cap_.offset
        slope = None if cap_ is None else torch.addcmul(z, z, z, value=-1 / cap_.a).div_(cap_.c)
        p = self.shifted.div_(self.total)
        soft_grad = self._soft_gradient(p, soft_scale) if self.problem.has_target else None
        weights = hard_scale * self.weights
        hard_grad = p.mul_(weights.sum(dim=1, keepdim=True)).scatter_add_(1, self.ids, -weights)
        if apart:
            parts = [hard_grad, soft_grad if self.subset is None else torch.zeros_like(p)]
            if self.subset is not None:
                parts[1].index_copy_(0, self.subset, soft_grad)
        elif soft_grad is None:
            parts = [hard_grad]
        else:
            added = (
                hard_grad.add_(soft_grad) if self.subset is None else hard_grad.index_add_(0, self.subset, soft_grad)
            )
            parts = [added]
        return [(part if slope is None else part.mul_(slope)).to(dtype) for part in parts]

    def _soft_gradient(self, p: Tensor, soft_scale: Tensor) -> Tensor:
        tau, scale = self.problem.temperature, (soft_scale * self.problem.temperature * self.kept)[:, None]
        if tau == 1:
            p_tau = p if self.subset is None else p[self.subset]
        else:
            p_tau = torch.exp(self.soft_z / tau - self.log_norm_tau)
        if self.problem.entries is None:
            return self.q.neg_().add_(p_tau).mul_(scale)
        grad = p_tau.clone()
        if self.problem.entries.rest is not None:
            grad.mul_((1 - self.rest / self.rest_p)[:, None])
            grad.scatter_(1, self.picked, self.log_p.exp())
        return grad.scatter_add_(1, self.picked, -self.q).mul_(scale)


def _cap(logits: Tensor, softcap: Softcap | None) -> Tensor:
    """`reference.cap` in place: each pass over the logits that makes a new tensor takes longer than its arithmetic."""
    if softcap is None:
        return logits
    capped = logits.add_(softcap.b).div_(softcap.c).sigmoid_().mul_(softcap.a)
    return capped.add_(softcap.offset) if softcap.offset else capped
