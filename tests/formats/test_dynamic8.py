"""The dynamic 8-bit maps: their bytes, their definition, and nearest-level rounding."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from formats import oracle
from halfbyte.formats import tiling
from halfbyte.formats.dynamic8 import dequantize_blockwise, dynamic_map, quantize_blockwise

SHA256 = {
    True: "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c",
    False: "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398",
}


@pytest.mark.parametrize("signed", [True, False])
def test_the_maps_byte_by_byte(signed: bool) -> None:
    levels = dynamic_map(signed)
    assert hashlib.sha256(levels.numpy().astype("<f4").tobytes()).hexdigest() == SHA256[signed]
    np.testing.assert_allclose(levels.numpy(), oracle.dynamic_levels(signed), rtol=5e-7)
    assert levels.unique().numel() == 256
    assert levels[127 if signed else 0] == 0


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 10_000])
def test_codes_are_the_nearest_levels(signed: bool, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "CHUNK", 1024)
    rng = np.random.default_rng(n)
    # Seven decades, so that every code is in use.
    x = (rng.normal(size=n) * 10 ** rng.uniform(-7, 0, size=n)).astype(np.float32)
    x = x if signed else np.abs(x)
    codes, scales = quantize_blockwise(torch.from_numpy(x), 256, signed=signed)
    levels = dynamic_map(signed).numpy()
    v = oracle.normalised(x, 256)
    np.testing.assert_array_equal(codes.numpy(), oracle.nearest(levels, v))
    np.testing.assert_array_equal(scales.numpy(), oracle.block_scales(x, 256))
    # And by brute force: no level is nearer, exactly, beyond the rounding of a midpoint to fp32.
    distance = np.abs(v.astype(np.float64)[:, None] - levels.astype(np.float64)[None])
    chosen = np.take_along_axis(distance, codes.numpy().astype(int)[:, None], 1)[:, 0]
    assert (chosen <= distance.min(1) + np.spacing(np.abs(v))).all()
    decoded = dequantize_blockwise(codes, scales, 256, signed=signed).numpy()
    np.testing.assert_array_equal(decoded, levels[codes.numpy()] * np.repeat(scales.numpy(), 256)[:n])


def test_ties_go_to_the_lower_level() -> None:
    levels = dynamic_map(True)
    ties = ((levels[1:] + levels[:-1]) * 0.5).unique()
    x = torch.cat([ties, torch.ones(1)])
    codes, _ = quantize_blockwise(x, 256)
    assert codes.tolist() == [*range(255), 255]


def test_the_signed_map_has_no_minus_one() -> None:
    codes, scales = quantize_blockwise(torch.tensor([-2.0, 1.0]), 256)
    assert dequantize_blockwise(codes, scales, 256)[0].item() == pytest.approx(-2 * 0.992968738079071)


def test_a_zero_block_is_zero() -> None:
    codes, scales = quantize_blockwise(torch.zeros(300), 256)
    assert (codes == 127).all()
    assert (dequantize_blockwise(codes, scales, 256) == 0).all()


@pytest.mark.cpu
def test_global_defaults_do_not_reach_the_map() -> None:
    script = (
        "import torch; torch.set_default_dtype(torch.bfloat16); torch.set_default_device('meta')\n"
        "from halfbyte.formats import dynamic8, fp4, nf4, quantize\n"
        "from halfbyte.formats.packed import Format\n"
        "assert all(t.device.type == 'cpu' and t.dtype == torch.float32 for t in (dynamic8.SIGNED, nf4.LEVELS, fp4.LEVELS))\n"
        "import hashlib; print(hashlib.sha256(dynamic8.SIGNED.numpy().tobytes()).hexdigest())\n"
        "x = torch.arange(640, dtype=torch.float32, device='cpu')\n"
        "for kind in ('nf4', 'fp4', 'int4', 'int8'):\n"
        "    assert quantize.dequantize(quantize.quantize(x, Format(kind))).dtype == torch.float32\n"
        "quantize.dequantize(quantize.quantize(x, Format('nf4', 64, nested=True)))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False, env=env)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == SHA256[True]
