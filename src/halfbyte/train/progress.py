"""What a person sees while a run goes on: one live line on a terminal, plain lines elsewhere, words to stderr.

Why two forms: a log file full of carriage returns helps nobody. Plain lines come at most every ten seconds, evaluations,
samples and warnings always.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

PLAIN_EVERY = 10.0


class Display:
    """Prints events. total: optimizer steps of the run; start: those already done."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self.progress: Progress | None = None
        self.loading: Progress | None = None
        self.total = 0
        self.start = 0
        self.printed = time.monotonic()

    def begin(self, total: int, start: int) -> None:
        """Show the bar (terminal) from here on."""
        self.total, self.start = total, start
        self.printed = time.monotonic()
        if self.console.is_terminal:
            columns = (BarColumn(24), MofNCompleteColumn(), TextColumn("{task.description}"))
            self.progress = Progress(*columns, console=self.console, transient=True)
            self.progress.add_task("starting", total=total, completed=start)
            self.progress.start()

    def advance(self, what: str, done: int, total: int | None) -> None:
        """Show how far a preparation is (terminal only)."""
        if not self.console.is_terminal:
            return
        if self.loading is None:
            self.loading = Progress(
                BarColumn(24),
                TextColumn("{task.percentage:>3.0f} %"),
                TextColumn("{task.description}"),
                console=self.console,
                transient=True,
            )
            self.loading.add_task("")
            self.loading.start()
        self.loading.update(self.loading.task_ids[0], completed=done, total=total, description=what)

    def settled(self) -> None:
        """Take the preparation's bar away."""
        if self.loading is not None:
            self.loading.stop()
            self.loading = None

    def end(self) -> None:
        """Take the bar away."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def tell(self, text: str) -> None:
        """A line of words."""
        self.console.print(text, markup=False, style="yellow" if text.startswith("WARNING") else None)

    def event(self, event: dict[str, Any]) -> None:
        """Show an event of the run, if it is for people."""
        kind = event["kind"]
        if kind == "train":
            self._train(event)
        elif kind == "eval":
            loss, perplexity = number(event["loss"], ".4f"), number(event["perplexity"], ".2f")
            text = f"step {event['step']}: held-out loss {loss}, perplexity {perplexity}, token accuracy {event['accuracy']:.1%}"
            self.tell(f"{text} ({event['set']}, {event['tokens']:,} tokens)")
        elif kind == "sample":
            self.tell(f"step {event['step']}: {event['prompt']}\n  > {event['answer'].strip()}")

    def _train(self, event: dict[str, Any]) -> None:
        loss = "skipped" if event["loss"] is None else f"{event['loss']:.4f}"
        speed, left = f"{event['tokens_per_s']:,.0f} tok/s", clock(event["left_s"])
        text = f"loss {loss}  lr {event['lr']:.2e}  {speed}  {memory(event)}  left {left}"
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=event["step"], description=text)
            return
        now = time.monotonic()
        if now - self.printed >= PLAIN_EVERY or event["step"] in (self.start + 1, self.total):
            self.printed = now
            self.tell(f"step {event['step']}/{self.total}  {text}")


def memory(event: dict[str, Any]) -> str:
    """`7.93 GiB (plan 7.90, reserved 8.10, driver 8.79)`: the peak, what was planned for it, on a GPU the outer figures."""
    unit, scale, digits = ("GiB", 1024, 2) if event["memory_mib"] >= 1024 else ("MiB", 1, 0)
    named = [("plan", "planned_mib"), ("reserved", "reserved_mib"), ("driver", "driver_mib")]
    others = [f"{name} {event[key] / scale:.{digits}f}" for name, key in named if event.get(key)]
    return f"{event['memory_mib'] / scale:.{digits}f} {unit}" + (f" ({', '.join(others)})" if others else "")


def number(value: float | None, spec: str) -> str:
    """`2.1534`, or `not finite` where a score has none."""
    return "not finite" if value is None else format(value, spec)


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
