"""The engine: what fastokens says is what the tokenizer says, and where it is not, the tokenizer's word counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from halfbyte.data import workers
from halfbyte.data.aligned import Aligner
from halfbyte.data.config import DataConfig
from halfbyte.data.engine import DISAGREES, EVERY, Engine
from halfbyte.data.prepare import prepare
from halfbyte.errors import DataError

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
HAN = "\u4f60\u597d\uff0c\u4e16\u754c\u3002"
TEXTS = ["The quick brown fox's 123 jumps, over 45678 lazy dogs.\n\n", f"It'll say: {HAN} na\u00efve caf\u00e9 e\u0301\n"] * 4
PARTS = ["a", "B", " ", "  ", "\n", "\r\n", "\t", "1", "99", "'s", "'LL", ".", "<s>", "<|end|>", "<|sp|>", HAN[:2], HAN[2]]
ALPHABET = st.sampled_from([*PARTS, "e\u0301", "\u00e9", "\U0001f44d", "\u3000", "\u0667", "\u2581"])


def byte_level(pattern: str | None, normal: Any) -> Tokenizer:
    core = Tokenizer(models.BPE(ignore_merges=pattern is not None))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]
    core.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    core.decoder = decoders.ByteLevel()
    if normal is not None:
        core.normalizer = normal
    return core


def spaced() -> Tokenizer:
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "\u2581")
    core.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return core


KINDS: dict[str, Any] = {
    "gpt2": lambda: byte_level(None, None),
    "llama3": lambda: byte_level(LLAMA3, None),
    "qwen": lambda: byte_level(LLAMA3.replace("{1,3}", ""), normalizers.NFC()),
    "gemma": spaced,
}


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Any:
    core = KINDS[request.param]()
    specials = ["<unk>", "<s>", "<|end|>", *(f"<0x{byte:02X}>" for byte in range(256) if request.param == "gemma")]
    initial = [] if request.param == "gemma" else pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=700, special_tokens=specials, initial_alphabet=initial, show_progress=False)
    )
    core.add_special_tokens([AddedToken("<|sp|>", lstrip=True, rstrip=True, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<|end|>")


@pytest.fixture(scope="module")
def engines(kind: Any) -> tuple[Engine, Engine]:
    return Engine(kind, True), Engine(kind, False)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(ALPHABET | st.characters(exclude_categories=["Cs"]), max_size=12).map("".join), max_size=5))
def test_the_tokens_are_the_tokenizers(engines: tuple[Engine, Engine], texts: list[str]) -> None:
    quick, exact = engines
    assert quick.quick and not exact.quick
    for mine, other in zip(quick(texts), exact(texts), strict=True):
        assert mine.dtype == other.dtype and mine.tolist() == other.tolist()


def test_spans_are_found_as_by_offsets(kind: Any) -> None:
    texts = [f"<s>{t}<|end|>" for t in (*TEXTS[:2], "\u2581 \u4f60", "e\u0301 x")]
    spans = [[(3, len(t) - 7), (len(t) - 7, len(t))] for t in texts]
    for found, alone in zip(Aligner(kind, True)(texts, spans), Aligner(kind)(texts, spans), strict=True):
        assert found.runs is not None and found.runs == alone.runs and found.ids.tolist() == alone.ids.tolist()


@pytest.mark.parametrize("model", [models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0), models.BPE({"a": 0}, [], dropout=0.1)])
def test_other_kinds_stay_with_their_tokenizer(model: Any) -> None:
    assert not Engine(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)), True).quick


def lying(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    """fastokens that gets every text with a word wrong."""
    fast = Engine._fast

    def wrong(engine: Engine, texts: Any) -> Any:
        ids, bounds = fast(engine, texts)
        ids = ids.copy()
        for i, text in enumerate(texts):
            ids[bounds[i] : bounds[i + 1]] += 1 if word in text else 0
        return ids, bounds

    monkeypatch.setattr(Engine, "_fast", wrong)


def test_a_character_that_differs_goes_to_the_tokenizer(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lying(monkeypatch, "\u00f8")
    texts = ["plain", "sm\u00f8", "\u4f60", "sm\u00f8 again", ""]
    assert [part.tolist() for part in Engine(tokenizer, True)(texts)] == [part.tolist() for part in Engine(tokenizer, False)(texts)]


def test_a_special_token_that_differs_ends_it(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lying(monkeypatch, "<|im_end|>")
    assert not Engine(tokenizer, True).quick


def test_a_text_that_differs_begins_the_source_anew(
    tokenizer: Any, chat: Any, jsonl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [chat(f"One {i}?", "two words" if i == 3 * EVERY else "two") for i in range(300)]
    monkeypatch.setattr(workers, "QUICK", 0)
    sets = {}
    for name in ("right", "wrong"):
        config = DataConfig(train=[{"path": str(jsonl(records))}], eval=0, tokens=64)
        sets[name] = prepare(config, tokenizer, 0, tmp_path / name)
        lying(monkeypatch, "two words")
    with pytest.raises(DataError) as caught:
        Engine(tokenizer, True)(["two words"])
    right, wrong = (sets[name].train.sources[0] for name in ("right", "wrong"))
    assert caught.value.code == DISAGREES and wrong.ids.tolist() == right.ids.tolist() and wrong.key == right.key
    assert not right.notes and "other tokens" in wrong.notes[0] and wrong.notes[0] in " ".join(sets["wrong"].report.notes)


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["alpaca_zh_demo", "alpaca_en_demo", "glaive_toolcall_en_demo"])
def test_the_public_sets_have_the_same_tokens(name: str, demo: Any, smollm2: Any) -> None:
    texts = Path(demo(f"{name}.json")).read_text(encoding="utf-8").split('",')
    assert [part.tolist() for part in Engine(smollm2, True)(texts)] == [part.tolist() for part in Engine(smollm2, False)(texts)]
