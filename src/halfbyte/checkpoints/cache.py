"""The cache of packed bases: a second start reads what the first one quantised.

Layout: `HALFBYTE_CACHE/bases/<key>/` with `model.safetensors` (the module's own names: `...q_proj.codes`), `manifest.json`
(sha256 of every tensor). The key hashes what was read (commit, or names, sizes and times of the files), the format, the compute
dtype, transformers' version (it names the tensors) and `LAYOUT`. An entry is written beside its place
and renamed into it, so two runs cannot harm each other; it is verified whenever it is read, and rebuilt if a byte is wrong.
Cost: the packed bytes on disk; on a second start, hashing and copying them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import __version__ as transformers_version

from halfbyte.checkpoints import shards
from halfbyte.checkpoints.base import Source
from halfbyte.checkpoints.shards import Header, Shards, Tensors
from halfbyte.errors import CheckpointError
from halfbyte.formats.config import FormatConfig
from halfbyte.formats.packed import SLOTS, Packed
from halfbyte.layers.linear import Linear4bit
from halfbyte.machine import cache_root as cache_root

log = logging.getLogger(__name__)
LAYOUT = 2
"""Raised whenever the same source and format would be stored in other bytes."""


def key(source: Source, fmt: FormatConfig, compute: torch.dtype) -> str:
    """What decides the packed bytes, hashed: 32 hex digits."""
    if source.revision:
        files: list[list[Any]] = [[source.name, source.revision]]
    else:
        paths = (
            [source.path] if source.path.is_file() else sorted([*source.path.glob("*.safetensors"), *source.path.glob("*.json")])
        )
        files = [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]
    what = [LAYOUT, transformers_version, files, fmt.model_dump(), str(compute)]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Entry(Tensors):
    """A verified entry. Reading gives packed weights as `Packed` under the name of the weight; what is read is a copy."""

    directory: Path
    shards: Shards
    specs: dict[str, str]
    digest: str

    def headers(self) -> dict[str, Header]:
        slots = {f"{name.removesuffix('weight')}{slot}" for name in self.specs for slot in SLOTS}
        headers = {name: header for name, header in self.shards.headers().items() if name not in slots}
        for name, spec in self.specs.items():
            empty = Packed.from_spec(spec, (torch.empty(0),) * len(SLOTS))
            headers[name] = Header(empty.shape, empty.dtype, empty.format)
        return headers

    def read(self, name: str) -> Tensor | Packed:
        if name not in self.specs:
            return self.shards.read(name).clone()
        stem = name.removesuffix("weight")
        return Packed.from_spec(self.specs[name], [self.shards.read(stem + slot).clone() for slot in SLOTS])


def find(name: str) -> Entry | None:
    """The entry of this key if it is there and whole; a damaged one is removed, with a warning."""
    directory = cache_root() / "bases" / name
    if not (directory / "manifest.json").is_file():
        return None
    try:
        manifest = json.loads((directory / "manifest.json").read_text("utf-8"))
        files = Shards([directory / shards.SINGLE])
        sums = manifest["sums"]
        wrong = [n for n, expected in sums.items() if hashlib.sha256(shards.bytes_of(files.read(n))).hexdigest() != expected]
        whole = set(sums) == set(files.headers()) and digest_of(sums, manifest["specs"]) == manifest["digest"]
        if not wrong and whole:
            return Entry(directory, files, manifest["specs"], manifest["digest"])
        why = f"{len(wrong)} of {len(sums)} tensors have changed" if wrong else "its manifest has changed"
    except (CheckpointError, OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        why = str(error)
    log.warning("the cached base in %s is damaged (%s): quantising again", directory, why)
    _remove(directory)
    return None


def store(name: str, model: nn.Module) -> str:
    """Writes the packed model under this key and returns its digest.

    A full or read-only disk costs the second start its shortcut, nothing else: it is logged.
    """
    tensors, specs = contents(model)
    place = cache_root() / "bases" / name
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=place.parent, prefix=".write-"))
    except OSError as error:
        log.warning("the packed base is not cached: %s", error)
        return digest_of(sums_of(tensors), specs)
    try:
        sums = shards.write(scratch / shards.SINGLE, tensors, {"format": "pt"})
        digest = digest_of(sums, specs)
        manifest = {"layout": LAYOUT, "digest": digest, "specs": specs, "sums": sums}
        _write_synced(scratch / "manifest.json", json.dumps(manifest))
        if not place.exists():
            os.rename(scratch, place)
        return digest
    except OSError as error:
        log.warning("the packed base is not cached: %s", error)
        return digest_of(sums_of(tensors), specs)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remember(name: str, digest: str) -> None:
    """Keeps the digest of a base that is not itself cached (16-bit, or packed in its own file)."""
    path = cache_root() / "digests" / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_synced(path.with_suffix(f".{os.getpid()}"), digest)
        os.replace(path.with_suffix(f".{os.getpid()}"), path)
    except OSError as error:
        log.warning("the digest of the base is not cached: %s", error)


def recall(name: str) -> str | None:
    """The digest that `remember` kept."""
    path = cache_root() / "digests" / name
    return path.read_text("utf-8") if path.is_file() else None


def contents(model: nn.Module) -> tuple[list[tuple[str, Tensor]], dict[str, str]]:
    """Every tensor of the model once (tied ones under their first name), and the spec of each packed weight, by weight name."""
    seen: set[int] = set()
    tensors = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen and not name.endswith("_extra_state"):  # a layer's spec: `specs` says it
            seen.add(id(tensor))
            tensors.append((name, tensor.detach()))
    specs = {f"{path}.weight": m.packed.spec for path, m in model.named_modules() if isinstance(m, Linear4bit)}
    return tensors, specs


def sums_of(tensors: list[tuple[str, Tensor]]) -> dict[str, str]:
    """sha256 of each tensor's bytes."""
    return {name: hashlib.sha256(shards.bytes_of(tensor)).hexdigest() for name, tensor in tensors}


def digest_of(sums: dict[str, str], specs: dict[str, str]) -> str:
    """One sha256 over names, layouts and bytes."""
    lines = [f"{name} {sums[name]}" for name in sorted(sums)] + [f"{name} {specs[name]}" for name in sorted(specs)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _remove(directory: Path) -> None:
    """Moves the entry aside before deleting it, so that nobody finds half of it."""
    aside = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".remove-"))
    try:
        os.rename(directory, aside / "entry")
    except FileNotFoundError:
        log.info("another run has removed %s already", directory)
    shutil.rmtree(aside, ignore_errors=True)
