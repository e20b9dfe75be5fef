"""What the page shows, as plain data: findings, lengths, tokens, rows, copies and examples.

Why a table of texts: a token's text is written once, so that a page of 500 examples stays at one or two megabytes. Examples of the
rows that are drawn come first, so that a click on a document finds it. Cost: about a second for 500 examples of 200 tokens.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.check import run as checking
from halfbyte.data.check.findings import CHECKS, Finding, Findings
from halfbyte.data.order import shuffled
from halfbyte.data.prepare import Prepared
from halfbyte.data.preview import COLUMNS, Piece, Row, lengths, piece_of, rows
from halfbyte.data.tokens import Tokens, TokenSet

ROWS, GROUPS, MEMBERS, TOP, BINS = 40, 50, 8, 100, 48
TOKENS_SHOWN = 6000  # of one example
BUDGET = 1_000_000  # tokens in the page
EXCERPT = 80  # tokens of a copy
Int = NDArray[np.int64]


def collect(prepared: Prepared, findings: Findings, copies: Any, tokenizer: Any, seed: int, examples: int) -> dict[str, Any]:
    """Everything on the page. copies: `duplicates.Copies` over the training set's sources."""
    packed = rows(prepared, seed, ROWS)
    texts: dict[int, str] = {}
    shown = _examples(prepared.train, tokenizer, seed, examples, [e for row in packed for e in row.example_ids], texts)
    at = {example["e"]: number for number, example in enumerate(shown)}
    return {
        "report": prepared.report.lines(),
        "findings": [_finding(f) for f in (*findings.errors, *findings.warnings)],
        "summary": findings.summary(),
        "passed": [{"id": name, "sentence": CHECKS[name].sentence} for name in findings.passed()],
        "template": asdict(prepared.template),
        "columns": COLUMNS,
        "lengths": lengths(prepared),
        "histogram": _histogram(prepared.train.lengths, prepared.config.tokens),
        "rowTokens": prepared.config.tokens,
        "tokens": _tokens(prepared.train, tokenizer),
        "sources": [s.name for s in prepared.train.sources],
        "rows": [_row(row, prepared.train, at) for row in packed],
        "rowsInAll": prepared.report.rows,
        "twins": _twins(prepared.train, copies, tokenizer, at),
        "examples": shown,
        "examplesInAll": len(prepared.train),
        "texts": {str(i): text for i, text in sorted(texts.items())},
    }


def _row(row: Row, data: TokenSet, at: dict[int, int]) -> dict[str, Any]:
    documents = zip(row.example_ids, row.tokens, row.trained, strict=True)
    return {"docs": [{"w": data.where(e), "n": n, "t": t, "x": at.get(e, -1)} for e, n, t in documents], "left": row.left}


def _finding(found: Finding) -> dict[str, Any]:
    lines = found.lines()
    return {"id": found.id, "error": found.error, "head": lines[0], "where": found.where, "fix": lines[-1].strip()}


def _histogram(sizes: Int, row: int) -> dict[str, Any]:
    """Bins of one width up to just above the row, and one for all that is longer."""
    top = int(max(1, min(sizes.max(), 1.25 * row)))
    edges = np.unique(np.linspace(0, top, BINS + 1).round().astype(np.int64))
    counts, _ = np.histogram(np.minimum(sizes, top), bins=edges)
    return {"edges": edges.tolist(), "counts": counts.tolist(), "beyond": int((sizes > top).sum()), "longest": int(sizes.max())}


def _tokens(data: TokenSet, tokenizer: Any) -> dict[str, Any]:
    """How often each token stands there, and how often it is learned."""
    size = max(len(tokenizer), *(int(s.ids.max(initial=0)) + 1 for s in data.sources))
    count, learned = np.zeros(size, np.int64), np.zeros(size, np.int64)
    for source in data.sources:
        for at in range(0, len(source.ids), 1 << 22):
            ids = np.asarray(source.ids[at : at + (1 << 22)]).astype(np.int64)
            count += np.bincount(ids, minlength=size)
            learned += np.bincount(ids[np.asarray(source.trained[at : at + (1 << 22)]) > 0], minlength=size)
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    most = [int(i) for i in np.argsort(-count, kind="stable")[: TOP + len(special)] if count[i]]

    def entry(token: int) -> list[Any]:
        text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return [token, text, str(tokenizer.convert_ids_to_tokens(token)), int(count[token]), int(learned[token])]

    return {
        "all": int(count.sum()),
        "learned": int(learned.sum()),
        "distinct": int((count > 0).sum()),
        "vocabulary": len(tokenizer),
        "top": [entry(i) for i in most if i not in special][:TOP],
        "special": [entry(i) for i in sorted(special) if i < size and count[i]],
    }


