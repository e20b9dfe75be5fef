"""The fp32 levels behind a nibble, for every format that keeps two codes a byte."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from halfbyte.formats import nf4
from halfbyte.formats.dynamic8 import dynamic_map


@functools.cache
def levels(kind: str, device: str = "cpu") -> Tensor:
    """fp32 `[16]`: the codebook (nf4, fp4). Cached on each device."""
    return nf4.LEVELS.to(device)


@functools.cache
def nested_levels(device: str) -> Tensor:
    """fp32 `[256]`: the signed dynamic map of nested scales. Cached on each device."""
    return dynamic_map(True).to(device)
