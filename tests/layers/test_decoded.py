"""Held weights: the same bits, only where there is room, and gone afterwards."""

from __future__ import annotations

import pytest
import torch

from halfbyte.adapters import lora
from halfbyte.adapters.config import AdapterConfig
from halfbyte.layers.decoded import held
from halfbyte.layers.linear import Linear4bit
from support import packed_base

IDS = torch.arange(12).reshape(1, 12)


def layers(model):
    return [m for m in model.modules() if isinstance(m, Linear4bit)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_held_weights_give_the_same_bits_forward_and_backward(family):
    base = packed_base(family)
    adapter = lora.attach(base.model, AdapterConfig(rank=4), 0)

    def step():
        out = base.model(input_ids=IDS, use_cache=False).logits
        grads = torch.autograd.grad(out.square().mean(), [p for _, p, _ in adapter.parameters()])
        return [out.detach(), *grads]

    plain = step()
    with held(base.model, torch.float32) as holds:
        assert holds and all(layer.decoded is not None for layer in layers(base.model))
        assert all(torch.equal(a, b) for a, b in zip(plain, step(), strict=True))
    assert all(layer.decoded is None for layer in layers(base.model))


def test_nothing_is_held_without_room_and_nothing_stays_after_an_error():
    model = packed_base().model
    with held(model, torch.float32, limit=1000) as holds:
        assert not holds and all(layer.decoded is None for layer in layers(model))
    with pytest.raises(KeyboardInterrupt), held(model, torch.float32):
        raise KeyboardInterrupt
    assert all(layer.decoded is None for layer in layers(model))


def test_an_inner_block_leaves_the_outer_one_s_weights():
    model = packed_base().model
    with held(model, torch.float32), held(model, torch.float32) as inner:
        assert not inner
    assert all(layer.decoded is None for layer in layers(model))
    with held(model, torch.float32):
        with held(model, torch.float32):
            pass
        assert all(layer.decoded is not None for layer in layers(model))


def test_held_weights_are_no_part_of_the_state():
    model = packed_base().model
    before = list(model.state_dict())
    with held(model, torch.float32):
        assert list(model.state_dict()) == before
