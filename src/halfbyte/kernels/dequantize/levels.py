"""The small tables behind the codes, in fp32, once a device."""

from __future__ import annotations

import functools

from torch import Tensor

from halfbyte.formats.dynamic8 import dynamic_map
from halfbyte.formats.quantize import BOOKS


@functools.cache
def levels(kind: str, device: str = "cpu") -> Tensor:
    """fp32 `[16]`: what the codes of nf4 or fp4 stand for."""
    return BOOKS[kind].levels.to(device)


@functools.cache
def nested_levels(device: str = "cpu") -> Tensor:
    """fp32 `[256]`: the signed dynamic map of nested scales."""
    return dynamic_map(True).to(device)
