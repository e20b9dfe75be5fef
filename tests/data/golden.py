# ruff: noqa: RUF001 (DeepSeek's own bar)
"""An independent judge of loss masks: conversations of unique words, and by hand, for each template family, what may
stand around them.

It looks at token ids and the mask alone. A mask is right when every learned run holds the words of one answer, all of them and no
others, follows the family's header, ends with its end-of-turn token, and otherwise holds only what the model writes itself.
"""

from __future__ import annotations

import copy
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.data.encode import Encoded, Encoder, Options
from halfbyte.data.problems import Problems, Where
from halfbyte.data.templates import Template
from halfbyte.data.turns import Example, Message
from halfbyte.errors import DataError

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Looks up the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Where"}}, "required": ["city"]},
    },
}
SPECIAL = re.compile(
    r"<\|[^|<>\s{}'\"]+\|>|<｜[^<>\s]+｜>|</?s>|\[/?(?:INST|SYSTEM_PROMPT)\]|<\|(?:turn|tool|tool_call|tool_response|channel|\")>"
    r"|<(?:start_of_turn|end_of_turn|end_of_utterance|bos|eos|BOS_TOKEN)>|<(?:turn|tool|tool_call|tool_response|channel)\|>|<\|\"\|>"
)


def _call(word: str) -> tuple[dict[str, Any], ...]:
    return ({"type": "function", "function": {"name": "get_weather", "arguments": {"city": word}}},)


def _says(text: str, **more: Any) -> Message:
    return Message("assistant", text, **more)


def _asks(text: str) -> Message:
    return Message("user", text)


ASK, SAY, RESULT = _asks("ask-one"), _says("say-one"), Message("tool", "result-one", name="get_weather")
AGAIN = (_asks("ask-two"), _says("say-two"))
GRID: dict[str, tuple[Message, ...]] = {
    "one turn": (ASK, SAY),
    "three turns": (ASK, SAY, *AGAIN, _asks("ask-three"), _says("say-three")),
    "system message": (Message("system", "rule-one"), ASK, SAY, *AGAIN),
    "odd whitespace": (_asks("  ask-one\n"), _says("\n  say-one \n\n"), _asks("\task-two "), _says(" say-two\n")),
    "unicode": (_asks("ask-one 二 🐈"), _says("say-one 二つ 🐈‍⬛ é"), _asks("Ω≈ç ask-two"), _says("ﬁ say-two ñ")),
    "thought": (ASK, _says("say-one", reasoning="muse-one")),
    "thoughts in two turns": (ASK, _says("say-one", reasoning="muse-one"), AGAIN[0], _says("say-two", reasoning="muse-two")),
    "thought in the content": (ASK, _says("<think>\nmuse-one\n</think>\n\nsay-one")),
    "tool call": (ASK, _says("", tool_calls=_call("call-one")), RESULT, SAY),
    "tool call at the end": (ASK, _says("", tool_calls=_call("call-one"))),
    "words and tool call": (
        ASK,
        _says("say-one", tool_calls=_call("call-one")),
        RESULT,
        _says("say-two"),
        AGAIN[0],
        _says("say-three"),
    ),
    "empty answer": (ASK, _says(""), *AGAIN),
    "opening answer": (SAY, ASK, _says("say-two")),
}
WORD = re.compile(r"(?:ask|say|muse|call|rule|result)-(?:one|two|three)")


@dataclass(frozen=True)
class Family:
    """By hand: what may stand before an answer, what ends it, and the eos and bos of its tokenizer.

    lead: what the model itself writes around plain words. foreign: what belongs to other turns. again: how often the header may
    come within an answer (channels of one turn).
    """

    headers: tuple[str, ...]
    ends: tuple[str, ...]
    foreign: str
    eos: str
    bos: str = "<s>"
    lead: str = r"\s*"


