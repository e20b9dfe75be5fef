"""From a run to a checkpoint and back: which tensors and documents, when old ones go, and what a full disk means.

    adapter_model.safetensors   the adapter's tensors (PEFT's names; the weights' own names in full fine-tuning)
    optimizer.safetensors       Adam's moments and counts, the loss scale
    trainer.json                `State`
    data.json                   seed and position of the next batch: epoch, row
    choices.json                what `auto` became, with reasons: reused on resume

Dropout masks and the global generator are functions of (seed, step), so there is no generator state to keep.
"""

from __future__ import annotations

import time

import torch

from halfbyte.checkpoints import resume
from halfbyte.checkpoints.resume import Contents, DiskFull
from halfbyte.errors import TrainingError
from halfbyte.train import proofs
from halfbyte.train.state import Parts, State

TOLERATED = 3
SLOW_SECONDS = 30.0


def contents(parts: Parts, state: State) -> Contents:
    """The run at this boundary: views, not copies."""
    epoch, row = parts.loader.position(state.step)
    scale = {"scale.scale": parts.scale.scale, "scale.clean": parts.scale.clean}
    return Contents(
        step=state.step,
        tensors={"adapter_model": parts.weights(), "optimizer": {**parts.optimizer.state_dict(), **scale}},
        documents={
            "trainer": state.document(),
            "data": {"seed": parts.config.seed, "epoch": epoch, "row": row},
            "choices": dict(parts.choices),
        },
        identity=parts.identity,
    )


def save(parts: Parts, state: State) -> None:
    """Save, verify, then delete old checkpoints. A full disk is told, survived twice, and ends the run the third time in a row."""
    if state.saved == state.step and state.kept_shortages == len(state.shortages):
        return
    before = state.saved, state.kept_shortages
    state.saved, state.kept_shortages = state.step, len(state.shortages)
    started = time.monotonic()
    try:
        written = resume.save(parts.checkpoints, contents(parts, state))
    except DiskFull as error:
        state.saved, state.kept_shortages = before
        state.save_failures += 1
        parts.report.event({"kind": "save-failed", "step": state.step, "reason": error.message})
        if state.save_failures >= TOLERATED:
            raise TrainingError(
                f"{TOLERATED} checkpoints in a row could not be saved: {error.message}",
                hint="free some space and run the same command again: it resumes from the newest checkpoint",
                code="train.disk-full",
            ) from error
        parts.report.tell(f"WARNING: {error.message}; going on, next try at the next save")
        return
    state.save_failures = 0
    proofs.saved(parts.proofs, parts.flat, written)
    seconds = time.monotonic() - started
    if seconds > SLOW_SECONDS:
        parts.report.tell(f"WARNING: saving took {seconds:.0f} s; schedulers often kill {SLOW_SECONDS:.0f} s after SIGTERM")
    resume.prune(parts.checkpoints, parts.config.keep, state.best_step)


@torch.no_grad()
def restore(parts: Parts, stored: Contents) -> State:
    """Put a checkpoint back, bit for bit; the mirror of `contents`. The run's identity was compared before."""
    parts.restore(stored.tensors["adapter_model"])
    optimizer = dict(stored.tensors["optimizer"])
    parts.scale.scale.copy_(optimizer.pop("scale.scale"))
    parts.scale.clean.copy_(optimizer.pop("scale.clean"))
    parts.optimizer.load_state_dict(optimizer)
    return State.from_document(stored.documents["trainer"])
