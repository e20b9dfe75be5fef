"""Loss masks: the decoded learned text is the answer and its end, under templates of every family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfbyte.data.config import DataConfig
from halfbyte.data.encode import Encoder, Options
from halfbyte.data.masks import Masker
from halfbyte.data.prepare import Prepared, prepare
from halfbyte.data.preview import of
from halfbyte.data.problems import Problems, Where
from halfbyte.data.proof import Unsafe
from halfbyte.data.rendering import Renderer
from halfbyte.data.templates import Template, resolve
from halfbyte.data.turns import Example, Message
from halfbyte.errors import DataError

# The manner of the families, in few words: headers, trimming, bos, an injected system message, an injected thought.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content']|trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content']|trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content']|trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content']|trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORCED = (  # the generation prompt opens a thought that finished turns do not show
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_SHORT = MARKED.replace("+ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}", "}}{% endgeneration %}{{ '<|im_end|>\n' }}")
SPACED = (  # a generation prompt that ends in a space, which byte-level tokenizers glue to the answer
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + (eos_token if m['role'] == 'assistant' else '') + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
INJECTED = (  # SmolLM2's way: a system message of its own when none is given
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = "chatml"
FAMILIES = {  # template -> (end of turn, what the model writes before an answer)
    "chatml": (CHATML, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "llama2": (LLAMA2, " </s>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "forced": (FORCED, "</s>"),
    "marked": (MARKED, "<|im_end|>"),
    "marked short": (MARKED_SHORT, "<|im_end|>"),
    "spaced": (SPACED, "</s>"),
    "injected": (INJECTED, "<|im_end|>"),
    "alpaca": ("alpaca", "</s>"),
    "plain": ("plain", "</s>"),
}
SPECIALS = (
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
)


@pytest.fixture(scope="module")
def special(make_tokenizer: Callable[..., Any]) -> Any:
    return make_tokenizer(specials=SPECIALS)


@pytest.fixture
def learn(special: Any, jsonl: Callable[..., Path], tmp_path: Path) -> Callable[..., Prepared]:
    def run(records: list[dict[str, Any]], template: str = "chatml", **options: Any) -> Prepared:
        if "{" in template:
            (tmp_path / "template.jinja").write_text(template)
            template = str(tmp_path / "template.jinja")
        config = DataConfig(train=[{"path": str(jsonl(records))}], eval=0, template=template, **{"tokens": 256, **options})
        return prepare(config, special, 0, tmp_path / "cache")

    return run


def learned(prepared: Prepared, tokenizer: Any) -> list[list[str]]:
    """The learned runs of every example, in the order of the file."""
    shown = sorted(of(prepared, tokenizer, 99, 0).examples, key=lambda s: int(s.where.rsplit(":", 1)[1]))
    runs = []
    for example in shown:
        parts = example.plain().split("⟦")[1:]
        runs.append([part.split("⟧")[0] for part in parts])
    return runs


@pytest.mark.parametrize("family", FAMILIES)
def test_learned_text_is_the_answer_and_its_end(
    family: str, learn: Callable[..., Prepared], special: Any, chat: Callable[..., Any]
) -> None:
    template, end = FAMILIES[family]
    records = [
        chat("What is it?", "It is a cat."),
        chat("One", "two", "three", "and four."),
        chat("assistant", "user\nWhat is it?"),
        chat("Zwei 二 🐈", "二つ 🐈‍⬛ é"),
    ]
    lead = " " if family == "llama2" else ""
    wanted = [[lead + m["content"] + end for m in r["messages"] if m["role"] == "assistant"] for r in records]
    assert learned(learn(records, template), special) == wanted


def test_an_answer_that_begins_with_a_newline_does_not_swallow_the_header(learn: Any, special: Any, chat: Any) -> None:
    # "assistant\n" + "\nIt is": the tokenizer glues the newlines unless the pieces are tokenised apart.
    assert special("\n\n").input_ids != [*special("\n").input_ids, *special("\n").input_ids]
    assert learned(learn([chat("What?", "\nIt is a cat.")]), special) == [["\nIt is a cat.<|im_end|>"]]


def test_a_thought_that_the_template_adds_is_learned(learn: Any, special: Any, chat: Any) -> None:
    found = learned(learn([chat("One", "two", "three", "four")], THINKING), special)
    assert found == [["two<|im_end|>", "<think>\n\n</think>\n\nfour<|im_end|>"]]


def test_last_and_all(learn: Any, special: Any, chat: Any) -> None:
    record = chat("One", "two", "three", "four")
    assert learned(learn([record], loss_on="last"), special) == [["four<|im_end|>"]]
    assert learned(learn([record], MARKED, loss_on="last"), special) == [["four<|im_end|>"]]
    whole = learn([record], loss_on="all")
    assert whole.train.trained() == whole.train.tokens() - 1  # the first token follows nothing


def test_an_opening_answer(learn: Any, special: Any) -> None:
    turns = [{"from": "gpt", "value": "Hello."}, {"from": "human", "value": "One"}, {"from": "gpt", "value": "two"}]
    for template in ("chatml", INJECTED):
        assert learned(learn([{"conversations": turns}], template), special) == [["Hello.<|im_end|>", "two<|im_end|>"]]


def test_pad_that_is_the_end_of_turn_does_not_mask_it(make_tokenizer: Any, jsonl: Any, tmp_path: Path, chat: Any) -> None:
    tokenizer = make_tokenizer(pad_token="<|im_end|>", eos_token="<|im_end|>")
    config = DataConfig(train=[{"path": str(jsonl([chat("One", "two")]))}], eval=0, tokens=32)
    assert learned(prepare(config, tokenizer, 0, tmp_path), tokenizer) == [["two<|im_end|>"]]


def test_prompt_messages_are_context(learn: Any, special: Any) -> None:
    record = {
        "prompt": [
            {"role": "user", "content": "One"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"},
        ],
        "completion": [{"role": "assistant", "content": "four"}],
    }
    assert learned(learn([record]), special) == [["four<|im_end|>"]]
    assert learned(learn([record], system="You are kind."), special) == [["four<|im_end|>"]]


def test_prompt_and_completion_as_text(learn: Any, special: Any) -> None:
    prepared = learn([{"prompt": "What is it?\n", "completion": "\nIt is a cat."}])
    assert learned(prepared, special) == [["\nIt is a cat.</s>"]]
    assert any("without the chat template" in note for note in prepared.report.notes)


def test_the_recipes_system_message(learn: Any, special: Any, chat: Any) -> None:
    prepared = learn([chat("One", "two"), chat("One", "two", system="Be brief.")], system="You are kind.")
    texts = [s.plain() for s in sorted(of(prepared, special, 9, 0).examples, key=lambda s: s.where)]
    assert "You are kind." in texts[0] and "Be brief." in texts[1] and "You are kind." not in texts[1]


@pytest.mark.parametrize(
    ("template", "code", "word"),
    [
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}", "data.no-eot", "never stop"),
        ("{% for m in messages %}{{ m['role'] + eos_token }}{% endfor %}", "data.template", "words of both sides"),
        (
            LLAMA2.replace("{{ bos_token + '[INST] ' + m['content']|trim + ' [/INST]' }}", "{{ '[INST]' }}"),
            "data.template",
            "words of both sides",
        ),
        ("{% for m in messages %}{{ m['content']|upper + eos_token }}{% endfor %}", "data.template", "words of both sides"),
        ("{% for m in messages", "data.template", "refused"),
        (
            "{% for m in messages %}{{ m['role'] + ': ' }}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
            "{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
            "data.mask",
            "around words of user",
        ),
        (
            "{% for m in messages %}{{ m['role'] + ': ' }}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
            "{% endfor %}",
            "data.template",
            "generation prompt does not write",
        ),
        (
            "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'user' %}{{ m['content'] }}{% else %}{% generation %}"
            "{{ m['content'] }}{% if loop.last %}{{ eos_token }}{% endif %}{% endgeneration %}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
            "data.no-eot",
            "after the answer",
        ),
    ],
)
def test_templates_that_cannot_be_masked(template: str, code: str, word: str, learn: Any, chat: Any) -> None:
    with pytest.raises(DataError, match=word) as caught:
        learn([chat("One", "two", "three", "four")], template)
    assert caught.value.code == code and caught.value.hint


def test_a_refusing_template_names_the_line(learn: Any, chat: Any) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:2: .*no system role") as caught:
        learn([chat("One", "two"), chat("One", "two", system="Be brief.")], GEMMA)
    assert caught.value.code == "data.template"


def test_a_thought_that_the_template_removes_is_an_error(learn: Any, chat: Any) -> None:
    removing = THINKING.replace("{{ m['content'] +", "{{ m['content'].split('</t>')[-1] +")
    with pytest.raises(DataError, match="removed thought") as caught:
        learn([chat("One", "hmm</t>two")], removing)
    assert caught.value.code == "data.mask"


def test_thoughts_that_the_template_strips_from_earlier_turns(learn: Any, special: Any, chat: Any) -> None:
    """Qwen3's way: the last answer keeps its thought, earlier ones lose it. The hint's way out must work."""
    stripping = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and not loop.last %}"
        "{{ m['content'].split('</t>')[-1] }}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    records = [chat("One", "hmm</t>two", "three", "well</t>four")]
    with pytest.raises(DataError, match="removed thought") as caught:
        learn(records, stripping)
    assert "data.loss_on: last" in caught.value.hint
    assert learned(learn(records, stripping, loss_on="last"), special) == [["well</t>four<|im_end|>"]]


CALLS = (  # Qwen's way with tools
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for t in m.tool_calls or [] %}{{ '<tool_call>' + (t.function | tojson) + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": '1 "é"', "deep": {"b": ["2"]}}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALLED = [
    {"role": "user", "content": "One"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "result", "name": "add"},
    {"role": "assistant", "content": "two"},
]
CALL_TEXT = '<tool_call>{"name": "add", "arguments": {"a": "1 \\"é\\"", "deep": {"b": ["2"]}}}</tool_call><|im_end|>'


def test_tool_calls_are_learned_and_results_never_are(learn: Any, special: Any) -> None:
    record = {"messages": CALLED, "tools": TOOLS}
    assert learned(learn([record], CALLS), special) == [[CALL_TEXT, "two<|im_end|>"]]
    everything = "".join(learned(learn([record], CALLS, loss_on="all"), special)[0])
    assert "One" in everything and "two" in everything and "result" not in everything
    assert "result" not in "".join(learned(learn([record], CALLS, loss_on=["user", "assistant", "system"]), special)[0])


def test_what_a_template_does_not_show_is_an_error(learn: Any) -> None:
    with pytest.raises(DataError, match="the tool call in the rendered text") as caught:
        learn([{"messages": CALLED, "tools": TOOLS}], CALLS.replace("m.tool_calls or []", "[]"))
    assert caught.value.code == "data.template" and "Jinja file" in caught.value.hint
    silent = CALLS.replace("{% if tools %}", "{% if false %}")
    with pytest.raises(DataError, match="the tool `sub` in the rendered text"):
        learn([{"messages": CALLED, "tools": [{"name": "sub", "parameters": {}}]}], silent)
    changed = CALLS.replace("(t.function | tojson)", "t.function.name + (t.function.arguments.keys() | list | tojson)")
    with pytest.raises(DataError, match="arguments in the rendered text"):
        learn([{"messages": CALLED}], changed)


def test_chosen_roles(learn: Any, special: Any, chat: Any) -> None:
    record = chat("One", "two", "three", "four", system="Be brief.")
    assert learned(learn([record], loss_on=["user"]), special) == [["One<|im_end|>", "three<|im_end|>"]]
    both = ["Be brief.<|im_end|>", "two<|im_end|>", "four<|im_end|>"]
    assert learned(learn([record], loss_on=["system", "assistant"]), special) == [both]
    with pytest.raises(ValueError, match="tool"):
        DataConfig(train=["x.jsonl"], loss_on=["tool"])


def test_weights_of_messages(learn: Any, special: Any, chat: Any) -> None:
    record = chat("One", "two", "three", "four", "five", "six")
    for number, weight in ((1, {"train": False}), (3, {"weight": 0.5})):
        record["messages"][number] |= weight
    prepared = learn([record])
    assert learned(prepared, special) == [["four<|im_end|>", "six<|im_end|>"]]
    source = prepared.train.sources[0]
    assert source.weights is not None
    assert sorted({*np.asarray(source.weights)[np.asarray(source.trained)].tolist()}) == [0.5, 1.0]


def test_each_answer_ends_an_example_of_its_own(learn: Any, special: Any, chat: Any) -> None:
    record = chat("One", "two", "three", "four")
    record["messages"][3]["train"] = True
    assert learned(learn([record], THINKING, loss_on="each"), special) == [
        ["<think>\n\n</think>\n\ntwo<|im_end|>"],
        ["<think>\n\n</think>\n\nfour<|im_end|>"],
    ]


def test_a_prompt_that_opens_a_thought_is_told(learn: Any, chat: Any) -> None:
    notes = learn([chat("One", "two")], FORCED).report.notes
    assert any("the generation prompt ends in '<think>\\n'" in note for note in notes)


def test_values_for_the_template_are_written_into_it(learn: Any, special: Any, chat: Any, tmp_path: Path) -> None:
    text = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + (mood or '') + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    )
    text += "{% if add_generation_prompt %}{{ '<|im_start|>assistant' + (mood or '') + '\n' }}{% endif %}"
    prepared = learn([chat("One", "two")], text, template_kwargs={"mood": {"a": [1, None, "é"]}["a"][2]})
    assert "<|im_start|>useré" in of(prepared, special, 1, 0).examples[0].plain()
    assert 'set mood = "é"' in prepared.template.text
    with pytest.raises(DataError, match="mod` is nothing") as caught:
        learn([chat("One", "two")], text, template_kwargs={"mod": 1})
    assert caught.value.hint == "did you mean `mood`?"


def test_the_day_is_pinned(learn: Any, special: Any, chat: Any) -> None:
    today = "{{ strftime_now('%d %b %Y') + strftime_now(\"%H\") }}"
    prepared = learn([chat("One", "two")], "\n" + today + LLAMA3)
    assert of(prepared, special, 1, 0).examples[0].plain().startswith("\n26 Jul 202400<s>")
    assert prepared.template.text == "\n" + today + LLAMA3  # what is saved asks for the day it is used on


def test_characters_that_mark_words_are_refused_where_words_must_be_marked(learn: Any, special: Any) -> None:
    with pytest.raises(DataError, match="noncharacters"):
        learn([{"messages": [*CALLED[:3], {"role": "assistant", "content": "\ufdd0two"}], "tools": TOOLS}], CALLS)


ATOMS = [
    "word",
    " ",
    "\n",
    "<think>",
    "</think>",
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "é",
    "🐈",
    "[/INST]",
    "</s>",
    "{{ x }}",
    '"',
]


@pytest.fixture(scope="module")
def maskers(make_tokenizer: Any) -> list[Masker]:
    tokenizer = make_tokenizer()
    templates = (resolve("chatml", tokenizer), Template("thinking", THINKING), Template("marked", MARKED))
    return [Masker(Renderer(template, tokenizer), tokenizer) for template in templates]


@given(st.lists(st.lists(st.sampled_from(ATOMS), min_size=1, max_size=4).map("".join), min_size=2, max_size=4))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_words_are_learned_whole_or_refused(maskers: list[Masker], texts: list[str]) -> None:
    """Headers, ends and tags within the words: what is learned is the answer's words and their end."""
    for masker in maskers:
        messages = tuple(Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts))
        example = Example(Where("f", 1), messages)
        try:
            text, found = masker.spans(example, "assistant")
        except Unsafe:
            continue
        assert found is not None
        for span in found:
            said = text[span.start : span.stop]
            assert said in (words := messages[span.message].content + "<|im_end|>", "<think>\n\n</think>\n\n" + words)


