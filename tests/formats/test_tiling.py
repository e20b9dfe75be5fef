"""Tiles: a partition whatever the size, beyond 2^31 included."""

from __future__ import annotations

import pytest
import torch

from halfbyte.formats import tiling

CPU = torch.device("cpu")


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 1000, 2**18, 2**31 + 100, 2**33 + 1])
@pytest.mark.parametrize("unit", [1, 32, 4096, 11008])
def test_flat_tiles_are_a_partition_aligned_to_the_unit(n: int, unit: int) -> None:
    end = 0
    for span in tiling.flat_tiles(n, unit, CPU):
        assert span.start == end
        assert span.start % unit == 0
        assert 0 < span.stop - span.start <= max(tiling.CHUNK, unit)
        end = span.stop
    assert end == n


@pytest.mark.parametrize(("rows", "columns"), [(0, 8), (3, 0), (1, 1), (7, 100), (2, 2**19 + 3), (5000, 333)])
def test_matrix_tiles_cover_every_element_once(rows: int, columns: int) -> None:
    seen = torch.zeros(rows, columns, dtype=torch.uint8)
    for row, column in tiling.matrix_tiles(rows, columns, 64, CPU):
        assert column.start % 64 == 0
        seen[row, column] += 1
    assert (seen == 1).all()


def test_an_accelerator_gets_larger_tiles() -> None:
    first = next(tiling.flat_tiles(2**40, 64, torch.device("meta")))
    assert first.stop == tiling.ACCELERATOR_CHUNK > tiling.CHUNK
