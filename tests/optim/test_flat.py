"""Flat buffers: parameters stay themselves, gradients land in place, padding stays zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from halfbyte.optim.flat import SEGMENT, flatten


def parameters() -> list[tuple[str, nn.Parameter, str]]:
    shapes = {
        "a": ((3, 5), "lora_a"),
        "b": ((7, 3), "lora_b"),
        "norm": ((9,), "no_decay"),
        "c": ((17, 16), "lora_a"),
        "s": ((), "dense"),
    }
    generator = torch.Generator().manual_seed(0)
    return [(name, nn.Parameter(torch.randn(shape, generator=generator)), role) for name, (shape, role) in shapes.items()]


def test_parameters_become_views_with_the_same_values() -> None:
    named = parameters()
    before = {name: p.detach().clone() for name, p, _ in named}
    flat = flatten(named)
    assert [g.role for g in flat.groups] == ["lora_a", "lora_b", "dense", "no_decay"]
    assert flat.numel == 15 + 21 + 9 + 17 * 16 + 1
    start, end = flat.values.data_ptr(), flat.values.data_ptr() + 4 * flat.values.numel()
    for name, p, _ in named:
        assert torch.equal(p, before[name])
        assert start <= p.data_ptr() < end
        assert (p.data_ptr() - start) % (4 * SEGMENT) == 0
    flat.values.fill_(2.0)
    assert all((p == 2.0).all() for _, p, _ in named)


def test_gradients_accumulate_in_place() -> None:
    named = parameters()
    flat = flatten(named)
    for _ in range(2):
        sum((p * p).sum() for _, p, _ in named).backward()
    for group in flat.groups:
        for segment in group.segments:
            parameter = next(p for name, p, _ in named if name == segment.name)
            assert torch.equal(group.view(group.grads, segment), 4 * parameter)
    padding = torch.ones_like(flat.values, dtype=torch.bool)
    for _, p, _ in named:
        at = (p.data_ptr() - flat.values.data_ptr()) // 4
        padding[at : at + p.numel()] = False
    assert padding.any()
    assert (flat.grads[padding] == 0).all()
    assert (flat.values[padding] == 0).all()


def test_a_16_bit_parameter_is_a_broken_invariant() -> None:
    with pytest.raises(AssertionError, match="fp32"):
        flatten([("x", nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)), "dense")])
