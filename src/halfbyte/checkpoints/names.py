"""Which tensor of a checkpoint is which parameter of the model, with every mismatch told at once.

Why by hand and not `load_state_dict`: the model is a skeleton without memory, tensors arrive one by one, and a wrong or missing
name must be known before the first byte is read.

Rules, in order: the renamings that transformers registers for the model; the base-model prefix added or taken away (`h.0.` is
`transformer.h.0.`); tied weights need one of their names; and `IGNORED`, the only unexpected tensors that are allowed.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from halfbyte.checkpoints.shards import Header
from halfbyte.errors import CheckpointError

IGNORED = {
    r"\.attn\.(masked_)?bias$": "causal mask of an old GPT-2 file, made anew by the model",
    r"\.attention\.(masked_)?bias$": "causal mask of an old GPT-NeoX or GPT-J file, made anew by the model",
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$": "rotary table, made anew by the model",
}
SHOWN = 20


@dataclass(frozen=True)
class Match:
    """tensors: model name to checkpoint name. ignored: checkpoint name to the reason. both: tied by the config, both stored."""

    tensors: dict[str, str]
    ignored: dict[str, str]
    both: list[tuple[str, str]]


def match(model: PreTrainedModel, headers: dict[str, Header], transposed: set[str]) -> Match:
    """Pairs every parameter and persistent buffer of `model` with a tensor of `headers`.

    transposed: weights that the model holds as `[K, N]` (Conv1D); a packed tensor has `[N, K]` for them. Raises CheckpointError
    that lists every missing, unexpected and misshapen tensor.
    """
    wanted: dict[str, Tensor] = model.state_dict()
    found, ignored, unexpected = _assign(model, headers, wanted)
    missing = [name for name in wanted if name not in found]
    both = []
    for target, source in model.all_tied_weights_keys.items():
        if target in found and source in found:
            both.append((target, source))
        elif target in found and source in missing:
            found[source] = found.pop(target)
            missing.remove(source)
        elif target in missing:
            missing.remove(target)
    misshapen = []
    for name, origin in found.items():
        header, expected = headers[origin], tuple(wanted[name].shape)
        if header.packed and name in transposed:
            expected = expected[::-1]
        if header.shape != expected:
            misshapen.append(f"{origin} {list(header.shape)}, the model's {name} is {list(expected)}")
    if missing or unexpected or misshapen:
        raise _mismatch(missing, unexpected, misshapen)
    return Match(found, ignored, both)


def _assign(
    model: PreTrainedModel, headers: dict[str, Header], wanted: dict[str, Tensor]
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Model name to checkpoint name; what is ignored, by rule; what nobody wants."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    rules = {**IGNORED, **dict.fromkeys(model._keys_to_ignore_on_load_unexpected or (), "transformers ignores it for this model")}
    found: dict[str, str] = {}
    ignored: dict[str, str] = {}
    unexpected: list[str] = []
    for origin in headers:
        name = origin
        if name not in wanted:
            name, joined = rename_source_key(origin, renamings, converters, model.base_model_prefix, wanted)
            if joined is not None:
                kind = model.config.model_type
                raise CheckpointError(
                    f"{origin}: {kind} checkpoints store this weight in parts that transformers joins; not built yet",
                    hint="mixture-of-experts models cannot be loaded so far",
                    code="checkpoint.experts",
                )
        if name in wanted and name not in found:
            found[name] = origin
            continue
        rule = next((reason for pattern, reason in rules.items() if re.search(pattern, name)), None)
        if rule is None:
            unexpected.append(origin)
        else:
            ignored[origin] = rule
    return found, ignored, unexpected


def _mismatch(missing: list[str], unexpected: list[str], misshapen: list[str]) -> CheckpointError:
    lines = ["the checkpoint does not fit the model that its config describes"]
    for title, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen)):
        if names:
            lines.append(f"  {title} ({len(names)}):")
            lines += [f"    {name}" for name in names[:SHOWN]]
            lines += [f"    ... and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    hint = "check that config.json and the weights belong together"
    close = difflib.get_close_matches(missing[0], unexpected, 1) if missing else []
    if close:
        hint += f"; {close[0]} looks like {missing[0]}"
    return CheckpointError("\n".join(lines), hint=hint, code="checkpoint.mismatch")
