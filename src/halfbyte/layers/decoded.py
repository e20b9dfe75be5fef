"""Decoded weights kept in memory for a while: what a CPU with RAM to spare does instead of decoding at every call.

Why: on a CPU, decoding a weight costs as much as multiplying some tens of tokens by it, so generation, token by token, would
spend nearly all its time decoding, and a training step of 64 tokens half of it. On a GPU it costs little; fused layers hold decoded
weights themselves where memory is left over (`layers.fused.holding`).
The numbers are the same bits: a held weight is what `dequantize` would return. Cost: the model in the compute dtype, on top of
the packed one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from halfbyte import machine
from halfbyte.kernels.dequantize import dequantize
from halfbyte.layers.linear import Linear4bit

log = logging.getLogger("halfbyte")
SHARE = 0.5
"""Of the memory that is free, what may be used."""


@contextmanager
def held(model: nn.Module, dtype: torch.dtype, *, limit: int | None = None) -> Iterator[bool]:
    """Within it, packed layers on the CPU answer from decoded weights in `dtype`. Yields whether they do.

    All or none: when they would take more than `limit` bytes (default: half of the memory that is free) nothing is held.
    """
    layers = _layers(model)
    wanted = size(model, dtype)
    room = limit if limit is not None else int(SHARE * machine.ram().free)
    if not layers or wanted > room:
        log.debug("decoded weights are not held: %d bytes wanted, room for %d", wanted, room)
        yield False
        return
    try:
        for layer in layers:
            layer.decoded = dequantize(layer.packed, dtype)
        yield True
    finally:
        for layer in layers:
            layer.decoded = None


def size(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes that `held` would take for what it does not hold yet."""
    return sum(layer.packed.numel for layer in _layers(model)) * dtype.itemsize


def _layers(model: nn.Module) -> list[Linear4bit]:
    return [m for m in model.modules() if isinstance(m, Linear4bit) and m.codes.device.type == "cpu" and m.decoded is None]
