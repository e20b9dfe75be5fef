"""AdamW (arXiv 1711.05101) with 32-bit moments over flat groups, on torch's fused kernel.

Why fused: it reads `found_inf` on the device, so a step with a non-finite gradient leaves weights, moments and the step
count untouched without asking the host. Why functional: the moments are ours, exist before the first forward pass (a step
can then not run out of memory) and are saved as plain tensors. Cost: 8 bytes a trainable parameter.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from halfbyte.optim.config import OptimConfig
from halfbyte.optim.flat import Flat

MATRICES = ("lora_a", "lora_b", "dense")


class AdamW:
    """One learning rate a group: the schedule's, times `lora_plus` for B (arXiv 2402.12354). Only matrices decay."""

    def __init__(self, flat: Flat, config: OptimConfig) -> None:
        self.groups = flat.groups
        self.config = config
        self.first = {g.role: torch.zeros_like(g.values) for g in flat.groups}
        self.second = {g.role: torch.zeros_like(g.values) for g in flat.groups}
        self.count = {g.role: torch.zeros((), device=g.values.device) for g in flat.groups}

    @torch.no_grad()
    def step(self, lr: float, found_inf: Tensor) -> None:
        """Apply the gradients in the flat buffers. found_inf: fp32 scalar on the device; 1 leaves everything untouched."""
        for group in self.groups:
            adamw(
                [group.values],
                [group.grads],
                [self.first[group.role]],
                [self.second[group.role]],
                [],
                [self.count[group.role]],
                fused=True,
                found_inf=found_inf,
                amsgrad=False,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                lr=lr * (self.config.lora_plus if group.role == "lora_b" else 1.0),
                weight_decay=self.config.weight_decay if group.role in MATRICES else 0.0,
                eps=self.config.eps,
                maximize=False,
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Moments a parameter (`first.NAME`, `second.NAME`, in the parameter's shape) and step counts a group (`count.ROLE`)."""
        tensors = {f"count.{role}": count for role, count in self.count.items()}
        for kind, moments in (("first", self.first), ("second", self.second)):
            for group in self.groups:
                tensors.update({f"{kind}.{s.name}": group.view(moments[group.role], s) for s in group.segments})
        return tensors

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """The mirror of `state_dict`, exact. The names and shapes must be this run's (checked by the caller's identity)."""
        own = self.state_dict()
        assert own.keys() == tensors.keys(), sorted(own.keys() ^ tensors.keys())[:4]
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
