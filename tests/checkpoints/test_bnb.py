"""bitsandbytes checkpoints, read: bytes, tables, tolerated dtypes, refused ones. Both ways with transformers: tests/export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from halfbyte.checkpoints import bnb
from halfbyte.checkpoints.shards import Shards
from halfbyte.errors import CheckpointError, FormatError
from halfbyte.formats.packed import Format, Packed
from halfbyte.formats.quantize import dequantize, quantize

WEIGHT = torch.randn(48, 72, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
FORMATS = [Format(kind, block, nested=nested) for kind in ("nf4", "fp4") for nested in (False, True) for block in (32, 64, 256)]  # type: ignore[arg-type]


def read(tensors: dict[str, Tensor], directory: Path) -> Packed:
    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / "x.safetensors")
    value = bnb.BnbTensors(Shards([directory / "x.safetensors"])).read("w.weight")
    assert isinstance(value, Packed)
    return value


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_stored_and_read_are_mirrors(fmt: Format, tmp_path: Path) -> None:
    packed = quantize(WEIGHT, fmt)
    tensors = dict(bnb.stored("w.weight", packed))
    back = read(tensors, tmp_path)
    assert back.spec == packed.spec
    assert all(torch.equal(a, b) for a, b in zip(back.tensors(), packed.tensors(), strict=True))
    again = dict(bnb.stored("w.weight", back))
    assert again.keys() == tensors.keys() and all(torch.equal(again[k], tensors[k]) for k in tensors)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_the_library_reads_what_is_stored(fmt: Format) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(64, 256).to(torch.bfloat16)
    packed = quantize(weight, fmt)
    tensors = dict(bnb.stored("w.weight", packed))
    parts = {k.removeprefix("w."): v for k, v in tensors.items() if k != "w.weight"}
    state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
    assert torch.equal(functional.dequantize_4bit(tensors["w.weight"], state), dequantize(packed))


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.block == 64], ids=str)
def test_keys_shapes_and_json_are_the_librarys(fmt: Format) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(WEIGHT, blocksize=64, quant_type=fmt.kind, compress_statistics=fmt.nested)
    theirs = {"w.weight": codes} | {f"w.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    ours = dict(bnb.stored("w.weight", quantize(WEIGHT, fmt)))
    described = {k: (tuple(v.shape), v.dtype) for k, v in ours.items() if "quant_state" not in k}
    assert described == {k: (tuple(v.shape), v.dtype) for k, v in theirs.items() if "quant_state" not in k}
    key = f"w.weight.quant_state.bitsandbytes__{fmt.kind}"
    texts = [bytes(t[key].tolist()).decode() for t in (ours, theirs)]
    assert list(json.loads(texts[0])) == list(json.loads(texts[1]))
    assert texts[0].rpartition("nested_offset")[0] == texts[1].rpartition("nested_offset")[0]
    assert torch.equal(ours["w.weight.quant_map"], theirs["w.weight.quant_map"])
    if fmt.nested:
        assert torch.equal(ours["w.weight.nested_quant_map"], theirs["w.weight.nested_quant_map"])


def stored(fmt: Format) -> dict[str, Tensor]:
    return dict(bnb.stored("w.weight", quantize(WEIGHT, fmt)))


def test_other_dtypes_are_read(tmp_path: Path) -> None:
    tensors = stored(Format("nf4", 64))
    expected = read(tensors, tmp_path)
    tensors["w.weight"] = tensors["w.weight"].view(-1).view(torch.bfloat16).view(-1, 1)
    assert torch.equal(read(tensors, tmp_path).codes, expected.codes)
    tensors["w.weight.absmax"] = tensors["w.weight.absmax"].to(torch.float16)
    tensors["w.weight.quant_map"] = tensors["w.weight.quant_map"].to(torch.bfloat16)
    torch.testing.assert_close(dequantize(read(tensors, tmp_path)), dequantize(expected), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["quant_map", "nested_quant_map"])
def test_a_foreign_table_is_an_error(name: str, tmp_path: Path) -> None:
    tensors = stored(Format("nf4", 64, nested=True))
    tensors[f"w.weight.{name}"] = tensors[f"w.weight.{name}"].clone()
    tensors[f"w.weight.{name}"][3] += 0.01
    with pytest.raises(FormatError, match=rf"w\.weight\.{name}"):
        read(tensors, tmp_path)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    tensors = stored(Format("nf4", 64, nested=True))
    del tensors["w.weight.absmax"], tensors["w.weight.nested_absmax"]
    with pytest.raises(CheckpointError, match=r"w\.weight\.absmax, w\.weight\.nested_absmax"):
        read(tensors, tmp_path)


@pytest.mark.parametrize(
    "change", [{"blocksize": 48}, {"quant_type": "fp4"}, {"dtype": "int3"}, {"shape": None}, {"nested_blocksize": 64}]
)
def test_an_impossible_state_is_an_error(change: dict[str, Any], tmp_path: Path) -> None:
    tensors = stored(Format("nf4", 64, nested=True))
    key = "w.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[key].tolist())) | change
    tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises((CheckpointError, FormatError), match="quant_state"):
        read(tensors, tmp_path)


def test_codes_of_the_wrong_length(tmp_path: Path) -> None:
    tensors = stored(Format("nf4", 64))
    tensors["w.weight"] = tensors["w.weight"][:-1]
    with pytest.raises(CheckpointError, match=r"w\.weight has 1727 values, 1728 expected"):
        read(tensors, tmp_path)
