"""The preview: examples as the model will see them, token by token, with what is learned marked.

Why the first thing to look at: a wrong mask or template is plain to the eye in one screen, and invisible in a loss curve. What
is learned is green and stands in ⟦brackets⟧, so that it shows without colour too; where its weight in the loss is not 1 that is
written in front, ⟦0.5x like this⟧, and less is yellow, more is cyan; tokens alternate in brightness; special tokens are underlined;
a newline is written ⏎. Below, the first packed rows are drawn, each document with its own shade. Cost: none to
speak of.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from halfbyte.data.batch import IGNORED
from halfbyte.data.config import DataConfig
from halfbyte.data.loader import Loader
from halfbyte.data.order import shuffled
from halfbyte.data.prepare import Prepared, Progress, prepare
from halfbyte.data.tokens import TokenSet

OPEN, CLOSE = "⟦", "⟧"
READ = ("dim", "default")  # not learned
LEARNED = {-1: ("yellow", "bold yellow"), 0: ("green", "bold green"), 1: ("cyan", "bold cyan")}  # by weight: below 1, 1, above
COLUMNS = ("set", "examples", "tokens", "learned", "shortest", "median", "95 %", "longest")
SHOWN_TOKENS = 400  # of one example; the middle of a longer one is left out, and counted
SHADES, LEFT, WIDTH, ROWS = "█▒", "·", 96, 4


@dataclass(frozen=True)
class Piece:
    """Tokens that read as one text: mostly one, several where a character spans tokens. weight: in the loss, if learned."""

    ids: list[int]
    text: str
    trained: bool
    special: bool = False
    weight: float = 1.0


@dataclass(frozen=True)
class Shown:
    """One example: where it came from, and its tokens."""

    source: str
    where: str
    tokens: int
    trained: int
    pieces: list[Piece]

    @property
    def weighted(self) -> bool:
        """Whether something that is learned weighs more or less than 1."""
        return any(piece.trained and piece.weight != 1 for piece in self.pieces)

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


@dataclass(frozen=True)
class Row:
    """A packed row: the examples in it, the tokens of each and how many of them are learned, and the tokens left over."""

    example_ids: list[int]
    tokens: list[int]
    trained: list[int]
    left: int

    def drawn(self, width: int = WIDTH) -> str:
        """The row as one line: shades take turns, a document is at least one character, and the rest is dotted."""
        total, text, at = sum(self.tokens) + self.left, "", 0
        for number, size in enumerate(self.tokens):
            at += size
            text += SHADES[number % 2] * max(1, round(width * at / total) - len(text))
        return text + LEFT * max(0, width - len(text))


@dataclass(frozen=True)
class Preview:
    """What `halfbyte data preview` shows: the prepared sets, some examples, and the first rows."""

    prepared: Prepared
    examples: list[Shown]
    rows: list[Row]

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain data, ids and texts of every token included."""
        report = self.prepared.report
        return {
            "report": asdict(report),
            "template": asdict(self.prepared.template),
            "lengths": [dict(zip(COLUMNS, row, strict=True)) for row in lengths(self.prepared)],
            "examples": [asdict(shown) for shown in self.examples],
            "rows": [asdict(row) for row in self.rows],
        }


