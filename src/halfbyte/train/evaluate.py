"""Held-out loss, perplexity and token accuracy, one result an evaluation set.

Every trained token of a set weighs the same; the set is read whole, in one fixed order, without dropout, so two evaluations
of the same weights give the same numbers. Products are in the compute dtype in an fp8 run too, since an adapter that was trained in
fp8 is used in 16 bits: the score is that of `halfbyte eval`. Cost: about a third of the arithmetic of training on as many tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoints.base import Base
from halfbyte.data.loader import Loader as DataLoader
from halfbyte.data.tokens import TokenSet
from halfbyte.layers import decoded, head
from halfbyte.layers.forward import hidden_states
from halfbyte.objectives import sft
from halfbyte.train import fusing
from halfbyte.train.signals import Stop
from halfbyte.train.state import Loader, Microbatch, Parts, State
from halfbyte.train.step import forward, mixed


@dataclass(frozen=True)
class Score:
    """loss: mean cross-entropy (nats a token); perplexity: exp(loss); accuracy: share of tokens predicted right; tokens."""

    loss: float
    perplexity: float
    accuracy: float
    tokens: int

    def document(self) -> dict[str, Any]:
        """Plain JSON: null for what is not finite."""
        return {k: v if math.isfinite(v) else None for k, v in asdict(self).items()}


@torch.no_grad()
def evaluate(parts: Parts, stop: Stop | None = None) -> dict[str, Score] | None:
    """A score for every evaluation set; None when the run was asked to stop meanwhile."""
    training = parts.model.training
    parts.model.eval()
    try:
        scores = {}
        with fusing.exact(parts.model):
            for name, loader in parts.evals.items():
                score = _score(parts, loader, stop)
                if score is None:
                    return None
                scores[name] = score
        return scores
    finally:
        parts.model.train(training)


def _score(parts: Parts, loader: Loader, stop: Stop | None) -> Score | None:
    def sums(part: Microbatch) -> tuple[Tensor, Tensor]:
        with mixed(parts):
            return sft.sums(forward(parts, part), part.labels, parts.head, chunks=parts.ladder.rung.chunks)

    return measure(loader, math.gcd(parts.ladder.start, parts.microbatch), sums, stop)


def measure(
    loader: Loader, microbatch: int, sums: Callable[[Microbatch], tuple[Tensor, Tensor]], stop: Stop | None = None
) -> Score | None:
    """The score of a whole set. sums: loss and right predictions, summed over the learned tokens of a microbatch."""
    loss_sum, correct, tokens = 0.0, 0.0, 0
    for batch in loader.sweep():
        totals = []
        for part in batch.microbatches(microbatch):
            if stop:
                return None
            totals.append(torch.stack([value.double() for value in sums(part)]))
        found = torch.stack(totals).sum(0).tolist()
        loss_sum, correct, tokens = loss_sum + found[0], correct + found[1], tokens + batch.trained_tokens
    loss = loss_sum / max(1, tokens)
    return Score(loss, math.exp(min(loss, 700.0)), correct / max(1, tokens), tokens)


@torch.no_grad()
def evaluate_base(base: Base, sets: Mapping[str, TokenSet], tokens: int) -> dict[str, Score]:
    """Scores of a loaded model, with whatever adapter is attached and switched on; `tokens` a row, one row at a time.

    On CUDA adopted layers run fused, as in training; on a CPU with room for it, the weights are decoded once for all rows.
    """
    device = next(base.model.parameters()).device
    output = head.find(base.model)

    def sums(part: Microbatch) -> tuple[Tensor, Tensor]:
        hidden = hidden_states(base.model, part.input_ids.to(device), part.position_ids.to(device), part.cu_seqlens)
        return sft.sums(hidden, part.labels, output)

    with fusing.attached(base.model, device), decoded.held(base.model, base.compute):
        scores = {name: measure(DataLoader(part, tokens, 1, 0), 1, sums) for name, part in sets.items()}
    return {name: score for name, score in scores.items() if score is not None}


def record(parts: Parts, state: State, scores: dict[str, Score]) -> None:
    """Report the scores, keep them in the state, and note whether the held-out loss (over all sets' tokens) is the best yet.

    One that is not finite is told, is never the best, and does not end the run: non-finite steps do.
    """
    entry: dict[str, Any] = {"step": state.step, "sets": {name: score.document() for name, score in scores.items()}}
    for name, score in scores.items():
        parts.report.event({"kind": "eval", "step": state.step, "set": name, **score.document()})
        if not math.isfinite(score.loss):
            parts.report.tell(f"WARNING: step {state.step}: the held-out loss of {name} is not finite")
    state.evaluations.append(entry)
    if state.step == 0 or not scores:
        return
    tokens = sum(score.tokens for score in scores.values())
    loss = sum(score.loss * score.tokens for score in scores.values()) / max(1, tokens)
    if math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss):
        state.best_loss, state.best_step, state.stale = loss, state.step, 0
    else:
        state.stale += 1
