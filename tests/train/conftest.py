"""What runs from a recipe share: a tiny model and chats on disk, and a cache beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import chats, save_tiny, write_jsonl


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model` and `chats.jsonl`."""
    root = tmp_path_factory.mktemp("files")
    save_tiny(root / "model")
    write_jsonl(root / "chats.jsonl", chats(80))
    return root


@pytest.fixture
def cache(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the files."""
    monkeypatch.setenv("HALFBYTE_CACHE", str(files / "cache"))
