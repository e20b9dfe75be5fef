"""The parts of one optimizer step, each a function that the loop calls by name.

No function here waits for the device: losses, norms and the finite flag stay where they were computed until the log line
reads them (`settle`), so a skipped step costs no synchronisation either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.errors import TrainingError
from halfbyte.objectives import sft
from halfbyte.optim.schedule import learning_rate
from halfbyte.pinned import to_device
from halfbyte.train.state import Batch, Microbatch, Parts, State

TOLERATED = 3
ANOMALIES = "anomalies.jsonl"


@dataclass(frozen=True)
class Outcome:
    """One optimizer step, still on the device. values: fp32 `[4]`: loss, gradient norm, found_inf, loss scale."""

    step: int
    lr: float
    values: Tensor
    batch: Batch


def seed_step(parts: Parts, step: int) -> None:
    """Make the global generator a function of (seed, step): dropout inside the base then resumes exactly, with nothing saved."""
    torch.manual_seed((parts.config.seed * 1_000_003 + step) % 2**63)


def split(parts: Parts, batch: Batch, step: int) -> Iterator[Microbatch]:
    """The batch's microbatches in order; the adapter's dropout masks are numbered before each. Gradients start at zero: the
    optimizer's step, or `drop`, leaves them so."""
    for number, part in enumerate(batch.microbatches(parts.microbatch)):
        parts.dropout(parts.config.seed, step, number * parts.microbatch)
        yield part


def mixed(parts: Parts) -> AbstractContextManager[object]:
    """Autocast where the weights are fp32 masters themselves (full fine-tuning), nothing otherwise."""
    return nullcontext() if parts.autocast is None else torch.autocast(parts.device.type, dtype=parts.autocast)


def forward(parts: Parts, part: Microbatch) -> Tensor:
    """Hidden states `[1, S, H]` after the final norm."""
    parts.watch.mark("forward")
    ids, positions = (to_device(tensor, parts.device) for tensor in (part.input_ids, part.position_ids))
    hidden = parts.forward(ids, positions, part.cu_seqlens)
    return hidden if parts.autocast is None else hidden.to(parts.autocast)


def objective(parts: Parts, hidden: Tensor, part: Microbatch, batch: Batch) -> Tensor:
    """The microbatch's share of the batch's mean loss."""
    parts.watch.mark("loss")
    return sft.loss(hidden, part.labels, parts.head, batch.weight, parts.loss, parts.ladder.rung.chunks, part.weights)


def backward(parts: Parts, loss: Tensor) -> Tensor:
    """Add the gradient of the (scaled) loss to the flat gradient buffer; returns the loss without its graph."""
    parts.watch.mark("backward")
    (loss * parts.scale.scale).backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def drop(parts: Parts) -> None:
    """Forget an unfinished window's gradient."""
    parts.flat.grads.zero_()


def clip_gradient(parts: Parts, loss: Tensor) -> Tensor:
    """Measure the gradient for the step, which unscales and clips it. Returns `[4]`: loss, norm before clipping, found_inf, loss
    scale."""
    parts.watch.mark("update")
    return parts.optimizer.clip(loss, parts.scale.scale, parts.config.clip)


def optimizer_step(parts: Parts, state: State, values: Tensor, batch: Batch) -> Outcome:
    """One AdamW step at the schedule's rate, untouched where the gradient is not finite; the gradient is zero after it, and the
    position moves on, in any case."""
    lr = learning_rate(state.step, parts.total_steps, parts.config)
    scale, tokens = parts.scale.after(values[2]), batch.trained_tokens
    # The last that can find no memory; called again, it goes on where it ended. Nothing behind it allocates.
    parts.optimizer.step(lr)
    parts.scale.take(scale)
    state.step += 1
    state.trained_tokens += tokens
    return Outcome(state.step, lr, values, batch)


def settle(parts: Parts, state: State, pending: list[Outcome]) -> None:
    """Read what the last steps gave (one synchronisation), record anomalies, fill the log window. Empties `pending`.

    Raises TrainingError (train.non-finite) after three non-finite steps in a row.
    """
    if not pending:
        return
    rows = torch.stack([outcome.values for outcome in pending]).tolist()
    for outcome, (loss, norm, found_inf, scale) in zip(pending, rows, strict=True):
        if found_inf:
            _anomaly(parts, state, outcome, loss, norm, scale)
        else:
            state.non_finite = 0
        state.window.append(
            {
                "step": outcome.step,
                "loss": loss if math.isfinite(loss) else None,
                "norm": norm if math.isfinite(norm) else None,
                "lr": outcome.lr,
                "tokens": outcome.batch.trained_tokens,
                "skipped": bool(found_inf),
            }
        )
    pending.clear()


def _anomaly(parts: Parts, state: State, outcome: Outcome, loss: float, norm: float, scale: float) -> None:
    """Record a skipped step. An fp16 overflow that a smaller loss scale can cure is no anomaly: the scale is halved."""
    state.skipped += 1
    if parts.scale.moving and math.isfinite(loss) and scale > 1:
        parts.report.tell(f"step {outcome.step}: fp16 overflow, step skipped, loss scale {scale:g} -> {scale / 2:g}")
        return
    state.non_finite += 1
    what = "loss" if not math.isfinite(loss) else "gradient"
    event = {
        "kind": "anomaly",
        "step": outcome.step,
        "what": f"non-finite {what}",
        "loss": str(loss),
        "norm": str(norm),
        "examples": [i for row in outcome.batch.example_ids for i in row],
    }
    parts.report.event(event)
    parts.report.tell(f"WARNING: step {outcome.step}: non-finite {what}; step skipped, weights untouched, see {ANOMALIES}")
    if state.non_finite >= TOLERATED:
        raise TrainingError(
            f"{TOLERATED} non-finite steps in a row (the last is step {outcome.step}); the weights from before them are saved",
            hint=f"the examples of each are in {ANOMALIES}: look at them with `halfbyte data preview`; if they are sound, "
            "lower train.lr or set compute to bf16 or fp32; the same command again goes on behind them",
            code="train.non-finite",
        )
