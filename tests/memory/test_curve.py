"""Memory over one step: the planned curve, the real one from a history or from samples, and the picture of both."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.errors import RecipeError
from halfbyte.memory import curve, picture, trace
from halfbyte.memory.budget import Budget
from halfbyte.memory.choose import Chooser
from halfbyte.memory.curve import DECODED, PHASES, Curve, begins
from halfbyte.memory.part import NOBODYS
from halfbyte.memory.plan import chooser, settled
from halfbyte.memory.rungs import Rung
from halfbyte.memory.tape import SCRATCH
from halfbyte.memory.trace import OTHER, from_history, last_microbatch
from halfbyte.memory.watch import Watch
from halfbyte.recipe import recipe_from
from support import SMOLLM2

CPU = Budget("cpu", "CPU", 8 << 30, 8 << 30, False, "")
MARKS = {"forward": 0.0, "loss": 2.0, "backward": 3.0, "update": 4.0, "end": 5.0}


def chooser_of(budget: str | Budget, *overrides: str) -> Chooser:
    recipe = recipe_from({"model": "m", "data": {"train": "a.jsonl"}}, list(overrides))
    return chooser(recipe, budget, config=SMOLLM2)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("budget", "overrides"),
    [("24GiB", ()), ("3GiB", ()), ("24GiB", ("format=none",)), (CPU, ()), (CPU, ("memory.recompute=on",))],
    ids=str,
)
def test_the_largest_moment_of_the_planned_curve_is_the_plan(budget: Any, overrides: tuple[str, ...]) -> None:
    made = chooser_of(budget, *overrides)
    plan = settled(made)
    found = curve.planned(made, plan.rung)
    context = sum(p.bytes for p in plan.parts if p.name in NOBODYS) if plan.budget.kind == "cuda" else 0
    assert found.peak == plan.bytes - context
    assert sum(found.at_peak().values()) == found.peak
    assert list(found.x) == sorted(found.x) and found.x[0] == 0 and found.x[-1] == sum(PHASES.values())
    assert found.totals[-1] < found.peak, "the update needs less"


@pytest.mark.cpu
def test_held_weights_are_a_part_and_leave_no_scratch() -> None:
    made = chooser_of("24GiB")
    rung = replace(settled(made).rung, decoded=False)
    plain, held = curve.planned(made, rung), curve.planned(made, replace(rung, decoded=True))
    assert held.at_peak()[DECODED] == made.decoded()[True] > 0
    assert SCRATCH in plain.parts and SCRATCH not in held.parts


@pytest.mark.cpu
def test_a_picture_of_the_plan_alone(tmp_path: Path) -> None:
    made = chooser_of("24GiB")
    picture.of_plan(tmp_path / "new" / "a.png", made, settled(made))
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(RecipeError, match="is no picture"):
        picture.of_plan(tmp_path / "a.jpeg2", made, settled(made))


def alloc(addr: int, size: int, file: str = "x.py") -> dict[str, Any]:
    return {"action": "alloc", "addr": addr, "size": size, "frames": [{"filename": file, "line": 1, "name": "f"}]}


def free(addr: int, size: int) -> dict[str, Any]:
    return {"action": "free_requested", "addr": addr, "size": size}


def test_a_history_is_told_apart_by_part_and_phase() -> None:
    events = [
        {"action": "segment_alloc", "addr": 0, "size": 1 << 20},
        alloc(1, 100),  # kept for backward
        alloc(2, 40, "/src/halfbyte/kernels/augmented/__init__.py"),
        free(2, 40),
        {"action": "free_completed", "addr": 2, "size": 40},
        alloc(2, 30),  # the loss, at an address used before
        alloc(3, 50),  # backward
        free(2, 30),
        free(1, 100),
        alloc(4, 7),  # update
        free(3, 50),
        free(9, 5),  # of before
    ]
    found = from_history(events, MARKS, before=1000, always={"packed weights": 600, "optimizer": 300})
    assert found.totals[0] == 1000 and found.peak == 1000 + 100 + 30 + 50
    assert found.at_peak() == {
        "packed weights": 600,
        "optimizer": 300,
        OTHER: 100,
        "activations": 100,
        SCRATCH: 0,
        "loss": 30,
        "backward": 50,
        "update": 0,
    }
    assert found.parts[SCRATCH][2] == 40
    places = [x for x, size in zip(found.x, found.parts["backward"], strict=False) if size]
    assert min(places) == begins("backward") and max(places) < sum(PHASES.values())
    assert found.totals[-1] == 1000 + 7 - 5


def test_what_an_earlier_microbatch_left_is_there_from_the_start() -> None:
    events = [alloc(1, 10), alloc(2, 20), free(2, 20), alloc(3, 5), alloc(4, 5), free(3, 5), alloc(5, 1), alloc(6, 1)]
    found = from_history(events, {"forward": 2, "loss": 3, "backward": 4, "update": 5, "end": 6}, before=0, always={})
    assert found.totals[0] == 10 and found.peak == 20
    assert len(found.x) == 1 + 1 + 5, "the earlier microbatch has no place of its own"


def test_the_last_microbatch_is_drawn_and_a_step_that_was_given_up_is_not() -> None:
    once = ["forward", "loss", "backward"]
    marks = [(phase, float(i)) for i, phase in enumerate([*once, "forward", *once, "update", "end"])]
    assert last_microbatch(marks) == {"forward": 4.0, "loss": 5.0, "backward": 6.0, "update": 7.0, "end": 8.0}
    assert last_microbatch([("forward", 0.0), ("loss", 1.0), ("end", 2.0)]) == {}
    assert last_microbatch([("end", 0.0)]) == {}


def test_one_step_is_sampled_on_a_cpu(tmp_path: Path) -> None:
    watch = Watch(torch.device("cpu"), standing=lambda: {"weights": 1000}, record=2)
    for step in range(3):
        with watch.step():
            for phase in PHASES:
                watch.mark(phase)
                time.sleep(0.01 if step == 1 else 0)
        assert (watch.recorded is None) == (step == 0)
    found = watch.recorded
    assert found is not None and set(found.parts) == {"weights", OTHER}
    assert found.peak > 1 << 20 and list(found.x) == sorted(found.x)
    assert all(any(begins(phase) <= x < begins(phase) + width for x in found.x) for phase, width in PHASES.items())
    picture.draw(tmp_path / "a.png", "one", curve.made([(0.0, {"loss": 1 << 20})], {"weights": 1 << 20}), found, {"peak": 3 << 20})
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_step_that_fails_leaves_no_recording() -> None:
    watch = Watch(torch.device("cpu"), record=1)
    with pytest.raises(ValueError, match="no"), watch.step():
        watch.mark("forward")
        raise ValueError("no")
    assert watch.recorded is None and watch.recorder is None


def test_a_picture_has_a_panel_for_a_truth_that_is_known_by_part(tmp_path: Path) -> None:
    plan = Curve((0.0, 1.0, 2.9), {"weights": (1 << 30, 1 << 30), "activations": (0, 1 << 30)})
    for name, real in (("one", None), ("two", plan)):
        picture.draw(tmp_path / f"{name}.png", "title", plan, real, room=3 << 30)
    sizes = [int.from_bytes((tmp_path / f"{name}.png").read_bytes()[20:24], "big") for name in ("one", "two")]
    assert sizes[1] > 1.4 * sizes[0], "pixels from top to bottom"


def test_a_log_line_has_the_plan_beside_the_truth() -> None:
    watch = Watch(torch.device("cpu"), planned=lambda rung: rung.microbatch << 20)
    found = watch.event(Rung(3, False))
    assert found.keys() == {"memory_mib", "planned_mib", "resident_mib"} and found["planned_mib"] == 3
    assert 0 < found["resident_mib"] <= found["memory_mib"] * 1.01
    assert watch.outer() == (0, 0)


def test_the_peak_of_a_gpu_begins_anew_with_a_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rung above took is of the whole run, and no truth for the plan of the one that is left."""
    taken = [5 << 30]
    monkeypatch.setattr("halfbyte.memory.measure.peak", lambda device: taken[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: taken.__setitem__(0, 2 << 30))
    watch = Watch(torch.device("cuda", 0))
    watch.anew()
    watch.read()
    assert watch.peak == 2 << 30 and watch.whole == 5 << 30


@pytest.mark.gpu
def test_a_history_of_a_gpu_adds_up() -> None:
    device = torch.device("cuda", 0)
    kept = torch.empty(1 << 22, device=device)
    torch.cuda.reset_peak_memory_stats()
    recorder = trace.recorder(device)
    tensors = []
    for phase in PHASES:
        recorder.mark(phase)
        passing = torch.empty(1 << 20, device=device)
        tensors.append(torch.empty(1 << 21, device=device))
        del passing
    found = recorder.curve({"weights": kept.nbytes})
    assert found is not None
    assert found.peak == pytest.approx(torch.cuda.max_memory_allocated(), abs=1 << 16)
    assert found.at_peak()["activations"] == tensors[0].nbytes
