"""What a run is made of (`Parts`, fixed) and where it stands (`State`, saved in every checkpoint)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from halfbyte.kernels.cross_entropy import Head
from halfbyte.memory.watch import Watch
from halfbyte.objectives.config import LossConfig
from halfbyte.optim.adamw import AdamW
from halfbyte.optim.flat import Flat
from halfbyte.optim.scaling import LossScale
from halfbyte.train.config import TrainConfig
from halfbyte.train.ladder import Ladder
from halfbyte.train.proofs import Proofs


class Microbatch(Protocol):
    """m rows, flattened: ids, labels, positions int64 `[1, m*T]`, cu_seqlens int32."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def position_ids(self) -> Tensor: ...
    @property
    def cu_seqlens(self) -> Tensor: ...
    @property
    def weights(self) -> Tensor | None: ...


class Batch(Protocol):
    """R rows: one optimizer step."""

    @property
    def example_ids(self) -> list[list[int]]: ...
    @property
    def trained_tokens(self) -> int: ...
    @property
    def weight(self) -> float: ...
    def microbatches(self, m: int) -> Iterator[Microbatch]: ...


class Loader(Protocol):
    """Batches as a function of the step; `position` is (epoch, row), `sweep` is every row once, for evaluation."""

    def at(self, step: int) -> Batch: ...
    def position(self, step: int) -> tuple[int, int]: ...
    def rows(self, epoch: int) -> int: ...
    def sweep(self) -> Iterator[Batch]: ...


class Reporter(Protocol):
    """Where events go: files, terminal, trackers. An event is a JSON object with `kind` and `step`."""

    def event(self, event: dict[str, Any]) -> None: ...
    def tell(self, text: str) -> None: ...


@dataclass(frozen=True)
class Parts:
    """What a run is made of. Nothing in it but tensors' contents changes, the rung of `ladder`, what `watch` has seen, and what was
    proven.

    forward: (input_ids, position_ids, cu_seqlens) -> hidden `[1, S, H]`. dropout: (seed, step, first row), numbers the masks.
    weights: the adapter's tensors for a checkpoint, by name; restore: the mirror. autocast: compute dtype of a model whose
    weights are fp32 (full fine-tuning), else None. answers: fixed prompts -> the model's texts, one by one.
    """

    config: TrainConfig
    loss: LossConfig
    model: nn.Module
    head: Head
    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    dropout: Callable[[int, int, int], None]
    weights: Callable[[], Mapping[str, Tensor]]
    restore: Callable[[Mapping[str, Tensor]], None]
    answers: Callable[[list[str]], Iterable[str]]
    flat: Flat
    optimizer: AdamW
    scale: LossScale
    loader: Loader
    evals: Mapping[str, Loader]
    device: torch.device
    autocast: torch.dtype | None
    ladder: Ladder
    watch: Watch
    row_tokens: int
    total_steps: int
    checkpoints: Path
    identity: Mapping[str, Any]
    choices: Mapping[str, Any]
    report: Reporter
    proofs: Proofs = field(default_factory=Proofs)

    @property
    def microbatch(self) -> int:
        """Rows at once, now."""
        return self.ladder.rung.microbatch


@dataclass
class State:
    """Where a run stands, at an optimizer-step boundary. All of it is plain JSON.

    step: optimizer steps done, skipped ones included; also the number of the next batch. window: log values since the last log
    line. evaluated, saved: steps of the last evaluation and checkpoint (-1: none). stale: evaluations since the best one.
    shortages: when memory ran short: step, why, and the rung taken, which is resumed on; kept_shortages: how many of them the last
    checkpoint holds.
    """

    step: int = 0
    trained_tokens: int = 0
    skipped: int = 0
    non_finite: int = 0
    seconds: float = 0.0
    logged_seconds: float = 0.0
    logged_step: int = 0
    evaluated: int = -1
    saved: int = -1
    save_failures: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    stale: int = 0
    window: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    shortages: list[dict[str, Any]] = field(default_factory=list)
    kept_shortages: int = 0

    def document(self) -> dict[str, Any]:
        """For `trainer.json`."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> State:
        """The mirror of `document`."""
        return cls(**document)
