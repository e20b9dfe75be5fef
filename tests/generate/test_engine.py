"""The token engine: the tokens of plain decoding, whatever the model is made of; on the CPU its step runs on the references."""

from __future__ import annotations

import pytest
import torch

from halfbyte.adapters import lora
from halfbyte.adapters.config import AdapterConfig
from halfbyte.generate.chat import encode, generate
from halfbyte.generate.engine import Choose, Engine, likeliest
from halfbyte.generate.reading import read
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


def plainly(base, prompt: str, tokens: int) -> list[int]:
    ids = encode(base, prompt)
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


@pytest.mark.parametrize("width", [1024, 1000])
def test_the_likeliest_is_the_first_of_equals(width: int) -> None:
    scores = torch.randint(0, 50, (3, width), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert torch.equal(likeliest(scores), scores.argmax(-1))


def test_the_same_engine_answers_again() -> None:
    base = adopted()
    engine = Engine(base.model, 1, 128, 16)
    for prompt in (*PROMPTS, PROMPTS[0]):
        assert engine.answer([encode(base, prompt)], 16, set()) == [plainly(base, prompt, 16)]


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
        return torch.stack([choose(scores, torch.tensor([i])) for i in range(400)])

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
