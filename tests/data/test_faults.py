"""The table of faults: mistakes planted one at a time in real data, and the id under which each is told (`planted.py`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from data.planted import BASE, FAULTS, Fault, Records, content, longest, near
from halfbyte.data.check import learned
from halfbyte.data.check.findings import CHECKS, Findings
from halfbyte.data.check.run import Checked, check
from halfbyte.data.config import DataConfig
from halfbyte.data.prepare import prepare
from halfbyte.errors import DataError

BESIDE = {"data.no-answer", "data.control", "data.shape"}  # an answerless set is empty too, wrongly decoded bytes are controls


@pytest.fixture(scope="module")
def base(dialogues: Records) -> Records:
    return dialogues[:BASE]


@pytest.fixture
def look(base: Records, tokenizer: Any, tmp_path: Path) -> Callable[..., Checked]:
    """Checks the base after a fault was planted in it."""

    def run(plant: Callable[[Records], Any], file: str = "data.jsonl", private: bool = True, **options: Any) -> Checked:
        path = tmp_path / file
        path.write_bytes(content(Fault("", "", plant), base))
        if "{%" in options.get("template", ""):
            (tmp_path / "chat.jinja").write_text(options["template"])
            options["template"] = str(tmp_path / "chat.jinja")
        config = DataConfig(**{"train": [str(path)], "tokens": 2048, "eval": 0, **options})
        return check(config, tokenizer, 0, tmp_path / "cache", private=private)

    return run


def test_nothing_is_found_in_the_base(look: Callable[..., Checked]) -> None:
    found = look(lambda records: None)
    assert found.findings.found == [] and found.prepared is not None and len(found.prepared.train) == BASE


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_planted(fault: Fault, look: Callable[..., Checked]) -> None:
    found = look(fault.plant, fault.file, **fault.options).findings
    hits = [f for f in found.found if f.id in fault.id.split("|")]
    assert hits, f"not found; but {found.ids()}"
    assert any(f.error for f in hits) == fault.error
    assert found.ids() - set(fault.id.split("|")) <= BESIDE, "a fault is told once, by its name"
    assert all(f.lines()[-1].startswith("  fix: ") and len(f.lines()[-1]) > 12 for f in hits)
    assert fault.error or not found.errors or fault.id.startswith(("data.length-bias", "data.label-balance"))


def test_there_are_enough() -> None:
    assert len(FAULTS) + len(MASKS) + 3 >= 60 and len({f.name for f in FAULTS}) == len(FAULTS)
    assert {i for f in FAULTS for i in f.id.split("|")} <= set(CHECKS)


def _blind(tokens: Any) -> Any:
    """Nothing of five examples is learned."""
    trained = np.array(tokens.trained)
    trained[: tokens.offsets[5]] = False
    return replace(tokens, trained=trained)


def _endless(tokens: Any) -> Any:
    """What a mask that stops before the end of turn would learn."""
    trained = np.array(tokens.trained)
    trained[np.isin(tokens.ids, tokens.end)] = False
    return replace(tokens, trained=trained)


MASKS = [
    ("examples without a learned token", "data.zero-trained", _blind, "<pad>"),
    ("the mask stops before the end of turn", "data.no-eot", _endless, "<pad>"),
    ("pad = end of turn, masked by its id", "data.pad-eos", _endless, "<|im_end|>"),
]


@pytest.mark.parametrize(("name", "code", "plant", "pad"), MASKS, ids=lambda v: v if isinstance(v, str) else "")
def test_planted_in_the_mask(
    name: str, code: str, plant: Callable[[Any], Any], pad: str, look: Callable[..., Checked], make_tokenizer: Any
) -> None:
    prepared = look(lambda records: None).prepared
    assert prepared is not None
    tokens = prepared.train.sources[0]
    for source, expected in ((tokens, set()), (plant(tokens), {code})):
        findings = Findings()
        learned.check(source, make_tokenizer(pad_token=pad), prepared.config, findings)
        assert findings.ids() == expected and (not expected or findings.errors)


@pytest.mark.parametrize(
    ("change", "code"), [(lambda r: r, "data.overlap"), (near, "data.near-overlap")], ids=["copies", "near copies"]
)
def test_planted_between_the_sets(
    change: Callable[[Any], Any], code: str, base: Records, jsonl: Any, look: Callable[..., Checked]
) -> None:
    held = jsonl([*map(change, longest(base)), base[0]], "held.jsonl")
    found = look(lambda records: records.pop(0) and None, eval=[str(held)]).findings
    hit = next(f for f in found.found if f.id == code)
    assert (hit.count, hit.total) == (5, 6) and hit.error == (code == "data.overlap")
    assert all("held.jsonl" in where and "data.jsonl" in where for where in hit.where)


def test_tools_that_the_template_does_not_show(demo: Callable[[str], str], tokenizer: Any, tmp_path: Path) -> None:
    config = DataConfig(train=[{"path": demo("glaive_toolcall_en_demo.json"), "limit": 40}], tokens=4096, eval=0)
    found = check(config, tokenizer, 0, tmp_path, private=False)
    assert found.prepared is None and {f.id for f in found.findings.errors} <= {"data.template", "data.mask"}
    assert any("tool" in problem.expected for problem in found.problems) and len(found.problems) >= 20


def test_an_embedding_that_was_never_trained(base: Records, jsonl: Any, tokenizer: Any, tmp_path: Path) -> None:
    import torch

    from halfbyte.data import checks

    prepared = prepare(DataConfig(train=[str(jsonl(base))], tokens=4096), tokenizer, 0, tmp_path / "cache")
    weight = torch.randn(len(tokenizer), 8, generator=torch.Generator().manual_seed(0))
    checks.embeddings(prepared.train, tokenizer, weight, trainable=False)
    weight[tokenizer.convert_tokens_to_ids("<|im_end|>")] = 0
    with pytest.raises(DataError, match="never learned") as caught:
        checks.embeddings(prepared.train, tokenizer, weight, trainable=False)
    assert caught.value.code == "data.new-special-tokens"


BETWEEN = {
    "held-out examples that are learned": ("data.overlap", True),
    "held-out examples that are nearly learned": ("data.near-overlap", False),
    "tools that the template does not show": ("data.template", True),
    "an embedding row that was never trained": ("data.new-special-tokens", True),
}


def test_the_docs_have_this_table() -> None:
    page = (Path(__file__).parents[2] / "docs/concepts/faults.md").read_text(encoding="utf-8")
    rows = [(f.name, f.id.split("|")[0], f.error) for f in FAULTS]
    rows += [(name, code, True) for name, code, *_ in MASKS] + [(name, *found) for name, found in BETWEEN.items()]
    table = ["| planted | halfbyte | | it says |", "| --- | --- | --- | --- |"]
    rows = [(name.replace("|", r"\|"), *rest) for name, *rest in rows]
    table += [f"| {name} | `{code}` | {'stops' if error else 'told'} | {CHECKS[code].sentence} |" for name, code, error in rows]
    assert "\n".join(["<!-- data faults -->", *table, "<!-- /data faults -->"]) in page


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("faults_table", Path(__file__).parents[2] / "bench/faults_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_docs_have_what_other_trainers_do(table: ModuleType) -> None:
    rows = table.cells()
    assert list(rows) == [f.name for f in FAULTS] + [name for name, *_ in MASKS] + list(BETWEEN)
    assert all(set(row) == set(table.PEERS) for row in rows.values())
    page = (Path(__file__).parents[2] / "docs/concepts/faults.md").read_text(encoding="utf-8")
    assert "\n".join(["<!-- peers -->", table.text(), "<!-- /peers -->"]) in page


CLEAN: dict[str, Any] = {"peer": "trl", "fault": "nothing", "rows": 9, "given": 9, "learned": 90, "said": []}
CLEAN |= {"zero": 0, "cut": 0, "twice": 0, "unending": 0}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, "learns it"),
        ({"said": ["WARNING: one kind only"]}, "learns it, logged"),
        ({"rows": 8}, "drops it"),
        ({"cut": 1}, "cuts it"),
        ({"zero": 1}, "keeps it, learns nothing"),
        ({"error": ["KeyError: 'text'"]}, "stops (`KeyError`)"),
        ({"error": ["DatasetGenerationError: no", "ArrowInvalid: in row 11"]}, "stops, says what"),
        ({"fault": "pad = end of turn, masked by its id"}, "not affected"),
        ({"fault": "pad = end of turn, masked by its id", "unending": 3}, "learns it"),
        ({"fault": "messages as JSON text"}, "reads it as meant"),
        ({"fault": "messages as JSON text", "learned": 80}, "learns it"),
    ],
)
def test_a_cell_follows_from_what_came_out(change: dict[str, Any], told: str, table: ModuleType) -> None:
    said = table.cell(CLEAN | {"fault": "a loop"} | change, CLEAN)
    assert said == told and table.kind(said) in table.KINDS
