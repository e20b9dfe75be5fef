"""Checkpoints of a run: written so that no crash, kill, full disk or flipped bit can lose more than one interval.

    step-00001234/
      *.safetensors   tensors (adapter, optimizer, ...)
      *.json          documents (trainer state, data position, ...)
      manifest.json   step, identity of the run, size and sha256 of every other file; written last

Why so: a directory becomes visible under its name by one rename, after every file in it has been fsynced, so a kill at any
moment leaves either the whole checkpoint or none. Discovery scans for the greatest step with a valid manifest; there is no
`latest` link to go stale. A file format alone does not notice a flipped bit; sha256 does. No pickle.
The checksum is taken of the bytes in memory and compared with what is read back, so it covers the way to the disk as well.
Cost: one read after each save and at each load (hashing runs at about 1.5 GB/s), and host memory for the largest file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from halfbyte.checkpoints import shards
from halfbyte.checkpoints.atomic import alive, sync_path
from halfbyte.errors import CheckpointError, TrainingError

VERSION = 1
MANIFEST = "manifest.json"
RESERVE = 16 * 2**20
PIECE = 1 << 20
STEP = re.compile(r"^step-(\d{8,})$")
TEMPORARY = re.compile(r"^\.step-\d+\.tmp-(?P<host>.+)-(?P<pid>\d+)$")
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds. tensors: file stem -> name -> tensor; documents: file stem -> JSON object."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    documents: Mapping[str, Any]
    identity: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for group in self.tensors.values() for t in group.values())


class Damaged(CheckpointError):
    """A checkpoint is incomplete or its bytes are not those that were written."""


class DiskFull(TrainingError):
    """A checkpoint could not be written for want of space; what was there before is intact."""


def save(root: Path, contents: Contents) -> Path:
    """Write one checkpoint below `root` and return its directory, verified.

    Raises DiskFull (nothing is left behind) when the disk has not the room, or runs full while writing.
    """
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step-{contents.step:08d}"
    temporary = root / f".step-{contents.step:08d}.tmp-{socket.gethostname()}-{os.getpid()}"
    require_space(root, contents.nbytes)
    try:
        _write(temporary, contents)
        verify(temporary)
        _replace(temporary, final)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskFull(
            f"the disk ran full while writing {final.name} ({error}); older checkpoints are intact",
            hint="free some space, or set `output` to another disk",
            code="train.disk-full",
        ) from error
    return final


def require_space(root: Path, tensors: int) -> None:
    """Raise DiskFull unless the disk of `root` has room for 1.2 times `tensors` bytes and a reserve."""
    needed, free = int(1.2 * tensors) + RESERVE, shutil.disk_usage(root).free
    if free < needed:
        raise DiskFull(
            f"no space for checkpoints: {needed / 2**20:,.0f} MiB needed, {free / 2**20:,.0f} MiB free in {root}",
            hint="free some space, or set `output` to another disk",
            code="train.disk-full",
        )


def _write(directory: Path, contents: Contents) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    files = {}
    for stem, tensors in contents.tensors.items():
        path = directory / f"{stem}.safetensors"
        shards.write(path, tensors.items(), {})  # a tensor at a time: never a second copy of weights and moments
        files[path.name] = _entry(path)
    for stem, document in contents.documents.items():
        files[f"{stem}.json"] = _put(directory / f"{stem}.json", _json(document))
    manifest = {
        "version": VERSION,
        "step": contents.step,
        "files": files,
        "identity": dict(contents.identity),
        "world_size": 1,
        "libraries": {"python": platform.python_version(), "torch": torch.__version__},
    }
    _put(directory / MANIFEST, _json({**manifest, "sha256": hashlib.sha256(_json(manifest)).hexdigest()}))
    sync_path(directory)


def _entry(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, read in pieces: what the manifest holds of it."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            size += len(piece)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _put(path: Path, data: bytes) -> dict[str, Any]:
    """Write and fsync one file; its manifest entry."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _json(document: Any) -> bytes:
    return json.dumps(document, indent=1).encode() + b"\n"


def _replace(temporary: Path, final: Path) -> None:
    """Give the finished directory its name. A checkpoint of the same step (a resumed run saves it again) is moved away first."""
    trash = final.with_name(f".trash-{final.name}-{os.getpid()}")
    if final.exists():
        os.rename(final, trash)
    os.rename(temporary, final)
    sync_path(final.parent)
    shutil.rmtree(trash, ignore_errors=True)


