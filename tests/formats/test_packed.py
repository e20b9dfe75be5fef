"""`Format` and `Packed`: what exists, what is refused, what travels through a custom operator."""

from __future__ import annotations

import pytest
import torch

from halfbyte.errors import FormatError
from halfbyte.formats.config import FormatConfig
from halfbyte.formats.packed import Format, Packed, matrix_shape
from halfbyte.formats.quantize import dequantize, quantize


@pytest.mark.parametrize(
    ("config", "fmt"),
    [
        ({}, Format("nf4", 64, nested=True)),
        ({"kind": "fp4", "block": 128, "nested": False}, Format("fp4", 128)),
        ({"kind": "int4"}, Format("int4", 64)),
        ({"kind": "int4", "symmetric": False}, Format("int4", 64, zero="int")),
        ({"kind": "int4", "symmetric": False, "zero": "min", "block": 32}, Format("int4", 32, zero="min")),
        ({"kind": "int8"}, Format("int8")),
    ],
)
def test_from_config(config: dict[str, object], fmt: Format) -> None:
    assert Format.from_config(FormatConfig(**config)) == fmt  # type: ignore[arg-type]


def test_no_format_has_nothing_to_pack() -> None:
    with pytest.raises(FormatError, match="16 bits"):
        Format.from_config(FormatConfig(kind="none"))


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"kind": "nf5"}, "unknown format 'nf5'"),
        ({"kind": "nf4", "block": 48}, "no block of 48"),
        ({"kind": "nf4", "block": 16}, "no block of 16"),
        ({"kind": "int4", "block": 33}, "no group of 33"),
        ({"kind": "int4", "nested": True}, "no nested scales"),
        ({"kind": "int8", "nested": True}, "no nested scales"),
        ({"kind": "nf4", "zero": "int"}, "no zero point"),
        ({"kind": "int4", "zero": "half"}, "no zero point"),
    ],
)
def test_what_does_not_exist_is_refused(fields: dict[str, object], word: str) -> None:
    with pytest.raises(FormatError, match=word):
        Format(**fields)  # type: ignore[arg-type]


def test_matrix_shape() -> None:
    assert [matrix_shape(s) for s in ((), (5,), (2, 3), (2, 3, 4), (0, 4))] == [(1, 1), (1, 5), (2, 3), (6, 4), (0, 4)]


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (2, 3, 5)])
@pytest.mark.parametrize("fmt", [Format("nf4", 64, nested=True), Format("int4", 32, zero="min"), Format("int8")])
def test_spec_and_tensors_rebuild_a_packed_weight(fmt: Format, shape: tuple[int, ...]) -> None:
    packed = quantize(torch.randn(shape, dtype=torch.float64), fmt)
    again = Packed.from_spec(packed.spec, packed.tensors())
    assert (again.format, again.shape, again.dtype) == (fmt, shape, torch.float32)
    assert torch.equal(dequantize(again), dequantize(packed))
    assert torch.equal(dequantize(packed.to("cpu")), dequantize(packed))
    assert all(t.dtype == torch.uint8 for t in packed.tensors())
