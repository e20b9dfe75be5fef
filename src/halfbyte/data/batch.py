"""A batch: R rows of T tokens as tensors, and its microbatches.

Why the labels come shifted: whoever computes the loss must not think about the boundary between two examples again; the last
token of a document has no label, and a leftover at the end of a row is a document of its own that nobody learns from. Cost:
28 bytes a token, 32 where weights differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

IGNORED = -100


@dataclass(frozen=True)
class MicroBatch:
    """m rows laid end to end: what the model sees in one forward.

    input_ids, labels, position_ids: int64 [1, m*T]; cu_seqlens: int32 [m*D+1], rising, padded with m*T. weights: float32 [1, m*T],
    of each label in the loss, or None where all weigh 1.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    weights: torch.Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """R rows: everything that one optimizer step learns from.

    input_ids, labels, position_ids: int64 [R, T]; labels[r, t] is the token that must follow position t, -100 for no loss;
    position_ids restart at every document. cu_seqlens: int32 [R, D+1], boundaries within the row, padded with T; D is fixed
    for the run. example_ids: the examples in each row. trained_tokens: labels that are not -100, in the whole batch, even where
    this is one process's part of it. weights: float32 [R, T], of each label in the loss, or None where all weigh 1; weight: their
    sum over the whole batch's labels, what the loss is divided by.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    example_ids: list[list[int]]
    trained_tokens: int
    weight: float
    weights: torch.Tensor | None = None

    def microbatches(self, m: int) -> Iterator[MicroBatch]:
        """Flattens m rows at a time; m divides R."""
        rows, tokens = self.input_ids.shape
        assert rows % m == 0, f"a microbatch of {m} rows does not divide a batch of {rows}"
        for at in range(0, rows, m):
            part = slice(at, at + m)
            # A row's last boundary is the next row's first: consecutive duplicates go, the rising rest stays.
            starts = (self.cu_seqlens[part] + tokens * torch.arange(m, dtype=torch.int32)[:, None]).flatten()
            starts = starts[torch.cat([torch.tensor([True]), starts[1:] > starts[:-1]])]
            cu_seqlens = torch.full((m * (self.cu_seqlens.shape[1] - 1) + 1,), m * tokens, dtype=torch.int32)
            cu_seqlens[: len(starts)] = starts
            yield MicroBatch(
                self.input_ids[part].reshape(1, -1),
                self.labels[part].reshape(1, -1),
                self.position_ids[part].reshape(1, -1),
                cu_seqlens,
                None if self.weights is None else self.weights[part].reshape(1, -1),
            )
