"""Every error a user can meet, in one tree.

    HalfbyteError                 base: message (what, where) + hint (what to do)
    ├── RecipeError               a recipe, an override or an argument is wrong
    ├── FormatError               a tensor cannot be stored in, or read from, a format
    ├── CheckpointError           a model, adapter or checkpoint file is missing, damaged or does not fit
    │   └── UnsafeFileError       a file that could run code (pickle, remote code) was refused
    ├── DataError                 a data file or example is wrong (file, line, field)
    ├── ModelError                a model's layers cannot be used as asked (targets, probe, head)
    ├── MemoryPlanError           no plan fits the device
    ├── TrainingError             a run cannot go on (non-finite steps, lock, disk)
    └── Interrupted               a run was stopped by a signal after saving: exit code 75

Why a tree: the command line prints any of them as one message and one hint, without a traceback; a program catches the
branch it cares about. Broken invariants inside the library are assertions, never one of these.
"""

from __future__ import annotations


class HalfbyteError(Exception):
    """A mistake or a circumstance that the user can mend. `hint` says how; `code` is a stable id, such as ``data.no-eot``."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", code: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class RecipeError(HalfbyteError):
    """A recipe, an override or an argument is wrong: names file, line and key."""


class FormatError(HalfbyteError):
    """A tensor cannot be stored in, or read from, a format: names the tensor."""


class CheckpointError(HalfbyteError):
    """A model, adapter or checkpoint file is missing, damaged or does not fit."""


class UnsafeFileError(CheckpointError):
    """A file that could run code on load (pickle, remote code) was refused."""


class DataError(HalfbyteError):
    """A data file or an example is wrong: names file, line and field."""


class ModelError(HalfbyteError):
    """A model's layers cannot be used as asked: no target matched, a probe disagreed, a head was not understood."""


class MemoryPlanError(HalfbyteError):
    """No plan fits the device: carries the numbers and what would help."""


class TrainingError(HalfbyteError):
    """A run cannot go on: three non-finite steps in a row, a locked output directory, no disk space."""


class Interrupted(HalfbyteError):
    """A run was stopped by a signal and its state was saved: run the same command again to resume."""

    exit_code = 75
