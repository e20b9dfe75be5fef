"""The loop: exact resume, one loss for every microbatch, skipped steps, stopping, keep-best, patience."""

from __future__ import annotations

import json
import os
import signal
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from halfbyte.errors import Interrupted, TrainingError
from halfbyte.optim.scaling import LossScale
from halfbyte.train import loop, metrics, saving
from halfbyte.train.report import Report
from halfbyte.train.signals import Stop, guard
from halfbyte.train.state import Parts, State
from train import rig, trials

pytestmark = pytest.mark.cpu


def lines(output: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock decides."""
    found = [json.loads(line) for line in (output / metrics.METRICS).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in metrics.TIMES} for line in found]


def assert_same(one: Parts, other: Parts) -> None:
    """Every trainable tensor and every optimizer tensor, bit for bit."""
    assert torch.equal(one.flat.values, other.flat.values)
    assert one.flat.values.isfinite().all()
    left, right = one.optimizer.state_dict(), other.optimizer.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


class StopAfter(Stop):
    """Asks to stop at the n-th look: between two microbatches, steps or evaluation rows."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def __bool__(self) -> bool:
        self.looks -= 1
        if self.looks < 0:
            self.signal = signal.SIGTERM
        return self.signal is not None


def test_the_loss_falls(tmp_path: Path) -> None:
    rig.run(rig.build(tmp_path, steps=30))
    losses = [line["loss"] for line in lines(tmp_path) if line["kind"] == "train"]
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("looks", [0, 1, 4, 6, 9, 14, 21, 27, 31])
def test_an_interrupted_run_ends_like_one_that_was_not(tmp_path: Path, looks: int) -> None:
    whole, broken = rig.build(tmp_path / "whole", prompts=["why"]), rig.build(tmp_path / "broken", prompts=["why"])
    rig.run(whole)
    with pytest.raises(Interrupted) as caught:
        rig.run(broken, StopAfter(looks))
    assert caught.value.exit_code == 75
    resumed = rig.build(tmp_path / "broken", prompts=["why"])
    rig.run(resumed)
    assert_same(whole, resumed)
    assert lines(tmp_path / "whole") == lines(tmp_path / "broken")


def test_a_run_with_8_bit_moments_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, broken = rig.build(tmp_path / "whole", bits=8), rig.build(tmp_path / "broken", bits=8)
    rig.run(whole)
    assert whole.optimizer.moments.first.dtype == torch.uint8
    with pytest.raises(Interrupted):
        rig.run(broken, StopAfter(9))
    resumed = rig.build(tmp_path / "broken", bits=8)
    rig.run(resumed)
    assert_same(whole, resumed)
    assert lines(tmp_path / "whole") == lines(tmp_path / "broken")


def test_a_dropped_window_leaves_no_gradient(tmp_path: Path) -> None:
    parts = rig.build(tmp_path, microbatch=1)
    with pytest.raises(Interrupted):
        rig.run(parts, StopAfter(7))  # in the middle of a window
    assert not parts.flat.grads.any()


def test_a_killed_run_ends_like_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = rig.build(tmp_path / "whole", log_every=3), rig.build(tmp_path / "broken", log_every=3)
    rig.run(whole)

    original = saving.save

    def die_at_six(parts: Parts, state: State) -> None:
        if state.step == 6:
            raise KeyboardInterrupt
        original(parts, state)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save", die_at_six)
        with pytest.raises(KeyboardInterrupt):
            rig.run(broken)
    assert max(line["step"] for line in lines(tmp_path / "broken")) == 6
    resumed = rig.build(tmp_path / "broken", log_every=3)
    rig.run(resumed)
    assert_same(whole, resumed)
    assert lines(tmp_path / "whole") == lines(tmp_path / "broken")


def test_every_microbatch_size_gives_the_same_loss_and_gradient(tmp_path: Path) -> None:
    norms, losses = [], []
    for m in (1, 2, 4):
        parts = rig.build(tmp_path / str(m), microbatch=m, steps=1, clip=0)
        parts.model.config.resid_pdrop = 0.0
        for module in parts.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        rig.run(parts)
        (line,) = [line for line in lines(tmp_path / str(m)) if line["kind"] == "train"]
        norms.append(line["norm"])
        losses.append(line["loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)


class Poisoned(rig.Rows):
    """Rows whose embedding becomes NaN at the given steps."""

    def __init__(self, parts: Parts, steps: set[int]) -> None:
        super().__init__(parts.config.seed)
        self.steps = steps

    def at(self, step: int) -> rig.RowBatch:
        batch = super().at(step)
        return replace(batch, ids=batch.ids + 1000) if step in self.steps else batch


def poison(parts: Parts, steps: set[int]) -> Parts:
    """Token ids of 1,000 and more make the forward pass NaN, as a broken example would."""

    def forward(ids: torch.Tensor, positions: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        bad = (ids >= 1000).any()
        hidden = parts.forward(ids % 1000, positions, bounds)
        return hidden * float("nan") if bad else hidden

    return replace(parts, forward=forward, loader=Poisoned(parts, steps))


def test_a_nan_batch_is_skipped_and_recorded(tmp_path: Path) -> None:
    parts = poison(rig.build(tmp_path, steps=1, save_every=0, eval_every=0), {0})
    weights, state = parts.flat.values.clone(), {k: v.clone() for k, v in parts.optimizer.state_dict().items()}
    end = rig.run(parts)
    assert torch.equal(parts.flat.values, weights)
    assert all(torch.equal(tensor, state[name]) for name, tensor in parts.optimizer.state_dict().items())
    assert (end.step, end.skipped) == (1, 1)
    (anomaly,) = [json.loads(line) for line in (tmp_path / "anomalies.jsonl").read_text().splitlines()]
    assert anomaly["what"] == "non-finite loss"
    assert anomaly["examples"] == [i for row in parts.loader.at(0).example_ids for i in row]
    (line,) = [line for line in lines(tmp_path) if line["kind"] == "train"]
    assert line["loss"] is None
    assert line["skipped"] == 1


def test_a_skipped_step_consumes_its_data_and_schedule_position(tmp_path: Path) -> None:
    sound, poisoned = rig.build(tmp_path / "a", steps=4), poison(rig.build(tmp_path / "b", steps=4), {1})
    rig.run(sound)
    rig.run(poisoned)
    rates = [[line["lr"] for line in lines(tmp_path / d) if line["kind"] == "train"] for d in "ab"]
    assert rates[0] == rates[1]
    assert {float(v) for k, v in poisoned.optimizer.state_dict().items() if k.startswith("count")} == {3.0}


def test_three_non_finite_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    parts = poison(rig.build(tmp_path, steps=9), {1, 3, 4, 5})
    with pytest.raises(TrainingError) as caught:
        rig.run(parts)
    assert caught.value.code == "train.non-finite"
    assert "step 6" in caught.value.message
    assert parts.flat.values.isfinite().all()
    resumed = rig.build(tmp_path, steps=9)
    assert rig.run(resumed).step == 9
    assert resumed.flat.values.isfinite().all()
    assert [line["step"] for line in lines(tmp_path) if line["kind"] == "train"] == [1, 2, 3, 4, 5, 7, 8, 9]


def test_an_fp16_overflow_skips_the_step_and_is_no_anomaly(tmp_path: Path) -> None:
    parts = rig.build(tmp_path, steps=3)

    def overflowing(*inputs: torch.Tensor) -> torch.Tensor:
        hidden = parts.forward(*inputs)
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: grad * float("inf"))
        return hidden

    weights = parts.flat.values.clone()
    scale = LossScale.create(torch.float16, torch.device("cpu"))
    state = rig.run(replace(parts, forward=overflowing, scale=scale, total_steps=1))
    assert torch.equal(parts.flat.values, weights)
    assert (state.skipped, state.non_finite) == (1, 0)
    assert not (tmp_path / "anomalies.jsonl").exists()
    assert float(scale.scale) == 2.0**15


def test_a_held_out_loss_that_is_not_finite_is_told_and_never_the_best(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    parts = rig.build(tmp_path, steps=4, eval_every=1)
    parts.report.on_event = told.append  # type: ignore[attr-defined]

    def forward(*inputs: torch.Tensor) -> torch.Tensor:
        hidden = parts.forward(*inputs)
        return hidden if torch.is_grad_enabled() else hidden * float("nan")

    state = rig.run(replace(parts, forward=forward))
    assert state.step == 4 and state.best_loss is None and state.stale == 4
    scores = [event for event in told if event["kind"] == "eval"]
    assert len(scores) == 5 and all(s["loss"] is s["perplexity"] is None and s["accuracy"] is not None for s in scores)
    assert sum("the held-out loss of held-out is not finite" in event.get("text", "") for event in told) == 5
    assert isinstance(parts.report, Report)
    metrics.plot(parts.report.metrics.read(), tmp_path / "loss.png", "title")
    assert (tmp_path / "checkpoints" / "step-00000004").is_dir()


def test_signals_set_a_flag_and_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with guard() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert stop
        assert stop.signal is signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_patience_ends_the_run_and_the_best_checkpoint_stays(tmp_path: Path) -> None:
    parts = rig.build(tmp_path, steps=60, lr=5e-2, patience=2, eval_every=2, save_every=5, schedule="constant", warmup=0)
    state = rig.run(parts)
    assert state.step < 60
    assert state.stale == 2
    kept = sorted(path.name for path in parts.checkpoints.iterdir())
    assert f"step-{state.best_step:08d}" in kept
    assert len(kept) <= 3


def test_the_time_limit_ends_the_run_with_an_evaluation(tmp_path: Path) -> None:
    state = rig.run(rig.build(tmp_path, steps=10_000, max_minutes=1e-6, eval_every=0, save_every=0))
    assert state.step == 1
    assert state.evaluated == 1
    assert state.saved == 1 and (tmp_path / "checkpoints" / "step-00000001").is_dir()
    (line,) = [json.loads(text) for text in (tmp_path / metrics.METRICS).read_text().splitlines() if '"train"' in text]
    assert line["left_s"] == 0


def test_a_raised_time_limit_goes_on_like_a_run_that_had_none(tmp_path: Path) -> None:
    whole = rig.build(tmp_path / "whole", steps=4, eval_every=0)
    rig.run(whole)
    rig.run(rig.build(tmp_path / "cut", steps=4, eval_every=0, max_minutes=1e-6))
    resumed = rig.build(tmp_path / "cut", steps=4, eval_every=0, max_minutes=60)
    assert rig.run(resumed).step == 4
    assert_same(whole, resumed)


def test_a_finished_run_does_nothing_again(tmp_path: Path) -> None:
    first = rig.build(tmp_path)
    rig.run(first)
    before = (tmp_path / metrics.METRICS).read_bytes()
    again = rig.build(tmp_path)
    rig.run(again)
    assert_same(first, again)
    assert (tmp_path / metrics.METRICS).read_bytes() == before


def test_gradients_accumulate_in_the_flat_buffer(tmp_path: Path) -> None:
    parts = rig.build(tmp_path, steps=1)
    rig.run(parts)
    start, end = parts.flat.grads.data_ptr(), parts.flat.grads.data_ptr() + 4 * parts.flat.grads.numel()
    for parameter in parts.model.parameters():
        assert parameter.grad is not None
        assert start <= parameter.grad.data_ptr() < end


def test_the_hidden_state_is_gone_when_layers_run_backwards(tmp_path: Path) -> None:
    """In rows of a hundred thousand tokens it is a GiB that the plan does not count."""
    parts = trials.fused(tmp_path, 32, trials.KEEPING)
    made: list[weakref.ref[torch.Tensor]] = []
    there: list[bool] = []

    def forward(*inputs: torch.Tensor) -> torch.Tensor:
        hidden = parts.forward(*inputs)
        made.append(weakref.ref(hidden))
        return hidden

    def mark(name: str) -> None:
        if name in ("loss", "backward"):
            there.append(made[-1]() is not None)

    watched = replace(parts, forward=forward, watch=SimpleNamespace(mark=mark))  # type: ignore[arg-type]
    assert loop.gradient(watched, State(step=0), Stop()) is not None
    assert there == [True, False] * len(made) and len(made) == 2