def told(masker: Masker, example: Example, loss_on: str, rendered: Any = None) -> Any:
    try:
        return masker.spans(example, loss_on, rendered)
    except Unsafe as error:
        return error.args


@given(st.lists(st.sampled_from(ATOMS), min_size=2, max_size=5), st.sampled_from(["assistant", "last", "all"]))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_what_is_known_is_what_would_be_found(maskers: list[Masker], texts: list[str], loss_on: str) -> None:
    """The short way through a plain conversation, rendered beside others, gives the spans of the long one."""
    messages = tuple(Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts))
    example = Example(Where("f", 1), messages)
    for masker in maskers:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Masker, "_known", lambda *_: None)
            alone = told(masker, example, loss_on)
        other = Example(Where("f", 2), (*messages, Message("user", "Why?"), Message("assistant", "So.")))
        assert [told(masker, example, loss_on, text) for text in masker.render([other, example])[1:]] == [alone]


@pytest.mark.parametrize(("loss_on", "short"), [("assistant", True), ("last", True), ("all", False)])
def test_plain_conversations_go_the_short_way(
    maskers: list[Masker], loss_on: str, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Masker, "_start", None)  # the long way's first step
    monkeypatch.setattr("halfbyte.data.masks.all_but_results", None)
    example = Example(Where("f", 1), (Message("user", "What?"), Message("assistant", "That.")))
    for masker in maskers:
        if short:
            assert masker.spans(example, loss_on)[1]
        else:
            with pytest.raises(TypeError):
                masker.spans(example, loss_on)


