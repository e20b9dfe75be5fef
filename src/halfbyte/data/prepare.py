"""From the recipe's `data` section to token sets that are ready to train on: read, check, tokenise once, hold out, fit to rows.

Why one function: everything that can be wrong with data is found here, before a model is loaded, and told at once. Cost: a tenth of
a millisecond an example the first time, shared by all cores; a second or less for a million examples from the cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from halfbyte.data import checks, mixing, shapes, templates, workers
from halfbyte.data import tokens as store
from halfbyte.data.config import DataConfig, SourceConfig
from halfbyte.data.convert import Converter, Job
from halfbyte.data.encode import Encoder, Options
from halfbyte.data.engine import DISAGREES
from halfbyte.data.holdout import hold_out
from halfbyte.data.loader import Loader
from halfbyte.data.pieces import Pieces, fit
from halfbyte.data.problems import Problems
from halfbyte.data.report import Report
from halfbyte.data.sources import Record, Source, at_hand, open_source, parse
from halfbyte.data.stops import stops
from halfbyte.data.tokens import Tokens, TokenSet
from halfbyte.data.workers import Crew
from halfbyte.errors import DataError

Progress = Callable[[str, int, int | None], None]  # (what, done, of how many if known)


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
    basis = Basis(tokenizer, template, Options(config.system, config.loss_on))
    encoder = Encoder(*basis)
    report = Report(template.name, template.reason, config.tokens)
    tell = progress or (lambda what, done, total: None)
    cache = Path(cache_dir).expanduser()
    taken: set[str] = set()

    def read(sources: Iterable[SourceConfig]) -> list[Tokens]:
        return [_tokenise(s, basis, encoder, config, cache, tell, taken) for s in sources]

    def one(source: Tokens, part: Pieces) -> TokenSet:
        return _set((source,), [part], (1.0,), _pad_id(tokenizer), cache)

    sources = read(config.train)
    whole = [fit(s, config, report) for s in sources]
    others: list[Tokens] = []
    if isinstance(config.eval, list):
        # A source that is learned too is the same tokens under the same name, not a second source of that name.
        own = [next((t for c, t in zip(config.train, sources, strict=True) if c == s), None) for s in config.eval]
        others = [read([s])[0] if tokens is None else tokens for s, tokens in zip(config.eval, own, strict=True)]
        held = {s.name: one(s, fit(s, config, report, "held out: ")) for s in others}
        kept = whole
    else:
        kept, away = hold_out(sources, whole, config.eval, seed, report)
        held = {s.name: one(s, part) for s, part in zip(sources, away, strict=True) if len(part)}
    learned = [int(s.count(p.example, p.start, p.stop).sum()) for s, p in zip(sources, kept, strict=True)]
    if not sum(learned):
        raise DataError(
            "nothing is left to train on", hint="see the counts above; lower `data.eval`, raise `data.tokens`", code="data.empty"
        )
    visits = mixing.visits(config, [len(part.examples) for part in kept], learned)
    train = _set(tuple(sources), kept, visits, _pad_id(tokenizer), cache)
    loader = Loader(train, config.tokens, 1, seed)
    report.rows, report.efficiency = loader.rows(0), loader.efficiency(0)
    report.notes += mixing.told([s.name for s in sources], visits, learned)
    report.notes += dict.fromkeys(f"{s.name}: {note}" for s in (*sources, *others) for note in s.notes)
    ends = {i for s in sources for i in stops(s)} | ({tokenizer.eos_token_id} - {None})
    return Prepared(train, held, report, template, tuple(sorted(ends)), config)


def stored(config: DataConfig, tokenizer: Any, cache_dir: Path) -> bool:
    """Whether `prepare` would find every source in the cache. Nothing is tokenised or downloaded; content is read to be hashed
    where that was not done before. Raises `DataError` for what cannot be opened."""
    cache = Path(cache_dir).expanduser()
    template = templates.resolve(config.template, tokenizer, config.template_kwargs)
    basis = Basis(tokenizer, template, Options(config.system, config.loss_on))
    if not (cache / "tokens").is_dir() or not all(at_hand(s, cache) for s in config.sources):
        return False
    return all(_folder(open_source(s, cache), s, basis, cache).is_dir() for s in config.sources)


class Basis(NamedTuple):
    """What decides the tokens of every source alike."""

    tokenizer: Any
    template: templates.Template
    options: Options


def _pad_id(tokenizer: Any) -> int:
    """Fills what no example fills. Never learned and never attended to, so any id will do."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(i for i in known if i is not None))


