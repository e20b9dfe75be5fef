"""The rates of a GPU: measured once, kept by its name, and read again; without a GPU there are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from halfbyte.memory import calibrate, speed
from halfbyte.memory.gpus import CARDS
from halfbyte.memory.speed import Rates


def test_without_a_gpu_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert calibrate.rates() is None


def test_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, times = Rates(6e14, 4e12, 5e10, 1e-5, "measured on a card"), []
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a card")
    monkeypatch.setattr(calibrate, "measure", lambda *args: times.append(1) or found)
    assert calibrate.rates() == calibrate.rates() == found and len(times) == 1
    assert calibrate.rates(torch.float16) == found and len(times) == 2, "another dtype is another rate"
    (kept,) = tmp_path.rglob("rates.json")
    assert len(json.loads(kept.read_text())) == 2
    kept.write_text("not json")
    assert calibrate.rates() == found and len(times) == 3


def test_cards_in_the_table() -> None:
    """Variants of a card have its rates; what is not in the table has the typical ones, without a source."""
    assert speed.tabulated("rtx4060ti-16g") == speed.tabulated("rtx4060ti")
    assert speed.tabulated("a100-80g").source == "tabulated for a100"
    assert speed.tabulated("24GiB") == speed.TYPICAL and not speed.TYPICAL.source
    for card in CARDS:
        rates = speed.tabulated(card)
        assert 1e13 < rates.gemm < 2e15 and 1e11 < rates.copy < 1e13 and 5e9 < rates.bus < 1e11
