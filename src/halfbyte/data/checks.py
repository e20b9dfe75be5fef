"""What must hold before the first step: each check has an id, a sentence and a fix.

    data.empty               there is nothing to learn from
    data.zero-trained        no token of a source would be learned
    data.no-eot              answers would be learned without their end (raised by masks.py)
    data.double-bos          examples begin with two bos tokens
    data.new-special-tokens  tokens whose embedding rows do not exist, or were never trained and stay frozen
    data.too-long            too much would be dropped because it does not fit a row

Why errors: each of these leaves a normal loss curve and a useless model. Cost: a pass over the token arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from halfbyte.data.tokens import Tokens, TokenSet, windows
from halfbyte.errors import DataError

DROP_LIMIT = 0.05  # share of the trained tokens that may be dropped without a word from the user


def source(tokens: Tokens, loss_on: str | Sequence[str]) -> None:
    """Raises `data.empty` or `data.zero-trained` for a source without anything to learn."""
    if not len(tokens):
        reasons = "; ".join(tokens.notes)
        message = f"`{tokens.name}` holds no usable example{f' ({reasons})' if reasons else ''}"
        raise DataError(message, hint="every example needs an answer by the assistant, or text", code="data.empty")
    if not tokens.trained.any():
        message = f"no token of `{tokens.name}` would be learned with `loss_on: {loss_on}`"
        raise DataError(
            message, hint="look at it with `halfbyte data preview`, or set `data.loss_on: all`", code="data.zero-trained"
        )


def double_bos(tokens: Tokens, tokenizer: Any) -> None:
    """Raises `data.double-bos` when any example begins with two bos tokens."""
    starts = tokens.offsets[:-1][np.diff(tokens.offsets) >= 2]
    bos = tokenizer.bos_token_id
    if bos is None or not len(starts):
        return
    doubled = np.zeros(len(starts), dtype=np.bool_)
    for at, part in windows(tokens.ids):
        first, last = np.searchsorted(starts, [at, at + len(part) - 1])
        here = starts[first:last] - at
        doubled[first:last] = (part[here] == bos) & (part[here + 1] == bos)
    if not doubled.any():
        return
    first = int(np.searchsorted(tokens.offsets, starts[np.flatnonzero(doubled)[0]]))
    message = (
        f"{int(doubled.sum())} examples of `{tokens.name}` begin with two {tokenizer.bos_token} tokens, first {tokens.where(first)}"
    )
    hint = "write the bos token in one place: the chat template, not the data"
    raise DataError(message, hint=hint, code="data.double-bos")


def too_long(longest: int, tokens: int, dropped: int, lost: int, total: int, where: list[str], policy: str) -> None:
    """Raises `data.too-long` when the policy is `error`, or when dropping would lose more than 5 % of the trained tokens."""
    if not dropped:
        return
    share = lost / max(1, total)
    if policy == "error" or share > DROP_LIMIT:
        places = ", ".join(where[:3]) + (", ..." if dropped > 3 else "")
        message = f"{dropped} examples are longer than a row of {tokens} tokens ({share:.1%} of the trained tokens): {places}"
        policies = "`data.too_long: split`, `truncate_left` or `truncate_right`"
        hint = f"set `data.tokens: {-(-longest // 64) * 64}` (the longest has {longest}), or {policies}"
        raise DataError(message, hint=hint, code="data.too-long")


def embeddings(data: TokenSet, tokenizer: Any, weight: torch.Tensor, trainable: bool) -> None:
    """Raises `data.new-special-tokens` for tokens of the data whose embedding row is missing, or frozen and never trained.

    weight [V, H]: the input embedding. Called once the base is loaded. A row that is zero, or the same as another token's row,
    was made by resizing and never trained; with a frozen embedding it will not be either.
    """
    seen = np.zeros(weight.shape[0], dtype=np.bool_)
    for _, part in (window for s in data.sources for window in windows(s.ids)):
        seen = np.pad(seen, (0, max(0, int(part.max(initial=0)) + 1 - len(seen))))
        seen[part] = True
    used = np.flatnonzero(seen)
    beyond = used[used >= weight.shape[0]]
    if len(beyond):
        message = f"the data uses token {_names(tokenizer, beyond)}, but the model's embedding has {weight.shape[0]} rows only"
        raise DataError(message, hint="use the tokenizer that belongs to this model", code="data.new-special-tokens")
    if trainable:
        return
    specials = sorted({*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()} & set(used.tolist()))
    rows = weight.detach()[torch.tensor(specials, dtype=torch.long, device=weight.device)].float()
    _, group, counts = torch.unique(rows, dim=0, return_inverse=True, return_counts=True)
    dead = np.asarray(specials)[((rows == 0).all(dim=1) | (counts[group] > 1)).cpu().numpy()] if specials else np.zeros(0)
    if len(dead):
        names = _names(tokenizer, dead)
        message = f"the data uses special tokens that this model never learned: {names}; their embedding rows are frozen"
        hint = "use a template without them (`data.template: alpaca` or `plain`), or add `adapter.modules_to_save: [embed_tokens]`"
        raise DataError(message, hint=hint, code="data.new-special-tokens")


def _names(tokenizer: Any, ids: Any) -> str:
    shown = ", ".join(f"{tokenizer.convert_ids_to_tokens(int(i))!r} ({int(i)})" for i in ids[:5])
    return shown + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