def _tokenise(
    config: SourceConfig, basis: Basis, encoder: Encoder, data: DataConfig, cache: Path, tell: Progress, taken: set[str]
) -> Tokens:
    """One source from the cache, or read and tokenised into it; checked when it is written."""
    source = open_source(config, cache)
    name = _unique(source.name, taken)
    folder = _folder(source, config, basis, cache)
    tokens = store.load(folder, name)
    if tokens is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        crew = workers.crew(data.workers, source.size)
        try:
            _write(folder, source, name, config, crew, encoder, basis, tell)
        except DataError as error:
            if error.code != DISAGREES:
                raise
            told = "fastokens gives other tokens than the tokenizer, which did all the work"
            source = replace(source, notes=(*source.notes, told))
            _write(folder, source, name, config, crew._replace(quick=False), encoder, basis, tell)
        tokens = store.load(folder, name)
        assert tokens is not None
    passed = folder / "checked"
    if not passed.exists():
        checks.source(tokens, data.loss_on)
        checks.double_bos(tokens, basis.tokenizer)
        passed.touch()
    return tokens


def _folder(source: Source, config: SourceConfig, basis: Basis, cache: Path) -> Path:
    """Where the tokens of a source are kept."""
    key = store.key_of(
        {
            "source": source.digest, "shape": config.shape, "limit": config.limit, "template": basis.template.text,
            "tokenizer": _fingerprint(basis.tokenizer), "options": asdict(basis.options), "layout": asdict(shapes.layout(config)),
        }
    )  # fmt: skip
    return cache / "tokens" / key


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


def _write(
    folder: Path, source: Source, name: str, config: SourceConfig, crew: Crew, encoder: Encoder, basis: Basis, tell: Progress
) -> None:
    """Streams a source into a cache folder. Raises the collected mistakes, or `data.empty`, and leaves nothing behind."""
    problems = Problems()
    records = source.raw(problems)
    ahead = list(islice(records, 64))  # of which the first that can be parsed shows the shape
    first = next((record for raw in ahead if (record := parse(raw, Problems())) is not None), None)
    if first is None:
        for raw in chain(ahead, records):
            parse(raw, problems)
        problems.raise_any()
        raise DataError(f"`{config.path}` is empty", hint="it must hold at least one example", code="data.empty")
    job = Job(*basis, config.shape, shapes.layout(config), first, crew.quick)
    converter = Converter(job, None if crew.quick else encoder)
    writer = store.Writer(folder)
    whole = False
    try:
        count, end = 0, set[int]()
        for result in workers.convert(chain(ahead, records), job, converter, crew, config.limit):
            problems.merge(result.problems)
            end.update(result.end)
            if result.block is not None:
                count += len(result.block.lengths)
                # A set with mistakes is not kept: from the first one on, only they are looked for.
                if not problems.total:
                    writer.write(result.block)
            tell(name, count, config.limit)
        problems.raise_any()
        notes = [*source.notes, *_notes(problems, converter, first)]
        if not count:
            reasons = f" ({'; '.join(notes)})" if notes else ""
            hint = "every example needs an answer by the assistant, or text"
            raise DataError(f"`{config.path}` holds no usable example{reasons}", hint=hint, code="data.empty")
        writer.close(converter.reader.shape, sorted(end), notes)
        whole = True
    finally:
        if not whole:
            writer.discard()


def _notes(problems: Problems, converter: Converter, first: Record) -> list[str]:
    """What was left out or is odd, in words."""
    reader = converter.reader
    notes = [f"{n:,} examples left out: {why}" for why, n in sorted(problems.skipped.items())]
    notes += [f"{n:,} examples where {what}" for what, n in sorted(problems.noted.items())]
    if reader.ignored:
        notes.append(f"columns not read: {', '.join(reader.ignored)}")
    if reader.shape == "prompt_completion" and isinstance(first.data.get("prompt"), str):
        notes.append("prompt and completion are joined as they are, without the chat template")
    return notes


def _set(sources: tuple[Tokens, ...], parts: list[Pieces], visits: tuple[float, ...], pad_id: int, cache: Path) -> TokenSet:
    source = np.repeat(np.arange(len(parts), dtype=np.int64), [len(p) for p in parts])
    example, start, stop = (np.concatenate([getattr(p, name) for p in parts]) for name in ("example", "start", "stop"))
    return TokenSet(sources, visits, source, example, start, stop, pad_id, cache / "rows")
