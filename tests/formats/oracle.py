"""What the formats must compute, a second time: numpy, element by element where that is clearer, no code of the package.

Tables come from their definitions (the normal quantile function, twelfths), not from the package's constants.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

F32 = np.float32


def nf4_levels() -> np.ndarray:
    """QLoRA, section 3: 8 + 1 quantiles on the positive side, 7 on the negative, and an exact zero; scaled to [-1, 1]."""
    offset = 0.9677083
    positive = [NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.array(sorted([*positive, 0.0, *negative]))
    return (levels / levels.max()).astype(F32)


def fp4_levels() -> np.ndarray:
    """By code: sign bit, then twelfths."""
    twelfths = [0, 1 / 16, 8, 12, 4, 6, 2, 3]
    return np.array([t / 12 for t in twelfths] + [-t / 12 for t in twelfths]).astype(F32)


def nearest(levels: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Index of the nearest of the ascending fp32 levels by fp32 midpoints; a tie goes to the lower one."""
    midpoints = ((levels[1:] + levels[:-1]) * F32(0.5)).astype(F32)
    return np.searchsorted(midpoints, x, side="left")


def block_scales(x: np.ndarray, block: int) -> np.ndarray:
    """max |x| of each block of the flat array."""
    return np.array([np.abs(x[i : i + block]).max() for i in range(0, len(x), block)], dtype=F32)


def normalised(x: np.ndarray, block: int) -> np.ndarray:
    """x / scale in fp32; 0 in an all-zero block."""
    scale = np.repeat(block_scales(x, block), block)[: len(x)]
    return np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)


def nf4_codes(x: np.ndarray, block: int, levels: np.ndarray) -> np.ndarray:
    return nearest(levels, normalised(x, block)).astype(np.uint8)


def fp4_values(x: np.ndarray, block: int) -> np.ndarray:
    """The level each element rounds to: by magnitude, ties towards zero."""
    v = normalised(x, block)
    magnitudes = np.sort(fp4_levels()[:8])
    return np.sign(v) * magnitudes[nearest(magnitudes, np.abs(v))]


def pack(codes: np.ndarray, zero: int) -> bytes:
    """First element in the high nibble; an odd count is completed with the zero code."""
    codes = [*codes.tolist(), zero] if len(codes) % 2 else codes.tolist()
    return bytes(16 * high + low for high, low in zip(codes[::2], codes[1::2], strict=True))


def dynamic_levels(signed: bool) -> np.ndarray:
    """In float64: every decade 10^(i-6), i = 0..6, holds 2^i (unsigned 2^(i+1)) middles of equal parts of [0.1, 1]."""
    levels = [0.0, 1.0]
    for i in range(7):
        parts = 2**i if signed else 2 ** (i + 1)
        middles = [10.0 ** (i - 6) * (0.1 + 0.9 * (k + 0.5) / parts) for k in range(parts)]
        levels += middles
        if signed:
            levels += [-m for m in middles]
    return np.array(sorted(levels))


def int4_group(x: np.ndarray, zero: str) -> tuple[np.ndarray, F32, F32]:
    """Codes, scale and zero of one group, fp32."""
    if zero == "none":
        scale = F32(np.abs(x).max() / F32(7))
        q = np.rint(x / scale) if scale else np.zeros_like(x)
        return np.clip(q, -7, 7) + 8, scale, F32(0)
    low, high = x.min(), x.max()
    if zero == "int":
        low, high = min(low, F32(0)), max(high, F32(0))
        scale = F32((high - low) / F32(15))
        if not scale:
            return np.zeros_like(x), scale, F32(0)
        z = np.rint(-low / scale)
        return np.clip(np.rint(x / scale) + z, 0, 15), scale, z
    scale = F32((high - low) / F32(15))
    q = np.clip(np.rint((x - low) / scale), 0, 15) if scale else np.zeros_like(x)
    if zero == "min":
        return q, scale, low
    scale = scale if scale else F32(1)
    return q, scale, F32(-low / scale)


def int4_value(q: np.ndarray, scale: F32, z: F32, zero: str) -> np.ndarray:
    q = q.astype(F32)
    if zero == "none":
        return (q - F32(8)) * scale
    return q * scale + z if zero == "min" else (q - z) * scale
