"""What a run leaves to read: `metrics.jsonl`, `anomalies.jsonl`, `loss.png`, trackers.

One JSON object a line: `train` (loss, lr, norm, tokens, speed, memory), `eval` (loss, perplexity, accuracy of one set),
`sample` (prompt, answer), `anomaly`, `save-failed`, `resume`. On resume the lines after the checkpoint are dropped, so the
file reads as if the run had never stopped. A full disk never ends a run here: lines wait in memory for the next write.
"""

from __future__ import annotations

import errno
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from halfbyte.errors import TrainingError
from halfbyte.train.state import Parts, State

METRICS = "metrics.jsonl"
MEMORY = ("memory_mib", "planned_mib", "resident_mib", "allocated_mib", "reserved_mib", "driver_mib")
TIMES = ("seconds", "tokens_per_s", "left_s", *MEMORY)
"""Keys of a `train` line that differ between two identical runs."""


def log(parts: Parts, state: State) -> None:
    """One `train` event for the steps since the last one, skipped steps left out of the means."""
    if not state.window:
        return
    good = [entry for entry in state.window if not entry["skipped"]]
    tokens = sum(entry["tokens"] for entry in good)
    seconds = max(state.seconds - state.logged_seconds, 1e-9)
    rows = (state.step - state.logged_step) * parts.config.batch
    epoch, row = parts.loader.position(state.step)
    event = {
        "kind": "train",
        "step": state.step,
        "epoch": round(epoch + row / parts.loader.rows(epoch), 4),
        "loss": sum(entry["loss"] * entry["tokens"] for entry in good) / tokens if tokens else None,
        "norm": sum(entry["norm"] for entry in good) / len(good) if good else None,
        "lr": state.window[-1]["lr"],
        "trained_tokens": state.trained_tokens,
        "skipped": state.skipped,
        "tokens_per_s": round(rows * parts.row_tokens / seconds, 1),
        **parts.watch.event(parts.ladder.rung),
        "seconds": round(state.seconds, 3),
        "left_s": round(left(parts, state), 1),
    }
    state.window.clear()
    state.logged_seconds, state.logged_step = state.seconds, state.step
    parts.report.event(event)


def left(parts: Parts, state: State) -> float:
    """Seconds of training that are left, at the speed so far: of all steps, or of the time limit, whichever comes first."""
    by_steps = state.seconds / max(1, state.step) * (parts.total_steps - state.step)
    limit = parts.config.max_minutes
    return max(0.0, by_steps if limit is None else min(by_steps, 60 * limit - state.seconds))


class JsonLines:
    """An append-only file of JSON lines that never holds a torn line and never ends a run."""

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        self.path = path
        self.tell = tell
        self.waiting: list[bytes] = []

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop lines that are torn or not wanted: what a killed run wrote after its last checkpoint."""
        if not self.path.exists():
            return
        kept = [text for text in self.path.read_bytes().splitlines(keepends=True) if _sound(text, wanted)]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_bytes(b"".join(kept))
        temporary.replace(self.path)

    def write(self, event: dict[str, Any]) -> None:
        """Append one line; when the disk is full, say so once and keep it for the next write."""
        self.waiting.append(json.dumps(event, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write(b"".join(self.waiting))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            if self.path.exists():
                with self.path.open("rb+") as file:
                    file.truncate(size)
            if len(self.waiting) == 1:
                self.tell(f"WARNING: {self.path} cannot grow ({error.strerror}); its lines wait in memory")
            return
        self.waiting.clear()

    def read(self) -> list[dict[str, Any]]:
        """All lines, those that wait included."""
        text = self.path.read_bytes() if self.path.exists() else b""
        return [json.loads(part) for part in (text + b"".join(self.waiting)).splitlines()]


def _sound(text: bytes, wanted: Callable[[dict[str, Any]], bool]) -> bool:
    try:
        return text.endswith(b"\n") and wanted(json.loads(text))
    except ValueError:
        return False


def precedes(state: State) -> Callable[[dict[str, Any]], bool]:
    """Whether a line was written before this state: later steps are not, nor is an evaluation that will be made again."""
    redo = () if state.evaluated == state.step else ("eval", "sample")
    return lambda event: event["step"] < state.step or (event["step"] == state.step and event["kind"] not in redo)


class Tracker(Protocol):
    """TensorBoard, W&B."""

    def log(self, values: dict[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Scalars below `output/tensorboard`; steps after the resumed one are purged."""

    def __init__(self, output: Path, start: int, name: str, recipe: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(output / "tensorboard"), purge_step=start + 1 if start else None)
        self.writer.add_text("recipe", json.dumps(recipe, indent=1))

    def log(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """One W&B run an output directory, resumed under the same id. No data set text is sent."""

    def __init__(self, output: Path, start: int, name: str, recipe: dict[str, Any]) -> None:
        import wandb

        self.run = wandb.init(project="halfbyte", name=output.name, id=name, resume="allow", dir=str(output), config=recipe)

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, tuple[str, Callable[[Path, int, str, dict[str, Any]], Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "wandb": ("wandb", WeightsAndBiases),
}
"""`log.to` -> the package it needs, and how to open it with (output, first step, run id, recipe)."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise TrainingError before anything is loaded when a tracker's package is missing."""
    for name in names:
        package = TRACKERS[name][0]
        if importlib.util.find_spec(package) is None:
            raise TrainingError(
                f"`log.to` asks for {name}, but the package `{package}` is not installed",
                hint=f"pip install 'halfbyte[{name}]', or remove it from `log.to`",
                code="train.no-tracker",
            )


def values_of(event: dict[str, Any]) -> dict[str, float]:
    """What a tracker plots of an event."""
    group = f"eval/{event['set']}" if event["kind"] == "eval" else event["kind"]
    hidden = ("kind", "step", "set")
    return {f"{group}/{k}": float(v) for k, v in event.items() if k not in hidden and isinstance(v, int | float)}


def plot(events: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """`loss.png`: training loss of every log line, a running mean, and held-out loss of every set, over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    train = [(e["step"], e["loss"]) for e in events if e["kind"] == "train" and e["loss"] is not None]
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="train, every log line")
        axes.plot(steps, smooth(losses), color="tab:blue", linewidth=1.8, label="train, running mean")
    for name in sorted({e["set"] for e in events if e["kind"] == "eval"}):
        held_out = [(e["step"], e["loss"]) for e in events if e["kind"] == "eval" and e["set"] == name and e["loss"] is not None]
        if held_out:
            axes.plot(*zip(*held_out, strict=True), marker="o", linewidth=1.5, label=f"held out: {name}")
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(path, dpi=130)


def smooth(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """Exponential running mean, corrected for its start."""
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + 1 - decay
        out.append(mean / weight)
    return out
