"""Generation: equal to plain decoding, deterministic, stopped by the right thing, and the model left as it was."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from halfbyte.adapters import lora
from halfbyte.adapters.config import AdapterConfig
from halfbyte.errors import DataError, RecipeError
from halfbyte.generate.chat import Chat, encode, end_tokens, generate
from halfbyte.generate.stream import TextStream
from support import CHATML, packed_base, tiny_tokenizer

HELLO = [{"role": "user", "content": "hello"}]
IM_END = 258


def loud_base(end=None, *, after=3, **changes):
    """A tiny base that says the letters a b c ... and, when told, the token `end` after some of them."""
    base = packed_base(**changes)
    letters = [ord("a") - 33 + i for i in range(26)]  # byte-level BPE: '!' (33) is token 0
    order = letters[:after] + ([end] if end is not None else []) + letters[after:]
    said = iter(order + order[-1:] * 100)

    def answer(module, args, output):
        forced = torch.full_like(output, -10.0)
        forced[..., next(said)] = 10.0
        return forced

    base.model.lm_head.register_forward_hook(answer)
    return base


def greedy(base, prompt, tokens):
    """The text of the likeliest tokens, each from a pass over all before it."""
    ids = encode(base, prompt)
    start = len(ids)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(base.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    return base.tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_greedy_equals_decoding_without_a_cache():
    base = packed_base()
    answer = generate(base, "Once upon a time", max_tokens=12)
    assert answer.text == greedy(base, "Once upon a time", answer.tokens)
    assert generate(base, "Once upon a time", max_tokens=12).text == answer.text


@pytest.mark.parametrize(
    "setting",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3},
        {"max_time": 1e-9},
        {"stop_strings": list("abcdefghijklmnopqrstuvwxyz")},
        {"return_dict_in_generate": True},
        {"suppress_tokens": list(range(200))},
        {"min_new_tokens": 20},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_generation_settings_of_the_model_change_no_answer(setting):
    base = packed_base()
    own = GenerationConfig(**setting)
    base.model.generation_config = own
    prompt = "Once upon a time, a time, a time"
    answer = generate(base, prompt, max_tokens=12)
    assert answer.tokens == 12 and answer.text == greedy(base, prompt, 12)
    assert base.model.generation_config is own


def test_sampling_depends_on_the_seed_alone():
    base = packed_base()
    torch.manual_seed(1)
    first = generate(base, HELLO, max_tokens=16, temperature=1.0, top_p=0.9, seed=7).text
    state = torch.random.get_rng_state()
    assert generate(base, HELLO, max_tokens=16, temperature=1.0, top_p=0.9, seed=7).text == first
    assert torch.equal(state, torch.random.get_rng_state())
    assert generate(base, HELLO, max_tokens=16, temperature=1.0, top_p=0.9, seed=8).text != first


def test_the_end_of_turn_stops_and_is_not_part_of_the_text():
    answer = generate(loud_base(IM_END), HELLO, max_tokens=10)
    assert (answer.text, answer.tokens, answer.stopped_by) == ("abc", 4, "end")


def test_the_template_s_own_end_of_turn_stops_although_the_model_does_not_declare_it():
    base = loud_base(257)
    template = CHATML.replace("<|im_end|>", "<|im_start|>")
    assert 257 in end_tokens(base, template) and 257 not in end_tokens(base, CHATML)
    answer = generate(base, HELLO, max_tokens=10, template=template)
    assert (answer.text, answer.stopped_by) == ("abc", "end")


def test_max_tokens_and_the_context_stop_too():
    assert generate(loud_base(), HELLO, max_tokens=5).stopped_by == "length"
    base = loud_base(max_position_embeddings=40)
    answer = generate(base, "x" * 36, max_tokens=100)
    assert (answer.tokens, answer.stopped_by) == (4, "context")
    with pytest.raises(DataError, match="40 tokens, the model can see 40"):
        generate(base, "x" * 40, max_tokens=1)


def test_streamed_pieces_make_the_text():
    pieces: list[str] = []
    answer = generate(packed_base(), HELLO, max_tokens=24, stream=pieces.append)
    assert "".join(pieces) == answer.text and len(pieces) > 1


def test_a_character_of_several_tokens_is_streamed_whole():
    tokenizer = tiny_tokenizer()
    pieces: list[str] = []
    stream = TextStream(tokenizer, 2, pieces.append)
    stream.put(torch.tensor([[1, 2]]))
    for token in tokenizer("é😀x")["input_ids"]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert pieces == ["é", "😀", "x"]


def test_the_model_is_left_as_it_was_found():
    base = packed_base()
    base.model.train()
    base.model.model.layers[0].eval()
    generate(base, HELLO, max_tokens=2)
    assert base.model.training and not base.model.model.layers[0].training and base.model.model.layers[1].training


def test_an_interruption_leaves_model_and_history_as_they_were():
    base = packed_base()
    base.model.train()
    chat = Chat(base)

    def stop(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.say("hello", stop)
    assert base.model.training and chat.messages == []


def test_a_conversation_switches_between_base_and_adapter():
    base = packed_base()
    plain = generate(base, HELLO, max_tokens=8).text
    adapter = lora.attach(base.model, AdapterConfig(rank=4), 0)
    with torch.no_grad():
        for _, parameter, role in adapter.parameters():
            if role == "lora_b":
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    chat = Chat(base, adapter, max_tokens=8)
    adapted = chat.say("hello").text
    assert adapted != plain and [m["role"] for m in chat.messages] == ["user", "assistant"]
    chat.reset()
    chat.use("base")
    assert chat.say("hello").text == plain
    chat.reset()
    chat.use("adapter")
    assert chat.say("hello").text == adapted
    assert generate(base, HELLO, max_tokens=8).text == adapted  # the adapter is on again outside


def test_history_and_system_message_are_kept():
    base = packed_base()
    chat = Chat(base, system="Be brief.", max_tokens=1)
    chat.say("one")
    chat.say("two")
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    with pytest.raises(RecipeError, match="no adapter"):
        chat.use("adapter")


def test_messages_go_through_the_saved_template_and_strings_do_not():
    base = packed_base()
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    assert encode(base, HELLO, template) == base.tokenizer("[hello]", add_special_tokens=False)["input_ids"]
    assert encode(base, "hello") == base.tokenizer("hello")["input_ids"]
    base.tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        generate(base, HELLO)


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}])
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        generate(packed_base(), HELLO, **wrong)


NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML


def test_a_template_that_refuses_a_conversation_is_told_and_the_chat_goes_on():
    chat = Chat(packed_base(), template=NO_SYSTEM, system="Be brief.", max_tokens=2)
    with pytest.raises(DataError, match="refuses this conversation: System role not supported") as caught:
        chat.say("hello")
    assert caught.value.code == "data.template" and "--system" in caught.value.hint
    chat.system = None
    chat.reset()
    assert chat.say("hello").tokens > 0 and len(chat.messages) == 2
    broken = "{{ messages[0]['content'] + 1 }}"
    with pytest.raises(DataError, match="refuses this conversation"):
        encode(packed_base(), HELLO, broken)
    with pytest.raises(DataError, match="refuses this conversation"):
        encode(packed_base(), HELLO, "{% for m in messages %}")


def test_a_template_that_wants_a_system_message_answers_where_there_is_one():
    wants = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system message, please') }}{% endif %}" + CHATML
    answer = generate(packed_base(), [{"role": "system", "content": "Be brief."}, *HELLO], max_tokens=2, template=wants)
    assert answer.tokens > 0
    parts_only = "{% for m in messages %}{% for p in m['content'] %}{{ p.type + '|' + p['text'] }}{% endfor %}{% endfor %}"
    base = packed_base()
    assert base.tokenizer.decode(encode(base, HELLO, parts_only)) == "text|hello"


def test_templates_that_read_parts_and_templates_that_close_no_turn():
    base = packed_base()
    parts = "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}<|endoftext|>{% endfor %}"
    assert encode(base, HELLO, parts) == base.tokenizer("hello<|endoftext|>", add_special_tokens=False)["input_ids"]
    opening = base.tokenizer.convert_tokens_to_ids("<|im_start|>")
    unclosed = "{% for m in messages %}<|im_start|>{{ m['role'] + m['content'] }}{% endfor %}"
    assert opening in end_tokens(base, unclosed)
    assert opening not in end_tokens(base, base.tokenizer.chat_template)
