# ruff: noqa: RUF001 (DeepSeek's own bar)
"""Golden masks: every template family times a grid of conversations, by a judge that knows nothing of how masks are found."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.golden import GRID, TOOL, encoded, family, fault, fitted, segments, trl_templates
from halfbyte.data.encode import Encoded, Encoder, Options
from halfbyte.data.problems import Problems, Where
from halfbyte.data.rendering import PINNED, Form, Renderer, chat
from halfbyte.data.templates import GENERATION, NAMED, Template, resolve
from halfbyte.data.turns import Example
from halfbyte.errors import DataError
from support import trl_wheel

DOCS = Path(__file__).parents[2] / "docs" / "concepts" / "templates.md"
REFUSED = {"data.mask", "data.template", "data.no-eot"}
QUESTIONS = {"one turn", "three turns", "odd whitespace", "unicode", "thought in the content"}  # what every named template takes

# Manners of families that no named template has, in our own words.
STRIPPING = (  # Qwen3: thoughts of earlier turns are taken out, the last answer always has one
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\n' }}{% set words = m.content %}"
    "{% if m.role == 'assistant' %}{% set muse = m.reasoning_content or '' %}{% if '</think>' in words %}"
    "{% set muse = words.split('</think>')[0].split('<think>')[-1].strip() %}{% set words = words.split('</think>')[-1].strip() %}"
    "{% endif %}{% if loop.last %}{{ '<think>\n' + muse + '\n</think>\n\n' }}{% endif %}{% endif %}{{ words }}"
    "{% for t in m.tool_calls or [] %}{{ '\n<tool_call>\n' + (t.function | tojson) + '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNCLOSED = (  # GLM: no turn is closed, the next one's token ends an answer
    "{% if tools %}{{ '<|system|>\n' + (tools | tojson) }}{% endif %}{% for m in messages %}"
    "{{ '<|' + ('observation' if m.role == 'tool' else m.role) + '|>\n' + m.content|trim }}"
    "{% for t in m.tool_calls or [] %}{{ '\n<tool_call>' + (t.function | tojson) + '</tool_call>' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CHANNELS = (  # gpt-oss: several messages a turn, an end of its own for the last answer and for calls, results quoted
    "{{ '<|start|>system<|message|>' + strftime_now('%Y-%m-%d') + (tools | tojson if tools else '') + '<|end|>' }}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}{% if m.tool_calls %}"
    "{{ '<|start|>assistant to=' + m.tool_calls[0].function.name + '<|message|>' + (m.tool_calls[0].function.arguments | tojson) }}"
    "{{ '<|call|>' }}{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}{% else %}"
    "{{ '<|start|>' + m.role + '<|message|>' + (m.content | tojson if m.role == 'tool' else m.content) + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
MOVING = (  # Mistral: the system message goes into the last question
    "{{ bos_token }}{% set ns = namespace(rule='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.rule = m.content %}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + (ns.rule + '\n\n' if loop.index0 >= messages|length - 2 else '') }}"
    "{{ m.content + '[/INST]' }}"
    "{% elif m.tool_calls %}{{ raise_exception('no tools') }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
PARTS = (  # vision models: the content is a list of parts
    "{% for m in messages %}{{ m.role|capitalize + ':' }}{% for part in m.content %}{{ ' ' + part['text'] }}{% endfor %}"
    "{{ '<end_of_utterance>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QUOTING = (  # DeepSeek: arguments are joined as text, content beside a call must be null, the prompt opens a thought
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'system' %}{{ m.content }}{% elif m.role == 'tool' %}"
    "{{ '<｜tool▁outputs▁begin｜>' + m.content + '<｜tool▁outputs▁end｜>' }}{% elif m.content is none %}"
    "{{ '<｜Assistant｜>' + m.tool_calls[0].function.name + '\n' + m.tool_calls[0].function.arguments + eos_token }}"
    "{% else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
SEPARATED = (  # Phi 4: a token between role and words
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
BARE = (  # Falcon 3: only answers are closed, and a line break follows all but the last
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '' if loop.last and m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TURNS = (  # Command R: roles are tokens; content is trimmed
    "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}"
    "{{ {'user': '<|USER_TOKEN|>', 'system': '<|SYSTEM_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}[m.role] }}"
    "{{ m.content|trim + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
DEFAULT = (  # SmolLM 2, Qwen 2.5: a system message where the conversation has none
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPACED = (  # Mistral v1: spaces on both sides of a question, questions and answers in turn or an error
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + eos_token }}{% endfor %}"
)
ENDLESS = (  # Falcon 1: names only, and no end
    "{% for m in messages %}{{ ('User: ' if m.role == 'user' else 'Falcon: ') + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Falcon:' }}{% endif %}"
)
STRUCTURED = {"thought", "thoughts in two turns", "tool call", "tool call at the end", "words and tool call", "empty answer"}
MANNERS = {
    "phi4 separated": (SEPARATED, STRUCTURED),
    "falcon3 bare": (BARE, STRUCTURED),
    "cohere turns": (TURNS, STRUCTURED),
    "chatml default": (DEFAULT, STRUCTURED),
    "mistral spaced": (SPACED, {*STRUCTURED, "system message", "opening answer"}),
    "qwen stripping": (STRIPPING, {"thoughts in two turns", "empty answer"}),
    "glm unclosed": (UNCLOSED, {"thought", "thoughts in two turns", "empty answer"}),
    "gptoss channels": (CHANNELS, {"words and tool call", "empty answer"}),
    "mistral moving": (MOVING, {k for k in GRID if k not in QUESTIONS and k not in ("system message", "opening answer")}),
    "idefics parts": (PARTS, {k for k in GRID if k not in QUESTIONS and k not in ("system message", "opening answer")}),
    "deepseek quoting": (QUOTING, {"thought", "thoughts in two turns", "thought in the content", "words and tool call",
                                    "empty answer"}),
}  # fmt: skip


def verdict(tokenizer: Any, name: str, text: str, case: str, loss_on: str = "assistant") -> str:
    """exact, the code of a refusal, or what is wrong."""
    found = encoded(tokenizer, name, text, GRID[case], loss_on)
    if isinstance(found, str):
        return found
    messages = GRID[case]
    return fault(family(name), messages, segments(tokenizer, found)) or "exact"


@pytest.mark.parametrize("name", MANNERS)
def test_manners(name: str, make_tokenizer: Callable[..., Any]) -> None:
    text, refused = MANNERS[name]
    tokenizer = fitted(make_tokenizer(), name, text)
    found = {case: verdict(tokenizer, name, text, case) for case in GRID}
    assert {case for case, said in found.items() if said in REFUSED} == refused
    assert {said for case, said in found.items() if case not in refused} == {"exact"}


def test_a_template_without_an_end_is_refused_whatever_is_said(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = fitted(make_tokenizer(), "falcon endless", ENDLESS)
    assert {verdict(tokenizer, "falcon endless", ENDLESS, case) for case in GRID} == {"data.no-eot"}


@pytest.mark.parametrize("name", NAMED)
def test_named_templates(name: str, make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = fitted(make_tokenizer(), name, NAMED[name].text + "".join(NAMED[name].tokens))
    text = resolve(name, tokenizer).text
    found = {case: verdict(tokenizer, name, text, case) for case in GRID}
    assert {found[case] for case in QUESTIONS | {"system message"}} == {"exact"}
    assert set(found.values()) <= {"exact", *REFUSED}
    assert all(found[case] in REFUSED for case in ("tool call", "words and tool call", "thought", "empty answer"))


def last_of_each(tokenizer: Any, name: str, text: str) -> str:
    """What is wrong with two turns with thoughts under `loss_on: each`."""
    messages = GRID["thoughts in two turns"]
    problems = Problems()
    try:
        parts = list(
            Encoder(tokenizer, Template(name, text), Options(None, "each")).encode([Example(Where("g", 1), messages)], problems)
        )
    except DataError as error:
        return error.code
    if problems.total:
        return problems.shown[0].code
    first, second = (segments(tokenizer, part) for part in parts)
    last = max(i for i, (learned, _) in enumerate(second) if learned)
    before = "".join(words for _, words in second[:last])
    return fault(family(name), messages[:2], first) or fault(family(name), messages[2:], [(False, before), *second[last:]])


def test_each_answer_as_an_example_of_its_own(make_tokenizer: Callable[..., Any]) -> None:
    """The way out where earlier thoughts are stripped: two examples, each with its thought."""
    tokenizer = fitted(make_tokenizer(), "qwen", STRIPPING)
    messages = GRID["thoughts in two turns"]
    encoder = Encoder(tokenizer, Template("qwen", STRIPPING), Options(None, "each"))
    first, second = encoder.encode([Example(Where("g", 1), messages)], Problems())
    assert fault(family("qwen"), messages[:2], segments(tokenizer, first)) == ""
    runs = [text for mark, text in segments(tokenizer, second) if mark]
    assert runs == ["<think>\nmuse-two\n</think>\n\nsay-two<|im_end|>"]
    assert first.group == second.group != ""


@pytest.mark.parametrize(("name", "end"), [("gptoss channels", "<|call|>"), ("glm unclosed", "<|observation|>")])
def test_the_ends_of_tool_calls_count_as_ends(name: str, end: str, make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = fitted(make_tokenizer(), name, MANNERS[name][0])
    encoder = Encoder(tokenizer, Template(name, MANNERS[name][0]), Options(None, "assistant"))
    for case, count in (("one turn", 0), ("tool call at the end", 1), ("tool call", 1)):
        list(encoder.encode([Example(Where("g", 1), GRID[case], tools=(TOOL,))], Problems()))
        assert encoder.end_ids().count(tokenizer.convert_tokens_to_ids(end)) == count


def test_the_judge_sees_every_fault(make_tokenizer: Callable[..., Any]) -> None:
    """One token more or less at either end of any answer, or an answer left out, and the judge says so."""
    text = NAMED["chatml"].text
    tokenizer = fitted(make_tokenizer(), "chatml", text)
    messages = GRID["three turns"]
    right = encoded(tokenizer, "chatml", text, messages)
    assert isinstance(right, Encoded)
    edges = np.flatnonzero(np.diff(right.trained.astype(np.int8)))
    for edge in edges:
        for at in (edge, edge + 1):
            wrong = right.trained.copy()
            wrong[at] = not wrong[at]
            assert fault(family("chatml"), messages, segments(tokenizer, right._replace(trained=wrong))), at
    assert fault(family("chatml"), messages, segments(tokenizer, right._replace(trained=np.ones_like(right.trained))))


@pytest.mark.parametrize("name", [*NAMED, *MANNERS])
def test_renders_are_what_transformers_renders(name: str, make_tokenizer: Callable[..., Any]) -> None:
    """Byte for byte, the prompt of every turn too: `chat` asks as training did."""
    base = make_tokenizer()
    text = MANNERS[name][0] if name in MANNERS else NAMED[name].text
    tokenizer = fitted(base, name, text + "".join(NAMED[name].tokens if name in NAMED else ()))
    text = text if name in MANNERS else resolve(name, tokenizer).text
    tokenizer.chat_template = text
    renderer = Renderer(Template(name, text), tokenizer)
    form = Form(parts=name == "idefics parts")
    today = datetime.date.today().isoformat()
    for case in QUESTIONS:
        for stop in range(1, len(GRID[case]) + 1):
            part = GRID[case][:stop]
            for prompt in (False, True):
                theirs = tokenizer.apply_chat_template(chat(part, form), tokenize=False, add_generation_prompt=prompt)
                assert renderer(part, prompt=prompt) == theirs.replace(today, PINNED.isoformat())


@pytest.fixture(scope="module")
def smollm2() -> Any:
    from transformers import AutoTokenizer

    from halfbyte.checkpoints import bundled

    file = Path(bundled.fetch())
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory, smollm2: Any) -> dict[str, tuple[Any, str]]:
    """Template name -> SmolLM2's tokenizer with its special tokens, and its text."""
    folder = trl_wheel(tmp_path_factory)
    return {name: (fitted(smollm2, name, text), text) for name, text in trl_templates(folder).items()}


