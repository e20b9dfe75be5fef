"""`python-docs`: thousands of facts of this interpreter, the same every time, without running modules."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from halfbyte.data import python_docs


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return python_docs.build(tmp_path_factory.mktemp("docs"))


def test_what_it_holds(path: Path) -> None:
    rows = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    answers = {q["content"]: a["content"] for q, a in rows}
    assert len(rows) >= 3000 and len(answers) == len(rows)
    dumps = answers["What does `json.dumps` do?"]
    assert dumps.startswith("`json.dumps(obj, *, skipkeys=False,") and dumps.endswith("Serialize `obj` to a JSON formatted `str`.")
    assert answers["What does `math.sqrt` do?"] == "`math.sqrt(x, /)`: Return the square root of x."
    assert answers["What does `os.path.join` do?"].startswith("`os.path.join(a, *p)`: Join two or more pathname components")
    assert "What is `collections.Counter` in Python?" in answers and "What is the Python module `json` for?" in answers
    assert max(len(text) for text in answers.values()) < 1000


def test_the_file_is_made_once(path: Path) -> None:
    before = path.stat().st_mtime_ns
    assert python_docs.build(path.parent.parent) == path and path.stat().st_mtime_ns == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.cpu
def test_the_same_again_whatever_this_process_has_done(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "displayhook", lambda value: value)
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert python_docs.build(tmp_path).read_bytes() == path.read_bytes()
    assert not {"antigravity", "this", "tkinter"} & set(sys.modules)


@pytest.mark.parametrize(
    ("doc", "sentence"),
    [
        ("Return it.  Then more.", "Return it."),
        ("Return e.g. this one. And more", "Return e.g. this one."),
        ("f(x) -> int\n\nReturn\nthe ``x``", "Return the `x`"),
        ("f(x) -> int\nReturn the x.", "Return the x."),
        ("Deprecated.", ""),
        ("", ""),
    ],
)
def test_first_sentence(doc: str, sentence: str) -> None:
    assert python_docs.first_sentence(doc, "f") == sentence
