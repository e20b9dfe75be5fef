"""Named chat templates, for base models whose tokenizer has none. Each is the family's own format, written here in few words.

A named template needs its family's tokens: a token that a tokenizer lacks would get an embedding row that nothing trains. What
depends on the tokenizer is written in when the template is chosen, since the text is saved for good: `FIRST` becomes the bos token
where the tokenizer begins plain text with one. Cost: nothing.
"""

from __future__ import annotations

from typing import NamedTuple

FIRST = "{{ first }}"
_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}{% endif %}"
)
_JOINED = "{% if loop.first and system is defined %}{{ system + '\\n\\n' }}{% endif %}"
_OTHER = "{% else %}{{ raise_exception('this template has system, user and assistant only, not ' + message['role']) }}{% endif %}"


def _turns(user: str, assistant: str, system: str = "", prompt: str = "") -> str:
    """The loop over messages; without `system` a system message is for the caller to place."""
    first = "{% if message['role'] == 'user' %}" + user + "{% elif message['role'] == 'assistant' %}" + assistant
    third = "{% elif message['role'] == 'system' %}" + system if system else ""
    asked = "{% if add_generation_prompt %}{{ '" + prompt + "' }}{% endif %}" if prompt else ""
    return "{% for message in messages %}" + first + third + _OTHER + "{% endfor %}" + asked


def _tagged(opening: str, closing: str, prompt: str) -> str:
    """Every turn between two tags, the role in the first."""
    turn = "{{ '" + opening.replace("ROLE", "' + message['role'] + '") + "' + message['content'] + '" + closing + "' }}"
    return _turns(turn, turn, turn, prompt)


def _inst(space: str, system: str = _SYSTEM, joined: str = _JOINED) -> str:
    """Mistral's: questions between [INST] tags, a system message before the first of them."""
    user = "{{ '[INST]" + space + "' }}" + joined + "{{ message['content'] + '[/INST]' }}"
    return FIRST + system + _turns(user, "{{ '" + space + "' + message['content'] + eos_token }}")


class Named(NamedTuple):
    """A template and the tokens that it cannot do without."""

    text: str
    tokens: tuple[str, ...] = ()


CHATML = _tagged("<|im_start|>ROLE\\n", "<|im_end|>\\n", "<|im_start|>assistant\\n")
_LLAMA2 = _SYSTEM + _turns(
    "{{ bos_token + '[INST] ' }}{% if loop.first and system is defined %}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}"
    "{% endif %}{{ message['content'] + ' [/INST]' }}",
    "{{ ' ' + message['content'] + ' ' + eos_token }}",
)
_GEMMA = (
    FIRST
    + _SYSTEM
    + _turns(
        "{{ '<start_of_turn>user\\n' }}" + _JOINED + "{{ message['content']|trim + '<end_of_turn>\\n' }}",
        "{{ '<start_of_turn>model\\n' + message['content']|trim + '<end_of_turn>\\n' }}",
        prompt="<start_of_turn>model\\n",
    )
)
_MISTRAL7 = _inst(
    "",
    system=_SYSTEM + "{% if system is defined %}{{ '[SYSTEM_PROMPT]' + system + '[/SYSTEM_PROMPT]' }}{% endif %}",
    joined="",
)
_VICUNA = FIRST + _turns(
    "{{ 'USER: ' + message['content'] + ' ' }}",
    "{{ 'ASSISTANT: ' + message['content'] + eos_token }}",
    "{{ message['content'] + ' ' }}",
    "ASSISTANT:",
)
_ALPACA = FIRST + _turns(
    "{{ '### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' }}",
    "{{ message['content'] + eos_token }}{% if not loop.last %}{{ '\\n\\n' }}{% endif %}",
    "{{ message['content'] + '\\n\\n' }}",
)
_PLAIN = FIRST + _turns(
    "{{ message['content'] + '\\n' }}",
    "{{ message['content'] + eos_token }}{% if not loop.last %}{{ '\\n' }}{% endif %}",
    "{{ message['content'] + '\\n' }}",
)
NAMED = {
    "chatml": Named(CHATML, ("<|im_start|>", "<|im_end|>")),
    "alpaca": Named(_ALPACA),
    "plain": Named(_PLAIN),
    "vicuna": Named(_VICUNA),
    "llama2": Named(_LLAMA2, ("<s>", "</s>")),
    "llama3": Named(
        FIRST
        + _tagged(
            "<|start_header_id|>ROLE<|end_header_id|>\\n\\n",
            "<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\\n\\n",
        ),
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "mistral": Named(_inst(" "), ("[INST]", "[/INST]")),
    "mistral-tekken": Named(_inst(""), ("[INST]", "[/INST]")),
    "mistral-v7": Named(_MISTRAL7, ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")),
    "gemma": Named(_GEMMA, ("<start_of_turn>", "<end_of_turn>")),
    "phi3": Named(_tagged("<|ROLE|>\\n", "<|end|>\\n", "<|assistant|>\\n"), ("<|user|>", "<|assistant|>", "<|end|>")),
    "zephyr": Named(
        _turns(
            "{{ '<|user|>\\n' + message['content'] + eos_token + '\\n' }}",
            "{{ '<|assistant|>\\n' + message['content'] + eos_token + '\\n' }}",
            "{{ '<|system|>\\n' + message['content'] + eos_token + '\\n' }}",
            "<|assistant|>\\n",
        )
    ),
}
