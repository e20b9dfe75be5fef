"""Preference data as it stands in the file: pairs (`chosen`, `rejected`) and labels (`label`), looked at before anything learns.

Why here: a set whose pairs are equal, or whose better answer is always the longer one, trains without a complaint and teaches
nothing, or length. The thresholds are lenient: published sets have the chosen answer longer in 50 to 75 % of their pairs.
Cost: microseconds a record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from halfbyte.data.preferences import LABELS, is_label
from halfbyte.data.sources import Record

FEW = 20  # below, shares say nothing
BIAS, BALANCE = 0.9, 0.95


def is_preference(data: Mapping[str, Any]) -> bool:
    """Whether a record is a pair, or an answer with a label."""
    return {"chosen", "rejected"} <= set(data) or is_label(data.get("label"))


def text_of(value: object) -> str | None:
    """The answer in any spelling: text, one message, or the last of a list of messages."""
    if isinstance(value, list) and value:
        value = value[-1]
    if isinstance(value, Mapping):
        value = value.get("content", value.get("value"))
    return value if isinstance(value, str) else None


@dataclass
class Labels:
    """Counts over the records of one source."""

    records: int = 0
    same: list[str] = field(default_factory=list)
    longer: Counter[str] = field(default_factory=Counter)
    labels: Counter[bool] = field(default_factory=Counter)

    def add(self, record: Record) -> None:
        """Counts one record."""
        self.records += 1
        data = record.data
        if is_label(data.get("label")):
            self.labels[LABELS[str(data["label"]).strip().lower()]] += 1
        chosen, rejected = text_of(data.get("chosen")), text_of(data.get("rejected"))
        if chosen is None or rejected is None:
            return
        if chosen.strip() == rejected.strip():
            self.same.append(str(record.where))
        elif len(chosen) != len(rejected):
            self.longer["chosen" if len(chosen) > len(rejected) else "rejected"] += 1

    def shares(self) -> dict[str, tuple[int, str]]:
        """id -> (records it is about, in words), for shares that are out of balance."""
        found: dict[str, tuple[int, str]] = {}
        sides, marks = sum(self.longer.values()), sum(self.labels.values())
        if sides >= FEW:
            side, count = self.longer.most_common(1)[0]
            if count > BIAS * sides:
                found["data.length-bias"] = count, f"the {side} answer is the longer one in {count / sides:.0%} of the pairs"
        if marks >= FEW:
            mark, count = self.labels.most_common(1)[0]
            if count > BALANCE * marks:
                found["data.label-balance"] = count, f"{count / marks:.0%} of the labels are {str(mark).lower()}"
        return found
