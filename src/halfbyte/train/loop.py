"""The training loop, whole: fetch, forward, loss, backward, clip, step, log, evaluate, sample, save.

It knows nothing of recipes, files or models; `run.py` composes those into `Parts`. A step is atomic: signals are looked at
between microbatches, an unfinished window is dropped, and everything is saved at the boundary before it. A step that finds no
memory begins anew with less (`survive`).
"""

from __future__ import annotations

import time

from torch import Tensor

from halfbyte.errors import Interrupted, MemoryPlanError, TrainingError
from halfbyte.kernels import gemm
from halfbyte.train import metrics, proofs, saving
from halfbyte.train.evaluate import evaluate, record
from halfbyte.train.signals import Stop
from halfbyte.train.state import Batch, Parts, State
from halfbyte.train.step import (
    Outcome,
    backward,
    clip_gradient,
    drop,
    forward,
    mixed,
    objective,
    optimizer_step,
    seed_step,
    settle,
    split,
)
from halfbyte.train.survive import continuing, rewinding, watch, whole


def train(parts: Parts, state: State, stop: Stop) -> None:
    """Train from where `state` stands to the end of the run. Raises Interrupted (exit code 75) after saving when asked to stop."""
    pending: list[Outcome] = []
    parts.model.train()
    try:
        survey(parts, state, stop)
        steps(parts, state, stop, pending)
    except MemoryPlanError:
        read(parts, state, pending)
        keep(parts, state)
        raise
    read(parts, state, pending)
    saving.save(parts, state)
    if stop.signal and not (finished(parts, state) and state.evaluated == state.step):
        raise Interrupted(
            f"stopped by {stop.signal.name} at step {state.step} of {parts.total_steps}; the run is saved",
            hint="run the same command again to resume",
            code="train.interrupted",
        )


def steps(parts: Parts, state: State, stop: Stop, pending: list[Outcome]) -> None:
    """Step, log, evaluate, save, until the run is over or asked to stop; pending: steps whose numbers were not read yet."""
    while not stop and not finished(parts, state):
        started = time.monotonic()
        with parts.watch.step():
            outcome = one_step(parts, state, stop)
        state.seconds += time.monotonic() - started
        if outcome is None:
            break
        pending.append(outcome)
        watch(parts, state)
        gemm.report()
        if at_boundary(parts, state):
            read(parts, state, pending)
        if due(state.step, parts.config.log_every):
            metrics.log(parts, state)
        survey(parts, state, stop)
        if due(state.step, parts.config.save_every) or state.best_step == state.step:
            saving.save(parts, state)


def one_step(parts: Parts, state: State, stop: Stop) -> Outcome | None:
    """One optimizer step on one batch; None when the run was asked to stop meanwhile (the window is dropped, nothing changed)."""
    found = rewinding(parts, state, lambda: gradient(parts, state, stop), lambda: drop(parts))
    if found is None:
        return None
    values, batch = found
    return continuing(parts, state, lambda: optimizer_step(parts, state, values, batch))


def gradient(parts: Parts, state: State, stop: Stop) -> tuple[Tensor, Batch] | None:
    """The gradient of one batch in the flat buffer, measured: a function of weights, seed and step, so it can begin anew."""
    batch = fetch(parts, state)
    seed_step(parts, state.step)
    total = None
    for part in split(parts, batch, state.step):
        if stop:
            drop(parts)
            return None
        with mixed(parts):
            # Nobody holds the hidden state: it must not be there while layers run backwards.
            loss = objective(parts, forward(parts, part), part, batch)
        share = backward(parts, loss)
        total = share if total is None else total + share
    assert total is not None
    values = clip_gradient(parts, total)
    proofs.gradient(parts.proofs, parts.flat, values, batch.trained_tokens)
    return values, batch


def read(parts: Parts, state: State, pending: list[Outcome]) -> None:
    """Read the device; when it ends the run (three non-finite steps), save first: a resumed run goes on behind them."""
    try:
        settle(parts, state, pending)
    except TrainingError:
        state.non_finite = 0
        keep(parts, state)
        raise


def keep(parts: Parts, state: State) -> None:
    """Save what an error leaves, unless it came in the middle of an update: then the last checkpoint is where the run goes on."""
    if whole(parts):
        saving.save(parts, state)


def fetch(parts: Parts, state: State) -> Batch:
    """The next batch: a function of seed and step."""
    return parts.loader.at(state.step)


def survey(parts: Parts, state: State, stop: Stop) -> None:
    """Evaluate and sample when due (before the first step, every `eval_every`, after the last), once a step whatever resumes."""
    due_now = state.step == 0 or bool(finished(parts, state)) or due(state.step, parts.config.eval_every)
    if not due_now or state.evaluated == state.step:
        return
    with parts.watch.aside():
        scores = rewinding(parts, state, lambda: evaluate(parts, stop), lambda: None)
        if scores is None:
            return
        record(parts, state, scores)
        told = rewinding(parts, state, lambda: list(parts.answers(parts.config.prompts)), lambda: None)
        for prompt, answer in zip(parts.config.prompts, told, strict=True):
            sample = {"kind": "sample", "step": state.step, "prompt": prompt, "answer": answer}
            state.samples.append(sample)
            parts.report.event(sample)
    state.evaluated = state.step


def finished(parts: Parts, state: State) -> str:
    """Why the run is over: all steps done, the time limit reached, or no better evaluation for `patience` of them; "" if not."""
    config = parts.config
    if state.step >= parts.total_steps:
        return "all steps"
    if config.patience is not None and state.stale >= config.patience:
        return f"train.patience: {config.patience} evaluations without a lower held-out loss"
    if config.max_minutes is not None and state.seconds >= 60 * config.max_minutes:
        return f"train.max_minutes: {config.max_minutes:g}"
    return ""


def at_boundary(parts: Parts, state: State) -> bool:
    """Whether the device must be read now: something after this step depends on its numbers."""
    config = parts.config
    return bool(finished(parts, state)) or any(due(state.step, n) for n in (config.log_every, config.eval_every, config.save_every))


def due(step: int, every: float) -> bool:
    """Whether `step` is a multiple of `every`; 0 is never."""
    return every > 0 and step % every == 0