def _examples(
    data: TokenSet, tokenizer: Any, seed: int, count: int, first: list[int], texts: dict[int, str]
) -> list[dict[str, Any]]:
    """Examples with their tokens: those of the drawn rows, then others from all over the set."""
    numbers = data.example_ids
    piece_at = {int(e): p for p, e in reversed(list(enumerate(numbers.tolist())))}
    wanted = [piece_at[e] for e in dict.fromkeys(first) if e in piece_at]
    wanted = list(dict.fromkeys([*wanted, *map(int, shuffled(len(data), (seed,)))]))[:count]
    found: list[dict[str, Any]] = []
    spent = 0
    for piece in wanted:
        if spent > BUDGET:
            break
        shown = piece_of(data, piece, tokenizer)
        spent += min(shown.tokens, TOKENS_SHOWN)
        entry = {"e": int(numbers[piece]), "s": int(data.source[piece]), "w": shown.where, "n": shown.tokens, "t": shown.trained}
        found.append({**entry, **_coded(shown.pieces, texts)})
    return found


def _coded(pieces: list[Piece], texts: dict[int, str]) -> dict[str, Any]:
    """Pieces as ids whose text stands in `texts` (a text of its own where several tokens make one), and runs of learned ones;
    where some of them weigh other than 1, runs of (pieces, weight) too."""
    coded: list[Any] = []
    runs: list[int] = [0]
    weights: list[tuple[int, float]] = []
    learning = False
    cut = 0
    for number, piece in enumerate(pieces):
        if len(coded) >= TOKENS_SHOWN:
            cut = sum(len(p.ids) for p in pieces[number:])
            break
        if piece.trained != learning:
            runs.append(0)
            learning = piece.trained
        runs[-1] += 1
        same = bool(weights) and weights[-1][1] == piece.weight
        weights[-1:] = [(weights[-1][0] + 1, piece.weight)] if same else [*weights[-1:], (1, piece.weight)]
        token = piece.ids[0]
        if len(piece.ids) == 1 and texts.setdefault(token, piece.text) == piece.text:
            coded.append(-token - 1 if piece.special else token)
        else:
            coded.append([piece.ids, piece.text])
    weighted = any(weight != 1 for _, weight in weights)
    return {"p": coded, "r": runs, "cut": cut, **({"k": weights} if weighted else {})}


def _twins(data: TokenSet, copies: Any, tokenizer: Any, at: dict[int, int]) -> list[dict[str, Any]]:
    """The largest groups of copies, each with its first members and how they begin."""
    found: list[dict[str, Any]] = []
    inside = np.isin(np.arange(len(copies.near)), data.example_ids)
    for group in copies.twins():
        members = [int(i) for i in group if inside[i]]
        if len(members) < 2:
            continue
        exact = len({int(copies.exact[i]) for i in members}) == 1
        some = [{"w": data.where(i), "x": at.get(i, -1), "text": _excerpt(data, i, tokenizer)} for i in members[:MEMBERS]]
        found.append({"count": len(members), "exact": exact, "members": some})
        if len(found) == GROUPS:
            break
    return found


def _excerpt(data: TokenSet, example: int, tokenizer: Any) -> str:
    source, number = _locate(data, example)
    start, stop = source.offsets[number], source.offsets[number + 1]
    ids = source.ids[start : min(stop, start + EXCERPT)].tolist()
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text + (" ..." if stop - start > EXCERPT else "")


def _locate(data: TokenSet, example: int) -> tuple[Tokens, int]:
    for source in data.sources:
        if example < len(source):
            return source, example
        example -= len(source)
    raise IndexError("no such example")


def of(config: Any, tokenizer: Any, seed: int, cache: Any, examples: int) -> dict[str, Any]:
    """Checks and prepares the data, and collects the page. Raises `DataError` where it cannot be prepared."""
    checked = checking.check(config, tokenizer, seed, cache)
    if checked.prepared is None:
        checked.findings.raise_errors()
    assert checked.prepared is not None, "what stops `prepare` is an error"
    copies = checking.find_copies(list(checked.prepared.train.sources), config.check.near, cache)
    return collect(checked.prepared, checked.findings, copies, tokenizer, seed, examples)
