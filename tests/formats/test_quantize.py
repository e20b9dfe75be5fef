"""Every format alike: shapes, dtypes, bounds of error and memory, offsets beyond 2^31, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils._python_dispatch import TorchDispatchMode

from halfbyte.errors import FormatError
from halfbyte.formats import fp4, nf4, tiling
from halfbyte.formats.packed import Format, Packed
from halfbyte.formats.quantize import dequantize, quantize, scales_of

FORMATS = [
    Format("nf4", 64),
    Format("nf4", 32, nested=True),
    Format("fp4", 64),
    Format("fp4", 4096, nested=True),
    Format("int4", 64),
    Format("int4", 32, zero="int"),
    Format("int4", 32, zero="float"),
    Format("int4", 128, zero="min"),
    Format("int8"),
]
IDS = [f"{f.kind}-{f.block}-{f.zero}{'-nested' if f.nested else ''}" for f in FORMATS]
SHAPES = [(), (0,), (0, 8), (8, 0), (1,), (33,), (128,), (1, 1), (5, 47), (3, 64), (2, 3, 33), (4, 4097)]
formats = pytest.mark.parametrize("fmt", FORMATS, ids=IDS)


@formats
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape_comes_back_and_takes_the_bytes_it_says(fmt: Format, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    packed = quantize(weight, fmt)
    assert packed.nbytes == fmt.nbytes(shape)
    decoded = dequantize(packed)
    assert decoded.shape == weight.shape
    assert (decoded - weight).norm() <= 0.25 * weight.norm()


@formats
def test_bits_a_weight(fmt: Format) -> None:
    bits = {"nf4-64-none": 4.5, "fp4-64-none": 4.5, "int4-64-none": 4.5, "int4-32-int": 6.0, "nf4-32-none-nested": 4.25 + 1 / 256}
    bits |= {"int4-128-min": 4.5, "int8-64-none": 8 + 32 / 4096}
    label = IDS[FORMATS.index(fmt)]
    if label in bits:
        assert 8 * fmt.nbytes((4096, 4096)) / 4096**2 == pytest.approx(bits[label], abs=1e-5)


@formats
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_any_float_comes_in_and_the_three_go_out(fmt: Format, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 130).to(dtype)
    packed = quantize(weight, fmt)
    assert torch.equal(packed.codes, quantize(weight.float(), fmt).codes)
    default = dequantize(packed).dtype
    assert default == {torch.float64: torch.float32}.get(dtype, dtype if dtype.itemsize > 1 else torch.bfloat16)
    truth = dequantize(packed, torch.float32)
    for out in (torch.bfloat16, torch.float16):
        assert torch.equal(dequantize(packed, out), truth.to(out))
    with pytest.raises(FormatError, match="float64"):
        dequantize(packed, torch.float64)


@formats
def test_strides_do_not_matter(fmt: Format) -> None:
    base = torch.randn(94, 66)
    for view in (base.t(), base[::2, 1:48], base[:, :1].expand(94, 70), base[5:, :]):
        assert same(quantize(view, fmt), quantize(view.contiguous(), fmt))


@formats
def test_a_weight_that_wants_gradients_is_quantised_without_them(fmt: Format) -> None:
    packed = quantize(torch.nn.Parameter(torch.randn(4, 64)), fmt)
    assert not any(t.requires_grad for t in packed.tensors())


@formats
@pytest.mark.parametrize("shape", [(5, 431), (1, 5000), (300, 33), (7,)], ids=str)
def test_the_size_of_tiles_does_not_matter(fmt: Format, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(shape)
    whole = quantize(weight, fmt)
    decoded = dequantize(whole)
    monkeypatch.setattr(tiling, "CHUNK", 128)
    assert same(quantize(weight, fmt), whole)
    assert torch.equal(dequantize(whole), decoded)


@formats
def test_temporaries_are_bounded_by_tiles(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "CHUNK", 1 << 12)
    weight = torch.randn(64, 16384, dtype=torch.bfloat16)
    # Besides tiles: what is returned, and scales in fp32 with their like in fp64 terms.
    largest = max(16 * (1 << 12), 4 * 4 * weight.numel() // min(fmt.block, 64))
    with Allocations(weight.numel()) as seen:
        packed = quantize(weight, fmt, name="w")
    assert seen.largest_temporary <= largest
    with Allocations(weight.numel() * 2) as seen:
        dequantize(packed)
    assert seen.largest_temporary <= largest


class Allocations(TorchDispatchMode):
    """Bytes of the largest tensor that an operation made; `empty` (the outputs, at most `expected` bytes) and views excepted."""

    def __init__(self, expected: int) -> None:
        super().__init__()
        self.expected = expected
        self.largest_temporary = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view and "_(" not in str(func) and not func._schema.is_mutable:
            size = result.numel() * result.element_size()
            if "aten.empty" in str(func):
                assert size <= self.expected
            else:
                self.largest_temporary = max(self.largest_temporary, size)
        return result


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [Format("nf4", 64, nested=True), Format("int4", 64, zero="int")], ids=["nf4", "int4"])
def test_more_than_two_to_the_31_elements(fmt: Format) -> None:
    # Zeros from calloc take no memory until written; only both ends differ, so that an offset that wraps is seen.
    n = 2**31 + 64
    weight = torch.zeros(n, dtype=torch.bfloat16)
    head, tail = torch.randn(128).bfloat16(), torch.randn(128).bfloat16()
    weight[:128], weight[-128:] = head, tail
    packed = quantize(weight, fmt)
    assert packed.nbytes == fmt.nbytes((n,))
    last = packed.codes[-64:]
    assert torch.equal(last, quantize(tail, Format(fmt.kind, 64, zero=fmt.zero)).codes)
    decoded = dequantize(packed)
    assert decoded.shape == (n,)
    for part, source in ((decoded[:128], head), (decoded[-128:], tail)):
        assert (part - source).float().norm() < 0.15 * source.float().norm()
    assert decoded[128:-128].count_nonzero() == 0


# --- bad input


@formats
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (2, 17), (4, 46)], ids=str)
def test_nan_and_inf_are_errors_that_name_tensor_and_place(fmt: Format, bad: float, place: tuple[int, int]) -> None:
    weight = torch.randn(5, 47)
    weight[place] = bad
    with pytest.raises(FormatError) as caught:
        quantize(weight, fmt, name="model.layers.3.mlp.up_proj.weight")
    assert "model.layers.3.mlp.up_proj.weight holds NaN or infinite values: 1 of 235" in caught.value.message
    assert str(list(place)) in caught.value.message
    assert caught.value.code == "format.not-finite"


@formats
def test_fp64_beyond_fp32_is_not_finite(fmt: Format) -> None:
    with pytest.raises(FormatError, match="infinite"):
        quantize(torch.tensor([1.0, 1e300], dtype=torch.float64), fmt)


@pytest.mark.parametrize("zero", ["int", "float", "min"])
def test_a_range_that_overflows_is_an_error(zero: str) -> None:
    with pytest.raises(FormatError, match="w: the values of one group span more than fp32 can hold"):
        quantize(torch.tensor([3e38, -3e38]), Format("int4", 32, zero=zero), name="w")  # type: ignore[arg-type]


def test_codes_of_another_kind_are_not_weights() -> None:
    with pytest.raises(FormatError, match="q_proj holds uint8"):
        quantize(torch.zeros(4, dtype=torch.uint8), Format("nf4"), name="q_proj")


# --- zeros, denormals


@formats
def test_zeros_decode_to_zeros(fmt: Format) -> None:
    assert (dequantize(quantize(torch.zeros(9, 70), fmt)) == 0).all()


@pytest.mark.parametrize("fmt", [f for f in FORMATS if not f.nested], ids=[i for i in IDS if "nested" not in i])
@pytest.mark.parametrize("size", [1e-37, 1e-39, 1e-42, 1e-45])
def test_denormal_weights_are_within_half_a_step_too(fmt: Format, size: float) -> None:
    weight = torch.randn(4, 128) * size
    assert within_half_a_step(weight, quantize(weight, fmt))


# --- properties


STEP = {"nf4": float(nf4.LEVELS.diff().max()), "fp4": float(fp4.LEVELS.sort()[0].diff().max())}
"""The widest gap between levels, in scales; 1 for the formats whose levels are evenly spaced."""


def same(a: Packed, b: Packed) -> bool:
    return a.spec == b.spec and all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def per_block(fmt: Format, shape: tuple[int, ...], scales: torch.Tensor) -> torch.Tensor:
    """Each element's scale, in the weight's shape."""
    if fmt.kind in ("nf4", "fp4"):
        return scales.repeat_interleave(fmt.block)[: math.prod(shape)].view(shape)
    rows, columns = math.prod(shape[:-1]), shape[-1]
    width = columns if fmt.kind == "int8" else fmt.block
    return scales.view(rows, -1).repeat_interleave(width, 1)[:, :columns].reshape(shape)


arrays = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=70),
    elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=True),
    fill=st.just(np.float32(0)),
)


@formats
@settings(max_examples=20, deadline=None)
@given(array=arrays)
def test_the_error_in_each_block_is_at_most_half_a_step(fmt: Format, array: np.ndarray) -> None:
    weight = torch.from_numpy(array)
    packed = quantize(weight, fmt)
    assert packed.nbytes == fmt.nbytes(weight.shape)
    if fmt.nested:
        # A nested scale may be off by several per cent of the largest in its 256.
        error = (dequantize(packed).double() - weight.double()).abs().max().item()
        assert error <= (STEP[fmt.kind] / 2 + 0.2) * weight.abs().max().item() + 1e-44
        return
    assert within_half_a_step(weight, packed)


def within_half_a_step(weight: torch.Tensor, packed: Packed) -> bool:
    """Whether no element is further off than half the widest step of its block, and fp32 rounding."""
    fmt, shape = packed.format, tuple(weight.shape)
    error = (dequantize(packed).double() - weight.double()).abs()
    scale = per_block(fmt, shape, scales_of(packed)).double()
    # fp32 rounding of what is multiplied, and of a scale that is a denormal (127 steps of it, at worst).
    slack = 1e-6 * per_block(fmt, shape, largest_of(fmt, weight)).double() + 128 * 1.5e-45
    return bool((error <= STEP.get(fmt.kind, 1.0) / 2 * scale + slack).all())


def largest_of(fmt: Format, weight: torch.Tensor) -> torch.Tensor:
    """max |x| of each block, group or row, in the order of the scales."""
    if fmt.kind in ("nf4", "fp4"):
        return torch.stack([part.abs().max() for part in weight.reshape(-1).split(fmt.block)])
    width = weight.shape[-1] if fmt.kind == "int8" else fmt.block
    parts = weight.reshape(-1, weight.shape[-1]).split(width, 1)
    return torch.stack([part.abs().amax(1) for part in parts], 1).reshape(-1)


EXACT = [f for f in FORMATS if not f.nested and f.zero not in ("int", "float")]


@pytest.mark.parametrize("fmt", EXACT, ids=[IDS[FORMATS.index(f)] for f in EXACT])
@settings(max_examples=20, deadline=None)
@given(array=hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, max_side=70), elements=st.integers(-(10**6), 10**6)))
def test_codes_of_what_was_decoded_are_the_codes(fmt: Format, array: np.ndarray) -> None:
    # Guaranteed where both ends of a block's range are levels: not with an integer zero (its range may shrink at a tie), nor
    # when the scale itself is rounded to 8 bits.
    packed = quantize(torch.from_numpy(array), fmt)
    assert torch.equal(quantize(dequantize(packed), fmt).codes, packed.codes)
    again = quantize(dequantize(packed, torch.bfloat16), fmt) if fmt.kind in ("nf4", "fp4") else packed
    assert torch.equal(again.codes, packed.codes)


@formats
@settings(max_examples=20, deadline=None)
@given(power=st.integers(-20, 20), seed=st.integers(0, 2**32 - 1))
def test_a_power_of_two_scales_the_scales_alone(fmt: Format, power: int, seed: int) -> None:
    weight = torch.randn(5, 90, generator=torch.Generator().manual_seed(seed))
    one, other = quantize(weight, fmt), quantize(weight * 2.0**power, fmt)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(dequantize(one) * 2.0**power, dequantize(other))
