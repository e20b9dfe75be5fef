"""A step that finds no memory begins anew with less: the same weights, whatever allocation fails; the rung is kept."""

from __future__ import annotations

import gc
import json
import signal
from collections.abc import Container, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from halfbyte import shortage
from halfbyte.errors import Interrupted, MemoryPlanError
from halfbyte.machine import Device
from halfbyte.memory.rungs import Rung, below, ways
from halfbyte.optim import adamw
from halfbyte.pinned import Arena
from halfbyte.train import survive
from halfbyte.train.signals import Stop
from halfbyte.train.state import Parts, State
from train import rig
from train.test_loop import StopAfter, assert_same
from train.trials import CPU, KEEPING, SMALLER, Trial, close, fused, modules, near, rungs, same_bits, with_ladder

STRIDES = [
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


@pytest.mark.cpu
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


def live() -> int:
    """Bytes of all tensors that the garbage collector knows."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.cpu
def test_a_step_that_begins_anew_has_left_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever in forward, loss or backward memory was short: what the next try finds is what there was before the step."""
    trial = Trial(fused(tmp_path, 32, rungs(Rung(4, True), Rung(2, True), Rung(1, True, chunks=8))))
    gc.unfreeze()
    _, _, count = trial.step()
    left: list[int] = []
    monkeypatch.setattr(trial.parts.report, "tell", lambda text: left.append(live()))
    before = live()
    for n in range(1, count, count // 24):
        trial.step([n])
    assert len(left) >= 12, len(left)
    assert max(left) <= before, (max(left), before)


OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has")


def short_at(parts: Parts, calls: Container[int], training: bool = True, error: Exception = OUT) -> Parts:
    """The run whose forward number n (from 1, of training or of evaluation) finds no memory, for every n in `calls`."""
    forwards: list[object] = []

    def sometimes(*inputs: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() == training:
            forwards.append(inputs)
            if len(forwards) in calls:
                raise error
        return parts.forward(*inputs)

    return replace(parts, forward=sometimes)


@pytest.mark.cpu
@pytest.mark.parametrize("bits", [32, 8])
def test_moments_that_go_to_the_host_in_the_middle_change_nothing(tmp_path: Path, bits: Literal[32, 8]) -> None:
    whole = rig.build(tmp_path / "whole", steps=4, bits=bits)
    rig.run(whole)
    steps = rungs(Rung(2, False), Rung(2, False, paged=True))
    parts = with_ladder(rig.build(tmp_path / "short", steps=4, bits=bits), steps)
    rig.run(short_at(parts, {4}))
    assert parts.optimizer.pages is not None and whole.optimizer.pages is None
    assert_same(whole, parts)


@pytest.mark.cpu
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


@pytest.mark.cpu
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


@pytest.mark.cpu
def test_a_half_applied_update_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It never finds its memory in its second half: the run goes on from the checkpoint before it, as if nothing had been."""
    monkeypatch.setattr(adamw, "_spans", lambda values, bits: [slice(0, 2560), slice(2560, 5120), slice(5120, len(values))])
    whole = rig.build(tmp_path / "whole", steps=5)
    rig.run(whole)
    parts, calls, applied = rig.build(tmp_path / "short", steps=5), [0], adamw.adamw.step

    def short(*inputs: Any) -> None:
        calls[0] += 1
        if calls[0] > 3 * 3 + 2:  # in the fourth step, behind two of its three spans
            raise OUT
        applied(*inputs)

    monkeypatch.setattr(adamw.adamw, "step", short)
    with pytest.raises(MemoryPlanError, match="half applied and not saved: the run resumes from step 3, of which"):
        rig.run(parts)
    monkeypatch.setattr(adamw.adamw, "step", applied)
    again = rig.build(tmp_path / "short", steps=5)
    assert rig.run(again).step == 5
    assert_same(whole, again)


@pytest.mark.cpu
def test_a_rung_that_was_taken_since_the_last_checkpoint_is_saved_too(tmp_path: Path) -> None:
    """Stopped in the second step, which had just begun anew on a smaller rung."""
    parts = with_ladder(rig.build(tmp_path, steps=5, save_every=1), rungs(Rung(2, False), Rung(2, True)))
    stop, forwards = Stop(), [0]

    def forward(*inputs: torch.Tensor) -> torch.Tensor:
        forwards[0] += torch.is_grad_enabled()
        if forwards[0] == 4 and not stop:
            stop.signal = signal.SIGTERM
            raise OUT
        return parts.forward(*inputs)

    with pytest.raises(Interrupted):
        rig.run(replace(parts, forward=forward), stop)
    stored = rig.resume.newest(parts.checkpoints, print)
    assert stored is not None and stored.step == 1 and len(stored.documents["trainer"]["shortages"]) == 1


@pytest.mark.cpu
def test_evaluation_may_find_no_memory_too(tmp_path: Path) -> None:
    whole = rig.build(tmp_path / "whole", steps=2)
    rig.run(whole)
    parts = with_ladder(rig.build(tmp_path / "short", steps=2), rungs(Rung(2, False), Rung(1, True)))
    state = rig.run(short_at(parts, {2}, training=False))
    assert len(state.shortages) == 1 and parts.model.training
    assert state.evaluations[0]["sets"]["held-out"]["loss"] == pytest.approx(
        json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[0])["loss"], rel=1e-6
    )


def answering(parts: Parts, fails: Container[int]) -> Parts:
    """The run whose answer number n (from 1) finds no memory, for every n in `fails`."""
    asked: list[str] = []

    def answers(prompts: Iterable[str]) -> Iterator[str]:
        for prompt in prompts:
            asked.append(prompt)
            if len(asked) in fails:
                raise RuntimeError("capture ended") from torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96.00 MiB.")
            yield f"{prompt}!"

    return replace(parts, answers=answers)


@pytest.mark.cpu
def test_answers_may_find_no_memory_too(tmp_path: Path) -> None:
    """The second of two prompts fails before the first step: a smaller rung, both again, and each is told once."""
    messages: list[str] = []
    parts = with_ladder(rig.build(tmp_path, steps=2, prompts=["one", "two"]), rungs(Rung(2, False), Rung(1, True)))
    monitored = answering(parts, {2})
    monitored.report.on_event = lambda event: messages.append(event.get("text", ""))  # type: ignore[attr-defined]
    state = rig.run(monitored)
    assert [s["rung"]["microbatch"] for s in state.shortages] == [1] and parts.model.training
    told = [(sample["step"], sample["prompt"], sample["answer"]) for sample in state.samples]
    assert told == [(step, prompt, f"{prompt}!") for step in (0, 2) for prompt in ("one", "two")]
    assert [entry["step"] for entry in state.evaluations] == [0, 2], "what was scored is not scored again"
    assert "step 1: 96.00 MiB could not be allocated; going on with 1 row" in "\n".join(messages)


@pytest.mark.cpu
def test_where_no_rung_is_left_to_answer_on_the_run_is_saved(tmp_path: Path) -> None:
    parts = with_ladder(rig.build(tmp_path, steps=2, prompts=["one"]), rungs(Rung(2, False)))
    with pytest.raises(MemoryPlanError, match=r"96.00 MiB could not be allocated, and nothing smaller is left"):
        rig.run(answering(parts, range(1, 100)))
    stored = rig.resume.newest(parts.checkpoints, print)
    assert stored is not None and stored.step == 0
    state = rig.run(rig.build(tmp_path, steps=2, prompts=["one"]))
    assert state.step == 2 and [sample["step"] for sample in state.samples] == [0, 2]


def test_other_errors_are_not_survived(tmp_path: Path) -> None:
    parts = with_ladder(rig.build(tmp_path, steps=2, eval_every=0), rungs(Rung(2, False), Rung(1, True)))

    def broken(*inputs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        rig.run(replace(parts, forward=broken, evals={}))
    assert shortage.is_shortage(RuntimeError("CUDA error: out of memory"))
    assert shortage.is_shortage(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"))


@pytest.mark.cpu
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
        return 10 * needs[rung.microbatch, rung.recompute] - 5 * rung.paged - 3 * rung.embedding_away - 2 * (rung.chunks > 1)

    found = ways([4, 2, 1], "auto", lambda m, again: again, [False, True], [False, True], measure)
    walked, now = [], found[0]
    while (lower := below(found, now)) is not None:
        assert lower.bytes < now.bytes
        walked.append((lower.microbatch, lower.recompute, lower.embedding_away, lower.paged, lower.chunks))
        now = lower
    assert walked == [
        *((2, False, False, False, 1), (1, False, False, False, 1), (2, True, False, False, 1), (1, True, False, False, 1)),
        *((1, True, True, False, 1), (1, True, True, True, 1), (1, True, True, True, 8)),
    ]
    asked = ways([2], "off", lambda m, again: False, [True], [False], measure)
    assert {(r.microbatch, r.recompute, r.paged) for r in asked} == {(2, False, True)}
    elsewhere = replace(found[0], microbatch=3, bytes=65)
    assert below(found, elsewhere) == found[2], "a rung that the plan does not have: the first that needs less"


def test_the_numbers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortage, "cuda_device", lambda: Device("a card", 1 << 28, 24 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 18 << 30)
    text = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 24.00 GiB of which 256.00 MiB is free."
    error, cuda = torch.OutOfMemoryError(text), torch.device("cuda", 0)
    told = "2.50 GiB could not be allocated (the run holds 18.00 GiB, driver and others 5.75, free are 0.25 of 24.00"
    assert shortage.in_words(error, cuda) == f"{told})"
    assert shortage.in_words(torch.OutOfMemoryError(f"{text} 20.00 GiB allowed; Of"), cuda) == f"{told}, allowed are 20.00 GiB)"
    assert shortage.in_words(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), CPU) == "memory could not be allocated"


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [KEEPING, SMALLER], ids=["keeping", "smaller"])
def test_on_a_gpu_the_step_is_the_same_to_rounding(tmp_path: Path, steps: list[Rung]) -> None:
    """To rounding only: attention adds in the order in which threads finish."""
    Trial(fused(tmp_path, 32, steps, 0.2, torch.device("cuda", 0))).every(7, near)


def test_what_a_failed_step_held_is_given_back_before_less_is_tried(tmp_path: Path) -> None:
    parts, steps = rig.build(tmp_path, steps=3), rungs(Rung(2, False), Rung(2, True))
    told: list[str] = []
    ladder = replace(
        parts.ladder,
        rung=steps[0],
        smaller=lambda rung: below(steps, rung),
        place=lambda rung: told.append(f"placed, recompute {rung.recompute}"),
        forget=lambda: told.append("given back"),
    )
    tries = iter([OUT, None])

    def attempt() -> str:
        if (error := next(tries)) is not None:
            told.append("failed")
            raise error
        return "done"

    found = survive.rewinding(replace(parts, ladder=ladder), State(step=1), attempt, lambda: told.append("rewound"))
    assert found == "done" and told == ["failed", "rewound", "given back", "placed, recompute True"]


@pytest.mark.cpu
def test_host_memory_that_runs_out_is_survived_too(tmp_path: Path) -> None:
    """Pages for what waits there are asked of the system, which says so in its own way."""
    with pytest.raises(MemoryError, match=r"host memory: tried to allocate 1048576\.00 GiB") as caught:
        Arena([(1 << 50, torch.uint8)], CPU)
    assert shortage.is_shortage(caught.value)
    assert shortage.in_words(caught.value, CPU) == "1048576.00 GiB could not be allocated"
    whole = rig.build(tmp_path / "whole", steps=3)
    rig.run(whole)
    parts = with_ladder(rig.build(tmp_path / "short", steps=3), rungs(Rung(2, False), Rung(2, True)))
    raising = short_at(parts, {2}, error=MemoryError("host memory: tried to allocate 3.00 GiB"))
    state = rig.run(raising)
    assert [s["why"] for s in state.shortages] == ["3.00 GiB could not be allocated"]
    assert_same(whole, parts)
