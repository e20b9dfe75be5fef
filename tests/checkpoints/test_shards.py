"""Safetensors files, one tensor at a time: damage is named, and what is written the format's own library reads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfbyte.checkpoints import shards
from halfbyte.errors import CheckpointError

TENSORS: dict[str, Tensor] = {
    "odd": torch.arange(7, dtype=torch.uint8),
    "a.weight": torch.randn(3, 5).to(torch.bfloat16),
    "b": torch.randn(2, 2),
    "none": torch.empty(0, dtype=torch.uint8),
    "scalar": torch.tensor(3.5),
    "turned": torch.randn(4, 6).T,
}


def test_written_files_are_read_by_the_library(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    sums = shards.write(file, TENSORS.items(), {"format": "pt"})
    back = load_file(file)
    assert back.keys() == TENSORS.keys() == sums.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype, name
        assert sums[name] == hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    save_file({k: v.contiguous() for k, v in TENSORS.items()}, tmp_path / "x.safetensors")
    source = shards.Shards([tmp_path / "x.safetensors"])
    assert {k: h.shape for k, h in source.headers().items()} == {k: tuple(v.shape) for k, v in TENSORS.items()}
    assert all(torch.equal(source.read(k), v) for k, v in TENSORS.items())


def test_sharded_and_single(tmp_path: Path) -> None:
    tensors = [(f"t{i}", torch.full((100,), float(i))) for i in range(10)]
    assert shards.write_sharded(tmp_path, tensors, 4000) == ["model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    files = shards.write_sharded(tmp_path, tensors, 1000)
    assert files == [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    source = shards.open_directory(tmp_path)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors)
    (tmp_path / files[2]).unlink()
    (tmp_path / files[4]).unlink()
    with pytest.raises(CheckpointError, match=f"{files[2]}, {files[4]}"):
        shards.open_directory(tmp_path)


def damage(data: bytes, how: str) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    match how:
        case "empty":
            return b""
        case "cut":
            return data[:-1]
        case "longer":
            return data + b"\0"
        case "huge header":
            return (1 << 60).to_bytes(8, "little") + data[8:]
        case "not json":
            return data[:8] + b"x" * length + data[8 + length :]
        case "offsets":
            header["b"]["data_offsets"][1] += 4
        case "no shape":
            del header["b"]["shape"]
        case "dtype":
            header["b"]["dtype"] = "F3"
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@pytest.mark.parametrize("how", ["empty", "cut", "longer", "huge header", "not json", "offsets", "no shape", "dtype"])
def test_damage_names_the_file(how: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    shards.write(file, TENSORS.items(), {})
    file.write_bytes(damage(file.read_bytes(), how))
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        shards.Shards([file])


F32 = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
HEADERS: dict[str, object] = {
    "a list": [],
    "a number": 5,
    "null": None,
    "metadata of text": {"__metadata__": "x", "a": F32},
    "metadata of numbers": {"__metadata__": {"format": 1}, "a": F32},
    "an entry of text": {"a": "x"},
    "offsets of text": {"a": F32 | {"data_offsets": ["0", "64"]}},
    "offsets of nothing": {"a": F32 | {"data_offsets": [None, 64]}},
    "offsets of floats": {"a": F32 | {"data_offsets": [0.0, 64.0]}},
    "three offsets": {"a": F32 | {"data_offsets": [0, 64, 64]}},
    "offsets below 0": {"a": F32 | {"data_offsets": [-64, 0]}, "b": F32},
    "offsets the wrong way": {"a": F32 | {"data_offsets": [64, 0]}},
    "the same bytes": {"a": F32, "b": F32},
    "some of the same bytes": {
        "a": F32 | {"shape": [12], "data_offsets": [0, 48]},
        "b": F32 | {"shape": [8], "data_offsets": [32, 64]},
    },
    "bytes of nobody": {"a": F32 | {"shape": [4], "data_offsets": [48, 64]}},
    "dtype a list": {"a": F32 | {"dtype": ["F32"]}},
    "shape below 0": {"a": F32 | {"shape": [-4, -4]}},
    "shape of truth": {"a": F32 | {"shape": [True, 16]}},
    "shape a word": {"a": F32 | {"shape": "44"}},
    "shape past all": {"a": F32 | {"shape": [10**30]}},
    "shape infinite": b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 64]}}',
    "a number of many digits": b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 64]}}',
    "deep": b"[" * 200_000,
    "not UTF-8": b'{"\xff": 1}',
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_is_none_names_the_file(case: str, tmp_path: Path) -> None:
    def file_of(header: object) -> Path:
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        (tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(64))
        return tmp_path / "x.safetensors"

    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged") as caught:
        shards.Shards([file_of(HEADERS[case])])
    assert caught.value.code == "checkpoint.damaged" and caught.value.hint
    assert shards.Shards([file_of({"__metadata__": {"format": "pt"}, "a": F32})]).read("a").shape == (4, 4)


@pytest.mark.parametrize("text", ['{"weight_map": {"a": 3}}', '{"weight_map": {"a": ["b"], "c": {}}}', "[" * 200_000, "3"])
def test_an_index_that_is_none_names_the_file(text: str, tmp_path: Path) -> None:
    (tmp_path / shards.INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        shards.open_directory(tmp_path)


def test_a_directory_with_two_models_or_an_adapter(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapter"):
        shards.open_directory(tmp_path)
    for name in ("one", "two"):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"one\.safetensors, two\.safetensors"):
        shards.open_directory(tmp_path)
