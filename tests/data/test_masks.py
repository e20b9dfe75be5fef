"""Loss masks: the decoded learned text is the answer and its end, under templates of every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfbyte.data.config import DataConfig
from halfbyte.data.prepare import Prepared, prepare
from halfbyte.data.preview import of
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
