"""From the recipe's `data` section to token sets that are ready to train on: read, check, tokenise once, hold out, fit to rows.

Why one function: everything that can be wrong with data is found here, before a model is loaded, and told at once. Cost: the
tokenizer's speed the first time (about 800 short chats a second and core), milliseconds from the cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.data import checks, shapes, templates
from halfbyte.data import tokens as store
from halfbyte.data.config import DataConfig, SourceConfig
from halfbyte.data.encode import Encoded, Encoder, Options
from halfbyte.data.loader import Loader
from halfbyte.data.problems import Problems
from halfbyte.data.report import Report, SourceReport
from halfbyte.data.sources import Source, open_source
from halfbyte.data.tokens import Tokens, TokenSet
from halfbyte.errors import DataError

Progress = Callable[[str, int, int | None], None]  # (what, done, of how many if known)
Int = NDArray[np.int64]


@dataclass(frozen=True)
class Prepared:
    """What a run learns from. `end_ids`: the tokens that end an answer, for whoever generates."""

    train: TokenSet
    eval: dict[str, TokenSet]
    report: Report
    template: templates.Template
    end_ids: tuple[int, ...]
    config: DataConfig

    @property
    def digest(self) -> str:
        """Names the training and held-out sets: a resumed run must find the same."""
        parts = [self.train.digest, *(f"{k}:{v.digest}" for k, v in self.eval.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def prepare(config: DataConfig, tokenizer: Any, seed: int, cache_dir: Path, progress: Progress | None = None) -> Prepared:
    """Reads, checks and tokenises everything that `config` names.

    Raises `DataError`: wrong lines (all of them, with file and line), and every check of `checks.py`.
    """
    template = templates.resolve(config.template, tokenizer, config.template_kwargs)
    encoder = Encoder(tokenizer, template, Options(config.system, config.loss_on if isinstance(config.loss_on, str) else tuple(config.loss_on)))
    report = Report(template.name, template.reason, config.tokens)
    tell = progress or (lambda what, done, total: None)
    cache = Path(cache_dir).expanduser()
    taken: set[str] = set()

    def read(sources: Iterable[SourceConfig]) -> list[Tokens]:
        return [_tokenise(s, tokenizer, template, encoder, config, cache, tell, taken) for s in sources]

    sources = read(config.train)
    pad_id = _pad_id(tokenizer)
    whole = [_fit(s, config, report) for s in sources]
    others: list[Tokens] = []
    if isinstance(config.eval, list):
        others = read(config.eval)
        held = {s.name: _set((s,), (1.0,), [_fit(s, config, report, "held out: ")], pad_id) for s in others}
        kept = whole
    else:
        kept, away = _hold_out(sources, whole, config.eval, seed, report)
        held = {s.name: _set((s,), (1.0,), [part], pad_id) for s, part in zip(sources, away, strict=True) if len(part)}
    train = _set(tuple(sources), tuple(s.weight for s in config.train), kept, pad_id)
    if not len(train) or not train.trained():
        raise DataError(
            "nothing is left to train on", hint="see the counts above; lower `data.eval`, raise `data.tokens`", code="data.empty"
        )
    loader = Loader(train, config.tokens, 1, seed)
    report.rows, report.efficiency = loader.rows(0), loader.efficiency(0)
    report.notes += [f"{s.name}: {note}" for s in (*sources, *others) for note in s.notes]
    ends = {i for s in sources for i in s.end} | ({tokenizer.eos_token_id} - {None})
    return Prepared(train, held, report, template, tuple(sorted(ends)), config)


def _pad_id(tokenizer: Any) -> int:
    """Fills what no example fills. Never learned and never attended to, so any id will do."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(i for i in known if i is not None))


def _tokenise(
    config: SourceConfig, tokenizer: Any, template: templates.Template, encoder: Encoder, data: DataConfig, cache: Path,
    tell: Progress, taken: set[str],
) -> Tokens:  # fmt: skip
    """One source from the cache, or read and tokenised into it; checked either way."""
    source = open_source(config, cache)
    name = _unique(source.name, taken)
    key = store.key_of(
        {
            "source": source.digest, "shape": config.shape, "limit": config.limit, "template": template.text,
            "tokenizer": _fingerprint(tokenizer), "system": data.system, "loss_on": data.loss_on,
        }
    )  # fmt: skip
    folder = cache / "tokens" / key
    tokens = store.load(folder, name)
    if tokens is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _write(folder, source, name, config, encoder, tell)
        tokens = store.load(folder, name)
        assert tokens is not None
    checks.source(tokens, data.loss_on)
    checks.double_bos(tokens, tokenizer)
    return tokens


def _unique(name: str, taken: set[str]) -> str:
    number, chosen = 1, name
    while chosen in taken:
        number += 1
        chosen = f"{name}#{number}"
    taken.add(chosen)
    return chosen


def _fingerprint(tokenizer: Any) -> str:
    own = tokenizer.backend_tokenizer.to_str() + json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return hashlib.sha256(own.encode()).hexdigest()


