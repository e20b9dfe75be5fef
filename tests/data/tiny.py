"""A tokenizer for tests: byte-level BPE of 480 words with the chatml tokens, a bos and an eos."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SAMPLE = [
    "user\nWhat is it?\n\nassistant\n\nIt is a cat.\n",
    "system\nYou are kind.\n\n",
    "One, two, three and four. Qwertz asks Uiop replies",
    "The quick brown fox jumps over the lazy dog. A journey of a thousand miles begins with a single step.",
]


def byte_level(template: str | None = CHATML, specials: tuple[str, ...] = (), **options: Any) -> Any:
    """Builds one; `template=None` leaves it without a chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokens = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", *specials]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        SAMPLE * 3, trainers.BpeTrainer(vocab_size=480, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False)
    )
    options = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **options}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **options)
    tokenizer.chat_template = template
    return tokenizer
