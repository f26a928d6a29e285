"""Muon for the matrices of the blocks, Adam for embedding, head, tables and scalars; both torch's own."""

from __future__ import annotations

import torch
from torch import Tensor

from kdclimb.config import OptimConfig
from kdclimb.model import GPT


class Optimizers:
    """The two optimisers as one: `step(lr_mult)`, `untie()`, and a state of plain tensors for resuming."""

    def __init__(self, model: GPT, config: OptimConfig):
        self.model, self.config = model, config
        matrices = list(model.blocks.parameters())
        self.muon = torch.optim.Muon(
            matrices, lr=config.muon_lr, momentum=config.muon_momentum, weight_decay=config.muon_weight_decay
        )
        groups = [
            {"params": [p for p in (model.embed, model.bigram_lambdas, model.head) if p is not None]},
            {"params": [model.bigram], "lr": config.adam_lr * config.bigram_lr_mult},
        ]
        betas = (config.adam_beta1, config.adam_beta2)
        self.adam = torch.optim.Adam(groups, lr=config.adam_lr, betas=betas, eps=1e-10, fused=True)
        self.base_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in self._both()]

    def _both(self):
        return self.muon, self.adam

    def step(self, lr_mult: float) -> None:
        """One update with every LR times `lr_mult`; weight decay stays at its base strength."""
        for optimizer, lrs in zip(self._both(), self.base_lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * lr_mult
        # torch's Muon shrinks weights by lr * weight_decay, so that an LR boost would boost the decay too
        self.muon.param_groups[0]["weight_decay"] = self.config.muon_weight_decay / lr_mult
        for optimizer in self._both():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def untie(self) -> None:
        """Untie the head; it takes a copy of the embedding's Adam state, so that neither starts cold."""
        head = self.model.untie()
        self.adam.param_groups[0]["params"].append(head)
        if state := self.adam.state.get(self.model.embed):
            self.adam.state[head] = {name: value.clone() for name, value in state.items()}

    def grad_norm(self) -> Tensor:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))

    def state_tensors(self) -> dict[str, Tensor]:
        """Every state tensor, named optimiser.parameter.field."""
        return {
            f"{kind}.{index}.{field}": value
            for kind, optimizer in (("muon", self.muon), ("adam", self.adam))
            for index, fields in optimizer.state_dict()["state"].items()
            for field, value in fields.items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        for kind, optimizer in (("muon", self.muon), ("adam", self.adam)):
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                owner, index, field = name.split(".")
                if owner == kind:
                    state.setdefault(int(index), {})[field] = value
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
