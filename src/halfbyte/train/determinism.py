"""`train.deterministic`: torch's deterministic algorithms for the length of a run, and everything as it was after it.

Why a switch: on a GPU some operations add in whatever order their threads finish, so two runs differ in the last bits, and what
forbids that is slower. cuBLAS needs a workspace of fixed size, told by a variable before its first call. Torch's flag would also
fill every new buffer with NaN, a write of all memory that a layer touches: off, since nothing here reads what it has not written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.utils.deterministic

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACE = ":4096:8"


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Within it, if `on`, an operation without a deterministic algorithm raises RuntimeError."""
    if not on:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled, unset = torch.utils.deterministic.fill_uninitialized_memory, VARIABLE not in os.environ  # type: ignore[attr-defined]
    os.environ.setdefault(VARIABLE, WORKSPACE)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        if unset:
            del os.environ[VARIABLE]
