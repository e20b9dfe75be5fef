"""Where one document ends and the next begins in a packed row: built once a microbatch, read by every layer.

Why an object: what follows from the boundaries (equal lengths or not, a block mask, the obstacle of a kernel) is the same for
all layers, so it is worked out once and kept here. Cost: 4 bytes a document on the device, and what a method keeps.

Letters: T tokens of the microbatch, D documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from halfbyte.pinned import to_device

Wanted = Literal["auto", "cudnn", "flash", "flex", "sdpa"]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Documents:
    """cu_seqlens: int32 `[D+1]` on the device of the activations, 0 first, T last, repeats allowed (empty documents).

    boundaries: the same on the host, or None where reading them would wait for the device. longest: tokens of the longest
    document, or any bound of it. wanted: the method that the recipe asks for.
    """

    cu_seqlens: Tensor
    boundaries: tuple[int, ...] | None
    longest: int
    wanted: Wanted = "auto"
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, cu_seqlens: Tensor, device: torch.device, tokens: int, wanted: Wanted = "auto") -> Documents:
        """From boundaries on the CPU, without the empty documents; or on the device, as they are and unread.

        Why without: FlashAttention's backward pads every document by 128 rows of fp32, an empty one too.
        """
        if cu_seqlens.device.type != "cpu":
            return cls(cu_seqlens, None, tokens, wanted)
        boundaries = tuple(dict.fromkeys(cu_seqlens.tolist()))
        longest = max((b - a for a, b in itertools.pairwise(boundaries)), default=0)
        starts = torch.tensor(boundaries, dtype=torch.int32)
        return cls(to_device(starts, device), boundaries, longest, wanted)

    @cached_property
    def lengths(self) -> tuple[int, ...] | None:
        """Tokens of each document, empty ones left out; None where the boundaries are not on the host."""
        if self.boundaries is None:
            return None
        return tuple(b - a for a, b in itertools.pairwise(self.boundaries) if b > a)

    @cached_property
    def equal(self) -> int | None:
        """How many documents there are when all have the same length; else None."""
        lengths = self.lengths
        return len(lengths) if lengths and min(lengths) == max(lengths) else None

    def read_lengths(self) -> tuple[int, ...]:
        """`lengths`, waiting for the device where they are not on the host."""
        if self.lengths is not None:
            return self.lengths
        return self.keep("lengths", lambda: Documents.of(self.cu_seqlens.cpu(), torch.device("cpu"), 0).lengths or ())

    def window(self, window: int | None) -> int | None:
        """None for a window that no document is longer than."""
        return None if window is None or window >= self.longest else window

    def keep(self, key: Any, build: Callable[[], Value]) -> Value:
        """What `build` returns, built at the first call with this key and kept as long as the documents."""
        if key not in self._kept:
            self._kept[key] = build()
        value: Value = self._kept[key]
        return value
