"""What happens when an allocation fails in a step: the step begins anew with less memory, and the run goes on.

A step has two halves. Until the gradient is measured nothing has changed but the gradient, so the first half is taken back whole:
gradient zeroed, caches emptied, the next smaller rung, the same rows with the same random numbers. The second half applies the
gradient chunk by chunk, each computed before anything is written: it is not taken back but goes on where it ended.
Cost: nothing while nothing fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TypeVar

from halfbyte.errors import MemoryPlanError
from halfbyte.shortage import in_words, is_shortage
from halfbyte.train.state import Parts, State

T = TypeVar("T")
TRIES = 3
"""Times that the second half is tried: little is allocated there, and no rung makes it less."""


def rewinding(parts: Parts, state: State, attempt: Callable[[], T], rewind: Callable[[], None]) -> T:
    """What `attempt` returns, on a rung where it finds its memory. Raises MemoryPlanError (train.out-of-memory) below the last."""
    while True:
        try:
            parts.ladder.settle()
            return attempt()
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            why = in_words(error, parts.device)
        # The error is gone here, and with it the frames that held the step's tensors.
        rewind()
        descend(parts, state, why)


def continuing(parts: Parts, state: State, attempt: Callable[[], T]) -> T:
    """The same for what goes on where it ended."""
    for _ in range(TRIES):
        try:
            return attempt()
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            why = in_words(error, parts.device)
        parts.ladder.release()
        parts.report.tell(f"step {state.step + 1}: {why}; caches emptied, the update goes on where it ended")
    raise _nothing_fits(parts, state, why)


def whole(parts: Parts) -> bool:
    """Whether no update is half applied: only then a checkpoint holds one step."""
    return parts.optimizer.applied == 0


def descend(parts: Parts, state: State, why: str) -> None:
    """Empties pools and caches and takes the next smaller rung, which the next attempt settles on; tells it in one line."""
    ladder = parts.ladder
    ladder.release()
    below = ladder.smaller(ladder.rung)
    if below is None:
        raise _nothing_fits(parts, state, why)
    ladder.rung = below
    parts.watch.anew()
    state.shortages.append({"step": state.step + 1, "why": why, "rung": asdict(below)})
    parts.report.tell(f"step {state.step + 1}: {why}; going on with {below.words()}")


def watch(parts: Parts, state: State) -> None:
    """After a step: an allocator that has to empty its cache in every step counts as one that found no memory."""
    if not parts.ladder.thrashing():
        return
    if parts.ladder.smaller(parts.ladder.rung) is None:
        parts.report.tell(f"step {state.step}: the allocator empties its cache in every step; nothing smaller is left to choose")
        return
    descend(parts, state, "the allocator had to empty its cache in each of the last steps")


def _nothing_fits(parts: Parts, state: State, why: str) -> MemoryPlanError:
    rung = parts.ladder.rung
    planned = f", for which {rung.bytes / 2**30:.2f} GiB were planned" if rung.bytes else ""
    since = f"step {state.saved}, of which there is a checkpoint" if state.saved >= 0 else "its first step, since none is saved yet"
    saved = "the run is saved" if whole(parts) else f"the update is half applied and not saved: the run resumes from {since}"
    return MemoryPlanError(
        f"step {state.step + 1}: {why}, and nothing smaller is left to choose than {rung.words()}{planned}; {saved}",
        hint=parts.ladder.advice or "end other programs on the device, or shorten data.tokens",
        code="train.out-of-memory",
    )
