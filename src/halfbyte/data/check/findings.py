"""Every check of the data by its id: what it means, what to do, and from which share of the examples on it stops a run.

Why a table: the report, the reference page, `ignore` and `stop` in the recipe, and the tests all speak of the same ids. Why shares:
a single copy among a million examples is worth a word and no more, and an evaluation that was learned by heart is worth a stop.
Cost: none.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from halfbyte.errors import DataError, RecipeError
from halfbyte.mistakes import nearest

SHOWN = 3  # places named in words; `--json` has the first KEPT
KEPT = 1000


class Check(NamedTuple):
    """What a check means, what to do about it, and the share of examples above which it is an error (None: never)."""

    sentence: str
    fix: str
    stops: float | None = None


CHECKS: dict[str, Check] = {
    "data.not-found": Check("the source does not exist", "check the path; it is relative to where the command runs", 0),
    "data.gated": Check("the data set asks for an agreement or a login", "accept its terms on the Hub and log in", 0),
    "data.unreachable": Check("the Hub cannot be reached", "try again, or download the set once and name its files", 0),
    "data.refused": Check("the data set runs code of its own", "name its data files", 0),
    "data.bad-file": Check("a line cannot be read", "mend it, or repair it with `--fix`; `--bad` writes such lines to a file", 0),
    "data.bad-example": Check("a field is missing or of another kind than expected", "mend it, or name the shape", 0),
    "data.shape": Check("the columns fit no shape that is built", "rename them, or name the shape", 0),
    "data.tools": Check("a tool call or a tool's schema that cannot be read", "mend it, or leave the example out", 0),
    "data.empty": Check("there is no usable example", "every example needs an answer by the assistant, or text", 0),
    "data.template": Check("the chat template refuses, drops or changes messages",
                           "choose one that writes them with `data.template`, or leave them out", 0),
    "data.mask": Check("an answer cannot be told from what surrounds it",
                       "`data.loss_on: each` where earlier thoughts are stripped; else another `data.template`, such as chatml", 0),
    "data.no-eot": Check("answers would be learned without their end: the model would never stop",
                         "write the end-of-turn token after every answer in the template", 0),
    "data.pad-eos": Check("the end-of-turn token is also the pad token and is masked out: the model would never stop",
                          "mask padding by position and not by its id, or give the tokenizer a pad token of its own", 0),
    "data.double-bos": Check("examples begin with two bos tokens", "write the bos token in one place: the template", 0),
    "data.new-special-tokens": Check("tokens whose embedding rows do not exist, or were never trained and stay frozen",
                                     "use the tokenizer of this model, or a template without them", 0),
    "data.too-long": Check("examples longer than a row; stops where dropping them would lose more than 5 % of what is learned",
                           "raise `data.tokens`, or choose another `data.too_long`"),
    "data.zero-trained": Check("examples of which no token would be learned", "look at them with `data preview`", 0.05),
    "data.no-answer": Check("examples without an answer, or with an empty one, are left out", "give them an answer", 0.5),
    "data.empty-question": Check("a message by the user or the system is empty", "fill it, or leave the example out"),
    "data.role-order": Check("turns do not alternate between user and assistant, ending with an answer",
                             "merge turns of one speaker, and put the system message first"),
    "data.special-in-text": Check("a message spells a special token, which is read as that token",
                                  "take it out: `--fix` does so at the ends of messages"),
    "data.foreign-special": Check("a message holds the markup of another model's chat template, which here is plain text",
                                  "give the messages without any template; it is added for you"),
    "data.rendered": Check("one message holds a whole dialogue with its headings", "split it into messages with roles"),
    "data.placeholder": Check("a blank of a form is not filled in, such as {{name}}", "fill it in before training"),
    "data.damaged-text": Check("text was decoded with the wrong encoding (mojibake)", "`--fix` repairs what is certain"),
    "data.lost-characters": Check("characters were lost in an earlier conversion (U+FFFD stands for them)",
                                  "go back to the original text: they cannot be restored"),
    "data.control": Check("control characters that no text needs", "`--fix` takes them out"),
    "data.escaped": Check(r"line breaks are written as the two characters \n", "decode the text once more: it was escaped twice"),
    "data.entities": Check("HTML entities stand in place of characters, such as &amp;quot;", "unescape the text"),
    "data.non-text": Check("long stretches that are no text: base64, hexadecimal, or symbols only", "leave them out"),
    "data.repetition": Check("text that repeats itself over and over", "leave these examples out"),
    "data.length": Check("a message is absurdly long for this set", "look at it: a separator is missing, or a file is in a field"),
    "data.echo": Check("the answer is the question once more", "give it an answer"),
    "data.same-answer": Check("many questions have the same long answer", "leave most of these examples out"),
    "data.duplicates": Check("exact copies of an earlier example", "`--fix` leaves them out; copies on purpose are a `weight`"),
    "data.near-duplicates": Check("nearly the same as an earlier example", "keep one of each"),
    "data.overlap": Check("held-out examples that are also learned: the evaluation would praise memory",
                          "take them out of one of the two sets", 0.05),
    "data.near-overlap": Check("held-out examples nearly the same as learned ones", "hold out whole groups of such examples"),
    "data.private": Check("personal data: e-mail addresses, phone, card or account numbers", "mask or remove them"),
    "data.secret": Check("keys, tokens or passwords", "remove them, and have them revoked"),
    "data.same-pair": Check("the chosen and the rejected answer are the same", "leave these pairs out", 0.05),
    "data.length-bias": Check("one side of the pairs is nearly always the longer one: length is what would be learned",
                              "balance the pairs by length"),
    "data.label-balance": Check("nearly all labels are the same", "add examples of the other label, or weight the labels"),
}  # fmt: skip
LATER = ("data.new-special-tokens",)  # needs the base's embedding: looked at when the base is loaded


@dataclass(frozen=True)
class Finding:
    """What one check found in one source."""

    id: str
    source: str
    count: int
    total: int
    where: tuple[str, ...] = ()
    detail: str = ""
    fix: str = ""
    error: bool = False

    def lines(self) -> list[str]:
        """As a person reads it: how many, what, where, and what to do."""
        # Without a total it is said of the whole source, and a count would read like a line number.
        many = f"{self.count:,} of {self.total:,} ({self.count / self.total:.1%}): " if self.total else ""
        what = self.detail or CHECKS[self.id].sentence
        places = ", ".join(map(brief, self.where[:SHOWN])) + (f", and {self.count - SHOWN:,} more" if self.count > SHOWN else "")
        head = f"{'error' if self.error else 'warning'} [{self.id}] {self.source}: {many}{what}"
        return [head, *([f"  at {places}"] if places else []), f"  fix: {self.fix or CHECKS[self.id].fix}"]


def brief(where: str) -> str:
    """A place as a person reads it: relative to the working directory, or without the folder where it lies elsewhere."""
    return re.sub(r"(?<![\w.~-])/(?:[^\s:,=]+/)+", "", where.replace(f"{Path.cwd()}/", ""))


@dataclass
class Findings:
    """What all checks found; errors come first."""

    ignore: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    found: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)  # id -> why

    def __post_init__(self) -> None:
        for key, names in (("ignore", self.ignore), ("stop", self.stop)):
            for name in names:
                if name not in CHECKS:
                    guess = nearest(name, CHECKS)
                    hint = f"did you mean `{guess}`?" if guess else "the ids are in docs/reference/checks.md"
                    raise RecipeError(f"`data.check.{key}`: no check is called `{name}`", hint=hint, code="recipe.invalid")

    def add(
        self, name: str, source: str, count: int, total: int, where: tuple[str, ...] = (), *,
        detail: str = "", fix: str = "", error: bool = False,
    ) -> None:  # fmt: skip
        """Notes what a check found, unless it found nothing or is ignored. error: it stops a run, whatever is wished."""
        if not count or (name in self.ignore and not error):
            return
        stops = 0.0 if name in self.stop else CHECKS[name].stops
        error = error or (stops is not None and (not total or count / total > stops))
        self.found.append(Finding(name, source, count, total, where[:KEPT], detail, fix, error))

    @property
    def errors(self) -> list[Finding]:
        """What stops a run."""
        return [f for f in self.found if f.error]

    @property
    def warnings(self) -> list[Finding]:
        """What is told and counted."""
        return [f for f in self.found if not f.error]

    def passed(self) -> list[str]:
        """Checks that were made and found nothing."""
        out = {f.id for f in self.found} | set(self.not_run) | set(self.ignore)
        return [name for name in CHECKS if name not in out]

    def ids(self) -> set[str]:
        """The ids of what was found."""
        return {f.id for f in self.found}

    def lines(self) -> list[str]:
        """The report as a person reads it."""
        lines = [line for f in (*self.errors, *self.warnings) for line in f.lines()]
        reasons: dict[str, list[str]] = {}
        for name, why in self.not_run.items():
            reasons.setdefault(why, []).append(name)
        lines += [f"not looked at, {why}: {', '.join(names)}" for why, names in reasons.items()]
        lines += [f"ignored: {', '.join(self.ignore)}"] if self.ignore else []
        return [*lines, *self.notes, self.summary()]

    def summary(self) -> str:
        """One line."""
        errors, warnings = len(self.errors), len(self.warnings)
        said = [f"{len(self.passed())} checks passed"]
        said += [f"{n} {word}{'s' if n > 1 else ''}" for n, word in ((errors, "error"), (warnings, "warning")) if n]
        return ", ".join(said)

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        found = [asdict(f) | {"sentence": CHECKS[f.id].sentence, "fix": f.fix or CHECKS[f.id].fix} for f in self.found]
        return {"findings": found, "passed": self.passed(), "not_run": self.not_run, "notes": self.notes}

    def memory(self) -> dict[str, Any]:
        """What a later run need not look for again."""
        return {"found": [asdict(f) for f in self.found], "notes": self.notes, "not_run": self.not_run}

    def remember(self, memory: dict[str, Any]) -> None:
        """Takes over what an earlier run found."""
        self.found = [Finding(**f | {"where": tuple(f["where"])}) for f in memory["found"]]
        self.notes, self.not_run = memory["notes"], memory["not_run"]

    def raise_errors(self) -> None:
        """Raises one `DataError` with all errors, if there are any."""
        if not self.errors:
            return
        first = self.errors[0]
        lines = [line for f in self.errors for line in f.lines()[:-1]]
        hint = f"{first.fix or CHECKS[first.id].fix}; `data.check.ignore: [{first.id}]` goes on all the same"
        raise DataError("\n".join(lines), hint=hint, code=first.id)
