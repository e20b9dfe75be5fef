"""What is proven once while a run goes on, because nothing before the first step can show it.

    adapter.no-gradient  after the first backward pass a module of the adapter has no gradient: it would never learn
    adapter.not-saved    the first checkpoint does not hold the weights that are in memory

Why: both leave a loss curve that falls, only less, or a run that ends well and an adapter that answers like the base. Cost: one
synchronisation at the first step; the adapter read once from disk after the first save.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from halfbyte.adapters import state as adapter_state
from halfbyte.errors import TrainingError
from halfbyte.optim.flat import Flat

SHOWN = 6


@dataclass
class Proofs:
    """What was proven in this process."""

    gradient: bool = False
    saved: bool = False


@torch.no_grad()
def gradient(proofs: Proofs, flat: Flat, values: Tensor, trained_tokens: int) -> None:
    """Look at the first finite gradient of a batch that learns anything. values: `[4]` as `clip_gradient` returns them.

    Of an adapter B is looked at, because the gradient of A is zero while B is. Experts are passed over as long as any of them
    learns: a batch need not visit all. Raises TrainingError (`adapter.no-gradient`) before any weight has changed.
    """
    if proofs.gradient or not trained_tokens or bool(values[2]):
        return
    named = [(s.name.rpartition(".")[0], g.view(g.grads, s)) for g in flat.groups if g.role == "lora_b" for s in g.segments]
    alive = torch.stack([(part != 0).any() for _, part in named]).tolist() if named else []
    proofs.gradient = True
    dead = [name for (name, _), lives in zip(named, alive, strict=True) if not lives]
    visited = any(lives for (name, _), lives in zip(named, alive, strict=True) if ".experts." in name)
    dead = [name for name in dead if not (visited and ".experts." in name)]
    if dead:
        names = ", ".join(dead[:SHOWN]) + (f" and {len(dead) - SHOWN} more" if len(dead) > SHOWN else "")
        leaves = sorted({name.rpartition(".")[2] for name in dead})
        every = len(dead) == len(named)
        raise TrainingError(
            f"{len(dead)} of {len(named)} adapted modules got no gradient in the first step and would never learn: {names}",
            hint="nothing of the adapter is reached: is the loss on any of its layers' tokens? look at `halfbyte data preview`"
            if every
            else f"the loss does not depend on them: leave them out with `adapter.exclude`, by path or as {leaves[:SHOWN]}",
            code="adapter.no-gradient",
        )


def saved(proofs: Proofs, flat: Flat, checkpoint: Path) -> None:
    """Compare the first checkpoint of this process with the weights in memory, tensor for tensor, bit for bit.

    Raises TrainingError (`adapter.not-saved`) naming what differs.
    """
    if proofs.saved:
        return
    proofs.saved = True
    wrong = differences(flat, checkpoint / "adapter_model.safetensors")
    if wrong:
        names = ", ".join(wrong[:SHOWN]) + (f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else "")
        raise TrainingError(
            f"{checkpoint} does not hold what was learned: {len(wrong)} tensors differ from the weights in memory: {names}",
            hint="this is a defect in halfbyte: please report it; nothing was lost, but the run would end with another adapter",
            code="adapter.not-saved",
        )


def differences(flat: Flat, path: Path) -> list[str]:
    """Names of trained tensors that the file lacks, holds besides, or holds with other bits; one tensor is read at a time."""
    wrong, known = [], set()
    with safe_open(path, framework="pt") as file:
        stored = set(file.keys())
        for group in flat.groups:
            for segment in group.segments:
                name = segment.name if segment.name in stored else adapter_state.file_name(segment.name, group.role)
                known.add(name)
                mine = group.view(group.values, segment).detach().cpu()
                if name not in stored or not torch.equal(file.get_tensor(name), mine):
                    wrong.append(name)
    return wrong + sorted(stored - known)