def _write(folder: Path, source: Source, name: str, config: SourceConfig, encoder: Encoder, tell: Progress) -> None:
    """Streams a source into a cache folder. Raises the collected mistakes, or `data.empty`, and leaves nothing behind."""
    problems = Problems()
    records = source.read(problems)
    first = next(records, None)
    if first is None:
        problems.raise_any()
        raise DataError(f"`{name}` is empty", hint="it must hold at least one example", code="data.empty")
    reader = shapes.reader(config.shape, first, shapes.layout(config))
    examples = (e for r in chain([first], records) if (e := reader.read(r, problems)) is not None)
    writer = store.Writer(folder)
    whole = False
    try:
        count = writer.write(_told(encoder.encode(islice(examples, config.limit), problems), name, config.limit, tell))
        problems.raise_any()
        notes = [*source.notes, *(f"{n:,} examples left out: {why}" for why, n in sorted(problems.skipped.items()))]
        notes += [f"{n:,} examples where {what}" for what, n in sorted(problems.noted.items())]
        if reader.ignored:
            notes.append(f"columns not read: {', '.join(reader.ignored)}")
        if reader.shape == "prompt_completion" and first.data.get("prompt").__class__ is str:
            notes.append("prompt and completion are joined as they are, without the chat template")
        if not count:
            reasons = f" ({'; '.join(notes)})" if notes else ""
            hint = "every example needs an answer by the assistant, or text"
            raise DataError(f"`{name}` holds no usable example{reasons}", hint=hint, code="data.empty")
        writer.close(reader.shape, encoder.end_ids(), notes)
        whole = True
    finally:
        if not whole:
            writer.discard()


def _told(encoded: Iterator[Encoded], name: str, total: int | None, tell: Progress) -> Iterator[Encoded]:
    number = 0
    for number, example in enumerate(encoded, 1):
        yield example
        if number % 256 == 0:
            tell(name, number, total)
    tell(name, number, number)


@dataclass(frozen=True)
class _Pieces:
    """Pieces of one source: the example each comes from, and its place. int64 [P] each."""

    example: Int
    start: Int
    stop: Int

    def __len__(self) -> int:
        return len(self.example)

    def take(self, keep: NDArray[np.bool_]) -> _Pieces:
        return _Pieces(self.example[keep], self.start[keep], self.stop[keep])


def _fit(source: Tokens, config: DataConfig, report: Report, label: str = "") -> _Pieces:
    """Applies `too_long`, counts what that costs, and leaves out pieces that would learn nothing."""
    start, stop, size = source.offsets[:-1], source.offsets[1:], config.tokens
    trained = source.count(start, stop)
    lengths = stop - start
    counts = SourceReport(
        label + source.name, source.shape, len(source), int(lengths.sum()), int(trained.sum()), int(lengths.max())
    )
    report.sources.append(counts)
    pieces = _Pieces(np.arange(len(source), dtype=np.int64), start, stop)
    long = lengths > size
    if source.shape != "text" and long.any():
        if config.too_long in ("drop", "error"):
            lost = int(trained[long].sum())
            where = [source.where(int(i)) for i in np.flatnonzero(long)[:3]]
            checks.too_long(counts.longest, size, int(long.sum()), lost, counts.trained, where, config.too_long)
            counts.dropped, counts.dropped_trained = int(long.sum()), lost
            pieces = pieces.take(~long)
        elif config.too_long == "truncate":
            counts.truncated = int(long.sum())
            pieces = _Pieces(pieces.example, start, np.minimum(stop, start + size))
        else:
            counts.split = int(long.sum())
            starts = [np.arange(a, b, size) for a, b in zip(start.tolist(), stop.tolist(), strict=True)]
            example = np.repeat(pieces.example, [len(s) for s in starts])
            begin = np.concatenate(starts).astype(np.int64)
            pieces = _Pieces(example, begin, np.minimum(begin + size, stop[example]))
    learned = source.count(pieces.start + 1, pieces.stop) > 0
    if not learned.all():
        report.notes.append(f"{source.name}: {int((~learned).sum()):,} pieces left out, since nothing in them would be learned")
    return pieces.take(learned)


def _hold_out(
    sources: list[Tokens], whole: list[_Pieces], share: float, seed: int, report: Report
) -> tuple[list[_Pieces], list[_Pieces]]:
    """Splits off a share of the examples of every source, by the hash of their content.

    So the split does not depend on the order of the lines, and examples that are equal stay on one side.
    """
    if not share:
        return whole, [part.take(np.zeros(len(part), dtype=np.bool_)) for part in whole]
    marks = [_marks(source, pieces, seed) for source, pieces in zip(sources, whole, strict=True)]
    wanted = [round(share * len(mark)) for mark in marks]
    if not any(wanted):
        largest = max(range(len(marks)), key=lambda i: len(marks[i]))
        wanted[largest] = 1
        if len(marks[largest]) < 2:
            message = "one example cannot be both learned and held out"
            raise DataError(message, hint="set `data.eval: 0`, or name held-out sources", code="data.empty")
    kept: list[_Pieces] = []
    away: list[_Pieces] = []
    for number, (pieces, mark, count) in enumerate(zip(whole, marks, wanted, strict=True)):
        ranked = sorted(mark, key=lambda e: (mark[e], e))
        chosen = ranked[:count]
        if count and mark[chosen[-1]] != mark[ranked[-1]]:
            chosen = [e for e in ranked if mark[e] <= mark[chosen[-1]]]
        out = np.isin(pieces.example, np.asarray(chosen, dtype=np.int64))
        kept.append(pieces.take(~out))
        away.append(pieces.take(out))
        report.sources[number].held_out = len(chosen)
    return kept, away


def _marks(source: Tokens, pieces: _Pieces, seed: int) -> dict[int, bytes]:
    """Example number -> hash of the seed and its tokens."""
    key = seed.to_bytes(8, "little")
    return {
        int(e): hashlib.blake2b(source.ids[source.offsets[e] : source.offsets[e + 1]].tobytes(), digest_size=8, key=key).digest()
        for e in np.unique(pieces.example)
    }


def _set(sources: tuple[Tokens, ...], weights: tuple[float, ...], parts: list[_Pieces], pad_id: int) -> TokenSet:
    source = np.repeat(np.arange(len(parts), dtype=np.int64), [len(p) for p in parts])
    example, start, stop = (np.concatenate([getattr(p, name) for p in parts]) for name in ("example", "start", "stop"))
    return TokenSet(sources, weights, source, example, start, stop, pad_id)
