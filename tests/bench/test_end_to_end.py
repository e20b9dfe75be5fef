"""Scripts of bench/ from their command line to their last line, on a CPU: what runs rarely, and on a rented machine, must run."""

from __future__ import annotations

import itertools
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support import chats, save_tiny, write_jsonl

from .test_tables import bench

pytestmark = pytest.mark.slow
Call = Callable[..., int]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Runs a script's `main` with such words in an empty folder; the exit code."""

    def run(script: str, *words: object) -> int:
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        return int(bench(script).main() or 0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("bench") / "model")


@pytest.fixture(scope="module")
def data(model: Path) -> Path:
    return write_jsonl(model.parent / "chats.jsonl", chats(40))


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_fp8_against_bf16(call: Call, model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--model", model, "--data", data, "--out", tmp_path, "--steps", 2, "--tokens", 64, "--held", 2, "--jobs", 2]
    assert call("fp8_quality_gpu", *words, "--seeds", 0) == 0
    seeds, *runs = lines(tmp_path / "fp8_quality.jsonl")
    assert seeds == {"seeds": [0]} and {run["compute"] for run in runs} == {"bf16", "fp8"}
    assert all(5 < run["after"] < 6 and len(run["rows"]) == 2 for run in runs), runs
    said = capfd.readouterr().out.splitlines()[-1]
    assert "bound +0.5%: kept" in said and call("fp8_quality_gpu", "--table", tmp_path) == 0
    assert said in capfd.readouterr().out


def test_fused_against_reference(call: Call, model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--model", model, "--data", data, "--out", "e.jsonl", "--steps", 2, "--tokens", 64, "--jobs", 2, "--work", "w"]
    assert call("equivalence_gpu", "run", *words, "--no-deterministic") == 0
    assert len(lines(tmp_path / "e.jsonl")) == 4
    assert "verdict: green" in capfd.readouterr().out


def test_memory_of_a_long_run(call: Call, tmp_path: Path) -> None:
    try:
        code = call("flat", "--out", tmp_path, "--steps", 20)
    finally:
        logging.disable(logging.NOTSET)
    machine, *found, last = lines(tmp_path / "flat.jsonl")
    assert machine["what"] == "machine" and [line["step"] for line in found] == list(range(1, 21))
    assert last["what"] == "flat" and last["ok"] is (code == 0) and last["late_mib"] == max(x["resident_mib"] for x in found[-2:])
    assert call("flat", "--out", tmp_path, "--again") == code


def test_a_layer_and_its_memory(call: Call, tmp_path: Path) -> None:
    call("layer_gpu", "--out", tmp_path, "--tiny")
    gate, *found = lines(tmp_path / "layer_gpu.jsonl")
    assert gate["red"] == {} and {line["what"] for line in found} == {"layer"}
    call("memory_seen_gpu", "--out", tmp_path, "--cpu")
    assert [line["gate"] for line in lines(tmp_path / "memory_seen_gpu.jsonl")] == ["green"]


def test_a_peer_in_pretence(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock of its own: how long the first import takes is nothing to the budget.
    monkeypatch.setattr(bench("peer_fits"), "time", SimpleNamespace(monotonic=itertools.count().__next__))
    call("peer_fits", "--out", tmp_path, "--cpu", "--budget", 10)
    found = lines(tmp_path / "peer_fits.jsonl")
    assert found[0]["gate"] == "green" and len(found) == 12 and found[-1]["failed"] == "no time left"


def test_formats_and_heads(call: Call, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"{i} and again {i * i}. " * 20} for i in range(8)])
    rows = ["--rows", "bf16", "nf4"]
    assert call("datatypes", model, texts, "--tokens", 256, "--context", 64, "--compute", "fp32", *rows) == 0
    assert {"bf16", "nf4"} <= {line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if "|" in line}
    assert call("head_parity", model, data, "--rows", 8, "--tokens", 64, "--out", tmp_path / "h.json") == 0
    heads = json.loads((tmp_path / "h.json").read_text())["heads"]
    assert 0 < abs(heads["int8"]["difference"]) < abs(heads["nf4"]["difference"]) < 0.05, heads


def test_a_step_beside_the_peer(call: Call, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    words = ["--rows", 2, "--tokens", 64, "--repeats", 1, "--theirs", "fp32", "--out", tmp_path / "c.json"]
    assert call("cpu_step", "--model", model, *words) == 0
    assert json.loads((tmp_path / "c.json").read_text())


def test_startup(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("startup", "--runs", 1) == 0
    assert "| `halfbyte --help` |" in capsys.readouterr().out
