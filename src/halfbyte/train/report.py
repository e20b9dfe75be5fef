"""One place that every event of a run goes through: files, terminal, trackers, and the caller's own function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from halfbyte.train.metrics import METRICS, TRACKERS, JsonLines, Tracker, precedes, values_of
from halfbyte.train.progress import Display
from halfbyte.train.state import State
from halfbyte.train.step import ANOMALIES

OnEvent = Callable[[dict[str, Any]], None]


class Report:
    """Fans events out. on_event receives every event and, as `{"kind": "message", "text": ...}`, every line of words."""

    def __init__(self, output: Path, on_event: OnEvent | None = None, display: Display | None = None) -> None:
        self.display = display or Display()
        self.on_event = on_event
        self.output = output
        self.metrics = JsonLines(output / METRICS, self.tell)
        self.anomalies = JsonLines(output / ANOMALIES, self.tell)
        self.trackers: list[Tracker] = []

    def open(self, state: State, total: int, trackers: Sequence[str], name: str, recipe: dict[str, Any]) -> None:
        """Begin, or go on after `state`: lines that a killed run wrote after its last checkpoint are dropped."""
        for file in (self.metrics, self.anomalies):
            file.keep(precedes(state))
        self.trackers = [TRACKERS[tracker][1](self.output, state.step, name, recipe) for tracker in trackers]
        self.display.begin(total, state.step)

    def close(self) -> None:
        """End the display and the trackers."""
        self.display.end()
        for tracker in self.trackers:
            tracker.close()

    def event(self, event: dict[str, Any]) -> None:
        """A JSON object with `kind` and `step`."""
        (self.anomalies if event["kind"] == "anomaly" else self.metrics).write(event)
        self.display.event(event)
        if values := values_of(event):
            for tracker in self.trackers:
                tracker.log(values, event["step"])
        if self.on_event is not None:
            self.on_event(event)

    def tell(self, text: str) -> None:
        """A line of words for people."""
        self.display.tell(text)
        if self.on_event is not None:
            self.on_event({"kind": "message", "text": text})
