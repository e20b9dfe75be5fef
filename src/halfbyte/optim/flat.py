"""Trainable parameters as views into one flat fp32 buffer, and their gradients into another.

Why: the norm, the clip, the optimizer, a checkpoint and later an all-reduce each become one call on one tensor, and the
backward pass accumulates into the gradient buffer in place, so microbatches cost no extra memory. Segments start at
multiples of 256 elements, so that every parameter is aligned for vector loads and 8-bit optimizer blocks never straddle two.
Cost: at most 255 padding elements a parameter, always zero.

Letters: n = elements of a group with padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SEGMENT = 256
ROLES = ("lora_a", "lora_b", "dense", "no_decay")


@dataclass(frozen=True)
class Segment:
    """Where a parameter lies in its group: `values[offset : offset + numel].view(shape)`."""

    name: str
    offset: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FlatGroup:
    """Parameters of one role, which share learning rate and weight decay.

    values, grads: fp32 `[n]`, slices of the run's two buffers. Every parameter is a view of `values`, its `.grad` of `grads`.
    """

    role: str
    values: Tensor
    grads: Tensor
    segments: tuple[Segment, ...]

    def view(self, buffer: Tensor, segment: Segment) -> Tensor:
        """The segment's part of a buffer `[n]` laid out as this group (values, gradients or a moment), in its own shape."""
        size = _numel(segment.shape)
        return buffer[segment.offset : segment.offset + size].view(segment.shape)


@dataclass(frozen=True)
class Flat:
    """All trainable parameters of a run. values, grads: fp32 `[sum of n]`; groups: consecutive slices of them."""

    values: Tensor
    grads: Tensor
    groups: tuple[FlatGroup, ...]

    @property
    def numel(self) -> int:
        """Trainable elements, without padding."""
        return sum(_numel(s.shape) for g in self.groups for s in g.segments)

    def named(self) -> dict[str, Tensor]:
        """Every parameter's values by name: views, not copies."""
        return {s.name: g.view(g.values, s) for g in self.groups for s in g.segments}


def flatten(parameters: Iterable[tuple[str, nn.Parameter, str]]) -> Flat:
    """Move `(name, parameter, role)` into flat buffers; the parameters stay the same objects and become views.

    All must be fp32 on one device (masters; the compute dtype is a cast inside the forward). The order within a role is kept.
    """
    by_role: dict[str, list[tuple[str, nn.Parameter]]] = {role: [] for role in ROLES}
    for name, parameter, role in parameters:
        assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}; trainable parameters are fp32 masters"
        by_role[role].append((name, parameter))
    present = [(role, members) for role, members in by_role.items() if members]
    assert present, "nothing to train"
    sizes = [sum(_padded(p.numel()) for _, p in members) for _, members in present]
    device = present[0][1][0][1].device
    values = torch.zeros(sum(sizes), device=device)
    grads = torch.zeros_like(values)
    groups, start = [], 0
    for (role, members), size in zip(present, sizes, strict=True):
        groups.append(_group(role, members, values[start : start + size], grads[start : start + size]))
        start += size
    return Flat(values, grads, tuple(groups))


def _group(role: str, members: Sequence[tuple[str, nn.Parameter]], values: Tensor, grads: Tensor) -> FlatGroup:
    segments, offset = [], 0
    for name, parameter in members:
        segments.append(Segment(name, offset, tuple(parameter.shape)))
        offset += _padded(parameter.numel())
    group = FlatGroup(role, values, grads, tuple(segments))
    for (_, parameter), segment in zip(members, segments, strict=True):
        view = group.view(values, segment)
        view.copy_(parameter.detach())
        parameter.data = view
        parameter.grad = group.view(grads, segment)
    return group


def _padded(size: int) -> int:
    return -(-size // SEGMENT) * SEGMENT


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
