"""Sources of examples, as every tool describes them: a place, a shape, and columns that may bear other names.

One function turns the description into an entry of `data.train`; a name is written only where the shape would not read it by
itself, so that a recipe stays as short as its data is ordinary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from halfbyte.importers.draft import Draft

LISTS = ("messages", "conversations", "conversation")
TURNS = (("role", "content"), ("from", "value"))
ROLES = {"system": ("system", "developer"), "user": ("user", "human", "prompter"), "tool": ("tool", "function", "observation")}
ROLES["assistant"] = ("assistant", "gpt", "model", "bot", "chatgpt")
FILES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md")
LOADERS = ("json", "csv", "parquet", "arrow", "text")
"""Names of `datasets`' own loaders: the data is in the files that are named beside them."""


@dataclass
class Columns:
    """Names in the source's records: `of` ours -> theirs; role and content of a turn; roles theirs -> ours."""

    of: dict[str, str] = field(default_factory=dict)
    role: str = "role"
    content: str = "content"
    roles: dict[str, str] = field(default_factory=dict)

    def named(self, shape: str) -> dict[str, Any]:
        """What has to be written into the recipe for this shape."""
        found: dict[str, Any] = {}
        columns = {ours: theirs for ours, theirs in self.of.items() if ours != theirs and theirs}
        if shape in ("messages", "sharegpt"):
            if columns.get("messages") in LISTS:
                columns.pop("messages")
            if (self.role, self.content) not in TURNS:
                found["keys"] = {"role": self.role, "content": self.content}
            if roles := {theirs: ours for theirs, ours in self.roles.items() if theirs not in ROLES.get(ours, ())}:
                found["roles"] = roles
        if columns:
            found["columns"] = columns
        return found


def put_columns(draft: Draft, at: str, shape: str, columns: Columns, *keys: str) -> None:
    """Writes the names below `at` (`data.train.0`)."""
    for name, value in columns.named(shape).items():
        draft.put(f"{at}.{name}", value, *keys, why="names of its columns")


def list_turn_shape(columns: Columns) -> str:
    """messages, or sharegpt where turns are written `from` and `value`."""
    return "sharegpt" if (columns.role, columns.content) == ("from", "value") else "messages"
