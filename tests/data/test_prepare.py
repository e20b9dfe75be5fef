"""From recipe to token sets: checks before the first step, the cache, holding out, fitting to rows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from halfbyte.data import checks, templates
from halfbyte.data.config import DataConfig
from halfbyte.data.encode import Encoder
from halfbyte.data.prepare import Prepared, prepare
from halfbyte.data.rendering import Renderer
from halfbyte.data.tokens import windows
from halfbyte.data.turns import Message
from halfbyte.errors import DataError


@pytest.fixture
def run(tokenizer: Any, jsonl: Callable[..., Path], tmp_path: Path) -> Callable[..., Prepared]:
    def make(records: list[dict[str, Any]], seed: int = 0, with_tokenizer: Any = None, **options: Any) -> Prepared:
        config = DataConfig(train=[{"path": str(jsonl(records)), **options.pop("source", {})}], **{"tokens": 64, **options})
        return prepare(config, with_tokenizer or tokenizer, seed, tmp_path / "cache")

    return make


def held_out(prepared: Prepared) -> set[bytes]:
    return {s.ids[a:b].tobytes() for e in prepared.eval.values() for s in e.sources for a, b in zip(e.start, e.stop, strict=True)}


def test_a_held_out_share_is_stable(run: Any, chat: Any) -> None:
    records = [chat(f"One {i}?", f"two {i}") for i in range(40)]
    first = run(records, eval=0.1)
    assert len(held_out(first)) == 4 and len(first.train) == 36 and list(first.eval) == ["data"]
    assert held_out(run(records[::-1], eval=0.1)) == held_out(first)
    assert held_out(run(records, eval=0.1, seed=1)) != held_out(first)
    assert len(held_out(first) & held_out(run([*records, chat("more", "and more")], eval=0.1))) >= 3


def test_equal_examples_stay_on_one_side(run: Any, chat: Any) -> None:
    records = [chat(f"One {i % 10}?", "two") for i in range(40)]
    prepared = run(records, eval=0.1)
    learned = {prepared.train.sources[0].ids[a:b].tobytes() for a, b in zip(prepared.train.start, prepared.train.stop, strict=True)}
    assert held_out(prepared) and not held_out(prepared) & learned


def test_a_small_set_still_holds_out_one(run: Any, chat: Any) -> None:
    prepared = run([chat(f"One {i}?", "two") for i in range(3)])
    assert len(prepared.train) == 2 and len(held_out(prepared)) == 1
    with pytest.raises(DataError, match="one example, or one group of them, cannot be both"):
        run([chat("One?", "two")])
    assert run([chat("One?", "two")], eval=0).eval == {}


def test_held_out_sources_of_their_own(run: Any, chat: Any, jsonl: Any) -> None:
    other = jsonl([chat("Three?", "four")], "other.jsonl")
    prepared = run([chat("One?", "two")], eval=[{"path": str(other)}, {"path": str(other)}])
    assert list(prepared.eval) == ["other", "other#2"] and len(prepared.train) == 1
    assert [s.name for s in prepared.report.sources] == ["data", "held out: other", "held out: other#2"]


def test_a_source_that_is_learned_too_is_held_out_under_its_own_name(run: Any, chat: Any, jsonl: Any) -> None:
    records = [chat("One?", "two")]
    prepared = run(records, eval=[str(jsonl(records))])
    assert [s.name for s in prepared.train.sources] == list(prepared.eval) == ["data"]
    assert prepared.eval["data"].tokens() == prepared.train.tokens()


def test_a_forged_turn_is_noted(run: Any, chat: Any) -> None:
    prepared = run([chat("One?</s>", "two"), chat("One?", "two")], eval=0)
    assert any("1 examples where a message spells a special token" in note for note in prepared.report.notes)


LONG = "one " * 100


def test_too_long_is_dropped_and_counted(run: Any, chat: Any) -> None:
    records = [chat(f"One {i}?", "two three and four " * 2) for i in range(60)] + [chat(LONG, "two")]
    prepared = run(records, eval=0)
    report = prepared.report.sources[0]
    assert len(prepared.train) == 60 and report.dropped == 1 and report.dropped_trained > 0
    assert any("1 dropped as too long" in line for line in prepared.report.lines())


@pytest.mark.parametrize("policy", ["drop", "error"])
def test_too_much_too_long_is_an_error(policy: str, run: Any, chat: Any) -> None:
    records = [chat("One?", "two"), chat("One?", LONG)]
    with pytest.raises(DataError, match=r"1 examples are longer than a row of 64 tokens \(\d+\.\d% of .*data\.jsonl:2") as caught:
        run(records, eval=0, too_long=policy)
    assert caught.value.code == "data.too-long" and "data.tokens: " in caught.value.hint
    small = [chat("One?", "two three four and more of it") for _ in range(60)] + [chat(LONG, "two")]
    if policy == "error":
        with pytest.raises(DataError):
            run(small, eval=0, too_long=policy)


def test_truncate_and_split(run: Any, chat: Any) -> None:
    records = [chat("One?", LONG), chat(LONG, "two")]
    cut = run(records, eval=0, too_long="truncate_right")
    assert cut.train.lengths.tolist() == [64] and cut.report.sources[0].truncated == 2  # of the second, only the question was left
    assert any("nothing in them would be learned" in note for note in cut.report.notes)
    end = run(records, eval=0, too_long="truncate_left")
    assert end.train.lengths.tolist() == [64, 64] and end.train.stop.tolist() == end.train.sources[0].offsets[1:].tolist()
    parts = run(records, eval=0, too_long="split")
    assert parts.report.sources[0].split == 2 and int(parts.train.lengths.max()) <= 64
    first = parts.train.take(parts.train.example == 0)
    assert (
        first.start[0] == 0 and bool((first.start[1:] == first.stop[:-1]).all()) and first.stop[-1] == first.sources[0].offsets[1]
    )


def test_text_is_always_split(run: Any) -> None:
    prepared = run([{"text": LONG * 3}, {"text": LONG}], eval=0, too_long="error")
    assert prepared.train.lengths.max() > 64 and prepared.report.efficiency > 0.9
    assert prepared.train.sources[0].ids[prepared.train.stop - 1].tolist() == [1, 1]  # each document ends with eos


@pytest.mark.parametrize(
    ("records", "code"),
    [
        ([], "data.empty"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "data.empty"),
        ([{"instruction": "a", "output": ""}], "data.empty"),
    ],
)
def test_empty(records: list[Any], code: str, run: Any) -> None:
    with pytest.raises(DataError) as caught:
        run(records)
    assert caught.value.code == code and caught.value.hint and "data.jsonl`" in caught.value.message


def test_zero_trained(run: Any, monkeypatch: pytest.MonkeyPatch, chat: Any) -> None:
    prepared = run([chat("One?", "two")], eval=0)
    tokens = prepared.train.sources[0]
    blank = type(tokens)(**{**tokens.__dict__, "trained": np.zeros(len(tokens.ids), dtype=np.bool_)})
    with pytest.raises(DataError, match="no token of `data` would be learned") as caught:
        checks.source(blank, "assistant")
    assert caught.value.code == "data.zero-trained"


def test_double_bos(run: Any, chat: Any, make_tokenizer: Any) -> None:
    template = templates.CHATML
    doubled = make_tokenizer(template="{{ bos_token }}" + template)
    assert run([chat("One?", "two")], eval=0, with_tokenizer=doubled).train.sources[0].ids[0] == 0
    doubled = make_tokenizer(template="{{ bos_token + bos_token }}" + template)
    with pytest.raises(DataError, match=r"begin with two <s> tokens, first .*data\.jsonl:1") as caught:
        run([chat("One?", "two")], eval=0, with_tokenizer=doubled)
    assert caught.value.code == "data.double-bos"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 100])
def test_parts_of_a_map_cover_it(size: int, tmp_path: Path) -> None:
    whole = np.arange(8, dtype=np.uint32)
    np.save(tmp_path / "a.npy", whole)
    for array in (whole, np.load(tmp_path / "a.npy", mmap_mode="r")):
        parts = list(windows(array, size))
        assert [at for at, _ in parts] == list(range(0, 8, size))
        assert all(part.tolist() == whole[at : at + size + 1].tolist() for at, part in parts)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_double_bos_across_parts(size: int, run: Any, chat: Any, make_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = run([chat(f"{'One ' * i}?", "two") for i in range(1, 5)], eval=0).train.sources[0]
    monkeypatch.setattr(checks, "windows", lambda array: windows(array, size))
    for at in tokens.offsets[:-1].tolist():
        ids = np.array(tokens.ids)
        ids[at : at + 2] = 0
        with pytest.raises(DataError, match="1 examples"):
            checks.double_bos(replace(tokens, ids=ids), make_tokenizer())
    checks.double_bos(tokens, make_tokenizer())


def test_new_special_tokens(run: Any, chat: Any, tokenizer: Any) -> None:
    data = run([chat("One?", "two")], eval=0).train
    weight = torch.randn(len(tokenizer), 4, generator=torch.Generator().manual_seed(0))
    checks.embeddings(data, tokenizer, weight, trainable=False)
    with pytest.raises(DataError, match="has 100 rows only") as caught:
        checks.embeddings(data, tokenizer, weight[:100], trainable=True)
    assert caught.value.code == "data.new-special-tokens"
    zero, same = weight.clone(), weight.clone()
    zero[4] = 0
    same[4] = same[3]
    for dead in (zero, same):
        with pytest.raises(DataError, match=r"never learned: .*'<\|im_end\|>' \(4\)"):
            checks.embeddings(data, tokenizer, dead, trainable=False)
        checks.embeddings(data, tokenizer, dead, trainable=True)
    same[2] = same[0]  # <pad> and <s>: not in the data
    same[4] = weight[4]
    checks.embeddings(data, tokenizer, same, trainable=False)


def test_chatml_needs_its_tokens(run: Any, chat: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "One": 2, "two": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    small = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    with pytest.raises(DataError, match="chatml") as caught:
        run([chat("One", "two")], eval=0, with_tokenizer=small, template="chatml")
    assert caught.value.code == "data.new-special-tokens"
    assert run([chat("One", "two")], eval=0, with_tokenizer=small).template.name == "alpaca"  # what auto falls back to


def test_templates_resolve(make_tokenizer: Any, tokenizer: Any, tmp_path: Path) -> None:
    assert templates.resolve("auto", tokenizer).text == tokenizer.chat_template
    bare = make_tokenizer(template=None)
    found = templates.resolve("auto", bare)
    assert found.name == "chatml" and "no template of its own" in found.reason
    (tmp_path / "t.jinja").write_text("{{ eos_token }}")
    assert templates.resolve(str(tmp_path / "t.jinja"), bare).text == "{{ eos_token }}"
    with pytest.raises(DataError, match="neither a known template nor a file"):
        templates.resolve("chatnl", bare)
    with pytest.raises(DataError, match="neither a known template nor a file"):
        templates.resolve("{% for m in messages %}" * 20, bare)
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    with pytest.raises(DataError, match=r"latin\.jinja is not UTF-8 text"):
        templates.resolve(str(tmp_path / "latin.jinja"), bare)
    silent = make_tokenizer(template=None, eos_token=None)
    silent.get_vocab = lambda: {}
    assert templates.resolve("auto", silent).name == "none"
    with pytest.raises(DataError, match="has none") as caught:
        templates.resolve("plain", make_tokenizer(template=None, eos_token=None))
    assert caught.value.code == "data.no-eot"


def test_templates_run_in_a_sandbox(tokenizer: Any) -> None:
    text = "{{ messages.__class__.__mro__ }}{{ messages[0]['content'] + eos_token }}"
    with pytest.raises(DataError, match="unsafe"):
        Renderer(templates.Template("x", text), tokenizer)([Message("user", "a")])


@pytest.mark.parametrize("text", ["{{ 1 / 0 }}", "{{ 'a' * 10 ** 30 }}", f"{{{{ {'(' * 5000} }}}}", "{{ messages[9]['role'].x }}"])
def test_a_template_that_fails_is_an_error_of_ours(tokenizer: Any, text: str) -> None:
    with pytest.raises(DataError, match="refused these messages"):
        Renderer(templates.Template("x", text), tokenizer)([Message("user", "a")])
    if "((" in text:
        with pytest.raises(DataError, match="cannot be read"):
            templates._with(templates.Template("x", text), {"enable_thinking": True})


def test_the_cache(run: Any, chat: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    records = [chat("One?", "two"), chat("Three?", "four")]
    first = run(records, eval=0)
    monkeypatch.setattr(Encoder, "encode", lambda *_: pytest.fail("tokenised again"))
    again = run(records, eval=0)
    assert again.digest == first.digest and again.end_ids == first.end_ids
    run(records, eval=0, tokens=128, too_long="split")  # decided later than the tokens
    assert isinstance(again.train.sources[0].ids, np.memmap) and again.train.sources[0].ids.dtype == np.uint32
    assert not [p for p in (tmp_path / "cache" / "tokens").iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("part", ["ids.npy", "trained.npy", "offsets.npy", "meta.json"])
def test_a_damaged_cache_is_written_again(part: str, run: Any, chat: Any, tmp_path: Path) -> None:
    first = run([chat("One?", "two")], eval=0)
    ids = first.train.sources[0].ids.tolist()  # a copy: the file under the map is about to change
    file = tmp_path / "cache" / "tokens" / first.train.sources[0].key / part
    for damage in (lambda: file.write_bytes(file.read_bytes()[:-20]), lambda: file.unlink()):
        damage()
        again = run([chat("One?", "two")], eval=0).train.sources[0]
        assert again.ids.tolist() == ids and again.trained.any()


@pytest.mark.parametrize("change", [{"loss_on": "all"}, {"system": "S"}, {"template": "plain"}, {"source": {"limit": 1}}])
def test_what_decides_the_tokens_is_in_the_key(change: dict[str, Any], run: Any, chat: Any) -> None:
    records = [chat("One?", "two"), chat("Three?", "four")]
    assert run(records, eval=0, **change).train.sources[0].key != run(records, eval=0).train.sources[0].key


def test_runs_that_start_at_once_share_the_cache(run: Any, chat: Any, tokenizer: Any, jsonl: Any, tmp_path: Path) -> None:
    config = DataConfig(train=[{"path": str(jsonl([chat(f"One {i}", "two") for i in range(50)]))}], eval=0, tokens=64)
    digests: list[str] = []
    threads = [
        threading.Thread(target=lambda: digests.append(prepare(config, tokenizer, 0, tmp_path / "c").digest)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(digests) == 4 and len(set(digests)) == 1 and len(list((tmp_path / "c" / "tokens").iterdir())) == 1


def test_a_failed_run_leaves_nothing_behind(run: Any, chat: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        run([chat("One?", "two"), {"messages": 3}])
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_limit_and_progress(run: Any, chat: Any, tokenizer: Any, jsonl: Any, tmp_path: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    records = [chat(f"One {i}", "two") for i in range(600)]
    config = DataConfig(train=[{"path": str(jsonl(records)), "limit": 520}], eval=0)
    prepared = prepare(config, tokenizer, 0, tmp_path, progress=lambda *a: told.append(a))
    assert len(prepared.train) == 520 and told == [("data", 256, 520), ("data", 512, 520), ("data", 520, 520)]


def test_config_shorthand_and_limits() -> None:
    assert DataConfig(train="a.jsonl").train[0].path == "a.jsonl"
    assert [s.path for s in DataConfig(train=["a", {"path": "b"}], eval=["c"]).train] == ["a", "b"]
    for bad in ({"eval": 1.0}, {"eval": -0.1}, {"eval": [{"path": "a", "weight": 2}]}, {"train": []}):
        with pytest.raises(ValidationError):
            DataConfig(**{"train": ["a"], **bad})
