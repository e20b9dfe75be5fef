"""One run in one output directory: a lock file that names the process and host that hold it.

Why flock and a pid: the kernel frees an flock when its process dies, however it dies, so a killed run never blocks the next
one; the pid and host tell the user who holds it, and decide where a forked child outlived its parent with the lock.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from halfbyte.checkpoints.atomic import alive
from halfbyte.errors import RecipeError, TrainingError

try:
    import fcntl
except ImportError:  # Windows: the pid alone decides
    fcntl = None  # type: ignore[assignment]

NAME = "run.lock"


@contextmanager
def hold(output: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold the output directory. Raises TrainingError (train.locked) when a living run holds it, RecipeError where it is a file."""
    if file := next((place for place in (output, *output.parents) if place.is_file()), None):
        raise RecipeError(f"`output: {output}` is no directory: {file} is a file", hint="name another", code="recipe.output")
    output.mkdir(parents=True, exist_ok=True)
    path = output / NAME
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        pid, host = _owner(handle)
        dead = host == socket.gethostname() and not alive(pid)
        if not _acquire(handle, pid) and not dead:
            raise TrainingError(
                f"{output} is in use by a run with pid {pid} on {host or 'an unknown host'}",
                hint=f"wait for it, stop it (it saves first), or choose another `output`; the lock is {path}",
                code="train.locked",
            )
        if host:
            tell(f"took over the lock of pid {pid} on {host}, which is gone")
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def _owner(handle: int) -> tuple[int, str]:
    """Pid and host written by the last holder; (0, "") when it left in order."""
    try:
        owner = json.loads(os.pread(handle, 4096, 0))
        return int(owner["pid"]), str(owner["host"])
    except (ValueError, KeyError, TypeError):
        return 0, ""


def _acquire(handle: int, pid: int) -> bool:
    if fcntl is None:
        return pid == 0
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
