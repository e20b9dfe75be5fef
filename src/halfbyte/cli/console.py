"""What commands share to speak: data goes to stdout, words to stderr; rich turns colour off where there is no terminal."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

DEFAULTS_OF_LIBRARIES = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
"""Environment variables that are set unless the user has: no telemetry, and no second voice beside ours."""


def console(*, stderr: bool = False, least: int = 0) -> Console:
    """A rich console: stdout for what was asked for, stderr for words about it. 120 columns where it is no terminal; never fewer
    than `least`, below which rich would cut what it prints, where a terminal only breaks the line."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    made = Console(stderr=stderr, highlight=False, width=None if stream.isatty() else 120)
    made.width = max(made.width, least)
    return made


def say(text: str) -> None:
    """One line of words."""
    print(text, file=sys.stderr, flush=True)


def fail(message: str, hint: str = "", code: str = "") -> None:
    """An error as the user sees it: message, then hint, both on stderr."""
    mark = f"error [{code}]" if code else "error"
    say(f"{_red(mark)}: {message}")
    if hint:
        say(f"  hint: {hint}")


def emit(data: Any) -> None:
    """Data for a program: JSON on stdout."""
    print(json.dumps(data, indent=2, ensure_ascii=False, default=str), flush=True)


def emit_line(data: Any) -> None:
    """One event for a program: a JSON object on one line of stdout."""
    print(json.dumps(data, ensure_ascii=False, default=str), flush=True)


class Loading:
    """A bar on stderr while a model loads; nothing where stderr is no terminal."""

    def __enter__(self) -> Loading:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

        columns = (TextColumn("loading"), BarColumn(24), DownloadColumn(), TextColumn("{task.fields[what]}", style="dim"))
        self.bar = Progress(*columns, console=console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self.task = self.bar.add_task("", total=None, what="")
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def progress(self, what: str, done: int, total: int) -> None:
        """As loaders call it: bytes done and in all."""
        self.bar.update(self.task, completed=done, total=total, what=what)


def _red(text: str) -> str:
    import os

    return f"\033[1;31m{text}\033[0m" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else text
