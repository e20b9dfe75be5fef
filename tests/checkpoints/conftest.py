"""Every test here has a cache of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty HALFBYTE_CACHE."""
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


SHARED = os.environ.get("HALFBYTE_CACHE")


@pytest.fixture
def shared_cache() -> Path:
    """The cache that the tests were started with: the bundled model is downloaded once, not by every test."""
    return Path(SHARED or "~/.cache/halfbyte").expanduser()


@pytest.fixture
def child_env(cache: Path) -> dict[str, str]:
    """The environment of a child process that imports what this one does and has the same cache."""
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "HALFBYTE_CACHE": str(cache)}
