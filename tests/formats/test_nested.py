"""Nested scales against the definition, and the all-zero block that bitsandbytes' CUDA encoder gets wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from formats import oracle
from halfbyte.formats import nested
from halfbyte.formats.dynamic8 import dynamic_map
from halfbyte.formats.packed import Format, Packed
from halfbyte.formats.quantize import dequantize, quantize, scales_of


@pytest.mark.parametrize("blocks", [1, 2, 255, 256, 257, 5000])
def test_codes_are_the_nearest_levels_and_decoding_is_product_then_sum(blocks: int) -> None:
    scales = np.abs(np.random.default_rng(blocks).normal(0.05, 0.01, size=blocks)).astype(np.float32)
    codes, outer, offset = nested.encode(torch.from_numpy(scales))
    mean = np.float32(scales.astype(np.float64).mean())
    assert offset.item() == mean
    r = scales - mean
    levels = dynamic_map(True).numpy()
    np.testing.assert_array_equal(codes.numpy(), oracle.nearest(levels, oracle.normalised(r, 256)))
    np.testing.assert_array_equal(outer.numpy(), oracle.block_scales(r, 256))
    decoded = levels[codes.numpy()] * np.repeat(outer.numpy(), 256)[:blocks] + mean
    np.testing.assert_array_equal(nested.decode(codes, outer, offset).numpy(), decoded)


def test_nesting_changes_scales_only() -> None:
    w = torch.randn(63, 130)
    plain, twice = quantize(w, Format("nf4", 64)), quantize(w, Format("nf4", 64, nested=True))
    assert torch.equal(plain.codes, twice.codes)
    error = (scales_of(twice) - scales_of(plain)).abs() / scales_of(plain)
    assert 0 < error.max() < 0.02


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_zero_block_stays_zero_though_its_scale_does_not(kind: str) -> None:
    w = torch.randn(400, 64) * 0.02
    w[7] = 0
    packed = quantize(w, Format(kind, 64, nested=True))  # type: ignore[arg-type]
    assert scales_of(packed)[7] != 0
    assert (dequantize(packed)[7] == 0).all()


def test_a_file_with_the_zero_block_defect_decodes_as_it_always_did() -> None:
    # Code 0 in a zero block: minus the scale that nesting made up.
    w = torch.randn(400, 64) * 0.02
    w[7] = 0
    good = quantize(w, Format("nf4", 64, nested=True))
    codes = good.codes.clone()
    codes[7 * 32 : 8 * 32] = 0
    bad = Packed(good.format, good.shape, good.dtype, codes, *good.tensors()[1:])
    assert torch.equal(dequantize(bad)[7], -scales_of(bad)[7].expand(64))


def test_scales_that_are_all_equal() -> None:
    packed = quantize(torch.ones(64, 64), Format("nf4", 64, nested=True))
    assert (dequantize(packed) == 1).all()
