"""Held-out loss, perplexity and token accuracy, one result an evaluation set.

Every trained token of a set weighs the same; the set is read whole, in one fixed order, without dropout, so two evaluations
of the same weights give the same numbers. Cost: about a third of the arithmetic of training on as many tokens.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from halfbyte.objectives import sft
from halfbyte.train.signals import Stop
from halfbyte.train.state import Loader, Parts, State
from halfbyte.train.step import forward, mixed


@dataclass(frozen=True)
class Score:
    """loss: mean cross-entropy (nats a token); perplexity: exp(loss); accuracy: share of tokens predicted right; tokens."""

    loss: float
    perplexity: float
    accuracy: float
    tokens: int


@torch.no_grad()
def evaluate(parts: Parts, stop: Stop | None = None) -> dict[str, Score] | None:
    """A score for every evaluation set; None when the run was asked to stop meanwhile."""
    training = parts.model.training
    parts.model.eval()
    try:
        scores = {}
        for name, loader in parts.evals.items():
            score = _score(parts, loader, stop)
            if score is None:
                return None
            scores[name] = score
        return scores
    finally:
        parts.model.train(training)


def _score(parts: Parts, loader: Loader, stop: Stop | None) -> Score | None:
    total = torch.zeros(2, dtype=torch.float64, device=parts.device)
    tokens = 0
    for batch in loader.sweep():
        for part in batch.microbatches(parts.microbatch):
            if stop:
                return None
            with mixed(parts):
                found = sft.sums(forward(parts, part), part.labels, parts.head)
            total += torch.stack([value.double() for value in found])
        tokens += batch.trained_tokens
    loss_sum, correct = total.tolist()
    loss = loss_sum / max(1, tokens)
    return Score(loss, math.exp(min(loss, 700.0)), correct / max(1, tokens), tokens)


def record(parts: Parts, state: State, scores: dict[str, Score]) -> None:
    """Report the scores, keep them in the state, and note whether the held-out loss (over all sets' tokens) is the best yet."""
    entry: dict[str, Any] = {"step": state.step, "sets": {name: asdict(score) for name, score in scores.items()}}
    for name, score in scores.items():
        parts.report.event({"kind": "eval", "step": state.step, "set": name, **asdict(score)})
    state.evaluations.append(entry)
    if state.step == 0 or not scores:
        return
    tokens = sum(score.tokens for score in scores.values())
    loss = sum(score.loss * score.tokens for score in scores.values()) / max(1, tokens)
    if state.best_loss is None or loss < state.best_loss:
        state.best_loss, state.best_step, state.stale = loss, state.step, 0
    else:
        state.stale += 1
