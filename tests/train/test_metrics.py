"""Files of a run: torn lines, full disks, resume, the plot, plain progress."""

from __future__ import annotations

import io
import resource
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from halfbyte.train import metrics
from halfbyte.train.metrics import JsonLines
from halfbyte.train.progress import Display, clock, memory
from halfbyte.train.report import Report
from halfbyte.train.state import State


def event(step: int, kind: str = "train") -> dict[str, object]:
    return {"kind": kind, "step": step, "loss": 1.0}


def test_torn_and_later_lines_are_dropped_on_resume(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "m.jsonl", print)
    for line in (event(1), event(2), event(2, "eval"), event(3)):
        file.write(line)
    with file.path.open("ab") as raw:
        raw.write(b'{"kind": "train", "step": 1, "lo')
    file.keep(metrics.precedes(State(step=2, evaluated=2)))
    assert file.read() == [event(1), event(2), event(2, "eval")]
    file.keep(metrics.precedes(State(step=2, evaluated=0)))
    assert file.read() == [event(1), event(2)]


def test_lines_wait_while_the_disk_is_full_and_none_is_torn(tmp_path: Path) -> None:
    told: list[str] = []
    file = JsonLines(tmp_path / "m.jsonl", told.append)
    file.write(event(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.path.stat().st_size + 10, before[1]))
    try:
        file.write(event(2))
        file.write(event(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert len(told) == 1
    assert file.path.read_text().count("\n") == 1
    assert len(file.read()) == 3
    file.write(event(4))
    assert JsonLines(file.path, print).read() == [event(step) for step in (1, 2, 3, 4)]


def test_the_plot_is_a_picture_even_of_little(tmp_path: Path) -> None:
    score = {"kind": "eval", "set": "chats", "loss": 2.0}
    for number, events in enumerate([[], [event(1), {**score, "step": 0}, {**score, "step": 1}]]):
        metrics.plot(events, tmp_path / f"{number}.png", "title")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")


def test_smoothing_starts_at_the_first_value() -> None:
    assert metrics.smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert metrics.smooth([1.0, 0.0])[1] < 1.0


def test_trackers_get_numbers_only() -> None:
    found = metrics.values_of({"kind": "eval", "step": 3, "set": "chats", "loss": 2.0, "note": "x", "gone": None})
    assert found == {"eval/chats/loss": 2.0}


class FakeWandb(types.ModuleType):
    """What of wandb is used: `init`, and a run's `log` and `finish`."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.opened: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, float], int]] = []
        self.finished = 0

    def init(self, **options: Any) -> FakeWandb:
        self.opened.append(options)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((values, step))

    def finish(self) -> None:
        self.finished += 1


def test_wandb_gets_one_run_that_resumes_under_its_id_and_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for start in (0, 4):
        report = Report(tmp_path / "run", display=Display(Console(file=io.StringIO())))
        (tmp_path / "run").mkdir(exist_ok=True)
        report.open(State(step=start), 10, ["wandb"], "the-id", {"train": {"lr": 0.1}})
        full = {**event(start + 1), "lr": 1e-4, "tokens_per_s": 10.0, "memory_mib": 2048.0, "left_s": 1.0}
        report.event(full)
        report.event({"kind": "sample", "step": start + 1, "prompt": "secret", "answer": "text"})
        report.close()
    assert [(o["id"], o["resume"], o["config"]) for o in wandb.opened] == [("the-id", "allow", {"train": {"lr": 0.1}})] * 2
    assert [step for _, step in wandb.logged] == [1, 5]
    assert wandb.logged[0][0]["train/loss"] == 1.0 and wandb.logged[0][0]["train/lr"] == 1e-4
    assert "secret" not in str(wandb.logged)
    assert wandb.finished == 2


def test_progress_is_plain_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    display = Display(Console(file=out, width=200))
    display.begin(10, 0)
    full = {**event(1), "lr": 1e-4, "tokens_per_s": 1234.5, "memory_mib": 2048.0, "left_s": 61.4}
    display.event(full)
    display.event({**full, "step": 2})
    display.event({**full, "step": 10, "loss": None})
    display.event({"kind": "eval", "step": 10, "set": "chats", "loss": 2.0, "perplexity": 7.39, "accuracy": 0.5, "tokens": 99})
    display.tell("[red]not markup")
    display.end()
    first, last, scores, words = out.getvalue().splitlines()
    assert first.startswith("step 1/10  loss 1.0000  lr 1.00e-04  1,234 tok/s  2.00 GiB  left 1:01")
    assert last.startswith("step 10/10  loss skipped")
    assert scores == "step 10: held-out loss 2.0000, perplexity 7.39, token accuracy 50.0% (chats, 99 tokens)"
    assert words == "[red]not markup"


def test_progress_has_the_plan_beside_the_truth() -> None:
    cpu = {"memory_mib": 512.4, "planned_mib": 500.0, "resident_mib": 510.0}
    assert memory(cpu) == "512 MiB (plan 500)"
    gpu = {"memory_mib": 2048.0, "planned_mib": 2000.0, "allocated_mib": 900.0, "reserved_mib": 2150.4, "driver_mib": 3072.0}
    assert memory(gpu) == "2.00 GiB (plan 1.95, reserved 2.10, driver 3.00)"


def test_clock() -> None:
    assert [clock(s) for s in (0, 61.4, 3723)] == ["0:00", "1:01", "1:02:03"]
