"""FP4 against its definition and a numpy oracle, by value: code 8 is a second zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from formats import oracle
from halfbyte.formats import fp4
from halfbyte.formats.packed import BLOCKS, Format
from halfbyte.formats.quantize import dequantize, quantize


def test_the_levels_are_the_twelfths() -> None:
    np.testing.assert_array_equal(fp4.LEVELS.numpy(), oracle.fp4_levels())


def test_the_thresholds_are_the_fp32_midpoints() -> None:
    ascending = np.sort(oracle.fp4_levels()[:8])
    np.testing.assert_array_equal(fp4.THRESHOLDS.numpy(), (ascending[1:] + ascending[:-1]) * np.float32(0.5))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 9999])
def test_values_equal_the_oracle(block: int, n: int) -> None:
    x = np.random.default_rng(block + n).normal(size=n).astype(np.float32)
    packed = quantize(torch.from_numpy(x), Format("fp4", block))
    scale = np.repeat(oracle.block_scales(x, block), block)[:n]
    np.testing.assert_array_equal(dequantize(packed).numpy(), oracle.fp4_values(x, block) * scale)


def test_ties_go_towards_zero_on_both_sides() -> None:
    ascending = [0, 1, 6, 7, 4, 5, 2, 3]
    for rank, t in enumerate(fp4.THRESHOLDS.tolist()):
        up = float(np.nextafter(np.float32(t), np.float32(2)))
        x = torch.zeros(32)
        x[:6] = torch.tensor([1.0, t, -t, up, -up, -1.0])
        codes = quantize(x, Format("fp4", 32)).codes
        got = [n for byte in codes[:3].tolist() for n in (byte >> 4, byte & 15)]
        below, above = ascending[rank], ascending[rank + 1]
        assert got == [3, below, below | 8 if below else 0, above, above | 8, 11]


def test_the_second_zero_is_never_written_but_read() -> None:
    packed = quantize(torch.tensor([1.0, -1e-6, 1e-6, -0.0]), Format("fp4", 32))
    assert packed.codes.tolist() == [0x30, 0x00]
    packed.codes[1] = 0x80
    assert dequantize(packed).tolist() == [1.0, 0.0, 0.0, 0.0]
