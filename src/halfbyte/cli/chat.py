"""`halfbyte chat`: talk to a base or to what was trained on it."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from halfbyte.cli.arguments import Loaded

HELP = "/base answers without the adapter, /adapter with it, /reset forgets the conversation, /quit ends"


def chat(
    target: str = typer.Argument(..., help="Run, adapter or base: a directory, Hub id, .gguf file or smollm2-135m."),
    prompt: str | None = typer.Option(None, "--prompt", "-p", help="Answer this one question and exit."),
    base: bool = typer.Option(False, "--base", help="Start with the adapter switched off."),
    system: str | None = typer.Option(None, "--system", help="System message."),
    model: str | None = typer.Option(None, "--model", "-m", help="Base of the adapter, where it does not say or lies elsewhere."),
    other_base: bool = typer.Option(False, "--other-base", help="Allow a base whose weights differ from those it was trained on."),
    kind: str = typer.Option("nf4", "--format", "-f", help="Format of a base without an adapter."),
    compute: str = typer.Option("auto", "--compute", help="auto, bf16, fp16 or fp32."),
    max_tokens: int = typer.Option(256, "--max-tokens", min=1, help="Longest answer, in tokens."),
    temperature: float = typer.Option(0.0, "--temperature", "-t", min=0.0, help="0 takes the most likely token each time."),
    top_p: float = typer.Option(1.0, "--top-p", min=0.01, max=1.0, help="Draw from the most likely tokens of this probability."),
    seed: int = typer.Option(0, "--seed", min=0, help="Seed of the draws."),
) -> None:
    """Chat with a model; answers stream. Inside: /base, /adapter, /reset, /quit.

    \b
    halfbyte chat runs/quickstart --prompt "What does json.dumps do in Python?"
    """
    from halfbyte.cli.arguments import load
    from halfbyte.cli.console import say

    loaded = load(target, kind, model, compute, other_base=other_base)
    talk = _Talk(loaded, not base, system, max_tokens, temperature, top_p, seed)
    if prompt is not None:
        talk.ask(prompt)
        return
    say(f"{loaded.base.name}, {'with' if loaded.adapter else 'without'} adapter; {HELP}")
    while (line := _line()) is not None:
        if not line:
            continue
        if line.startswith("/"):
            if line in ("/quit", "/exit"):
                return
            say(talk.command(line))
        else:
            talk.ask(line)


def _line() -> str | None:
    """The next line of the user; None at the end of input."""
    print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


@dataclass
class _Talk:
    """A conversation: what was said so far, and whether the adapter is on."""

    loaded: Loaded
    adapted: bool
    system: str | None
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    said: list[dict[str, str]] = field(default_factory=list)

    def command(self, line: str) -> str:
        """Carries out a /command; returns what to tell the user."""
        if line == "/reset":
            self.said.clear()
            return "forgotten"
        if line in ("/base", "/adapter"):
            if self.loaded.adapter is None:
                return "there is no adapter: this is a base model"
            self.adapted = line == "/adapter"
            return f"the adapter is {'on' if self.adapted else 'off'}"
        return f"unknown command {line}: {HELP}"

    def ask(self, question: str) -> None:
        """Streams the answer to stdout."""
        from halfbyte.generate.chat import generate

        self.said.append({"role": "user", "content": question})
        head = [{"role": "system", "content": self.system}] if self.system else []
        adapter = self.loaded.adapter
        with adapter.enabled(self.adapted) if adapter else nullcontext():
            answer = generate(
                self.loaded.base,
                head + self.said,
                self.max_tokens,
                self.temperature,
                self.top_p,
                self.seed,
                lambda piece: print(piece, end="", flush=True),
                template=self.loaded.template,
            )
        print(flush=True)
        self.said.append({"role": "assistant", "content": answer.text})
