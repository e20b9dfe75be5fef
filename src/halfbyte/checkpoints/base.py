"""`Base`: the frozen model as everything above receives it, and where it came from.

Why one object: an adapter is only right on the exact base it was trained on, so the model never travels without its
tokenizer, its revision and the digest of its stored bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.formats.config import FormatConfig
from halfbyte.layers.report import SwapReport

Progress = Callable[[str, int, int], None]
"""`progress(what, done, total)`: called as work advances, in bytes; the last call has done == total."""


def silent(what: str, done: int, total: int) -> None:
    """The progress that shows nothing."""


@dataclass(frozen=True)
class Source:
    """path: a model directory or a .gguf file. name: as asked for. revision: commit hash of a Hub snapshot, else None."""

    path: Path
    name: str
    revision: str | None


@dataclass(frozen=True)
class Base:
    """A loaded base.

    name: as asked for (Hub id, path, bundled name). revision: commit hash of a Hub snapshot, else None. format: how the linear
    weights are stored (a pre-quantised checkpoint decides it). compute: dtype of everything that is not packed. digest: sha256
    over names, layouts and bytes of all tensors, 64 hex digits: equal digests are equal bases. report: what was packed, what
    was not and why. source: the directory or .gguf file that was read.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    revision: str | None
    format: FormatConfig
    compute: torch.dtype
    digest: str
    report: SwapReport
    source: Path
