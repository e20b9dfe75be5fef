"""Safetensors files, read and written one tensor at a time.

Why our own header reader: a damaged or hostile file is refused with its name before anything is allocated, and `inspect` needs
shapes without weights. Why our own writer: the library's copies every tensor into anonymous memory before it writes the first.
Cost: reading maps files into memory (page cache, not anonymous); writing holds one tensor.

A checkpoint is a `Tensors`: named headers and `read`. Layouts other than plain safetensors (gguf, bnb) are `Tensors` too, so that
the loader knows only one kind of source.
"""

from __future__ import annotations

import abc
import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from halfbyte.errors import CheckpointError, UnsafeFileError
from halfbyte.formats.packed import Format, Packed

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
HEADER_LIMIT = 100_000_000
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Header:
    """Shape and dtype of a stored tensor. packed: the format it is stored in already, if any (shape is `[N, K]` then)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    packed: Format | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor when it is read, decoded."""
        return math.prod(self.shape) * self.dtype.itemsize


class Tensors(abc.ABC):
    """The tensors of a checkpoint under the checkpoint's own names."""

    @abc.abstractmethod
    def headers(self) -> dict[str, Header]:
        """Every tensor's shape and dtype; reads no weight."""

    @abc.abstractmethod
    def read(self, name: str) -> Tensor | Packed:
        """One tensor on the CPU; may be a view of a mapped file, so copy what is kept."""


def read_header(path: Path) -> tuple[dict[str, Header], dict[str, str]]:
    """Headers and metadata of one safetensors file. Raises CheckpointError naming the file if it is damaged or cut short."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise _damaged(path, f"its header claims {length} bytes, the file has {size}")
        try:
            table = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, a number of thousands of digits
            raise _damaged(path, "its header is not JSON") from error
    metadata = (table.pop("__metadata__", None) or {}) if isinstance(table, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _damaged(path, "its header is not a table of tensors")
    headers = {name: _entry(path, name, entry) for name, entry in table.items()}
    end = 0
    for start, stop, name in sorted((*entry["data_offsets"], name) for name, entry in table.items()):
        if start != end:
            raise _damaged(path, f"tensor {name} starts at byte {start} of the data, {end} expected")
        end = stop
    if 8 + length + end != size:
        raise _damaged(path, f"{8 + length + end} bytes expected, {size} found")
    return headers, metadata


def _entry(path: Path, name: str, entry: Any) -> Header:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"the header entry of {name} is malformed") from error
    if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise _damaged(path, f"the header entry of {name} is malformed")
    if dtype not in DTYPES:
        raise CheckpointError(f"{path.name}: tensor {name} has dtype {dtype}, which is not supported")
    header = Header(shape, DTYPES[dtype])
    if header.nbytes != end - start:
        raise _damaged(path, f"tensor {name} should have {header.nbytes} bytes, its entry says {end - start}")
    return header


def _damaged(path: Path, what: str) -> CheckpointError:
    hint = "download or copy the file again; its size or checksum at the source tells whether it is complete"
    return CheckpointError(f"{path} is damaged: {what}", hint=hint, code="checkpoint.damaged")


class Shards(Tensors):
    """One or several safetensors files. Each is mapped when its first tensor is read."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self._headers: dict[str, Header] = {}
        self._where: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for file in files:
            headers, _ = read_header(file)
            self._headers.update(headers)
            self._where.update(dict.fromkeys(headers, file))

    def headers(self) -> dict[str, Header]:
        return self._headers

    def read(self, name: str) -> Tensor:
        file = self._where[name]
        if file not in self._open:
            self._open[file] = safe_open(str(file), framework="pt", device="cpu")
        tensor: Tensor = self._open[file].get_tensor(name)
        return tensor


def open_directory(directory: Path) -> Shards:
    """The weights of a model directory. Raises UnsafeFileError where only pickles are, CheckpointError where nothing is."""
    return Shards(weight_files(directory))


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that hold the model of `directory`, by index, by name, or the only one there."""
    index = directory / INDEX
    if index.is_file():
        return _indexed(index)
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    found = sorted(p for p in directory.glob("*.safetensors") if not p.name.startswith("adapter_"))
    if len(found) == 1:
        return found
    if found:
        names = ", ".join(p.name for p in found)
        raise CheckpointError(
            f"{directory} holds several safetensors files and no {INDEX}: {names}", hint="keep one model a directory"
        )
    if (directory / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{directory} holds an adapter, not a base model", hint="give its base as `model`, and this as the adapter"
        )
    refuse_pickles([p.name for p in directory.iterdir()], str(directory))
    raise CheckpointError(f"{directory} holds no weights", hint=f"a model directory has {SINGLE}, or shards and {INDEX}")


def refuse_pickles(names: list[str], where: str) -> None:
    """Raises UnsafeFileError if `names` has pickled weights: loading a pickle runs whatever code is in it."""
    pickles = sorted(n for n in names if n.endswith(PICKLES))
    if pickles:
        hint = "use a safetensors copy of the model, or convert this one on a machine you can lose (transformers: save_pretrained)"
        raise UnsafeFileError(f"{where} has its weights only as pickles ({', '.join(pickles)}), which can run code", hint=hint)


def _indexed(index: Path) -> list[Path]:
    try:
        listed: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        names = sorted(set(listed.values()))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise _damaged(index, "it is not an index of shards") from error
    if not all(isinstance(n, str) for n in names):
        raise _damaged(index, "it is not an index of shards")
    outside = [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]
    if outside:
        raise UnsafeFileError(f"{index} points at files that are not safetensors of its own directory: {', '.join(outside)}")
    missing = [n for n in names if not (index.parent / n).is_file()]
    if missing:
        raise CheckpointError(f"{index.parent} lacks shards that its index lists: {', '.join(missing)}", hint="download them again")
    return [index.parent / n for n in names]


def write(path: Path, tensors: Iterable[tuple[str, Tensor]], metadata: dict[str, str]) -> dict[str, str]:
    """Writes one safetensors file, holding one tensor in memory at a time, and syncs it. Returns the sha256 of each tensor.

    Wider dtypes come first, as the format's own writer does, so that every tensor is aligned to its dtype.
    """
    ordered = sorted(tensors, key=lambda item: (-item[1].dtype.itemsize, item[0]))
    table: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.dtype.itemsize
        table[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    sums = {}
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, tensor in ordered:
            data = bytes_of(tensor)
            sums[name] = hashlib.sha256(data).hexdigest()
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return sums


def write_sharded(directory: Path, tensors: list[tuple[str, Tensor]], limit: int) -> list[str]:
    """Writes `model.safetensors`, or shards of at most `limit` bytes (one tensor more if it is larger) and their index."""
    groups: list[list[tuple[str, Tensor]]] = [[]]
    room = limit
    for name, tensor in tensors:
        if groups[-1] and tensor.nbytes > room:
            groups.append([])
            room = limit
        groups[-1].append((name, tensor))
        room -= tensor.nbytes
    if len(groups) == 1:
        write(directory / SINGLE, groups[0], {"format": "pt"})
        return [SINGLE]
    files = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    for file, group in zip(files, groups, strict=True):
        write(directory / file, group, {"format": "pt"})
    where = {name: file for file, group in zip(files, groups, strict=True) for name, _ in group}
    index = {"metadata": {"total_size": sum(t.nbytes for _, t in tensors)}, "weight_map": where}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def bytes_of(tensor: Tensor) -> Any:
    """The tensor's bytes (a buffer), without a copy where it lies contiguous on the CPU."""
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    return flat.view(torch.uint8).numpy()
