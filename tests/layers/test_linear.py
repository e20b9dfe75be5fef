"""`Linear4bit` keeps its bytes whatever is done to the module, and a group equals its members one by one."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from halfbyte.errors import CheckpointError, FormatError
from halfbyte.formats.packed import SLOTS, Format
from halfbyte.formats.quantize import dequantize
from halfbyte.layers.linear import Linear4bit, linear_group
from kernels.checks import random_packed

FORMATS = [Format("nf4", 64, nested=True), Format("fp4", 32), Format("int4", 32, zero="min"), Format("int8")]
NESTED = FORMATS[0]


def layer(fmt: Format = NESTED, n: int = 63, k: int = 60, seed: int = 0) -> Linear4bit:
    generator = torch.Generator().manual_seed(seed)
    return Linear4bit(random_packed((n, k), fmt, "cpu", seed=seed), torch.randn(n, generator=generator))


def same_bytes(a: Linear4bit, b: Linear4bit) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.packed.tensors(), b.packed.tensors(), strict=True))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.kind)
def test_forward_is_the_linear_layer_of_its_weight(fmt: Format) -> None:
    x = torch.randn(2, 5, 60)
    module = layer(fmt)
    assert isinstance(module, nn.Linear)
    assert torch.equal(module.weight, dequantize(module.packed))
    torch.testing.assert_close(module(x), nn.functional.linear(x, module.weight, module.bias))


def test_everything_is_frozen_and_bytes() -> None:
    module = layer()
    assert [name for name, _ in module.named_parameters()] == [*SLOTS, "bias"]
    assert not any(p.requires_grad for p in module.parameters())
    assert all(p.dtype == torch.uint8 for name, p in module.named_parameters() if name != "bias")
    assert module.weight is not module.weight, "nothing decoded is kept"


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.kind)
def test_state_dict_round_trips(fmt: Format) -> None:
    source, target = layer(fmt, seed=1), layer(fmt, seed=2)
    assert not same_bytes(source, target)
    state = {name: t.clone() for name, t in source.state_dict().items()}
    assert all(isinstance(t, torch.Tensor) for t in state.values()), "safetensors can hold it"
    assert str(target.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
    assert same_bytes(source, target)
    target = layer(fmt, seed=2)
    target.load_state_dict(state, strict=True, assign=True)
    assert same_bytes(source, target)


def test_a_state_dict_without_its_keys_is_refused() -> None:
    state = layer().state_dict()
    del state["nested_scales"]
    with pytest.raises(RuntimeError, match="nested_scales"):
        layer().load_state_dict(state)


@pytest.mark.parametrize(("other", "k"), [(Format("fp4", 64, nested=True), 60), (Format("nf4", 64), 60), (NESTED, 64)])
def test_a_state_dict_of_another_format_is_an_error_that_names_both(other: Format, k: int) -> None:
    model = nn.ModuleDict({"proj": layer(NESTED)})
    before = copy.deepcopy(model["proj"])
    state = nn.ModuleDict({"proj": layer(other, k=k)}).state_dict()
    with pytest.raises(CheckpointError, match=re.escape("proj: the file holds " + layer(other, k=k).packed.spec)):
        model.load_state_dict(state)
    assert same_bytes(model["proj"], before), "nothing was read before it was refused"  # type: ignore[arg-type]


def test_deepcopy_is_a_copy() -> None:
    module = layer()
    twin = copy.deepcopy(module)
    assert same_bytes(module, twin)
    twin.codes.data.zero_()
    assert not same_bytes(module, twin)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_reach_the_bias_only(dtype: torch.dtype) -> None:
    for cast in (
        lambda m: m.to(dtype),
        lambda m: m.to("cpu", dtype),
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: m.double(),
    ):
        module, before = layer(), layer()
        cast(module)
        assert same_bytes(module, before) and module.codes.dtype == torch.uint8
    module = layer().to(torch.bfloat16)
    assert module.bias is not None and module.bias.dtype == torch.bfloat16
    assert module(torch.randn(3, 60, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_cast_of_the_bytes_is_refused() -> None:
    module, before = layer(), layer()
    with pytest.raises(FormatError, match="cannot be cast"):
        module.type(torch.float16)
    assert same_bytes(module, before)


def test_devices() -> None:
    """To the meta device and, empty, back: shapes and dtypes stay."""
    module = layer().to("meta")
    assert module.codes.device.type == "meta" and module.codes.dtype == torch.uint8
    module = module.to_empty(device="cpu")
    module.load_state_dict(layer().state_dict())
    assert same_bytes(module, layer())


@pytest.mark.gpu
def test_moves_to_the_gpu_and_back() -> None:
    module = layer().to("cuda")
    x = torch.randn(3, 60)
    torch.testing.assert_close(module(x.cuda()).cpu(), layer()(x))
    assert same_bytes(module.to("cpu"), layer())


def test_a_group_equals_its_members() -> None:
    x = torch.randn(4, 60, requires_grad=True)
    layers = [layer(NESTED, 63), layer(FORMATS[2], 8), nn.Linear(60, 5)]
    together = linear_group(x, layers)
    apart = [module(x) for module in layers]
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b)
    (one,) = torch.autograd.grad(sum(y.square().sum() for y in together), x)  # type: ignore[arg-type]
    (two,) = torch.autograd.grad(sum(y.square().sum() for y in apart), x)  # type: ignore[arg-type]
    torch.testing.assert_close(one, two)


def test_repr_names_the_format() -> None:
    assert repr(layer()) == "Linear4bit(in_features=60, out_features=63, nf4, block 64, nested)"
