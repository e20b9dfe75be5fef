"""Readers under fire: whatever bytes, records and turns arrive, either examples come out or an error of ours.

`HALFBYTE_FUZZ=100000 pytest tests/data/test_fuzz.py` tries so many inputs of each kind; the usual number is small.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datafiles import WRITERS
from halfbyte.data import files, shapes, templates
from halfbyte.data.config import SourceConfig
from halfbyte.data.convert import Converter, Job
from halfbyte.data.encode import Options
from halfbyte.data.problems import Problems, Where
from halfbyte.data.sources import Raw, Record, open_source
from halfbyte.errors import DataError

COUNT = int(os.environ.get("HALFBYTE_FUZZ", "25"))
fuzz = settings(
    max_examples=COUNT, deadline=None, derandomize=COUNT < 1000, suppress_health_check=list(HealthCheck), print_blob=True
)
NAMES = [f"a{kind}{packed}" for kind in files.SUFFIXES for packed in ("", *files.COMPRESSED)]
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("9" * 5000)
VALUES = st.recursive(PLAIN, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3), max_leaves=6)
KEYS = sorted(set().union(*shapes.COLUMNS.values(), {"label", "messages", "role", "from", "weight"}))
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "gpt", "human", "function_call", "observation", "", "robot"])
CALL = st.dictionaries(st.sampled_from(["name", "arguments", "function", "id"]), VALUES, max_size=3)
TURN = st.dictionaries(
    st.sampled_from(["role", "content", "from", "value", "weight", "train", "tool_calls", "reasoning_content", "text"]),
    ROLES | VALUES | st.lists(CALL, max_size=2),
    max_size=4,
)
TURNS = st.lists(
    TURN | st.fixed_dictionaries({"role": ROLES, "content": st.text(max_size=12)}), max_size=4
)  # fmt: skip
RECORDS = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), VALUES | TURNS | TURN | st.text(max_size=12), max_size=5)


def outcome(work: Callable[[], Any]) -> Any:
    """What comes out of `work`, or the error of ours that it ends in."""
    try:
        return work()
    except DataError as error:
        assert error.message and error.code.startswith("data.")
        return error


def read(name: str, content: bytes) -> Any:
    def work() -> list[Record]:
        problems = Problems()
        found = list(open_source(SourceConfig(path=str(path)), Path(folder) / "cache").read(problems))
        problems.raise_any()
        return found

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        return outcome(work)


@fuzz
@given(
    st.sampled_from(NAMES),
    st.binary(max_size=200) | st.text(max_size=60).map(str.encode) | VALUES.map(lambda v: json.dumps(v).encode()),
)
def test_any_bytes(name: str, content: bytes) -> None:
    found = read(name, content)
    assert isinstance(found, DataError) or all(isinstance(r.data, dict) and r.where.line >= 1 for r in found)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("valid")
    for name, write in WRITERS.items():
        write(folder / name)
    return {name: (folder / name).read_bytes() for name in WRITERS}


@fuzz
@given(st.data())
def test_damaged_files(valid: dict[str, bytes], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(valid)))
    content = bytearray(valid[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        match data.draw(st.sampled_from(["flip", "cut", "add", "repeat"])):
            case "flip":
                content[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
            case "cut":
                del content[at : at + data.draw(st.integers(1, 40))]
            case "add":
                content[at:at] = data.draw(st.binary(max_size=8))
            case _:
                content[at:at] = content[at : at + 20]
    read(name, bytes(content))


@fuzz
@given(RECORDS, st.sampled_from(["auto", *shapes.COLUMNS]), st.sampled_from(["all", "chosen"]), st.sampled_from(["line", "row"]))
def test_any_record(tokenizer: Any, data: dict[str, Any], shape: str, learn: str, unit: str) -> None:
    def work() -> Any:
        record = Record(Where("a", 7, unit), data)
        layout = shapes.layout(SourceConfig(path="a", learn=learn, columns={"weight": "weight"} if "weight" in data else {}))  # type: ignore[arg-type]
        template = templates.resolve("auto", tokenizer)
        job = Job(tokenizer, template, Options(None, "assistant"), shape, layout, record)
        result = Converter(job)([Raw(*record)])
        result.problems.raise_any()
        return result

    found = outcome(work)
    if isinstance(found, DataError) or found.block is None:
        return
    block = found.block
    assert len(block.ids) == len(block.trained) == block.lengths.sum() and block.trained.any()
    assert block.weights is None or (block.weights[block.trained] > 0).all()


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`bench/fuzz.py`, whose targets meet more inputs there than here."""
    spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).parents[2] / "bench/fuzz.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SCRATCH", tmp_path / "scratch")
    (tmp_path / "scratch").mkdir()
    (tmp_path / "found").mkdir()
    return module


def test_sound_and_halved_inputs_of_the_coverage_guided_targets(script: ModuleType, tmp_path: Path) -> None:
    tried = 0
    for target in set(script.TARGETS) - {"records", "template", "gguf"}:  # these need a tokenizer
        work = script.guarded(target, tmp_path / "found")
        for seed in script.seeds(target):
            work(seed)
            work(seed[: len(seed) // 2])
            tried += 1
    assert tried >= len(script.TARGETS) - 3 and not list((tmp_path / "found").iterdir())


def test_another_error_is_kept_once_and_fuzzing_goes_on(script: ModuleType, tmp_path: Path) -> None:
    script.TARGETS["json"] = lambda content: {}[content]
    work = script.guarded("json", tmp_path / "found")
    work(b"a")
    work(b"b")
    assert {p.name: p.read_bytes()[:1] for p in (tmp_path / "found").iterdir() if not p.suffix} == {"KeyError-elsewhere": b"a"}
