"""The one base class of every recipe section: frozen, and closed to unknown keys.

Why its own file: each folder keeps its torch-free `config.py`, and `halfbyte/config.py` composes them, so the base has to
stand below both. Cost: pydantic is imported when a recipe is, never by `halfbyte --help`.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of a recipe. Every field carries its default and one sentence; nothing else in the project repeats either.

    Strict: `rank: "8"` and `rank: true` are mistakes, not the number 8 or 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, validate_default=True)
