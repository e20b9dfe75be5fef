"""All checks of a recipe's data: for `halfbyte data check`, which tells all it finds, and before every training, which stops.

Order: the text of every source, then tokens and masks, then copies within and across the sets. What costs seconds is kept in the
cache under the content it speaks of. Cost: a second start reads a few small files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.cachefile import replacing
from halfbyte.data import shapes, templates
from halfbyte.data import tokens as store
from halfbyte.data.check import duplicates, learned
from halfbyte.data.check.findings import CHECKS, KEPT, LATER, Findings
from halfbyte.data.check.scan import LISTED, Scan, scan
from halfbyte.data.check.texts import Tests, special_tokens
from halfbyte.data.checks import DROP_LIMIT
from halfbyte.data.config import DataConfig, SourceConfig
from halfbyte.data.encode import Encoder, Options
from halfbyte.data.prepare import Prepared, Progress, prepare
from halfbyte.data.problems import Problem, Problems
from halfbyte.data.sources import open_source
from halfbyte.data.tokens import Tokens, TokenSet
from halfbyte.errors import DataError

AT_START = 50_000  # examples a source whose text is looked at before a training; `data check` looks at all
NEAR_AT_START = 300_000  # up to so many examples near copies are looked for as well
VERSION = 1
PRIVATE = ("data.private", "data.secret")
TOKEN_LEVEL = ("data.zero-trained", "data.pad-eos", "data.no-eot", "data.same-answer", "data.too-long", "data.double-bos")
COPIES = ("data.duplicates", "data.near-duplicates", "data.overlap", "data.near-overlap")
Int = NDArray[np.int64]


@dataclass(frozen=True)
class Checked:
    """What `data check` found. scans: one a source; problems: every line that is wrong; prepared: None where it cannot be."""

    findings: Findings
    scans: list[Scan]
    problems: list[Problem]
    prepared: Prepared | None

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        wrong = [
            {"where": str(p.where), "id": p.code, "field": p.field, "expected": p.expected, "got": p.got} for p in self.problems
        ]
        report = None if self.prepared is None else self.prepared.report.lines()
        return {**self.findings.as_dict(), "wrong_lines": wrong, "report": report}


def check(
    config: DataConfig, tokenizer: Any, seed: int, cache_dir: Path, *, private: bool = False, progress: Progress | None = None
) -> Checked:
    """Everything that can be said about the data, whatever is wrong with it. Raises nothing that a check has a name for."""
    cache = Path(cache_dir).expanduser()
    private = private or config.check.private
    findings = _findings(config, private)
    scans = _scans(config, tokenizer, cache, private, 0, progress)
    for found in scans:
        _tell(found, findings)
    problems = [p for found in scans for p in found.problems]
    prepared: Prepared | None = None
    try:
        prepared = prepare(config, tokenizer, seed, cache, progress)
    except DataError as error:
        if error.code not in {f.id for f in findings.errors}:
            more = _encoding(config, tokenizer, cache)
            problems += more
            _tell_problems("data", more, sum(s.examples for s in scans), findings)
        whole = error.code == "data.too-long" and _with_long(config, tokenizer, seed, cache, findings, error)
        if error.code not in {f.id for f in findings.errors}:
            findings.add(error.code, "data", 1, 0, detail=error.message, fix=error.hint, error=True)
        if not whole:
            why = "since the data cannot be prepared yet"
            findings.not_run.update({name: why for name in (*TOKEN_LEVEL, *COPIES) if name not in findings.ids()})
    else:
        _prepared(prepared, tokenizer, cache, findings, config.check.near)
    return Checked(findings, scans, problems, prepared)


def _with_long(config: DataConfig, tokenizer: Any, seed: int, cache: Path, findings: Findings, error: DataError) -> bool:
    """All other checks where only the length of examples stops a run: they are made as if these were cut, which keeps every one.
    Whether that could be done."""
    try:
        cut = prepare(config.model_copy(update={"too_long": "truncate_right"}), tokenizer, seed, cache)
    except DataError:
        return False
    before = len(findings.found)
    _prepared(replace(cut, config=config), tokenizer, cache, findings, config.check.near)
    lost = "" if config.too_long == "error" else f"; dropping them would lose more than {DROP_LIMIT:.0%} of what is learned"
    for number, f in enumerate(findings.found[before:], before):
        if f.id == error.code:
            findings.found[number] = replace(f, detail=f.detail + lost, error=True, fix=error.hint)
    return True


def before_training(prepared: Prepared, tokenizer: Any, cache_dir: Path, progress: Progress | None = None) -> Findings:
    """The same checks on data that is prepared, or what they found the last time. Very large sets are looked at in part, and that
    is noted. Raises `DataError`."""
    config, cache = prepared.config, Path(cache_dir).expanduser()
    findings = _findings(config, config.check.private)
    wanted = {
        "checks": VERSION,
        "data": prepared.digest,
        "of": config.model_dump(mode="json"),
        "special": special_tokens(tokenizer),
    }
    file = cache / "checks" / f"{store.key_of(wanted)}.json"
    if file.exists():
        findings.remember(json.loads(file.read_text(encoding="utf-8")))
    else:
        _look(prepared, tokenizer, cache, findings, progress)
        with replacing(file) as stream:
            stream.write(json.dumps(findings.memory()).encode())
    findings.raise_errors()
    return findings


def _look(prepared: Prepared, tokenizer: Any, cache: Path, findings: Findings, progress: Progress | None) -> None:
    config = prepared.config
    for found in _scans(config, tokenizer, cache, config.check.private, AT_START, progress):
        _tell(found, findings)
        if found.looked < found.examples:
            findings.notes.append(
                f"checks: {found.name}: the text of {found.looked:,} of {found.examples:,} examples; `data check` reads all"
            )
    near = config.check.near
    if near and len(prepared.train) > NEAR_AT_START:
        near = 0.0
        findings.notes.append(
            f"checks: no near copies among {len(prepared.train):,} examples; `halfbyte data check` looks for them"
        )
    _prepared(prepared, tokenizer, cache, findings, near)


def _findings(config: DataConfig, private: bool) -> Findings:
    findings = Findings(tuple(config.check.ignore), tuple(config.check.stop))
    findings.not_run.update(dict.fromkeys(LATER, "before the model is loaded"))
    if not private:
        findings.not_run.update(dict.fromkeys(PRIVATE, "since nobody asked (`--private`)"))
    return findings


def _scans(config: DataConfig, tokenizer: Any, cache: Path, private: bool, most: int, tell: Progress | None) -> list[Scan]:
    specials = special_tokens(tokenizer)
    tests = Tests(specials, private)
    options = {"special": specials, "private": private}
    found: list[Scan] = []
    for source in config.sources:
        found.append(scan(source, cache, tests, options, most))
        if tell is not None:
            tell(f"checks: {found[-1].name}", found[-1].examples, found[-1].examples)
    return found


def _tell(found: Scan, findings: Findings) -> None:
    """What a scan found, as findings."""
    unread = sum(p.code == "data.bad-file" for p in found.problems)
    _tell_problems(found.name, found.problems, found.examples + unread, findings)
    if found.error is not None:
        code, message, hint = found.error
        findings.add(code if code in CHECKS else "data.bad-file", found.name, 1, 0, detail=message, fix=hint, error=True)
    for name, count in found.counts.items():
        places = tuple(found.where.get(name, ()))
        findings.add(name, found.name, count, max(found.looked, count), places, detail=found.details.get(name, ""))


def _tell_problems(source: str, problems: list[Problem], total: int, findings: Findings) -> None:
    codes = dict.fromkeys(p.code for p in problems)
    for code in codes:
        mine = [p for p in problems if p.code == code]
        findings.add(code, source, len(mine), total, tuple(str(p) for p in mine), fix=mine[0].hint)


def _encoding(config: DataConfig, tokenizer: Any, cache: Path) -> list[Problem]:
    """Every example that the template or the mask refuses, in all sources."""
    found: list[Problem] = []
    try:
        template = templates.resolve(config.template, tokenizer, config.template_kwargs)
        encoder = Encoder(tokenizer, template, Options(config.system, config.loss_on))
        for source in config.sources:
            problems = Problems(keep=LISTED)
            for _ in encoder.encode(examples(source, cache, problems), problems):
                pass
            found += problems.shown
    except DataError:
        return found  # the whole template or source is refused: `prepare` said so
    return found


def examples(config: SourceConfig, cache: Path, problems: Problems) -> Any:
    """The examples of a source as they are read. Raises `DataError` as `open_source` and `shapes.reader` do."""
    read: Callable[..., Any] | None = None
    for number, record in enumerate(open_source(config, cache).read(problems)):
        if number == config.limit:
            return
        read = read or shapes.reader(config.shape, record, shapes.layout(config)).read
        if (example := read(record, problems)) is not None:
            yield example


def _prepared(prepared: Prepared, tokenizer: Any, cache: Path, findings: Findings, near: float) -> None:
    """Checks of tokens and of copies, on the training set and what is held out."""
    sets = (prepared.train, *prepared.eval.values())
    sources = list({id(s): s for part in sets for s in part.sources}.values())
    for source in sources:
        learned.check(source, tokenizer, prepared.config, findings)
    if prepared.config.loss_on == "each":
        near = 0.0  # the examples of one dialogue are beginnings of one another
    if not near:
        findings.not_run.update(
            dict.fromkeys(("data.near-duplicates", "data.near-overlap"), "since `near` is 0, the set large, or `loss_on` each")
        )
    copies = find_copies(sources, near, cache)
    where = _where(sources)
    bases = dict(zip(map(id, sources), np.cumsum([0, *(len(s) for s in sources)]).tolist(), strict=False))
    size = sum(len(s) for s in sources)
    train, held = np.zeros(size, np.bool_), np.zeros(size, np.bool_)
    for part, mask in ((prepared.train, train), *((part, held) for part in prepared.eval.values())):
        mask[_numbers(part, bases)] = True
    _copied(copies, train, held, where, findings)


def find_copies(sources: list[Tokens], near: float, cache: Path) -> duplicates.Copies:
    """`duplicates.find`, remembered under the content of the sources."""
    file = cache / "checks" / f"{store.key_of({'copies': VERSION, 'sources': [s.key for s in sources], 'near': near})}.npy"
    if file.exists():
        both = np.load(file)
        return duplicates.Copies(both[0], both[1])
    found = duplicates.find(sources, near)
    with replacing(file) as stream:
        np.save(stream, np.stack([found.exact, found.near]))
    return found


def _numbers(part: TokenSet, bases: dict[int, int]) -> Int:
    """The numbers, over all sources, of a set's examples."""
    base = np.asarray([bases[id(s)] for s in part.sources], dtype=np.int64)
    return np.asarray(np.unique(base[part.source] + part.example), dtype=np.int64)