_THINK = r"\s*(?:<think>\s*</think>|</think>)?\s*"
_CHATML = Family(
    tuple("<|im_start|>assistant\n" + opened for opened in ("", "<think>\n", "<think>", "<think>\n\n</think>\n\n")),
    ("<|im_end|>",), r"<\|im_start\|>", "<|im_end|>", "<|begin_of_text|>", _THINK,
)  # fmt: skip
_GEMMA4 = Family(
    ("<|turn>model\n", "<tool_response|>"), ("<turn|>", "<|tool_response>"), r"<\|turn>|<tool_response\|>", "<turn|>", "<bos>"
)
_VISION = Family(("Assistant:",), ("<end_of_utterance>",), "User:|Assistant:|System:", "<end_of_utterance>", "<|begin_of_text|>")
FAMILIES: dict[str, Family] = {
    "cohere2": Family(
        ("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>",), ("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",),
        "START_OF_TURN", "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>",
    ),
    "cohere": Family(
        ("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",), ("<|END_OF_TURN_TOKEN|>",), "START_OF_TURN", "<|END_OF_TURN_TOKEN|>",
        "<BOS_TOKEN>",
    ),
    "deepseek": Family(
        ("<｜Assistant｜>", "<｜Assistant｜><think>\n", "<｜tool▁outputs▁end｜>"), ("<｜end▁of▁sentence｜>",),
        "<｜User｜>|<｜Assistant｜>|outputs", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>",
    ),
    "diffusion_gemma": _GEMMA4,
    "gemma4": _GEMMA4,
    "gemma": Family(("<start_of_turn>model\n",), ("<end_of_turn>",), "<start_of_turn>", "<eos>", "<bos>"),
    "glm": Family(("<|assistant|>",), ("<|user|>", "<|observation|>"), r"<\|(?:assistant|system)\|>", "<|endoftext|>", lead=_THINK),
    "gptoss": Family(
        ("<|start|>assistant",), ("<|return|>", "<|end|>", "<|call|>"), r"<\|start\|>(?!assistant)", "<|return|>",
        lead=r"<\|channel\|>final<\|message\|>\s*",
    ),
    "muse": Family(("<|start|>assistant",), ("<|eot|>",), r"<\|start\|>(?!assistant)", "<|eot|>", lead=r" to=user<\|message\|>\s*"),
    "idefics": _VISION,
    "smolvlm": _VISION,
    "llama3": Family(
        ("<|start_header_id|>assistant<|end_header_id|>\n\n",), ("<|eot_id|>",), "header_id", "<|eot_id|>", "<|begin_of_text|>"
    ),
    "llava": Family(("[/INST]",), ("</s>",), r"\[/?INST\]", "</s>"),
    "phi3": Family(("<|assistant|>\n",), ("<|end|>",), r"<\|(?:user|assistant|system)\|>", "<|endoftext|>"),
    "phi4": Family(("<|im_start|>assistant<|im_sep|>",), ("<|im_end|>",), r"<\|im_", "<|im_end|>", "<|endoftext|>"),
    "falcon3": Family(("<|assistant|>\n",), ("<|endoftext|>",), r"<\|(?:user|assistant|system)\|>", "<|endoftext|>"),
    "falcon": Family(("Falcon:",), ("<|endoftext|>",), "User:", "<|endoftext|>"),
    "lfm": _CHATML, "nemotron": _CHATML, "qwen": _CHATML, "chatml": _CHATML,
    "alpaca": Family(("### Response:\n",), ("</s>",), "###", "</s>"),
    "plain": Family(("\n",), ("</s>",), "ask-", "</s>"),
    "vicuna": Family(("ASSISTANT:",), ("</s>",), "USER|ASSISTANT", "</s>"),
    "llama2": Family(("[/INST]",), ("</s>",), r"\[/?INST\]", "</s>"),
    "mistral": Family(("[/INST]",), ("</s>",), r"\[/?INST\]", "</s>"),
    "zephyr": Family(("<|assistant|>\n",), ("</s>",), r"<\|(?:user|assistant|system)\|>", "</s>"),
}  # fmt: skip


def family(name: str) -> Family:
    """The family of a template, by the longest beginning of its name."""
    return FAMILIES[max((key for key in FAMILIES if name.startswith(key)), key=len)]


