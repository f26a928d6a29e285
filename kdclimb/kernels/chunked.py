"""Hard CE + exact KL in plain torch, chunk by chunk, with the gradients made in the forward pass.

No (T, V) tensor is held: a chunk's logits are turned into their own gradient in place, multiplied
into dh and dW, and dropped. With z the capped logits, p = softmax(z), p_T = softmax(z/T), q the
teacher's softmax at T, and y the one-hot label, a token's gradient on the raw logits is
    cap'(z) * [hard_weight * (p - y) + soft_weight * T * (p_T - q)] / N
where cap'(z) = z * (1 - z/a) / c needs only the capped value.
"""

from __future__ import annotations

import torch

from kdclimb.kernels.reference import cap


def chunk_tokens(vocab: int, device: torch.device) -> int:
    """Rows a chunk. On a CPU 2 MiB of fp32 logits, which its caches hold; on a GPU 0.5 GiB."""
    elements = 2**19 if device.type == "cpu" else 2**27
    return max(64, elements // vocab)


def evaluate(student_hidden, student_head, target, labels, hard_weight, soft_weight, **options):
    """(total, hard, soft, kd_share); gradients of total are right for any grad_output."""
    teacher = (None, None, None) if target is None else (target.hidden, target.head, target.softcap)
    need_grad = torch.is_grad_enabled() and (student_hidden.requires_grad or student_head.requires_grad)
    return _ChunkedLoss.apply(
        student_hidden, student_head, *teacher, labels, hard_weight, soft_weight, need_grad, options
    )


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, t_hidden, t_head, t_softcap, labels, hard_weight, soft_weight, need_grad, options):
        compute = torch.promote_types(hidden.dtype, torch.float32)
        weight = head.to(hidden.dtype)
        valid = labels != options["ignore_index"]
        count = valid.sum().clamp_min(1).to(compute)
        grad_hidden = torch.empty_like(hidden) if need_grad else None
        grad_head = torch.zeros(head.shape, dtype=compute, device=head.device) if need_grad else None
        hard_sum = torch.zeros((), dtype=compute, device=hidden.device)
        soft_sum, share = torch.zeros_like(hard_sum), torch.zeros_like(hard_sum)
        size = chunk_tokens(head.shape[0], hidden.device)
        for start in range(0, hidden.shape[0], size):
            rows = slice(start, start + size)
            teacher = None
            if t_hidden is not None:
                teacher = cap((t_hidden[rows] @ t_head.to(t_hidden.dtype).T).to(compute), t_softcap)
            chunk = _Chunk(hidden[rows], weight, teacher, labels[rows], valid[rows], compute, options)
            hard_sum += chunk.hard
            soft_sum += chunk.soft
            if need_grad:
                grad, chunk_share = chunk.gradient(hard_weight, soft_weight, measure_share=start == 0)
                grad = grad.div_(count).to(hidden.dtype)
                torch.mm(grad, weight, out=grad_hidden[rows])
                grad_head.add_(grad.T @ hidden[rows])
                share += chunk_share
        hard, soft = hard_sum / count, soft_sum / count
        total = hard_weight * hard + soft_weight * soft
        if need_grad:
            ctx.save_for_backward(grad_hidden, grad_head.to(head.dtype))
        ctx.mark_non_differentiable(hard, soft, share)
        return total, hard, soft, share

    @staticmethod
    def backward(ctx, grad_total, *_):
        grad_hidden, grad_head = ctx.saved_tensors
        return (grad_hidden * grad_total, grad_head * grad_total, *(None,) * 8)


class _Chunk:
    """The capped logits of some rows, their summed losses, and the gradient on the raw logits."""

    def __init__(self, hidden, weight, teacher, labels, valid, compute, options):
        self.temperature, self.softcap, self.valid = options["temperature"], options["student_softcap"], valid
        self.labels = torch.where(valid, labels, 0)[:, None]
        self.z = cap((hidden @ weight.T).to(compute), self.softcap)
        self.log_norm = torch.logsumexp(self.z, dim=-1, keepdim=True)
        hard = self.log_norm - self.z.gather(1, self.labels)
        self.hard = (hard.squeeze(1) * valid).sum()
        self.teacher, self.soft = None, torch.zeros_like(self.hard)
        if teacher is not None:
            tau = self.temperature
            self.log_norm_tau = self.log_norm if tau == 1 else torch.logsumexp(self.z / tau, dim=-1, keepdim=True)
            teacher_log_norm = torch.logsumexp(teacher / tau, dim=-1)
            self.teacher = torch.exp(teacher / tau - teacher_log_norm[:, None])
            # KL without log q: sum_v q_v (z'_v - z_v) / T - lse(z'/T) + lse(z/T)
            difference = torch.linalg.vecdot(self.teacher, teacher - self.z)
            kl = difference / tau - teacher_log_norm + self.log_norm_tau.squeeze(1)
            self.soft = tau**2 * (kl * valid).sum()

    def gradient(self, hard_weight, soft_weight, measure_share):
        tau = self.temperature
        slope = 1.0 if self.softcap is None else self.z * (1 - self.z / self.softcap.a) / self.softcap.c
        p = torch.exp(self.z - self.log_norm)
        soft = None
        if self.teacher is not None:
            p_tau = p if tau == 1 else torch.exp(self.z / tau - self.log_norm_tau)
            soft = self.teacher.neg_().add_(p_tau).mul_(soft_weight * tau)
        hard = p.scatter_add_(1, self.labels, torch.full_like(p[:, :1], -1.0)).mul_(hard_weight)
        share = torch.zeros_like(self.hard)
        if soft is not None and measure_share:
            soft_norm, hard_norm = ((g * slope * self.valid[:, None]).norm() for g in (soft, hard))
            share = soft_norm / (soft_norm + hard_norm).clamp_min(1e-30)
        grad = hard if soft is None else hard.add_(soft)
        return grad.mul_(slope).mul_(self.valid[:, None]), share
