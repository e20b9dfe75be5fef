"""On which rung of its plan a run stands, and how it gets to another.

A rung (`memory.rungs`) is chosen before the first step, and a smaller one is taken whenever memory turns out to be shorter. None
changes what a step computes, so a run goes down in the middle of one and a checkpoint resumes on the rung it holds.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.config import Recipe
from halfbyte.memory.plan import Plan
from halfbyte.memory.rungs import Rung
from halfbyte.train import choices as choosing
from halfbyte.train.choices import KEPT, Choice

TAKEN = ("microbatch", "recompute", "offload", "moments", "embedding")
"""Choices that a rung stands for."""
RISING = 3
"""Steps in a row in which the allocator had to give its cache back and ask again, after which memory counts as too short."""


def _nothing(*_: object) -> None:
    pass


@dataclass
class Ladder:
    """rung: where the run stands, or goes next. smaller: the rung below one, None at the end. place: brings model and optimizer to
    a rung. forget: drops what an unfinished step left behind. retries: the allocator's count. advice: what would help where nothing
    fits. start: rows at once when the run began, of which evaluation batches are made."""

    rung: Rung
    device: torch.device
    smaller: Callable[[Rung], Rung | None] = _nothing
    place: Callable[[Rung], None] = _nothing
    forget: Callable[[], None] = _nothing
    retries: Callable[[], int] | None = None
    advice: str = ""

    def __post_init__(self) -> None:
        self.placed, self.start = self.rung, self.rung.microbatch
        self.seen, self.rising = 0, 0
        self.count = self.retries or _retries(self.device)

    def settle(self) -> None:
        """Model and optimizer are on the rung behind this. May itself find no memory, and be called again."""
        if self.placed != self.rung:
            self.place(self.rung)
            self.placed = self.rung

    def release(self) -> None:
        """Gives back all that is held and not needed."""
        self.forget()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def thrashing(self) -> bool:
        """After a step: whether the allocator had to ask again in each of the last RISING. Does not wait for the device."""
        now = self.count()
        self.rising = self.rising + 1 if now > self.seen else 0
        self.seen = now
        if self.rising < RISING:
            return False
        self.rising = 0
        return True


def _retries(device: torch.device) -> Callable[[], int]:
    if device.type != "cuda":
        return lambda: 0
    return lambda: int(torch.cuda.memory_stats_as_nested_dict(device).get("num_alloc_retries", 0))


def begin(
    plan: Plan, recipe: Recipe, kept: Mapping[str, Choice], fallen: Sequence[Mapping[str, Any]]
) -> tuple[Rung, dict[str, Choice]]:
    """The rung that a run begins on, and the choices that it stands for.

    plan: one that fits. kept: choices of a checkpoint. fallen: the shortages it has seen, whose last rung is taken. What the recipe
    asks for, it gets; what a checkpoint holds, only while it fits.
    """
    if fallen:
        last = Rung(**fallen[-1]["rung"])
        rung = _standing(plan, recipe, last)
        why = KEPT if rung == last else "; the fastest way of the plan that fits and needs no more"
        told = dict.fromkeys(TAKEN, f"memory ran short at step {fallen[-1]['step']}{why}")
    else:
        rows = choosing.settle("microbatch", recipe.memory.microbatch, kept, lambda: Choice(plan.microbatch, plan.reason))
        again = choosing.settle("recompute", recipe.memory.recompute, kept, lambda: Choice(_on(plan.rung.recompute), plan.reason))
        rung = _nearest(plan, rows.value, again.value == "on")
        told = {"offload": plan.offload, "moments": plan.paging, "embedding": plan.embedding}
        told["microbatch"] = rows.reason if rung.microbatch == rows.value else plan.reason
        told["recompute"] = again.reason if rung.recompute == (again.value == "on") else plan.reason
    values = {
        "microbatch": rung.microbatch,
        "recompute": _on(rung.recompute),
        "offload": _on(rung.offload),
        "moments": _place(rung.paged),
        "embedding": _place(rung.embedding_away),
    }
    return rung, {name: Choice(value, told[name]) for name, value in values.items()}


def _nearest(plan: Plan, rows: int, recompute: bool) -> Rung:
    """The plan's own rung, or the fastest that fits of those with what a checkpoint has settled before the plan: rows and
    recompute, or rows alone. What does not fit any more is not taken."""
    alike = [r for r in plan.rungs if r.microbatch == rows and r.bytes <= plan.budget.bytes]
    both = [r for r in alike if r.recompute == recompute]
    return plan.rung if plan.rung in both else next(iter(both or alike), plan.rung)


def _standing(plan: Plan, recipe: Recipe, rung: Rung) -> Rung:
    """The rung that a run has fallen to, if it still fits and the recipe still allows it; else the fastest of the plan that needs
    no more, or the leanest."""
    memory, paging = recipe.memory, recipe.optim.paged
    asked = [
        memory.microbatch in ("auto", rung.microbatch),
        memory.recompute in ("auto", _on(rung.recompute)),
        memory.offload in ("auto", _on(rung.offload)),
        paging == "auto" or (paging == "always") == rung.paged,
        memory.embedding == "auto" or (memory.embedding == "host") == rung.embedding_away,
    ]
    room = min(rung.bytes, plan.budget.bytes)
    if all(asked) and rung.bytes <= room:
        return rung
    return next((r for r in plan.rungs if r.bytes <= room), plan.rungs[-1])


def _place(away: bool) -> str:
    return "in host memory" if away else "on the device"


def _on(value: bool) -> str:
    return "on" if value else "off"
