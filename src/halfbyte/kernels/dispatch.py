"""Which twin of an operation runs: CUDA takes the fused one (Triton), a CPU the `cpu` one, the reference is always there.

Why a variable and no argument: the twins mean the same, so no caller should have to choose. `HALFBYTE_KERNELS=reference|fused`
forces one, for tests and for finding a fault; what is forced, or fallen back to, is logged once. Fused on CPU tensors needs
`TRITON_INTERPRET=1`.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from typing import Literal

import torch

from halfbyte.errors import RecipeError

Twin = Literal["reference", "fused", "cpu"]
VARIABLE = "HALFBYTE_KERNELS"
_log = logging.getLogger("halfbyte.kernels")


@functools.cache
def _forced(value: str) -> Twin:
    if value not in ("reference", "fused"):
        raise RecipeError(f"{VARIABLE}={value} is not a twin", hint="use reference or fused, or leave it unset")
    _log.warning("kernels: %s (forced by %s)", value, VARIABLE)
    return value  # type: ignore[return-value]


@functools.cache
def _cuda() -> Twin:
    if importlib.util.find_spec("triton") is not None:
        return "fused"
    _log.warning("kernels: reference (triton is not installed: slower and needs more memory; `pip install halfbyte[gpu]`)")
    return "reference"


def twin(device: torch.device) -> Twin:
    """The twin for tensors on `device`."""
    value = os.environ.get(VARIABLE)
    if value:
        return _forced(value)
    if device.type == "cuda":
        return _cuda()
    return "cpu" if device.type == "cpu" else "reference"