def test_one_refused_conversation_leaves_the_others(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    strict = tokenizer.chat_template.replace(
        "{% for", "{% if messages|length > 2 %}{{ raise_exception('no') }}{% endif %}{% for", 1
    )
    renderer = Renderer(Template("strict", strict), tokenizer)
    talk = (Message("user", "What?"), Message("assistant", "That."))
    assert renderer.several([talk, talk * 2], False) == [None, None]
    assert renderer.several([talk, talk], False) == [(renderer(talk), [])] * 2
    calling = (talk[0], Message("assistant", "", tool_calls=({"type": "function", "function": {"name": "f", "arguments": {}}},)))
    assert renderer.several([talk, calling], False) == [(renderer(talk), []), None]


def test_half_a_character_is_told_of(make_tokenizer: Any) -> None:
    tokenizer, problems = make_tokenizer(), Problems()
    encoder = Encoder(tokenizer, resolve("chatml", tokenizer), Options(None, "assistant"))
    good = Example(Where("f", 1), (Message("user", "What?"), Message("assistant", "That.")))
    half = replace(good, where=Where("f", 2), messages=(good.messages[0], Message("assistant", "\ud83d")))
    assert len(list(encoder.encode([good, half, Example(Where("f", 3), text="\ud83d")], problems))) == 1
    assert [str(p) for p in problems.shown] == [
        "f:2: `messages`: expected text, got half a character (U+D83D)", "f:3: `text`: expected text, got half a character (U+D83D)"
    ]  # fmt: skip
