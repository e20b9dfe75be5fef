"""Module names: what a pattern matches, and the nearest names for an error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase


def matches(path: str, pattern: str) -> bool:
    """Whether `pattern` (`*` matches anything) names the module at `path` or one that contains it.

    A pattern may start at any dot: `q_proj` matches `model.layers.0.self_attn.q_proj`.
    """
    parts = path.split(".")
    return any(
        fnmatchcase(".".join(parts[:end]), pattern) or fnmatchcase(".".join(parts[:end]), f"*.{pattern}")
        for end in range(1, len(parts) + 1)
    )


def nearest(word: str, paths: Iterable[str], count: int = 3) -> list[str]:
    """The module names nearest to `word`: last parts first, else whole paths; every last part when nothing is near."""
    paths = list(paths)
    leaves = sorted({path.rpartition(".")[2] for path in paths} - {""})
    leaves = [leaf for leaf in leaves if not leaf.isdigit()]
    near = difflib.get_close_matches(word.rpartition(".")[2].strip("*"), leaves, count, cutoff=0.5)
    near += [p for p in difflib.get_close_matches(word, paths, count, cutoff=0.7) if p.rpartition(".")[2] not in near]
    return near[:count] or leaves[:12]
