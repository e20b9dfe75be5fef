"""What can be wrong once there are tokens and masks: proven on every example, whatever made them.

Why proven again, after masks.py took care: a mask comes from a template, a tokenizer and a cache, and this is the last place where
a mistake in any of them can be seen before it is learned. Cost: about 30 ns a token, in parts of a million.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.check.findings import KEPT, Findings
from halfbyte.data.check.hashing import chunks, in_order
from halfbyte.data.config import DataConfig
from halfbyte.data.tokens import Tokens

ANSWERS = ("assistant", "last", "each")
TAIL = 3  # the end of turn is among the last tokens of a learned run: some templates learn a line break after it
SAME_SHARE, SAME_COUNT, SAME_TOKENS = 0.1, 20, 10
Bool = NDArray[np.bool_]
Int = NDArray[np.int64]


class _Part(NamedTuple):
    """Some examples: numbers `first` to `last`, their ids, the mask, and where each begins and ends in them."""

    first: int
    last: int
    ids: Int
    trained: Bool
    starts: Int
    stops: Int


def _parts(tokens: Tokens) -> Iterator[_Part]:
    for first, last in chunks(tokens.offsets):
        begin, end = tokens.offsets[first], tokens.offsets[last]
        ids = np.asarray(tokens.ids[begin:end]).astype(np.int64)
        trained = np.asarray(tokens.trained[begin:end]) > 0
        yield _Part(first, last, ids, trained, tokens.offsets[first:last] - begin, tokens.offsets[first + 1 : last + 1] - begin)


@dataclass
class _Seen:
    """Numbers of examples with something wrong, and for every example how much of its answer there is, and which."""

    endless: list[int] = field(default_factory=list)
    masked: list[int] = field(default_factory=list)
    nothing: list[int] = field(default_factory=list)
    sizes: list[Int] = field(default_factory=list)
    answers: list[NDArray[np.uint64]] = field(default_factory=list)


def check(tokens: Tokens, tokenizer: Any, config: DataConfig, findings: Findings) -> None:
    """Notes what is wrong with a tokenised source."""
    ends = np.asarray(sorted({*tokens.end, tokenizer.eos_token_id} - {None}), dtype=np.int64)
    seen = _Seen()
    for part in _parts(tokens):
        _look(part, ends, tokenizer.pad_token_id, config.loss_on in ANSWERS, seen)
    for name, found in (("data.zero-trained", seen.nothing), ("data.pad-eos", seen.masked), ("data.no-eot", seen.endless)):
        findings.add(name, tokens.name, len(found), len(tokens), _places(tokens, found))
    if tokens.shape != "text":
        _same(tokens, np.concatenate(seen.answers), np.concatenate(seen.sizes), findings)
        _long(tokens, config.tokens, config.too_long, findings)


def _places(tokens: Tokens, found: list[int]) -> tuple[str, ...]:
    return tuple(tokens.where(i) for i in found[:KEPT])


def _look(part: _Part, ends: Int, pad: int | None, answers: bool, seen: _Seen) -> None:
    own = part.trained.copy()
    own[part.starts[part.starts < part.stops]] = False  # nothing stands before the first token, so nothing can foretell it
    counted = np.concatenate([[0], np.cumsum(own, dtype=np.int64)])
    counts = counted[part.stops] - counted[part.starts]
    seen.nothing += (np.flatnonzero(counts == 0) + part.first).tolist()
    seen.sizes.append(counts)
    place = counted[:-1] - np.repeat(counted[part.starts], part.stops - part.starts)
    seen.answers.append(in_order(part.ids.astype(np.uint64), place.astype(np.uint64), part.starts, part.stops, own))
    if len(ends):
        _ends(part, ends, pad, answers, seen)


def _ends(part: _Part, ends: Int, pad: int | None, answers: bool, seen: _Seen) -> None:
    """Learned runs without an end of turn among their last tokens; `masked` where it stands right behind, unlearned, and pads.

    answers: every run is an answer; otherwise only an example that learns no end at all is one too many.
    """
    edge = np.zeros(len(part.ids) + 1, dtype=np.bool_)
    edge[part.stops] = edge[part.starts] = True
    last = np.flatnonzero(part.trained & (edge[1:] | ~np.append(part.trained[1:], False)))
    owner = np.searchsorted(part.stops, last, side="right")
    is_end = np.isin(part.ids, ends) & part.trained
    closed = np.zeros(len(last), dtype=np.bool_)
    for back in range(TAIL):
        at = last - back
        closed |= (at >= part.starts[owner]) & is_end[np.maximum(at, 0)]
    if not answers:
        closed |= np.isin(owner, np.searchsorted(part.stops, np.flatnonzero(is_end), side="right"))
    open_at, open_in = last[~closed], owner[~closed]
    behind = open_at + 1
    inside = behind < part.stops[open_in]
    pads = np.zeros(len(open_at), dtype=np.bool_)
    pads[inside] = np.isin(part.ids[behind[inside]], ends) & (part.ids[behind[inside]] == (-1 if pad is None else pad))
    seen.masked += (np.unique(open_in[pads]) + part.first).tolist()
    seen.endless += (np.unique(open_in[~pads]) + part.first).tolist()


def _same(tokens: Tokens, answers: NDArray[np.uint64], sizes: Int, findings: Findings) -> None:
    """One long answer to many questions."""
    _, first, counts = np.unique(answers[sizes >= SAME_TOKENS], return_index=True, return_counts=True)
    if not len(counts) or (most := int(counts.max())) < SAME_COUNT or most <= SAME_SHARE * len(tokens):
        return
    chosen = int(np.flatnonzero(sizes >= SAME_TOKENS)[first[counts.argmax()]])
    findings.add("data.same-answer", tokens.name, most, len(tokens), (tokens.where(chosen),))


def _long(tokens: Tokens, rows: int, policy: str, findings: Findings) -> None:
    """Examples longer than a row, whatever the policy makes of them."""
    lengths = np.diff(tokens.offsets)
    found = np.flatnonzero(lengths > rows)
    longest = int(lengths.max(initial=0))
    detail = f"examples longer than a row of {rows:,} tokens (`too_long: {policy}`); the longest has {longest:,}"
    places = tuple(f"{tokens.where(int(i))} ({lengths[i]:,} tokens)" for i in found[:KEPT])
    fix = f"`data.tokens: {-(-longest // 64) * 64}` takes them whole"
    findings.add("data.too-long", tokens.name, len(found), len(tokens), places, detail=detail, fix=fix)