@pytest.mark.slow
def test_trl_templates_are_masked_right_or_refused(trl: dict[str, tuple[Any, str]]) -> None:
    """All of TRL's templates times the grid: exact, or an error. The counts are those of the page."""
    assert len(trl) == 72
    said = {(name, case): verdict(tokenizer, name, text, case) for name, (tokenizer, text) in trl.items() for case in GRID}
    assert {key: what for key, what in said.items() if what not in {"exact", *REFUSED}} == {}
    rows = [f"| {case} | {sum(said[name, case] == 'exact' for name in trl)} |" for case in GRID]
    page = DOCS.read_text(encoding="utf-8")
    assert [row for row in rows if row not in re.sub(r"( \| \d+)( \|.*)", r"\1 |", page)] == []
    each = [name for name, (tokenizer, text) in trl.items() if last_of_each(tokenizer, name, text) == ""]
    assert len(each) == 30 and "all 22 are exact with `loss_on: each`" in page
    counts = Counter(said.values())
    assert f"{counts['exact']} are exact and {len(said) - counts['exact']} are refused" in " ".join(page.split())


@pytest.mark.slow
def test_what_transformers_marks_holds_what_we_learn(trl: dict[str, tuple[Any, str]]) -> None:
    """Where a template has generation blocks, transformers' mask is ours or more. The counts are the page's."""
    compared: Counter[str] = Counter()
    for name, (tokenizer, text) in trl.items():
        if not GENERATION.search(text):
            continue
        tokenizer.chat_template = text
        for case, messages in GRID.items():
            ours = encoded(tokenizer, name, text, messages)
            if isinstance(ours, str):
                continue
            tools = [TOOL] if any(m.tool_calls for m in messages) else None
            form = Renderer(Template(name, text), tokenizer).form(messages)
            theirs = tokenizer.apply_chat_template(
                chat(messages, form), tools=tools, return_dict=True, return_assistant_tokens_mask=True
            )
            mask = np.asarray(theirs["assistant_masks"], dtype=np.bool_)
            marked = segments(tokenizer, Encoded(Where("g", 1), np.asarray(theirs["input_ids"], dtype=np.uint32), mask))
            mine, other = ("".join(t for m, t in runs if m) for runs in (segments(tokenizer, ours), marked))
            kind = family(name)
            compared["same" if mine == other else "more"] += 1
            bare = re.sub("|".join(map(re.escape, kind.ends)) + r"|\s", "", mine)
            rest = iter(re.sub(r"\s", "", other))
            assert all(letter in rest for letter in bare.replace("\N{REPLACEMENT CHARACTER}", "")) or case == "unicode", (
                name,
                case,
            )
    page = " ".join(DOCS.read_text(encoding="utf-8").split())
    assert f"in {compared['same']} of {compared.total()} cases it is the same. In the other {compared['more']}" in page