def preview(
    config: DataConfig,
    tokenizer: Any,
    seed: int,
    *,
    examples: int = 3,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Preview:
    """Prepares the data as a run would and picks what to show. Raises `DataError` as `prepare` does."""
    from halfbyte.checkpoints.cache import cache_root

    prepared = prepare(config, tokenizer, seed, cache_dir or cache_root(), progress)
    return of(prepared, tokenizer, examples, seed)


def of(prepared: Prepared, tokenizer: Any, examples: int, seed: int) -> Preview:
    """The preview of sets that are prepared already: examples are drawn from all over the training set."""
    data = prepared.train
    chosen = shuffled(len(data), (seed,))[:examples]
    return Preview(prepared, [piece_of(data, int(piece), tokenizer) for piece in chosen], rows(prepared, seed, ROWS))


def rows(prepared: Prepared, seed: int, most: int) -> list[Row]:
    """The first rows of the first epoch, as the run lays them."""
    loader = Loader(prepared.train, prepared.config.tokens, 1, seed)
    found: list[Row] = []
    for number in range(min(most, loader.rows(0))):
        batch = loader.at(number)
        bounds = sorted(set(batch.cu_seqlens[0].tolist()))
        spans = list(pairwise(bounds))
        owned = len(batch.example_ids[0])
        learned = [int((batch.labels[0, start:stop] != IGNORED).sum()) for start, stop in spans[:owned]]
        sizes = [stop - start for start, stop in spans]
        found.append(Row(batch.example_ids[0], sizes[:owned], learned, sum(sizes[owned:])))
    return found


def piece_of(data: TokenSet, piece: int, tokenizer: Any) -> Shown:
    """One piece of a set, token by token."""
    source = data.sources[int(data.source[piece])]
    span = slice(int(data.start[piece]), int(data.stop[piece]))
    ids, trained = source.ids[span].tolist(), np.array(source.trained[span])
    trained[0] = False  # nothing stands before it, so nothing can foretell it
    where = source.where(int(data.example[piece]))
    weights = None
    if source.weights is not None:  # as they were written: 0.1 in 32 bits has more digits
        weights = [round(weight, 6) for weight in np.where(trained, source.weights[span], 1).tolist()]
    return Shown(source.name, where, len(ids), int(trained.sum()), pieces(ids, trained.tolist(), tokenizer, weights))


def pieces(ids: list[int], trained: list[bool], tokenizer: Any, weights: list[float] | None = None) -> list[Piece]:
    """Cuts tokens into the smallest runs that decode to whole characters. weights: of each token, None for all 1."""
    kinds = list(zip(trained, weights or [1.0] * len(ids), strict=True))
    found: list[Piece] = []
    run: list[int] = []
    specials = frozenset(tokenizer.all_special_ids)
    for number, token in enumerate(ids):
        run.append(token)
        text = _text(run, tokenizer)
        ends = number + 1 == len(ids) or kinds[number + 1] != kinds[number]
        if ends or not text.endswith("\N{REPLACEMENT CHARACTER}") or len(run) > 8:
            found.append(Piece(run, text, trained[number], token in specials, kinds[number][1]))
            run = []
    return found


def _text(run: list[int], tokenizer: Any) -> str:
    text: str = tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    # A tokenizer of the SentencePiece kind marks the space before a word, and loses it when the word is decoded alone.
    spaced = str(tokenizer.convert_ids_to_tokens(run[0])).startswith("▁") and not text.startswith(" ")
    return f" {text}" if spaced else text


def render(shown: Preview, console: Console) -> None:
    """Prints the whole preview."""
    console.print(renderable(shown, console.width))


def renderable(shown: Preview, width: int = 120) -> RenderableType:
    """What was read, how long it is, some examples, and the first packed row. width: columns that there are."""
    legend = f"learned tokens are green and stand in {OPEN}brackets{CLOSE}; special tokens are underlined; ⏎ is a newline"
    if any(example.weighted for example in shown.examples):
        legend += f"; {OPEN}0.5x tokens{CLOSE} count half in the loss (less than 1 is yellow, more is cyan)"
    parts: list[RenderableType] = [Text("\n".join(shown.prepared.report.lines())), _table(shown.prepared, width), Text(legend)]
    for example in shown.examples:
        title = f"{example.where}: {example.tokens} tokens, {example.trained} learned"
        parts.append(Panel(_marked(example.pieces), title=Text(title), title_align="left"))
    return Group(*parts, *(_drawn(number, row, min(WIDTH, width)) for number, row in enumerate(shown.rows, 1)))


def _table(prepared: Prepared, width: int) -> RenderableType:
    """Lengths of every set; where a table would have to cut its numbers, a line a set."""
    told = [[f"{value:,}" if isinstance(value, int) else value for value in row] for row in lengths(prepared)]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *told, strict=True)]
    if sum(widths) + 3 * len(widths) + 1 > width:
        lines = [f"{row[0]}: " + ", ".join(f"{n} {v}" for n, v in zip(COLUMNS[1:], row[1:], strict=True)) for row in told]
        return Text("\n".join(["lengths in tokens", *lines]))
    table = Table(*COLUMNS, title="lengths in tokens", title_justify="left")
    for row in told:
        table.add_row(*row)
    return table


def _drawn(number: int, row: Row, width: int) -> RenderableType:
    left = f", {row.left} left over (no loss)" if row.left else ""
    documents = " | ".join(map(str, row.tokens))
    return Text(f"row {number}: {len(row.tokens)} documents of {documents} tokens{left}; none sees another\n{row.drawn(width)}")


def _marked(found: list[Piece]) -> Text:
    """Token by token: two shades in turn, brackets around what is learned."""
    text = Text()
    learning: float | None = None  # the weight of what is learned
    half = SHOWN_TOKENS // 2
    for number, piece in enumerate(found):
        if len(found) > SHOWN_TOKENS and half <= number < len(found) - half:
            if number == half:
                text.append(f"{_closed(learning)} ... {len(found) - SHOWN_TOKENS} tokens ... ", style="italic")
                learning = None
            continue
        weight = piece.weight if piece.trained else None
        if weight != learning:
            text.append(_closed(learning) + ("" if weight is None else OPEN), style="bold")
            if weight not in (None, 1):
                text.append(f"{weight:g}x ", style="italic")
            learning = weight
        shades = READ if weight is None else LEARNED[(weight > 1) - (weight < 1)]
        text.append(piece.text.replace("\n", "⏎\n"), style=shades[number % 2] + (" underline" if piece.special else ""))
    return text.append(_closed(learning), style="bold")


def _closed(learning: float | None) -> str:
    return "" if learning is None else CLOSE


def lengths(prepared: Prepared) -> list[tuple[str | int, ...]]:
    """One row of COLUMNS for the training set and for each held-out set."""
    rows: list[tuple[str | int, ...]] = []
    for name, data in [("train", prepared.train), *((f"eval: {k}", v) for k, v in prepared.eval.items())]:
        quantiles = [int(np.quantile(data.lengths, q)) for q in (0.0, 0.5, 0.95, 1.0)]
        rows.append((name, len(np.unique(data.example_ids)), data.tokens(), data.trained(), *quantiles))
    return rows
