"""The token engine: the tokens of plain decoding, whatever the model is made of; on the CPU its step runs on the references."""

from __future__ import annotations

import pytest
import torch

from halfbyte.adapters import lora
from halfbyte.adapters.config import AdapterConfig
from halfbyte.generate import engine as engines
from halfbyte.generate import prompt
from halfbyte.generate.chat import encode, generate
from halfbyte.generate.engine import Choose, Engine
from halfbyte.generate.prompt import read_prompts
from halfbyte.generate.reading import read
from halfbyte.generate.routes import Request, Session
from halfbyte.layers import swap
from halfbyte.layers.structure import NotUnderstood
from support import packed_base

PROMPTS = ("Once upon a time", "hello there, how are you on this fine day?")


def adopted(family: str = "llama", **changes: object):
    base = packed_base(family, **changes)
    swap.adopt(base.model)
    return base


def adapt(base) -> lora.Adapter:
    adapter = lora.attach(base.model, AdapterConfig(rank=4), 0)
    with torch.no_grad():
        for _, parameter, role in adapter.parameters():
            if role == "lora_b":
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    return adapter


def plainly(base, text: str, tokens: int) -> list[int]:
    ids = encode(base, text)
    start = len(ids)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(base.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    return ids[start:]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_two_rows_say_what_plain_decoding_says(family: str) -> None:
    base = adopted(family)
    adapt(base)
    engine = Engine(base.model, 2, 128, 30)
    assert engine.answer([encode(base, p) for p in PROMPTS], 30, set()) == [plainly(base, p, 30) for p in PROMPTS]


def test_the_adapter_is_what_it_is_when_the_engine_is_made() -> None:
    base = adopted()
    ids = encode(base, PROMPTS[0])
    before = Engine(base.model, 1, 64, 12).answer([ids], 12, set())
    adapter = adapt(base)
    assert Engine(base.model, 1, 64, 12).answer([ids], 12, set()) != before
    with adapter.enabled(False):
        assert Engine(base.model, 1, 64, 12).answer([ids], 12, set()) == before


def test_an_answer_ends_with_its_end_and_others_go_on() -> None:
    base = adopted()
    rows = [encode(base, p) for p in PROMPTS]
    first, second = (plainly(base, p, 20) for p in PROMPTS)
    end = next(token for i, token in enumerate(first) if i > 2 and token not in first[:i] and token not in second)
    heard: list[tuple[int, int]] = []
    got = Engine(base.model, 2, 128, 20).answer(rows, 20, {end}, lambda row, token: heard.append((row, token)))
    assert got == [first[: first.index(end) + 1], second]
    assert [[t for r, t in heard if r == row] for row in (0, 1)] == got


def test_the_same_engine_answers_again() -> None:
    base = adopted()
    engine = Engine(base.model, 1, 128, 16)
    for text in (*PROMPTS, PROMPTS[0]):
        assert engine.answer([encode(base, text)], 16, set()) == [plainly(base, text, 16)]


def counted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens that each later prompt is read by."""
    read_by: list[int] = []

    def counting(reading, parts, embedding, cache, tables, spans):
        read_by.append(sum(len(span.tokens) for span in spans))
        return read_prompts(reading, parts, embedding, cache, tables, spans)

    monkeypatch.setattr(engines, "read_prompts", counting)
    return read_by


def test_a_prompt_is_read_from_where_it_leaves_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    base = adopted()
    adapt(base)
    first, more = encode(base, PROMPTS[0]), encode(base, PROMPTS[1])
    engine = Engine(base.model, 1, 256, 20)
    read_by = counted(engine, monkeypatch)
    answer = engine.answer([first], 20, set())[0]
    turns = ([*first, *answer, *more], [*first, *answer[:7], *more], first, more)
    for ids in turns:
        assert engine.answer([ids], 20, set()) == Engine(base.model, 1, 256, 20).answer([ids], 20, set())
    # The last token of an answer has not been through the model; of a prompt that is all in the cache the last one is read.
    assert [read_by[0], *read_by[1::2]] == [len(first), 1 + len(more), len(more), 1, len(more)]


def test_two_rows_continue_each_from_its_own_place() -> None:
    base = adopted("mistral")  # a window of 24 places
    rows = [encode(base, p) for p in PROMPTS]
    engine = Engine(base.model, 2, 256, 12)
    answers = engine.answer(rows, 12, set())
    longer = [[*rows[0], *answers[0], *rows[1]], [*rows[1], *answers[1][:3], *rows[0]]]
    assert engine.answer(longer, 12, set()) == Engine(base.model, 2, 256, 12).answer(longer, 12, set())


def test_long_prompts_are_read_in_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    base = adopted()
    rows = [encode(base, p) for p in PROMPTS]
    want = Engine(base.model, 2, 128, 8).answer(rows, 8, set())
    monkeypatch.setattr(prompt, "AT_ONCE", 7)
    assert Engine(base.model, 2, 128, 8).answer(rows, 8, set()) == want


def test_an_interrupted_answer_leaves_a_cache_that_can_be_used() -> None:
    base = adopted()
    rows = [encode(base, p) for p in PROMPTS]
    engine = Engine(base.model, 1, 128, 16)

    def stop(row: int, token: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.answer([rows[0]], 16, set(), stop)
    again = [*rows[0], *rows[1]]
    assert engine.answer([again], 16, set()) == Engine(base.model, 1, 128, 16).answer([again], 16, set())


def request(ids: list[int], temperature: float = 0.0, seed: int = 0) -> Request:
    return Request(ids, 10, set(), temperature, 0.9, seed, 0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_session_answers_as_a_fresh_engine_would(temperature: float) -> None:
    base = adopted()
    adapter = adapt(base)
    session, ids, used = Session(), encode(base, PROMPTS[1]), []

    def turn(seed: int) -> list[int]:
        asked = request(ids, temperature, seed)
        fresh = Session().ready(base.model, asked).answer([ids], 10, set())[0]
        used.append(session.ready(base.model, asked))
        assert used[-1].answer([ids], 10, set())[0] == fresh
        return fresh

    for seed in range(8):  # 440 places in the end: more room is made once, and the cache taken along
        ids = [*ids, *turn(seed), *encode(base, PROMPTS[1])]
    assert len(set(map(id, used))) == 2 and len(used[-1].cached[0]) > 256
    with adapter.enabled(False):
        turn(0)
    with torch.no_grad():
        next(p for _, p, role in adapter.parameters() if role == "lora_b").data.mul_(2)  # unseen by torch's counter
    turn(0)
    assert len(set(map(id, used))) == 4


def test_what_the_step_cannot_run_is_named() -> None:
    with pytest.raises(NotUnderstood, match="0 of 2 decoder layers"):
        read(packed_base().model)
    with pytest.raises(NotUnderstood, match="multiple of the embedding"):
        read(adopted("gpt2").model)
    assert read(adopted().model).embedding_scale == 1.0


def test_draws_depend_on_the_seed_and_stay_within_top_p() -> None:
    device = torch.device("cpu")
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(3, 1)

    def drawn(top_p: float, temperature: float = 1.0, seed: int = 0) -> torch.Tensor:
        choose = Choose(temperature, top_p, seed, 400, 3, device)
        out = torch.empty(400, 3, dtype=torch.int64)
        for i in range(400):
            choose(scores, torch.tensor([i]), out[i])
        return out

    assert torch.equal(drawn(1.0), drawn(1.0)) and not torch.equal(drawn(1.0), drawn(1.0, seed=1))
    shares = drawn(1.0).flatten().bincount(minlength=4) / 1200
    assert torch.allclose(shares, scores[0].softmax(0), atol=0.04)
    assert set(drawn(0.7).flatten().tolist()) == {0, 1}  # 0.64 is not enough, so the second is in
    assert set(drawn(0.6).flatten().tolist()) == {0}
    assert drawn(1.0, temperature=0.0).eq(0).all()


@pytest.mark.gpu
def test_chat_on_a_gpu_says_what_the_cpu_says() -> None:
    base = adopted()
    adapt(base)
    want = generate(base, PROMPTS[0], max_tokens=24).text
    base.model.to("cuda")
    pieces: list[str] = []
    answer = generate(base, PROMPTS[0], max_tokens=24, stream=pieces.append)
    assert answer.text == want == "".join(pieces)
