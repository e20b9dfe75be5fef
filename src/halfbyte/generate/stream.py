"""Text in pieces while tokens arrive.

Why not decode token by token: a character can span several tokens, and many tokenizers decode a word differently after a
space. The tokens since the last settled piece are decoded together with it, and only what cannot change any more is handed on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream(BaseStreamer):
    """Receives token ids `[1]` from `generate` (the prompt, `prompt_tokens` of them, first) and calls `emit` with text."""

    def __init__(self, tokenizer: Any, prompt_tokens: int, emit: Callable[[str], object] | None) -> None:
        self._tokenizer, self._emit = tokenizer, emit
        self._skip = prompt_tokens
        self._tokens: list[int] = []
        self._settled = 0  # tokens whose text was handed on
        self._context = 0  # where decoding starts: the piece before the settled one ends here

    def put(self, value: Tensor) -> None:
        if self._emit is None:
            return
        ids = value.reshape(-1).tolist()
        skipped = min(self._skip, len(ids))
        self._skip -= skipped
        for token in ids[skipped:]:
            self._tokens.append(token)
            self._hand_on(last=False)

    def end(self) -> None:
        if self._emit is not None:
            self._hand_on(last=True)

    def _hand_on(self, last: bool) -> None:
        before = self._decode(self._tokens[self._context : self._settled])
        after = self._decode(self._tokens[self._context :])
        if len(after) > len(before) and (last or not after.endswith(_INCOMPLETE)):
            assert self._emit is not None
            self._emit(after[len(before) :])
            self._context, self._settled = self._settled, len(self._tokens)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
