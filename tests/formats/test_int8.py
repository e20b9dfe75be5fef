"""int8: one scale an output channel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from halfbyte.formats import tiling
from halfbyte.formats.packed import Format
from halfbyte.formats.quantize import dequantize, quantize, scales_of


@pytest.mark.parametrize("shape", [(1, 1), (5, 431), (64, 48), (3, 4, 33)])
@pytest.mark.parametrize("chunk", [16, 1 << 18])
def test_codes_and_scales_equal_numpy(shape: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "CHUNK", chunk)
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    packed = quantize(torch.from_numpy(x), Format("int8"))
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    codes = np.rint(x / scale).astype(np.int8)
    np.testing.assert_array_equal(packed.codes.view(torch.int8).numpy(), codes.reshape(-1))
    np.testing.assert_array_equal(scales_of(packed).numpy(), scale.reshape(-1))
    np.testing.assert_array_equal(dequantize(packed).numpy(), codes.astype(np.float32) * scale)


def test_zero_and_denormal_rows() -> None:
    x = torch.zeros(3, 8)
    x[1, 0], x[2, 0] = 1e-44, -1.0
    decoded = dequantize(quantize(x, Format("int8")))
    assert (decoded[0] == 0).all()
    assert decoded.isfinite().all()
    assert decoded[2, 0] == -1.0
