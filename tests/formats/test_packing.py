"""Two codes a byte, the first element in the high nibble."""

from __future__ import annotations

import pytest
import torch

from formats import oracle
from halfbyte.formats.packing import pack_nibbles, unpack_nibbles


def test_the_first_element_is_in_the_high_nibble() -> None:
    packed = pack_nibbles(torch.tensor([0xA, 0x1, 0x0, 0xF, 0x3], dtype=torch.uint8), pad=7)
    assert packed.tolist() == [0xA1, 0x0F, 0x37]


@pytest.mark.parametrize("k", [0, 1, 2, 7, 64, 431])
@pytest.mark.parametrize("rows", [None, 1, 3])
def test_packing_and_back(k: int, rows: int | None) -> None:
    shape = (k,) if rows is None else (rows, k)
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    packed = pack_nibbles(codes, pad=7)
    assert packed.shape == (*shape[:-1], -(-k // 2))
    assert torch.equal(unpack_nibbles(packed, k), codes)
    if rows is None:
        assert packed.numpy().tobytes() == oracle.pack(codes.numpy(), zero=7)