def fitted(tokenizer: Any, name: str, text: str) -> Any:
    """A copy of a tokenizer with the special tokens that a template writes, as the family's own tokenizer has them."""
    kind = family(name)
    copied = copy.deepcopy(tokenizer)
    tokens = dict.fromkeys([*SPECIAL.findall(text), *(e for end in kind.ends for e in SPECIAL.findall(end)), kind.eos, kind.bos])
    copied.add_special_tokens({"additional_special_tokens": list(tokens)})
    copied.eos_token, copied.bos_token, copied.pad_token = kind.eos, kind.bos, kind.eos
    return copied


@functools.lru_cache(maxsize=4)
def encoder(tokenizer: Any, name: str, text: str, loss_on: str) -> Encoder:
    """One encoder for all conversations of a template: it is probed once."""
    return Encoder(tokenizer, Template(name, text), Options(None, loss_on))


def encoded(tokenizer: Any, name: str, text: str, messages: tuple[Message, ...], loss_on: str = "assistant") -> Encoded | str:
    """An example as tokens, or the code of the error that refused it."""
    problems = Problems()
    tools = (TOOL,) if any(message.tool_calls for message in messages) else ()
    try:
        found = list(encoder(tokenizer, name, text, loss_on).encode([Example(Where("g", 1), messages, tools=tools)], problems))
    except DataError as error:
        return error.code
    return problems.shown[0].code if problems.total else found[0]


def segments(tokenizer: Any, example: Encoded) -> list[tuple[bool, str]]:
    """Runs of tokens that are learned or not, as text."""
    parts: list[tuple[bool, list[int]]] = []
    for token, learned in zip(example.ids.tolist(), example.trained.tolist(), strict=True):
        if not parts or parts[-1][0] != learned:
            parts.append((learned, []))
        parts[-1][1].append(token)
    return [(k, tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) for k, ids in parts]


def fault(kind: Family, messages: tuple[Message, ...], runs: list[tuple[bool, str]]) -> str:
    """What is wrong with a mask; empty when it is right."""
    answers = [message for message in messages if message.role == "assistant"]
    learned = [i for i, (mark, _) in enumerate(runs) if mark]
    if len(learned) != len(answers):
        return f"{len(learned)} learned runs for {len(answers)} answers"
    for answer, at in zip(answers, learned, strict=True):
        text = runs[at][1]
        before, after = runs[at - 1][1] if at else "", runs[at + 1][1] if at + 1 < len(runs) else ""
        calls = [call["function"]["arguments"]["city"] for call in answer.tool_calls]
        wanted = WORD.findall(f"{answer.reasoning} {answer.content} {' '.join(calls)}")
        if sorted(WORD.findall(text)) != sorted(wanted):  # some templates write the call before the words
            return f"{WORD.findall(text)} learned instead of {wanted}"
        opening = answer is messages[0]  # nobody asked, so no header need separate it from the beginning
        if not opening and not any(before.rstrip(" ").endswith(header.rstrip(" ")) for header in kind.headers):
            return f"the header is not right before the answer: {before[-30:]!r}"
        end = next((end for end in kind.ends if text.endswith(end)), None)
        if end is None or any(after.startswith(end) for end in kind.ends):
            return f"the answer does not end with its end of turn: {text[-20:]!r}, then {after[:20]!r}"
        said = text[: -len(end)]
        if re.search(kind.foreign, said):
            return f"what belongs to another turn is learned: {said!r}"
        if not answer.reasoning and not calls and "<think>" not in answer.content:
            rest = re.fullmatch(rf"({kind.lead}){re.escape(answer.content.strip())}\s*", said)
            if rest is None:
                return f"more than the words is learned: {said!r}"
    return ""


def trl_templates(folder: Path) -> dict[str, str]:
    """TRL's chat templates, from a wheel of it that was unpacked into a folder."""
    files = sorted((folder / "trl" / "chat_templates").glob("*.jinja"))
    return {file.stem: file.read_text(encoding="utf-8") for file in files}
