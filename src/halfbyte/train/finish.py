"""The end of a run: the adapter (of the best checkpoint) in PEFT's layout, the plot, the summary, what to do next."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.adapters.lora import Adapter
from halfbyte.checkpoints import peft, resume
from halfbyte.checkpoints.base import Base
from halfbyte.config import Recipe
from halfbyte.data.prepare import Prepared
from halfbyte.errors import CheckpointError
from halfbyte.export import model
from halfbyte.memory.rungs import Rung
from halfbyte.recipe import dump
from halfbyte.train import loop, metrics
from halfbyte.train.account import PICTURE, Account, Memory
from halfbyte.train.progress import clock, number
from halfbyte.train.report import Report
from halfbyte.train.state import Parts, State

PLOT, SUMMARY = "loss.png", "summary.json"


@dataclass(frozen=True)
class Result:
    """What a run gave. adapter: its directory (of the whole model after full fine-tuning). exported_step: whose weights it holds.

    loss_before, loss_after: of the first and the last log line. eval_before, eval_after: scores of every held-out set before
    the first step and of the exported weights: loss, perplexity (None where not finite), accuracy, tokens. samples: prompt, step,
    answer. shortages: when memory ran short: step, why, and the rung that was taken. memory_bytes: the peak of the whole run;
    memory: plan and truth of its steps, by part.
    """

    adapter: Path
    output: Path
    steps: int
    exported_step: int
    loss_before: float | None
    loss_after: float | None
    eval_before: Mapping[str, Mapping[str, Any]]
    eval_after: Mapping[str, Mapping[str, Any]]
    trained_parameters: int
    trained_tokens: int
    skipped: int
    seconds: float
    tokens_per_s: float
    memory_bytes: int
    memory: Memory
    samples: list[dict[str, Any]] = field(default_factory=list)
    shortages: list[dict[str, Any]] = field(default_factory=list)
    summary: str = ""


def plot(parts: Parts, account: Account, output: Path, name: str) -> None:
    """Write `loss.png` from `metrics.jsonl`, and `memory.png`; a full disk is told and passed over."""
    assert isinstance(parts.report, Report)
    try:
        metrics.plot(parts.report.metrics.read(), output / PLOT, name)
        # Without a step here, a picture that is there shows more than one of now would.
        if parts.watch.steps or not (output / PICTURE).exists():
            account.draw(output, name, parts.ladder.rung, parts.watch)
    except OSError as error:
        parts.report.tell(f"WARNING: {output / PLOT} was not written: {error.strerror}")


def hand_over(
    recipe: Recipe, base: Base, adapter: Adapter, prepared: Prepared, parts: Parts, state: State, account: Account, report: Report
) -> Result:
    """Export the adapter, write `summary.json`, print the summary."""
    step = _choose_weights(parts, state, report)
    settings, template = dump(recipe), prepared.template.text
    output = Path(recipe.output).expanduser()
    if recipe.adapter.kind == "none":
        where = model.save(base, output / "model", template, {peft.RECIPE: settings}, end_ids=prepared.end_ids)
    else:
        extras = {peft.RECIPE: settings, peft.TEMPLATE: template}
        where = peft.save(adapter, output / "adapter", base, extras, prepared.end_ids)
    result = _result(parts, account, state, output, where, step, report)
    text = summary(recipe, result, loop.finished(parts, state) if state.step < parts.total_steps else "")
    (output / SUMMARY).write_text(json.dumps({**asdict(result), "summary": text}, indent=1, default=str) + "\n")
    report.tell(text)
    return Result(**{**_fields(result), "summary": text})


def _choose_weights(parts: Parts, state: State, report: Report) -> int:
    """Put the weights of the lowest held-out loss in place, if asked and not the last ones; the step they are from."""
    if not parts.config.best or state.best_step in (None, state.step):
        return state.step
    assert state.best_step is not None
    path = parts.checkpoints / f"step-{state.best_step:08d}"
    try:
        parts.restore(resume.load(path).tensors["adapter_model"])
    except CheckpointError as error:
        report.tell(f"WARNING: the best step's checkpoint cannot be used ({error.message}); exporting the last step's weights")
        return state.step
    report.tell(f"exporting the weights of step {state.best_step}: the lowest held-out loss ({state.best_loss:.4f})")
    return state.best_step


def _result(parts: Parts, account: Account, state: State, output: Path, where: Path, step: int, report: Report) -> Result:
    events = report.metrics.read()
    losses = [e["loss"] for e in events if e["kind"] == "train" and e["loss"] is not None]
    scores = {e["step"]: e["sets"] for e in state.evaluations}
    peak, memory = _memory(parts, account, output)
    return Result(
        adapter=where,
        output=output,
        steps=state.step,
        exported_step=step,
        loss_before=losses[0] if losses else None,
        loss_after=losses[-1] if losses else None,
        eval_before=scores.get(0, {}),
        eval_after=scores.get(step, {}),
        trained_parameters=parts.flat.numel,
        trained_tokens=state.trained_tokens,
        skipped=state.skipped,
        seconds=round(state.seconds, 1),
        tokens_per_s=round(state.step * parts.config.batch * parts.row_tokens / max(state.seconds, 1e-9), 1),
        memory_bytes=peak,
        memory=memory,
        samples=state.samples,
        shortages=state.shortages,
    )


def _memory(parts: Parts, account: Account, output: Path) -> tuple[int, Memory]:
    """The peak of the run, and plan and truth of its steps. A start that found the run finished has measured none: it keeps what
    the start that ended the run has left."""
    if not parts.watch.steps:
        try:
            left = json.loads((output / SUMMARY).read_text(encoding="utf-8"))
            return int(left["memory_bytes"]), Memory(**left["memory"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none is there, or of another version
    return parts.watch.whole, account.memory(parts.ladder.rung, parts.watch)


def _fields(result: Result) -> dict[str, Any]:
    return {name: getattr(result, name) for name in Result.__dataclass_fields__}


def summary(recipe: Recipe, result: Result, cut: str = "") -> str:
    """What was trained, how well, where it is, what to do next. cut: why the run ended before its last step, if it did."""
    memory = result.memory
    what = "all weights" if recipe.adapter.kind == "none" else f"a LoRA adapter of rank {recipe.adapter.rank}"
    lines = [
        "",
        f"Trained {what} ({result.trained_parameters:,} parameters) on {recipe.model.name} in {recipe.format.kind}",
        f"  {result.steps} steps, {result.trained_tokens:,} learned tokens, {clock(result.seconds)} of training, "
        f"{result.tokens_per_s:,.0f} tokens/s, peak {memory.peak / 2**30:.2f} GiB (planned {memory.planned_peak / 2**30:.2f})",
        *memory.lines(),
    ]
    if cut:
        lines.append(f"  ended early by {cut}; raise it and run the same command again to go on")
    if result.skipped:
        lines.append(f"  {result.skipped} steps skipped, see anomalies.jsonl")
    if result.shortages:
        last = result.shortages[-1]
        times = "once" if len(result.shortages) == 1 else f"{len(result.shortages)} times"
        lines.append(f"  memory ran short {times}; from step {last['step']} on: {Rung(**last['rung']).words()}")
    for name, after in result.eval_after.items():
        before = result.eval_before.get(name)
        start = f"{number(before['loss'], '.4f')} -> " if before else ""
        accuracy = f"{before['accuracy']:.1%} -> " if before else ""
        lines.append(
            f"  held-out loss {start}{number(after['loss'], '.4f')}, token accuracy {accuracy}{after['accuracy']:.1%}  ({name})"
        )
    lines += _answers(result)
    whole = recipe.adapter.kind == "none"
    lines += [
        "",
        f"{'Model' if whole else 'Adapter'}:  {result.adapter}",
        f"Plots:    {result.output / PLOT}, {result.output / PICTURE}",
        f"Numbers:  {result.output / metrics.METRICS}",
        "",
        "Next:",
        *(f"  {shlex.join(command)}" for command in _next(result, whole)),
    ]
    return "\n".join(lines)


def _next(result: Result, whole: bool) -> list[list[str]]:
    """Commands to go on with, as words: a path may have spaces, and the lines are there to be copied into a shell."""
    trained, dense = str(result.adapter), ["--format", "none"] if whole else []
    if whole:
        export = ["halfbyte", "quantize", trained, "--format", "nf4", "--out", str(result.output / "nf4")]
    else:
        export = ["halfbyte", "merge", trained, "--out", str(result.output / "merged")]
    return [["halfbyte", "chat", trained, *dense], ["halfbyte", "eval", trained, *dense], export]


def _answers(result: Result) -> list[str]:
    """Every fixed prompt, answered before and by the exported weights."""
    lines: list[str] = []
    steps = {sample["step"] for sample in result.samples}
    for prompt in dict.fromkeys(sample["prompt"] for sample in result.samples):
        told = {s["step"]: " ".join(s["answer"].split()) for s in result.samples if s["prompt"] == prompt}
        lines += ["", f"  {prompt}", f"    before: {told.get(0, '')}"]
        if len(steps) > 1:
            lines.append(f"    after:  {told.get(result.exported_step, told[max(told)])}")
    return lines