def prune(root: Path, keep: int, best: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and that of step `best`; called after the newest one was verified."""
    assert keep >= 2
    for step, path in _steps(root)[keep:]:
        if step != best:
            _discard(path)


def sweep(root: Path, tell: Tell) -> None:
    """Remove what dead processes left: temporary directories whose pid is gone on this host, and trash."""
    if not root.is_dir():
        return
    for path in root.iterdir():
        match = TEMPORARY.match(path.name)
        if match and match["host"] == socket.gethostname() and not alive(int(match["pid"])):
            tell(f"removed {path.name}, left by a process that died while saving")
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(".trash-"):
            shutil.rmtree(path, ignore_errors=True)


def newest(root: Path, tell: Tell) -> Contents | None:
    """The newest checkpoint that verifies, or None when there is none.

    A damaged one is said aloud, renamed to `step-N.corrupt` and left for inspection; the one before it is tried.
    """
    for _, path in _steps(root):
        try:
            return load(path)
        except Damaged as error:
            aside = path.with_name(f"{path.name}.corrupt")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
            tell(f"WARNING: {error.message}; renamed to {aside.name}, going back to the checkpoint before it")
    return None


def load(path: Path) -> Contents:
    """Read one checkpoint, every byte checked against the manifest. Raises Damaged naming the file and what is wrong."""
    manifest = _manifest(path)
    tensors: dict[str, dict[str, Tensor]] = {}
    documents: dict[str, Any] = {}
    for name, entry in manifest["files"].items():
        _check(path / name, entry)
        data = (path / name).read_bytes()
        if name.endswith(".safetensors"):
            tensors[name.removesuffix(".safetensors")] = load_tensors(data)
        else:
            documents[name.removesuffix(".json")] = json.loads(data)
    return Contents(manifest["step"], tensors, documents, manifest["identity"])


def verify(path: Path) -> None:
    """Check every byte of a checkpoint against its manifest. Raises Damaged."""
    for name, entry in _manifest(path)["files"].items():
        _check(path / name, entry)


def refuse_other_run(contents: Contents, identity: Mapping[str, Any], root: Path) -> None:
    """Raise CheckpointError when the checkpoint belongs to another run: names every key that differs, with both values."""
    stored = contents.identity
    missing = object()
    different = [k for k in sorted({*stored, *identity}) if stored.get(k, missing) != identity.get(k, missing)]
    if different:
        lines = "\n".join(f"  {k}: {_show(stored.get(k))} in the checkpoint, {_show(identity.get(k))} now" for k in different)
        raise CheckpointError(
            f"{root} holds checkpoints of another run; it differs in\n{lines}",
            hint="set the keys back to resume, choose another `output`, or delete the directory to start anew",
            code="train.other-run",
        )


def _show(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _steps(root: Path) -> list[tuple[int, Path]]:
    """Checkpoints by name, the newest first."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := STEP.match(path.name)) and path.is_dir()]
    return sorted(found, reverse=True)


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest, its own checksum checked: it covers the manifest without that one key, byte for byte."""
    try:
        data = (path / MANIFEST).read_bytes()
        manifest: dict[str, Any] = json.loads(data)
        own = manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path} has no readable manifest ({type(error).__name__})", code="train.damaged") from error
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    if _json(manifest) != data or hashlib.sha256(_json(rest)).hexdigest() != own:
        raise Damaged(f"{path / MANIFEST} is damaged: its sha256 is not its own", code="train.damaged")
    if manifest["version"] != VERSION:
        raise CheckpointError(
            f"{path} was written in checkpoint version {manifest['version']}, this halfbyte reads {VERSION}",
            hint="resume with the version of halfbyte that started the run",
            code="train.version",
        )
    return manifest


def _check(path: Path, entry: Mapping[str, Any]) -> None:
    try:
        found = _entry(path)
    except OSError as error:
        raise Damaged(f"{path} cannot be read ({error.strerror})", code="train.damaged") from error
    if found["bytes"] != entry["bytes"]:
        raise Damaged(f"{path} has {found['bytes']:,} bytes, its manifest says {entry['bytes']:,}", code="train.damaged")
    if found["sha256"] != entry["sha256"]:
        raise Damaged(f"{path} is damaged: its sha256 is not the manifest's", code="train.damaged")


def _discard(path: Path) -> None:
    trash = path.with_name(f".trash-{path.name}-{os.getpid()}")
    os.rename(path, trash)
    shutil.rmtree(trash, ignore_errors=True)
