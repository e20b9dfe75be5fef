"""A step that finds no memory begins anew with less: the same weights, whatever allocation fails; the rung is kept."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from halfbyte.adapters import lora
from halfbyte.adapters.config import AdapterConfig
from halfbyte.errors import Interrupted, MemoryPlanError
from halfbyte.layers import forward, head, recompute
from halfbyte.layers.fused.prepare import prepare
from halfbyte.memory.rungs import Rung, below, ways
from halfbyte.optim.adamw import AdamW
from halfbyte.optim.config import OptimConfig
from halfbyte.optim.flat import flatten
from halfbyte.optim.scaling import LossScale
from halfbyte.train import fusing, ladder, loop
from halfbyte.train.ladder import Ladder
from halfbyte.train.signals import Stop
from halfbyte.train.state import Parts, State
from layers.families import NF4, pair
from train import rig
from train.shortage import Short
from train.test_loop import StopAfter, assert_same

CPU = torch.device("cpu")


def rungs(*all_rungs: Rung) -> list[Rung]:
    """The same with bytes that fall."""
    return [replace(rung, bytes=len(all_rungs) - i) for i, rung in enumerate(all_rungs)]


def with_ladder(parts: Parts, steps: list[Rung], **more: Any) -> Parts:
    """The run on the first of `steps`, with the others below it."""

    def place(rung: Rung) -> None:
        recompute.set_recompute(parts.model, rung.recompute)  # type: ignore[arg-type]
        fusing.use(parts.model, rung)  # type: ignore[arg-type]
        if rung.paged:
            parts.optimizer.page()

    made = Ladder(steps[0], parts.device, lambda rung: below(steps, rung), place, lambda: fusing.forget(parts.model), **more)  # type: ignore[arg-type]
    place(steps[0])
    return replace(parts, ladder=made)


def modules(output: Path, bits: int, microbatch: int = 2) -> Parts:
    """All of a tiny GPT-2 learns, its layers run as modules, with dropout of the base."""
    parts = rig.build(output, microbatch=microbatch, bits=bits, steps=4)  # type: ignore[arg-type]
    return with_ladder(parts, rungs(*(Rung(microbatch, again) for again in (False, True))))


def fused(output: Path, bits: int, steps: list[Rung], dropout: float = 0, device: torch.device = CPU) -> Parts:
    """An adapter on a tiny packed Llama, its layers fused, gradients in place."""
    model, _ = pair("llama", NF4)
    model.to(device)
    adapter = lora.attach(model, AdapterConfig(rank=4, dropout=dropout), seed=1)
    flat = flatten(adapter.parameters())
    assert prepare(model, in_place=True).layers == 2
    parts = replace(
        rig.build(output, steps=4),
        model=model,
        head=head.find(model),
        forward=lambda ids, positions, bounds: forward.hidden_states(model, ids, positions, bounds),
        dropout=lambda seed, step, row: adapter.set_dropout_state(seed, step, row, rig.TOKENS),
        weights=flat.named,
        flat=flat,
        optimizer=AdamW(flat, OptimConfig(bits=bits)),  # type: ignore[arg-type]
        scale=LossScale.create(torch.float32, device),
        device=device,
    )
    return with_ladder(parts, steps)


KEEPING = rungs(Rung(2, False), Rung(2, True), Rung(2, True, offload=True))
SMALLER = rungs(Rung(4, False), Rung(2, False), Rung(1, False), Rung(1, True, chunks=8))


@dataclass
class Trial:
    """One optimizer step of a run, tried again and again from the same start."""

    parts: Parts

    def __post_init__(self) -> None:
        self.parts.model.train()
        self.first = self.parts.ladder.rung
        loop.one_step(self.parts, State(step=0), Stop())  # moments that are not zero
        self.start = [t.clone() for t in self._tensors()]
        gc.collect()
        gc.freeze()  # what is collected after each failure is then little

    def _tensors(self) -> list[torch.Tensor]:
        return [*self.parts.optimizer.state_dict().values(), self.parts.flat.values, self.parts.flat.grads]

    def step(self, fails: Iterable[int] = ()) -> tuple[list[torch.Tensor], State, int]:
        """What the step leaves, the state, and the number of allocations."""
        ladder = self.parts.ladder
        ladder.rung = self.first
        ladder.settle()
        with torch.no_grad():
            for tensor, kept in zip(self._tensors(), self.start, strict=True):
                tensor.copy_(kept)
        state = State(step=1)
        with Short(set(fails)) as memory:
            outcome = loop.one_step(self.parts, state, Stop())
        assert outcome is not None and (state.step, outcome.step) == (2, 2)
        return [t.clone() for t in (*self._tensors(), outcome.values)], state, memory.made

    def every(self, stride: int, check: Callable[[list[torch.Tensor], list[torch.Tensor]], None]) -> set[str]:
        """Each `stride`-th allocation fails once; the rungs that were gone to."""
        expected, _, count = self.step()
        assert count > 100
        seen = set()
        for n in range(1, count + 1, stride):
            found, state, made = self.step([n])
            assert made > n, "the failing allocation was the last"
            assert len(state.shortages) <= 1
            seen |= {json.dumps(s["rung"]) for s in state.shortages}
            check(found, expected)
        return seen


def same_bits(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


STRIDES = [
    pytest.param(97, id="some"),
    pytest.param(11, id="more", marks=pytest.mark.cpu),
    pytest.param(1, id="all", marks=pytest.mark.slow),
]
"""Every so many-th allocation."""


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("stride", STRIDES)
def test_every_allocation_of_a_step_may_fail(tmp_path: Path, stride: int, bits: int) -> None:
    seen = Trial(modules(tmp_path, bits)).every(stride, same_bits)
    assert len(seen) == 1, "nothing but recompute was chosen"


@pytest.mark.parametrize("stride", STRIDES)
def test_every_allocation_of_a_fused_step_may_fail(tmp_path: Path, stride: int) -> None:
    Trial(fused(tmp_path, 32, KEEPING)).every(stride, same_bits)


@pytest.mark.parametrize("stride", STRIDES)
def test_fewer_rows_give_the_same_step_to_rounding(tmp_path: Path, stride: int) -> None:
    Trial(fused(tmp_path, 32, SMALLER)).every(stride, close)


def test_a_step_goes_down_as_far_as_it_must(tmp_path: Path) -> None:
    trial = Trial(fused(tmp_path, 32, KEEPING))
    expected, _, count = trial.step()
    for first in range(1, count, 397):
        found, state, _ = trial.step([first, first + 40])
        assert len(state.shortages) <= 2
        same_bits(found, expected)
    with pytest.raises(MemoryPlanError, match=r"step 2: 2.00 MiB could not be allocated, and nothing smaller is left") as caught:
        trial.step(range(1, 10_000))
    assert caught.value.code == "train.out-of-memory"
    assert "what layers keep waits in host memory" in caught.value.message


def short_at(parts: Parts, calls: Container[int], training: bool = True) -> Parts:
    """The run whose forward number n (from 1, of training or of evaluation) finds no memory, for every n in `calls`."""
    forwards: list[object] = []

    def sometimes(*inputs: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() == training:
            forwards.append(inputs)
            if len(forwards) in calls:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has")
        return parts.forward(*inputs)

    return replace(parts, forward=sometimes)


@pytest.mark.parametrize("bits", [32, 8])
def test_moments_that_go_to_the_host_in_the_middle_change_nothing(tmp_path: Path, bits: Literal[32, 8]) -> None:
    whole = rig.build(tmp_path / "whole", steps=4, bits=bits)
    rig.run(whole)
    steps = rungs(Rung(2, False), Rung(2, False, paged=True))
    parts = with_ladder(rig.build(tmp_path / "short", steps=4, bits=bits), steps)
    rig.run(short_at(parts, {4}))
    assert parts.optimizer.pages is not None and whole.optimizer.pages is None
    assert_same(whole, parts)


def test_a_run_says_keeps_and_resumes_its_rung(tmp_path: Path) -> None:
    """Down to recompute in the second step, stopped in the third, resumed there: the weights of a run that had memory."""
    steps = rungs(Rung(2, False), Rung(2, True))
    whole, messages = rig.build(tmp_path / "whole", steps=5), []
    rig.run(whole)
    parts = with_ladder(rig.build(tmp_path / "short", steps=5), steps)
    monitored = short_at(parts, {4})
    monitored.report.on_event = lambda event: messages.append(event.get("text", ""))  # type: ignore[attr-defined]
    with pytest.raises(Interrupted):
        rig.run(monitored, StopAfter(13))
    (line,) = [text for text in messages if "could not be allocated" in text]
    assert line.endswith("512.00 MiB could not be allocated; going on with 2 rows at once, every layer is recomputed in backward")
    stored = rig.resume.newest(parts.checkpoints, print)
    assert stored is not None
    (shortage,) = stored.documents["trainer"]["shortages"]
    assert Rung(**shortage["rung"]) == steps[1]
    resumed = with_ladder(rig.build(tmp_path / "short", steps=5), [Rung(**shortage["rung"])])
    state = rig.run(resumed)
    assert state.shortages == [shortage]
    assert_same(whole, resumed)


def test_when_nothing_fits_the_run_is_saved_and_goes_on_later(tmp_path: Path) -> None:
    whole = rig.build(tmp_path / "whole", steps=5, save_every=0)
    rig.run(whole)
    parts = with_ladder(
        rig.build(tmp_path / "short", steps=5, save_every=0), rungs(Rung(2, False)), advice="data.tokens=12 saves it"
    )
    with pytest.raises(MemoryPlanError) as caught:
        rig.run(short_at(parts, range(5, 1000)))
    assert caught.value.hint == "data.tokens=12 saves it"
    stored = rig.resume.newest(parts.checkpoints, print)
    assert stored is not None and stored.step >= 1 and not parts.flat.grads.any()
    again = rig.build(tmp_path / "short", steps=5, save_every=0)
    rig.run(again)
    assert_same(whole, again)


def test_evaluation_may_find_no_memory_too(tmp_path: Path) -> None:
    whole = rig.build(tmp_path / "whole", steps=2)
    rig.run(whole)
    parts = with_ladder(rig.build(tmp_path / "short", steps=2), rungs(Rung(2, False), Rung(1, True)))
    state = rig.run(short_at(parts, {2}, training=False))
    assert len(state.shortages) == 1 and parts.model.training
    assert state.evaluations[0]["sets"]["held-out"]["loss"] == pytest.approx(
        json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[0])["loss"], rel=1e-6
    )


def test_other_errors_are_not_survived(tmp_path: Path) -> None:
    parts = with_ladder(rig.build(tmp_path, steps=2, eval_every=0), rungs(Rung(2, False), Rung(1, True)))

    def broken(*inputs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        rig.run(replace(parts, forward=broken, evals={}))
    assert ladder.is_shortage(RuntimeError("CUDA error: out of memory"))
    assert ladder.is_shortage(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"))


def test_an_allocator_that_thrashes_counts_as_short(tmp_path: Path) -> None:
    """Three steps in a row with retries, not two: then a smaller rung, at the boundary; with none left it is told and goes on."""
    for counts, falls in (([1, 1, 2, 3, 3, 3], 0), ([1, 2, 3, 3, 3, 3], 1), ([1, 2, 3, 4, 5, 6], 1)):
        given = iter(counts)
        parts = rig.build(tmp_path / str(counts), steps=6, eval_every=0)
        parts = with_ladder(parts, rungs(Rung(2, False), Rung(2, True)), retries=lambda given=given: next(given))
        state = rig.run(parts)
        assert len(state.shortages) == falls, counts
        assert parts.ladder.rung.recompute == bool(falls)


def test_the_ladder_is_the_plans_order_without_what_needs_more() -> None:
    needs = {(4, False): 9, (2, False): 7, (1, False): 5, (4, True): 6, (2, True): 4, (1, True): 3}

    def measure(rung: Rung) -> int:
        return 10 * needs[rung.microbatch, rung.recompute] - 5 * rung.paged - 2 * (rung.chunks > 1)

    found = ways([4, 2, 1], "auto", lambda m, again: again, [False, True], measure)
    walked, now = [], found[0]
    while (lower := below(found, now)) is not None:
        assert lower.bytes < now.bytes
        walked.append((lower.microbatch, lower.recompute, lower.paged, lower.chunks))
        now = lower
    assert walked == [
        *((2, False, False, 1), (1, False, False, 1), (2, True, False, 1), (1, True, False, 1)),
        *((1, True, True, 1), (1, True, True, 8)),
    ]
    asked = ways([2], "off", lambda m, again: False, [True], measure)
    assert {(r.microbatch, r.recompute, r.paged) for r in asked} == {(2, False, True)}
    elsewhere = replace(found[0], microbatch=3, bytes=65)
    assert below(found, elsewhere) == found[2], "a rung that the plan does not have: the first that needs less"


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [KEEPING, SMALLER], ids=["keeping", "smaller"])
def test_on_a_gpu_the_step_is_the_same_to_rounding(tmp_path: Path, steps: list[Rung]) -> None:
    """To rounding only: attention adds in the order in which threads finish."""
    Trial(fused(tmp_path, 32, steps, 0.2, torch.device("cuda", 0))).every(7, near)


def near(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
