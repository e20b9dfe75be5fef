"""int4 in its four forms of zero, against a numpy oracle; groups run along K and the last one of a row is short."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from formats import oracle
from halfbyte.formats.packed import Format, Packed, Zero
from halfbyte.formats.quantize import dequantize, quantize, scales_of

ZEROS: tuple[Zero, ...] = ("none", "int", "float", "min")


def rows_of(packed: Packed) -> list[list[int]]:
    """Codes by row, from the bytes."""
    rows, columns = packed.shape
    bytes_of_rows = packed.codes.view(rows, -1).tolist()
    return [[n for byte in row for n in (byte >> 4, byte & 15)][:columns] for row in bytes_of_rows]


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("block", [32, 64, 128, 4096])
@pytest.mark.parametrize("columns", [1, 31, 64, 97, 431])
def test_codes_scales_zeros_and_values_equal_the_oracle(zero: Zero, block: int, columns: int) -> None:
    x = np.random.default_rng(columns).normal(loc=0.3, size=(5, columns)).astype(np.float32)
    packed = quantize(torch.from_numpy(x), Format("int4", block, zero=zero))
    codes, decoded = rows_of(packed), dequantize(packed).numpy()
    groups = -(-columns // block)
    scales, zeros = scales_of(packed).view(5, groups), packed.zeros.view(torch.float32)
    assert packed.codes.shape == (5 * -(-columns // 2),)
    assert zeros.shape == ((0,) if zero == "none" else (5 * groups,))
    for r in range(5):
        for g in range(groups):
            span = slice(g * block, min((g + 1) * block, columns))
            q, s, z = oracle.int4_group(x[r, span], zero)
            assert codes[r][span] == q.astype(int).tolist()
            assert scales[r, g].item() == s
            assert zero == "none" or zeros.view(5, groups)[r, g].item() == z
            np.testing.assert_array_equal(decoded[r, span], oracle.int4_value(q, s, z, zero))


@pytest.mark.parametrize("zero", ZEROS)
def test_a_group_of_zeros_decodes_to_zeros(zero: Zero) -> None:
    x = torch.zeros(3, 97)
    x[1, :40] = torch.randn(40)
    decoded = dequantize(quantize(x, Format("int4", 32, zero=zero)))
    assert (decoded[[0, 2]] == 0).all()
    assert (decoded[1, 64:] == 0).all()


@pytest.mark.parametrize("zero", ("float", "min"))
@pytest.mark.parametrize("value", [3.7, -2e-3, 1e-40])
def test_a_constant_group_is_exact(zero: Zero, value: float) -> None:
    x = torch.full((2, 33), value)
    assert torch.equal(dequantize(quantize(x, Format("int4", 32, zero=zero))), x)


def test_an_integer_zero_keeps_zero_exact() -> None:
    x = torch.rand(4, 64) + 0.5
    x[:, ::7] = 0
    decoded = dequantize(quantize(x, Format("int4", 32, zero="int")))
    assert (decoded[:, ::7] == 0).all()


def test_the_symmetric_form_uses_fifteen_codes_but_reads_sixteen() -> None:
    packed = quantize(torch.tensor([[-7.0, 7.0, 0.0, 1.0]]), Format("int4", 32))
    assert rows_of(packed) == [[1, 15, 8, 9]]
    packed.codes[0] = 0x0F
    assert dequantize(packed).tolist() == [[-8.0, 7.0, 0.0, 1.0]]


def test_values_on_an_affine_grid_of_32_come_back() -> None:
    # What a Q4_1 file holds: q * d + m with 16-bit d and m, both ends of the range in use.
    rng = np.random.default_rng(0)
    q = rng.integers(0, 16, size=(64, 4, 32))
    q[..., 0], q[..., 1] = 0, 15
    d = rng.uniform(0.001, 0.1, size=(64, 4, 1)).astype(np.float16).astype(np.float32)
    m = rng.normal(size=(64, 4, 1)).astype(np.float16).astype(np.float32)
    x = torch.from_numpy((q.astype(np.float32) * d + m).reshape(64, 128))
    packed = quantize(x, Format("int4", 32, zero="min"))
    assert rows_of(packed) == q.reshape(64, 128).tolist()
    torch.testing.assert_close(dequantize(packed), x, rtol=0, atol=1e-6)


def test_groups_of_a_foreign_width() -> None:
    x = torch.randn(4, 90)
    packed = quantize(x, Format("int4", 90))
    assert scales_of(packed).shape == (4,)
    assert (dequantize(packed) - x).abs().max() <= scales_of(packed).max() * 0.5001
