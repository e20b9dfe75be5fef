"""The preview: examples as the model will see them, token by token, with what is learned marked.

Why the first thing to look at: a wrong mask or template is plain to the eye in one screen, and invisible in a loss curve. What
is learned is green and stands in ⟦brackets⟧, so that it shows without colour too; tokens alternate in brightness; a newline is
written ⏎. Cost: none to speak of.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from halfbyte.data.loader import Loader
from halfbyte.data.order import shuffled
from halfbyte.data.prepare import Prepared
from halfbyte.data.tokens import TokenSet

OPEN, CLOSE = "⟦", "⟧"
STYLES = {True: ("green", "bold green"), False: ("dim", "default")}
SHOWN_TOKENS = 400  # of one example; the middle of a longer one is left out, and counted


@dataclass(frozen=True)
class Piece:
    """Tokens that read as one text: mostly one, several where a character spans tokens."""

    ids: list[int]
    text: str
    trained: bool


@dataclass(frozen=True)
class Shown:
    """One example: where it came from, and its tokens."""

    source: str
    where: str
    tokens: int
    trained: int
    pieces: list[Piece]

    def plain(self) -> str:
        """The text with the learned spans in brackets, newlines as they are."""
        parts: list[str] = []
        learning = False
        for piece in self.pieces:
            if piece.trained != learning:
                parts.append(OPEN if piece.trained else CLOSE)
                learning = piece.trained
            parts.append(piece.text)
        return "".join(parts) + (CLOSE if learning else "")


def examples(prepared: Prepared, tokenizer: Any, count: int, seed: int = 0) -> list[Shown]:
    """`count` training examples, drawn from all over the set, as data: what `--json` prints."""
    data = prepared.train
    chosen = shuffled(len(data), (seed,))[:count]
    return [_shown(data, int(piece), tokenizer) for piece in chosen]


def _shown(data: TokenSet, piece: int, tokenizer: Any) -> Shown:
    source = data.sources[int(data.source[piece])]
    span = slice(int(data.start[piece]), int(data.stop[piece]))
    ids, trained = source.ids[span].tolist(), np.array(source.trained[span])
    trained[0] = False  # nothing stands before it, so nothing can foretell it
    where = source.where(int(data.example[piece]))
    return Shown(source.name, where, len(ids), int(trained.sum()), pieces(ids, trained.tolist(), tokenizer))


def pieces(ids: list[int], trained: list[bool], tokenizer: Any) -> list[Piece]:
    """Cuts tokens into the smallest runs that decode to whole characters."""
    found: list[Piece] = []
    run: list[int] = []
    for number, token in enumerate(ids):
        run.append(token)
        text = tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        ends = number + 1 == len(ids) or trained[number + 1] != trained[number]
        if ends or not text.endswith("\N{REPLACEMENT CHARACTER}") or len(run) > 8:
            found.append(Piece(run, text, trained[number]))
            run = []
    return found


def render(prepared: Prepared, tokenizer: Any, count: int = 3, batch: int = 1, seed: int = 0) -> RenderableType:
    """The whole preview: what was read, how long it is, some examples, and the first packed row."""
    loader = Loader(prepared.train, prepared.config.tokens, batch, seed)
    parts: list[RenderableType] = [Text("\n".join(prepared.report.lines())), _lengths(prepared), Text(_legend())]
    for shown in examples(prepared, tokenizer, count, seed):
        title = f"{shown.where}: {shown.tokens} tokens, {shown.trained} learned"
        parts.append(Panel(_marked(shown.pieces), title=Text(title), title_align="left"))
    parts.append(_row(loader))
    return Group(*parts)


def _legend() -> str:
    return f"learned tokens are green and stand in {OPEN}brackets{CLOSE}; ⏎ is a newline"


def _marked(found: list[Piece]) -> Text:
    """Token by token: two shades in turn, brackets around what is learned."""
    text = Text()
    learning = False
    half = SHOWN_TOKENS // 2
    for number, piece in enumerate(found):
        if len(found) > SHOWN_TOKENS and half <= number < len(found) - half:
            if number == half:
                text.append(f"{CLOSE if learning else ''} ... {len(found) - SHOWN_TOKENS} tokens ... ", style="italic")
                learning = False
            continue
        if piece.trained != learning:
            text.append(OPEN if piece.trained else CLOSE, style="bold")
            learning = piece.trained
        text.append(piece.text.replace("\n", "⏎\n"), style=STYLES[piece.trained][number % 2])
    return text.append(CLOSE, style="bold") if learning else text


def _lengths(prepared: Prepared) -> Table:
    table = Table(
        "set",
        "examples",
        "tokens",
        "learned",
        "shortest",
        "median",
        "95 %",
        "longest",
        title="lengths in tokens",
        title_justify="left",
    )
    for name, data in [("train", prepared.train), *((f"eval: {k}", v) for k, v in prepared.eval.items())]:
        lengths = data.lengths
        quantiles = [int(np.quantile(lengths, q)) for q in (0.0, 0.5, 0.95, 1.0)]
        count = len(np.unique(data.example_ids))
        table.add_row(name, f"{count:,}", f"{data.tokens():,}", f"{data.trained():,}", *(f"{q:,}" for q in quantiles))
    return table


def _row(loader: Loader) -> Text:
    """The first row of the run: its documents and their boundaries."""
    batch = loader.at(0)
    bounds = batch.cu_seqlens[0].unique_consecutive().tolist()
    sizes = [stop - start for start, stop in pairwise(bounds)]
    owned = len(batch.example_ids[0])
    left = f", {sizes[-1]} left over (no loss)" if len(sizes) > owned else ""
    documents = " | ".join(str(size) for size in sizes[:owned])
    return Text(f"first row: {owned} examples of {documents} tokens{left}; none sees another")
