"""A directory appears whole or not at all.

Why: a process can die between any two writes, and half an adapter that loads is worse than none. Files are written into a
hidden directory beside the target, flushed to disk, and the directory is renamed. Replacing an existing directory takes two
renames; a death between them leaves the former one as `.NAME.previous`, which `recover` puts back. A process that was killed
while it wrote leaves the hidden directory, as large as what it wrote: the next one that writes there removes it.
Cost: one fsync a file.
"""

from __future__ import annotations

import glob
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfbyte.errors import CheckpointError

log = logging.getLogger("halfbyte")


@contextmanager
def directory(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields an empty directory to write into, which becomes `target` when the block ends without an exception.

    An existing empty target is taken over; a non-empty one is an error unless `replace`.
    """
    target = Path(os.path.abspath(target))
    recover(target)
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file", hint="name a directory")
    if not replace and target.is_dir() and any(target.iterdir()):
        raise CheckpointError(
            f"{target} is not empty", hint="name a new directory, or remove this one first", code="checkpoint.not-empty"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    temporary = target.parent / f".{target.name}.tmp-{socket.gethostname()}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _sync(temporary)
        _swap(temporary, target)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}", hint="free some disk space?") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def recover(target: Path) -> bool:
    """Puts back what a death between the two renames left aside. True when it did."""
    previous = _previous(target)
    if not previous.is_dir():
        return False
    if target.is_dir():
        shutil.rmtree(previous, ignore_errors=True)
        return False
    previous.rename(target)
    return True


def _sweep(target: Path) -> None:
    """Removes what processes of this host left when they died while writing `target`."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.tmp-*"):
        host, _, pid = path.name.removeprefix(f".{target.name}.tmp-").rpartition("-")
        if host == socket.gethostname() and pid.isdecimal() and not alive(int(pid)):
            log.info("removed %s, left by a process that died while writing", path)
            shutil.rmtree(path, ignore_errors=True)


def alive(pid: int) -> bool:
    """Whether a process of this host exists."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _previous(target: Path) -> Path:
    return target.parent / f".{target.name}.previous"


def _swap(temporary: Path, target: Path) -> None:
    if target.is_dir():
        target.rename(_previous(target))
    temporary.rename(target)
    sync_path(target.parent)
    shutil.rmtree(_previous(target), ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        sync_path(path)
    sync_path(folder)


def sync_path(path: Path) -> None:
    """fsync a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
