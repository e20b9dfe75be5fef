"""`halfbyte chat`: talk to a base or to what was trained on it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from halfbyte.generate.chat import Chat

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
    from halfbyte.cli.console import fail, say
    from halfbyte.generate.chat import Chat

    loaded = load(target, kind, model, compute, other_base=other_base)
    talk = Chat(
        loaded.base,
        loaded.adapter,
        template=loaded.template,
        end_ids=loaded.end_ids,
        system=system,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    if base:
        talk.use("base")
    if prompt is not None:
        _ask(talk, prompt)
        return
    say(f"{loaded.base.name}, {'with' if loaded.adapter else 'without'} adapter; {HELP}")
    while (line := _line()) not in ("/quit", "/exit"):
        try:
            if line.startswith("/"):
                say(_command(talk, line))
            elif line:
                _ask(talk, line)
        except HalfbyteError as error:
            fail(error.message, error.hint, error.code)
        except KeyboardInterrupt:
            say("\nstopped; /quit ends the chat")


def _line() -> str:
    """The next line of the user; `/quit` at the end of input."""
    print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else "/quit"


def _ask(talk: Chat, question: str) -> None:
    """Streams the answer to stdout."""
    talk.say(question, lambda piece: print(piece, end="", flush=True))
    print(flush=True)


def _command(talk: Chat, line: str) -> str:
    """Carries out a /command; returns what to tell the user."""
    if line == "/reset":
        talk.reset()
        return "forgotten"
    if line in ("/base", "/adapter"):
        talk.use("base" if line == "/base" else "adapter")
        return f"answers come from the {talk.which}"
    return f"unknown command {line}: {HELP}"
