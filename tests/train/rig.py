"""A run small enough for a test: a tiny model, all of it trainable, on rows of random tokens. No files, recipes or adapters.

Its base has dropout of its own, so that a resume which loses the generator is noticed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from halfbyte.checkpoints import resume
from halfbyte.kernels.cross_entropy import Head
from halfbyte.memory.rungs import Rung
from halfbyte.memory.watch import Watch
from halfbyte.objectives.config import LossConfig
from halfbyte.optim.adamw import AdamW
from halfbyte.optim.config import OptimConfig
from halfbyte.optim.flat import flatten
from halfbyte.optim.scaling import LossScale
from halfbyte.train import loop, saving
from halfbyte.train.config import TrainConfig
from halfbyte.train.ladder import Ladder
from halfbyte.train.report import Report
from halfbyte.train.signals import Stop
from halfbyte.train.state import Parts, State
from support import tiny_model

TOKENS, ROWS, BATCH = 24, 10, 4
QUIET: dict[str, Any] = {"batch": BATCH, "epochs": 3, "lr": 1e-2, "save_every": 2, "eval_every": 3}


@dataclass(frozen=True)
class Micro:
    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    weights: torch.Tensor | None = None


@dataclass(frozen=True)
class RowBatch:
    ids: torch.Tensor  # [R, T]
    labels: torch.Tensor
    example_ids: list[list[int]]

    @property
    def trained_tokens(self) -> int:
        return int((self.labels != -100).sum())

    @property
    def weight(self) -> float:
        return float(self.trained_tokens)

    def microbatches(self, m: int) -> Iterator[Micro]:
        for at in range(0, len(self.ids), m):
            ids, labels = self.ids[at : at + m], self.labels[at : at + m]
            rows = len(ids)
            bounds = torch.arange(0, rows * TOKENS + 1, TOKENS, dtype=torch.int32)
            yield Micro(ids.reshape(1, -1), labels.reshape(1, -1), torch.arange(TOKENS).repeat(rows)[None], bounds)


class Rows:
    """A loader of `ROWS` random rows in epochs of their own order; uneven numbers of trained tokens."""

    def __init__(self, seed: int, batch: int = BATCH, rows: int = ROWS) -> None:
        self.batch, self.count, self.seed = batch, rows, seed
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, 64, (rows, TOKENS), generator=generator)
        self.labels = torch.cat([self.ids[:, 1:], torch.full((rows, 1), -100)], dim=1)
        for row in range(rows):
            self.labels[row, : 2 * row] = -100

    def rows(self, epoch: int) -> int:
        return self.count

    def position(self, step: int) -> tuple[int, int]:
        return divmod(step * self.batch, self.count)

    def at(self, step: int) -> RowBatch:
        picked = []
        for place in range(step * self.batch, (step + 1) * self.batch):
            epoch, row = divmod(place, self.count)
            order = torch.randperm(self.count, generator=torch.Generator().manual_seed(1000 * self.seed + epoch))
            picked.append(int(order[row]))
        return RowBatch(self.ids[picked], self.labels[picked], [[i] for i in picked])

    def sweep(self) -> Iterator[RowBatch]:
        for at in range(0, self.count, self.batch):
            kept = list(range(at, min(at + self.batch, self.count)))
            yield RowBatch(self.ids[kept], self.labels[kept], [[i] for i in kept])


def build(
    output: Path,
    microbatch: int = 2,
    steps: int = 7,
    seed: int = 0,
    compute: torch.dtype = torch.float32,
    bits: Literal[32, 8] = 32,
    **changes: Any,
) -> Parts:
    """A run of `steps` optimizer steps in `output`, moments in `bits`; `changes` go to its TrainConfig."""
    config = TrainConfig(**{**QUIET, "seed": seed, **changes})
    model = tiny_model("gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    named = [(n, p, "dense" if p.ndim > 1 else "no_decay") for n, p in model.named_parameters()]
    flat = flatten(named)

    def forward(ids: torch.Tensor, positions: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        hidden = model.base_model(input_ids=ids.view(-1, TOKENS), position_ids=positions.view(-1, TOKENS), use_cache=False)
        return hidden.last_hidden_state.reshape(1, -1, model.config.n_embd)

    def restore(tensors: Any) -> None:
        for name, values in flat.named().items():
            values.copy_(tensors[name])

    output.mkdir(parents=True, exist_ok=True)
    return Parts(
        config=config,
        loss=LossConfig(),
        model=model,
        head=Head(model.get_output_embeddings().weight),
        forward=forward,
        dropout=lambda seed, step, row: None,
        weights=flat.named,
        restore=restore,
        answers=lambda prompts: [f"{prompt}?" for prompt in prompts],
        flat=flat,
        optimizer=AdamW(flat, OptimConfig(weight_decay=0.1, bits=bits)),
        scale=LossScale.create(compute, torch.device("cpu")),
        loader=Rows(seed),
        evals={"held-out": Rows(seed + 1, rows=5)},
        device=torch.device("cpu"),
        autocast=None if compute == torch.float32 else compute,
        ladder=Ladder(Rung(microbatch, False), torch.device("cpu")),
        watch=Watch(torch.device("cpu")),
        row_tokens=TOKENS,
        total_steps=steps,
        checkpoints=output / "checkpoints",
        identity={"base": "tiny"},
        choices={},
        report=Report(output),
    )


def run(parts: Parts, stop: Stop | None = None) -> State:
    """Start, or resume from the newest checkpoint; returns the final state."""
    assert isinstance(parts.report, Report)
    stored = resume.newest(parts.checkpoints, parts.report.tell)
    state = State() if stored is None else saving.restore(parts, stored)
    parts.report.open(state, parts.total_steps, [], "test", {})
    try:
        loop.train(parts, state, Stop() if stop is None else stop)
    finally:
        parts.report.close()
    return state


def with_loader(parts: Parts, loader: Any) -> Parts:
    """The same run on other batches."""
    return replace(parts, loader=loader)