def _where(sources: list[Tokens]) -> Callable[[int], str]:
    bases = np.cumsum([0, *(len(s) for s in sources)])

    def where(example: int) -> str:
        number = int(np.searchsorted(bases, example, side="right")) - 1
        return sources[number].where(example - int(bases[number]))

    return where


def _firsts(group: Int, members: NDArray[np.bool_]) -> Int:
    """For every group number, the first member of it; -1 where it has none. int64 [E]."""
    first = np.full(len(group), -1, dtype=np.int64)
    found = np.flatnonzero(members)[::-1]
    first[group[found]] = found
    return first


def _copied(
    copies: duplicates.Copies, train: NDArray[np.bool_], held: NDArray[np.bool_], where: Callable[[int], str], findings: Findings
) -> None:
    """Examples with an exact or else a near copy in the training set: before them in it, or held out from it."""
    numbers = np.arange(len(train))
    exact, near = (_firsts(group, train)[group] for group in (copies.exact, copies.near))
    for name, members, ids, same, close in (
        ("train", train, ("data.duplicates", "data.near-duplicates"), exact != numbers, near != numbers),
        ("held out", held, ("data.overlap", "data.near-overlap"), exact >= 0, near >= 0),
    ):
        for code, copied, of in ((ids[0], members & same, exact), (ids[1], members & close & ~same, near)):
            found = np.flatnonzero(copied)
            findings.add(code, name, len(found), int(members.sum()), _pairs(found, of, where))


def _pairs(found: Int, of: Int, where: Callable[[int], str]) -> tuple[str, ...]:
    return tuple(f"{where(int(i))} = {where(int(of[i]))}" for i in found[:KEPT])
