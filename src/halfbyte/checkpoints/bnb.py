"""The bitsandbytes 4-bit layout: nf4 and fp4 weights as transformers + bitsandbytes save them, read and written byte for byte.

A linear weight NAME = `...weight`, n = N*K elements, b blocks, is stored as

    NAME                                     uint8 [ceil(n/2), 1]   codes (any dtype of the same bytes is read)
    NAME.absmax                              fp32 [b]; nested: uint8 [b]
    NAME.quant_map                           fp32 [16]              the format's levels
    NAME.nested_absmax, .nested_quant_map    fp32 [ceil(b/256)], fp32 [256]; nested only
    NAME.quant_state.bitsandbytes__nf4       uint8, a JSON object: quant_type, blocksize, dtype, shape [N, K], and, if nested,
                                             nested_blocksize, nested_dtype, nested_offset

Why checked and not trusted: kernels ignore the stored level tables and use their own, so a file with other levels would load
everywhere and mean something else. Here it is an error. Scales, tables and offsets that are not fp32 (seen in the wild) are read.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoints.shards import Header, Shards, Tensors
from halfbyte.errors import CheckpointError, FormatError
from halfbyte.formats import fp4, nf4
from halfbyte.formats.config import FormatConfig
from halfbyte.formats.dynamic8 import dynamic_map
from halfbyte.formats.packed import BLOCKS, NESTED_BLOCK, Format, Packed
from halfbyte.layers.names import matches

STATE = re.compile(r"(?P<weight>.+)\.quant_state\.bitsandbytes__(?P<kind>nf4|fp4)")
LEVELS = {"nf4": nf4.LEVELS, "fp4": fp4.LEVELS}
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
DTYPES = {str(d)[6:]: d for d in (torch.float32, torch.bfloat16, torch.float16)}


class BnbTensors(Tensors):
    """A bitsandbytes checkpoint: packed weights read as `Packed`, everything else as it is."""

    def __init__(self, files: Shards) -> None:
        self._files = files
        self._states: dict[str, tuple[str, Header, dict[str, Any]]] = {}
        hidden: set[str] = set()
        for key in files.headers():
            if found := STATE.fullmatch(key):
                weight = found["weight"]
                self._states[weight] = self._state(key, weight, found["kind"])
                hidden |= {key, *(f"{weight}.{part}" for part in PARTS)}
        self._dense = {name: header for name, header in files.headers().items() if name not in hidden | set(self._states)}

    def headers(self) -> dict[str, Header]:
        return {**self._dense, **{weight: header for weight, (_, header, _) in self._states.items()}}

    def read(self, name: str) -> Tensor | Packed:
        return self._packed(name) if name in self._states else self._files.read(name)

    def _state(self, key: str, weight: str, kind: str) -> tuple[str, Header, dict[str, Any]]:
        """The quant state's key, the header of the weight, and the JSON object."""
        try:
            state = json.loads(bytes(self._files.read(key).tolist()))
            shape, block, nested = tuple(int(n) for n in state["shape"]), int(state["blocksize"]), "nested_offset" in state
            dtype = DTYPES[state["dtype"]]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{key} is not a quant state: {error!r}", hint="download the file again") from error
        if state.get("quant_type") != kind or block not in BLOCKS or state.get("nested_blocksize", NESTED_BLOCK) != NESTED_BLOCK:
            raise FormatError(f"{key}: a layout that does not exist: {state}")
        wanted = [weight, f"{weight}.absmax", f"{weight}.quant_map"] + [f"{weight}.{part}" for part in PARTS[2:] if nested]
        missing = [part for part in wanted if part not in self._files.headers()]
        if missing:
            raise CheckpointError(f"{weight} is packed, but parts of it are missing: {', '.join(missing)}")
        return key, Header(shape, dtype, Format(kind, block, nested=nested)), state  # type: ignore[arg-type]

    def _packed(self, weight: str) -> Packed:
        _, header, state = self._states[weight]
        fmt = header.packed
        assert fmt is not None
        n = math.prod(header.shape)
        blocks = -(-n // fmt.block)
        codes = self._part(weight, -(-n // 2), None)
        levels = LEVELS[fmt.kind]
        self._check_levels(f"{weight}.quant_map", levels)
        empty = torch.empty(0, dtype=torch.uint8)
        if not fmt.nested:
            scales = self._part(f"{weight}.absmax", blocks, torch.float32)
            return Packed(fmt, header.shape, header.dtype, codes, scales, empty, empty, empty)
        self._check_levels(f"{weight}.nested_quant_map", dynamic_map(True))
        scales = self._part(f"{weight}.absmax", blocks, None)
        outer = self._part(f"{weight}.nested_absmax", -(-blocks // NESTED_BLOCK), torch.float32)
        offset = torch.tensor([float(state["nested_offset"])], dtype=torch.float32).view(torch.uint8)
        return Packed(fmt, header.shape, header.dtype, codes, scales, outer, offset, empty)

    def _part(self, name: str, count: int, dtype: torch.dtype | None) -> Tensor:
        """A part as its own bytes: `count` values of `dtype`, or `count` bytes of whatever the file calls them."""
        tensor = self._files.read(name).reshape(-1)
        tensor = tensor.view(torch.uint8) if dtype is None else tensor.to(dtype)
        if tensor.numel() != count:
            raise CheckpointError(f"{name} has {tensor.numel()} values, {count} expected")
        return tensor.clone().view(torch.uint8)

    def _check_levels(self, name: str, levels: Tensor) -> None:
        stored = self._files.read(name)
        tolerance = 1e-6 if stored.dtype == torch.float32 else 5e-3
        if stored.shape != levels.shape or not torch.allclose(stored.to(torch.float32), levels, rtol=0, atol=tolerance):
            hint = "kernels would ignore these levels and decode other weights; quantise the original model again"
            raise FormatError(f"{name} is not the table of its format", hint=hint, code="bnb.levels")


def check_config(quantization: dict[str, Any], where: str) -> None:
    """Raises CheckpointError unless the config's `quantization_config` is absent or bitsandbytes 4-bit."""
    method = quantization.get("quant_method")
    if not quantization or (method == "bitsandbytes" and quantization.get("load_in_4bit")):
        return
    what = "bitsandbytes 8-bit" if method == "bitsandbytes" else str(method)
    hint = "give the original 16-bit model, or a bitsandbytes 4-bit one (nf4, fp4)"
    raise CheckpointError(f"{where} is quantised by {what}, which cannot be loaded", hint=hint, code="checkpoint.quantized")


def format_of(quantization: dict[str, Any], asked: FormatConfig, paths: list[str]) -> FormatConfig:
    """The format and skip list that a checked `quantization_config` tells, for modules `paths`; the block size is not in it."""
    listed = quantization.get("llm_int8_skip_modules") or []
    skip = [name for name in listed if any(matches(path, name) for path in paths)]
    kind, nested = quantization.get("bnb_4bit_quant_type", "fp4"), bool(quantization.get("bnb_4bit_use_double_quant"))
    return asked.model_copy(update={"kind": kind, "nested": nested, "skip": skip})


def stored(name: str, packed: Packed) -> list[tuple[str, Tensor]]:
    """The tensors that hold weight `name` in a bitsandbytes file: the inverse of reading, byte for byte."""
    fmt = packed.format
    if fmt.kind not in LEVELS:
        raise FormatError(f"{name} is stored as {fmt.kind}; bitsandbytes files hold nf4 and fp4 only")
    state: dict[str, Any] = {
        "quant_type": fmt.kind,
        "blocksize": fmt.block,
        "dtype": str(packed.dtype)[6:],
        "shape": list(packed.shape),
    }
    tensors = [(name, packed.codes.reshape(-1, 1)), (f"{name}.quant_map", LEVELS[fmt.kind])]
    if fmt.nested:
        offset = packed.nested_offset.cpu().view(torch.float32).item()
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        tensors.append((f"{name}.absmax", packed.scales))
        tensors.append((f"{name}.nested_absmax", packed.nested_scales.view(torch.float32)))
        tensors.append((f"{name}.nested_quant_map", dynamic_map(True)))
    else:
        tensors.append((f"{name}.absmax", packed.scales.view(torch.float32)))
    text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    return [*tensors, (f"{name}.quant_state.bitsandbytes__{fmt.kind}", text)]
