"""A model's shapes from its config alone: what is packed, what stays, what learns, and the widths that activations have.

The model is built on the meta device, where a tensor is a shape without memory, so that every family that transformers
knows is counted by its own code, and packing and targets are decided by the very functions that a run uses.
Cost: about a second for an 8B model, no weights.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halfbyte.adapters import targets
from halfbyte.adapters.config import AdapterConfig
from halfbyte.errors import ModelError
from halfbyte.formats.config import FormatConfig
from halfbyte.formats.packed import Format
from halfbyte.layers import embedding, swap
from halfbyte.layers.report import Row, SwapReport
from halfbyte.memory import fused

SEGMENT = 256
"""Elements to which each trainable parameter is padded in the flat buffer (`optim/flat.py`)."""


@dataclass(frozen=True)
class Shapes:
    """What the arithmetic of `parts` needs.

    report: packed and kept rows with bytes at `compute`. layers: decoder layers. hidden, vocab: widths. linears: (N, K) of
    every linear layer of the widest decoder layer, attention first. heads. trained: elements that learn; added: those of them
    that the adapter adds to the base; padded: what learns in the flat buffer; rank_sum: of all adapters' ranks in that layer.
    largest: elements of the largest packed weight. layer: the widest decoder layer as the fused path sees it, or why it cannot
    take it. embedding: bytes of the input embedding; embedding_stays: why it must be on the device, or ""."""

    report: SwapReport
    layers: int
    hidden: int
    vocab: int
    heads: int
    linears: tuple[tuple[int, int], ...]
    trained: int
    added: int
    padded: int
    rank_sum: int
    largest: int
    layer: fused.Layer | str
    embedding: int
    embedding_stays: str


def skeleton(config: dict[str, Any] | PretrainedConfig, compute: torch.dtype) -> PreTrainedModel:
    """The model of a `config.json` without memory. Raises ModelError where transformers does not know it."""
    if isinstance(config, dict):
        kind = config.get("model_type", "")
        known = {
            k: v for k, v in config.items() if k not in ("auto_map", "quantization_config", "torch_dtype", "dtype", "model_type")
        }
        try:
            config = AutoConfig.for_model(kind, **known)
        except ValueError as error:
            raise ModelError(f"transformers does not know the model type `{kind}`", code="model.unknown") from error
    with init_empty_weights():
        net: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=compute)  # type: ignore[no-untyped-call]
    net.tie_weights(recompute_mapping=False)
    return net.requires_grad_(False)


def shapes(net: PreTrainedModel, fmt: FormatConfig, adapter: AdapterConfig) -> Shapes:
    """The shapes of a meta model. Raises ModelError when no target or skip pattern matches, and (`model.family`) where a model has
    no attention."""
    stored = None if fmt.kind == "none" else Format.from_config(fmt)
    report = swap.plan_packing(net, fmt.skip, stored, Format.of_head(fmt))
    config = net.config.get_text_config()
    missing = [name for name in ("hidden_size", "num_attention_heads", "vocab_size") if not getattr(config, name, 0)]
    if missing:
        message = f"model type `{config.model_type}` is no decoder with attention: its config has no {' and no '.join(missing)}"
        raise ModelError(message, hint="docs/guides/models.md lists the families that are tested", code="model.family")
    by_layer = _by_layer(report.rows)
    widest = max(by_layer.values(), key=lambda rows: sum(r.params for r in rows), default=[])
    ranks = _ranks(net, adapter) if adapter.kind == "lora" else {}
    added = _added(net, ranks)
    sizes = added + _own(net, report, adapter, ranks)
    return Shapes(
        report=report,
        layers=len(by_layer),
        hidden=int(config.hidden_size),
        vocab=int(config.vocab_size),
        heads=int(config.num_attention_heads),
        linears=tuple(_nk(r) for r in widest),
        trained=sum(sizes),
        added=sum(added),
        padded=sum(-(-n // SEGMENT) * SEGMENT for n in sizes),
        rank_sum=sum(ranks.get(r.module, 0) for r in widest),
        largest=max((r.params for r in report.rows if r.kind in ("linear", "conv1d")), default=0),
        layer=fused.read(net, adapter, ranks, {r.module: r.format for r in report.packed}),
        embedding=sum(r.bytes for r in report.rows if r.path == embedding.path_of(net)),
        embedding_stays=_stays(net, adapter),
    )


def _stays(net: PreTrainedModel, adapter: AdapterConfig) -> str:
    """Why the input embedding must be on the device. What will learn is not known to a model without an adapter."""
    whole = targets.modules_named(net, adapter.modules_to_save)
    learns = adapter.kind == "none" or any(embedding.path_of(net).startswith(f"{path}.") for path in whole)
    return "it learns" if learns else embedding.stays(net)


def _nk(row: Row) -> tuple[int, int]:
    first, second = row.shape
    return (second, first) if row.kind == "conv1d" else (first, second)


def _by_layer(rows: list[Row]) -> dict[str, list[Row]]:
    """The linear rows of each decoder layer: those below the most frequent `<path>.<number>.`."""
    prefixes: Counter[str] = Counter()
    split = [(row, _numbered(row.path)) for row in rows if row.kind in ("linear", "conv1d")]
    for _, found in split:
        if found:
            prefixes[found[0]] += 1
    if not prefixes:
        return {}
    stem = prefixes.most_common(1)[0][0]
    layers: dict[str, list[Row]] = {}
    for row, found in split:
        if found and found[0] == stem:
            layers.setdefault(found[1], []).append(row)
    return layers


def _numbered(path: str) -> tuple[str, str] | None:
    """`model.layers.3.mlp.up_proj.weight` -> (`model.layers`, `3`)."""
    steps = path.split(".")
    at = next((i for i, step in enumerate(steps) if step.isdigit()), None)
    return None if at is None else (".".join(steps[:at]), steps[at])


def _ranks(net: nn.Module, adapter: AdapterConfig) -> dict[str, int]:
    """Path of each target and the rank of its adapter."""
    return {path: int(targets.patterned(adapter.rank_pattern, path, adapter.rank)) for path in targets.match(net, adapter)}


def _added(net: PreTrainedModel, ranks: dict[str, int]) -> list[int]:
    """Elements of each parameter of an adapter's layers."""
    sizes = []
    for path, rank in ranks.items():
        weight = net.get_submodule(path).weight
        assert isinstance(weight, torch.Tensor)
        n, k = (weight.shape[1], weight.shape[0]) if isinstance(net.get_submodule(path), Conv1D) else weight.shape
        sizes += [rank * k, n * rank]
    return sizes


def _own(net: PreTrainedModel, report: SwapReport, adapter: AdapterConfig, ranks: dict[str, int]) -> list[int]:
    """Elements of each parameter of the base that learns."""
    if adapter.kind == "none":
        return [row.params for row in report.rows]
    whole = targets.modules_named(net, adapter.modules_to_save)
    sizes = [r.params for r in report.rows if any(r.path.startswith(f"{path}.") for path in whole)]
    if adapter.bias != "none":
        sizes += [r.params for r in report.rows if r.kind == "bias" and (adapter.bias == "all" or r.module in ranks)]
    return sizes
