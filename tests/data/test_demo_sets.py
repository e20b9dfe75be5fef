"""The public demo sets, in the shapes that people bring, through SmolLM2's own tokenizer.

Their folder comes from the environment variable HALFBYTE_TEST_DATA.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfbyte.data.config import DataConfig
from halfbyte.data.loader import Loader
from halfbyte.data.prepare import Prepared, prepare
from halfbyte.data.preview import of
from halfbyte.errors import DataError

pytestmark = pytest.mark.cpu


@pytest.fixture
def learn(demo: Callable[[str], str], smollm2: Any, tmp_path: Path) -> Callable[..., Prepared]:
    def run(name: str, shape: str = "auto", source: dict[str, Any] | None = None, **options: Any) -> Prepared:
        config = DataConfig(train=[{"path": demo(name), "shape": shape, **(source or {})}], **{"eval": 0, **options})
        return prepare(config, smollm2, 0, tmp_path / "cache")

    return run


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [("alpaca_en_demo.json", "alpaca", 999), ("alpaca_zh_demo.json", "alpaca", 1000), ("identity.json", "alpaca", 91)],
)
def test_alpaca(name: str, shape: str, count: int, learn: Any, smollm2: Any, demo: Any) -> None:
    import json

    prepared = learn(name)
    records = json.loads(Path(demo(name)).read_text(encoding="utf-8"))
    source = prepared.train.sources[0]
    assert source.shape == shape and len(source) == count == len(records)
    if count >= 999:
        assert prepared.report.efficiency >= 0.98
    for number, record in enumerate(records):
        span = slice(source.offsets[number], source.offsets[number + 1])
        ids, trained = source.ids[span], source.trained[span]
        assert smollm2.decode(ids[trained]) == record["output"] + "<|im_end|>"
        header = smollm2.decode(ids[~trained])
        assert record["instruction"] in header and header.endswith("<|im_start|>assistant\n\n")


def test_placeholders_stay(learn: Any, smollm2: Any) -> None:
    assert any("{{name}}" in shown.plain() for shown in of(learn("identity.json"), smollm2, 91, 0).examples)


def test_preferences_are_refused_unless_it_is_said_how_to_learn_them(learn: Any) -> None:
    for name in ("kto_en_demo.json", "dpo_en_demo.json"):
        with pytest.raises(DataError, match="not built yet") as caught:
            learn(name)
        assert caught.value.code == "data.shape"
    prepared = learn("kto_en_demo.json", "messages", tokens=8192)
    assert len(prepared.train) == 300 and any("columns not read: label" in note for note in prepared.report.notes)
    good = learn("kto_en_demo.json", source={"learn": "chosen"}, tokens=8192)
    assert len(good.train) == 150 and any("150 examples left out: marked as bad" in note for note in good.report.notes)
    pairs = learn("dpo_en_demo.json", source={"learn": "chosen"}, tokens=4096, too_long="truncate_right")
    assert len(pairs.train.sources[0]) == 300 and pairs.report.efficiency >= 0.98


def test_too_long_is_said(learn: Any) -> None:
    with pytest.raises(DataError, match=r"10 examples are longer than a row of 2048 tokens") as caught:
        learn("kto_en_demo.json", "messages")
    assert caught.value.code == "data.too-long"


@pytest.mark.parametrize(("name", "count"), [("c4_demo.jsonl", 300), ("wiki_demo.txt", 30)])
def test_text(name: str, count: int, learn: Any) -> None:
    prepared = learn(name)
    assert len(prepared.train) == count and prepared.report.efficiency >= 0.98
    loader = Loader(prepared.train, 2048, 4, 0)
    first = loader.at(0)
    assert first.trained_tokens >= 0.98 * first.input_ids.numel()


def test_python_docs(smollm2: Any, tmp_path: Path) -> None:
    prepared = prepare(DataConfig(train=["python-docs"]), smollm2, 0, tmp_path)
    assert len(prepared.train) >= 3000 and prepared.report.efficiency >= 0.98 and list(prepared.eval) == ["python-docs"]
