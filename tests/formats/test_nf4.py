"""NF4 against its definition and a numpy oracle: levels, thresholds, ties, packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from formats import oracle
from halfbyte.formats import nf4
from halfbyte.formats.packed import BLOCKS, Format
from halfbyte.formats.quantize import dequantize, quantize, scales_of

LEVELS = nf4.LEVELS.numpy()


def test_the_levels_are_the_normal_quantiles_of_the_paper() -> None:
    # The published constants were computed in lower precision than the definition.
    np.testing.assert_allclose(LEVELS, oracle.nf4_levels(), atol=3e-6)
    assert LEVELS[nf4.ZERO_CODE] == 0
    assert (LEVELS[0], LEVELS[15]) == (-1, 1)


def test_the_thresholds_are_the_fp32_midpoints() -> None:
    assert torch.equal(nf4.THRESHOLDS, (nf4.LEVELS[1:] + nf4.LEVELS[:-1]) * 0.5)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 9999])
def test_codes_and_bytes_equal_the_oracle(block: int, n: int) -> None:
    x = np.random.default_rng(block + n).normal(size=n).astype(np.float32)
    packed = quantize(torch.from_numpy(x), Format("nf4", block))
    assert packed.codes.numpy().tobytes() == oracle.pack(oracle.nf4_codes(x, block, LEVELS), zero=7)
    np.testing.assert_array_equal(scales_of(packed).numpy(), oracle.block_scales(x, block))


def test_a_tie_goes_to_the_lower_code_and_the_next_float_to_the_upper() -> None:
    for i, t in enumerate(nf4.THRESHOLDS.tolist()):
        t32 = np.float32(t)
        x = torch.zeros(32)
        x[0] = 1.0
        x[1], x[2], x[3] = t, float(np.nextafter(t32, np.float32(2))), float(np.nextafter(t32, np.float32(-2)))
        codes = quantize(x, Format("nf4", 32)).codes
        assert [int(codes[0]) & 15, int(codes[1]) >> 4, int(codes[1]) & 15] == [i, i + 1, i]


def test_every_float_near_a_cell_border_finds_its_code() -> None:
    # The search goes by 64 equal cells: values around each border and threshold, several ulp deep.
    centres = np.concatenate([np.linspace(-1, 1, 65), nf4.THRESHOLDS.numpy()]).astype(np.float32)
    values = [centres]
    for direction in (-2.0, 2.0):
        x = centres
        for _ in range(4):
            x = np.nextafter(x, np.float32(direction))
            values.append(x)
    x = np.clip(np.concatenate(values), -1, 1)
    # A leading 1 in each block of 32 makes its scale 1, so that the values are seen as they are.
    blocks = np.ones((-(-len(x) // 31), 32), dtype=np.float32)
    blocks[:, 1:] = np.resize(x, (len(blocks), 31))
    packed = quantize(torch.from_numpy(blocks), Format("nf4", 32))
    assert (scales_of(packed) == 1).all()
    assert packed.codes.numpy().tobytes() == oracle.pack(oracle.nearest(LEVELS, blocks.reshape(-1)).astype(np.uint8), zero=7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoding_is_one_fp32_product_and_one_rounding(dtype: torch.dtype) -> None:
    packed = quantize(torch.randn(7, 431), Format("nf4", 64))
    nibbles = [n for byte in packed.codes.tolist() for n in (byte >> 4, byte & 15)][: 7 * 431]
    scale = np.repeat(scales_of(packed).numpy(), 64)[: 7 * 431]
    truth = torch.from_numpy(LEVELS[nibbles] * scale).to(dtype).view(7, 431)
    assert torch.equal(dequantize(packed, dtype), truth)


def test_an_odd_count_ends_in_the_zero_code() -> None:
    assert quantize(torch.ones(3), Format("nf4", 32)).codes.tolist() == [0xFF, 0xF7]
