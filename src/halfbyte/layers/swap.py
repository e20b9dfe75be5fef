"""The only code that replaces modules in a model: linear layers by packed ones, decoder layers by the generic one.

`plan_packing` decides from a model's modules alone (it may live on the meta device) what is packed and says why the rest is
not; `pack` does it for a model that is in memory; a loader that streams tensors calls `pack_module` as each arrives.
`adopt` puts the generic decoder layer in the place of every layer that a probe proves equal.
The defaults are safe and a user's skip list adds to them: tied weights always stay in 16 bits, and so does the output head, unless
it is given a format of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace as with_fields

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from halfbyte.errors import ModelError
from halfbyte.formats.packed import Format, Packed
from halfbyte.formats.quantize import quantize
from halfbyte.layers import attention, forward, probe, structure
from halfbyte.layers.decoder import DecoderLayer
from halfbyte.layers.linear import Linear4bit
from halfbyte.layers.names import matches, nearest
from halfbyte.layers.operands import is_linear
from halfbyte.layers.report import LayerRow, Row, RowKind, SwapReport

log = logging.getLogger("halfbyte")
Source = Callable[[str], "Tensor | Packed"]


def plan_packing(
    model: nn.Module, skip: Iterable[str] = (), fmt: Format | None = None, head_format: Format | None = None
) -> SwapReport:
    """What would be packed: one row a parameter, tied ones once. Works on a meta-device model; changes nothing.

    skip: module patterns (`lm_head`, `*.down_proj`, `model.layers.0`) kept besides the defaults. fmt: what packed rows will be
    in (None: nothing is packed). head_format: of the output head (None: it is kept). Raises ModelError: a pattern that matches no
    module (`format.skip-no-match`), a head to pack that is the embedding too or no linear layer (`format.head`).
    """
    skip = list(skip)
    _check_patterns(model, skip)
    head = _head_of(model)
    shared = tied(model)
    rows: dict[int, Row] = {}
    for module_path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in rows:
                continue
            path = f"{module_path}.{name}" if module_path else name
            kind, reason = _judge(module, name, parameter, module is head)
            mine = fmt
            if kind == "head" and head_format is not None:
                _check_head(model, module, tied_to_another=id(parameter) in shared or path in shared)
                reason, mine = ("", head_format) if name == "weight" else ("bias", None)
            if id(parameter) in shared or path in shared:
                reason = "embedding, which is the output head too" if kind == "embedding" else reason or "tied to another parameter"
            reason = reason or next((f"skip: {p}" for p in skip if matches(module_path, p)), "")
            if not reason and mine is None:
                reason = "format none"
            mine = None if reason else mine
            size = parameter.nbytes if mine is None else mine.nbytes(_stored_shape(kind, parameter))
            rows[id(parameter)] = Row(path, kind, not reason, reason, parameter.numel(), size, tuple(parameter.shape), mine)
    if head_format is not None and not any(row.kind == "head" for row in rows.values()):
        raise _no_head(model, "it is the embedding too (tied), which stays in 16 bits")
    return SwapReport(list(rows.values()))


def _check_head(model: nn.Module, module: nn.Module, *, tied_to_another: bool) -> None:
    if tied_to_another:
        raise _no_head(model, "it is the embedding too (tied), which stays in 16 bits")
    if not is_linear(module):
        raise _no_head(model, f"it is {type(module).__name__}, not a linear layer")


def _no_head(model: nn.Module, why: str) -> ModelError:
    return ModelError(
        f"format.head: the output head of {type(model).__name__} cannot be packed: {why}",
        hint="leave `format.head` out (16bit)",
        code="format.head",
    )


def _stored_shape(kind: RowKind, parameter: Tensor) -> tuple[int, int]:
    n, k = parameter.shape
    return (k, n) if kind == "conv1d" else (n, k)


def _check_patterns(model: nn.Module, skip: list[str]) -> None:
    paths = [path for path, _ in model.named_modules() if path]
    for pattern in skip:
        if not any(matches(path, pattern) for path in paths):
            raise ModelError(
                f"format.skip: `{pattern}` matches no module of {type(model).__name__}",
                hint=f"nearest names: {', '.join(nearest(pattern, paths))}",
                code="format.skip-no-match",
            )


def _head_of(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None  # type: ignore[no-untyped-call]


def tied(model: nn.Module) -> set[int | str]:
    """Parameters known under two names: ids of shared ones, and both names where the model says that it will tie them."""
    names: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)] = names.get(id(parameter), 0) + 1
    found: set[int | str] = {key for key, count in names.items() if count > 1}
    if isinstance(model, PreTrainedModel):
        for target, source in (model.all_tied_weights_keys or {}).items():
            found |= {target, source}
    return found


def _judge(module: nn.Module, name: str, parameter: Tensor, is_head: bool) -> tuple[RowKind, str]:
    """Kind of a parameter, and why it is not packed ("" if nothing speaks against it)."""
    if isinstance(module, nn.Embedding):
        return "embedding", "embedding"
    if is_head:
        return "head", "output head"
    if name == "bias":
        return "bias", "bias"
    if name == "weight" and is_linear(module):
        return ("conv1d" if type(module) is Conv1D else "linear"), ""
    if parameter.ndim == 3:
        return "experts", "3-D experts are not packed yet"
    if isinstance(module, nn.Linear):
        return "other", f"{type(module).__name__} computes more than a linear layer"
    if parameter.ndim == 1 and "norm" in type(module).__name__.lower():
        return "norm", "norm"
    return "other", f"not a linear layer ({type(module).__name__})"


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` at `path`; mode (train or eval) follows the replaced one."""
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    module.training = parent.get_submodule(name).training
    parent.register_module(name, module)


def pack_module(model: nn.Module, path: str, weight: Tensor | Packed, fmt: Format | None = None) -> Linear4bit:
    """Replaces the linear module at `path` by a packed one; its bias parameter is kept, frozen.

    weight: as the checkpoint holds it (`Conv1D`: `[K, N]`, turned here), or already packed (`[N, K]`).
    """
    module = model.get_submodule(path)
    if isinstance(weight, Packed):
        packed = weight
    else:
        assert fmt is not None, "a dense weight needs a format"
        oriented = weight.T.contiguous() if type(module) is Conv1D else weight
        packed = quantize(oriented, fmt, name=f"{path}.weight")
    layer = Linear4bit(packed, module.bias)  # type: ignore[arg-type]
    replace(model, path, layer)
    return layer


def pack(
    model: nn.Module, source: Source | None, fmt: Format | None, skip: Iterable[str] = (), head_format: Format | None = None
) -> SwapReport:
    """Packs a model in memory, one weight after the other; each dense weight is freed before the next is read.

    source: weight by parameter path (a dense tensor as in the checkpoint, or Packed); None takes what the model holds.
    fmt: None packs nothing (a 16-bit base). head_format: of the output head (None: it is kept). All parameters are frozen. Returns
    the report with the bytes as they are now.
    """
    report = plan_packing(model, skip, fmt, head_format)
    rows = []
    for row in report.rows:
        if row.packed:
            weight = source(row.path) if source is not None else model.get_parameter(row.path).detach()
            layer = pack_module(model, row.module, weight, row.format)
            row = with_fields(row, bytes=layer.packed.nbytes)
            del weight
        rows.append(row)
    model.requires_grad_(False)
    report = with_fields(report, rows=rows)
    log.info("packing: %s", report.summary())
    return report


def readable(model: PreTrainedModel) -> list[LayerRow]:
    """Which decoder layers the generic one can be read from, and why not; of a model without weights, hence without a proof."""
    rows = []
    for path, layer in model.named_modules():
        if isinstance(layer, GradientCheckpointingLayer):
            try:
                structure.read(layer)
                rows.append(LayerRow(path, type(layer).__name__, True, ""))
            except structure.NotUnderstood as reason:
                rows.append(LayerRow(path, type(layer).__name__, False, str(reason)))
    return rows


def adopt(model: PreTrainedModel) -> SwapReport:
    """Puts the generic decoder layer in the place of every layer that a probe proves equal; weights must be loaded.

    Then plugs in the "halfbyte" attention where the model allows it and packed examples stay isolated. Returns a report whose
    `layers` say what was adopted, what was left and why, and whose `attention` says how packed rows run.
    """
    layers = {path: m for path, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)}
    rows: list[LayerRow] = []
    verdicts = _verdicts(model, layers)
    for path, layer in layers.items():
        verdict = verdicts[path]
        if isinstance(layer, DecoderLayer):
            rows.append(LayerRow(path, layer.adopted, True, ""))
        elif isinstance(verdict, structure.Structure):
            replace(model, path, DecoderLayer.adopting(layer, verdict))
            rows.append(LayerRow(path, type(layer).__name__, True, ""))
        else:
            rows.append(LayerRow(path, type(layer).__name__, False, verdict))
    report = SwapReport(layers=rows, attention=_plug_attention(model, proven=all(row.adopted for row in rows)))
    log.info(report.adoption())
    return report


Verdict = structure.Structure | str


def _verdicts(model: PreTrainedModel, layers: dict[str, GradientCheckpointingLayer]) -> dict[str, Verdict]:
    """For each layer its proven structure, or the reason why it is left. One proof a kind of layer."""
    verdicts: dict[str, Verdict] = {}
    kinds: dict[str, object] = {}
    first: dict[object, str] = {}
    readings: dict[str, structure.Structure] = {}
    for path, layer in layers.items():
        verdicts[path] = "is adopted already"
        if isinstance(layer, DecoderLayer):
            continue
        if layer._forward_hooks or layer._forward_pre_hooks:
            verdicts[path] = "carries hooks of another library"
            continue
        try:
            readings[path] = structure.read(layer)
        except structure.NotUnderstood as reason:
            verdicts[path] = str(reason)
            continue
        kinds[path] = (type(layer), readings[path], _plain_attributes(layer))
        first.setdefault(kinds[path], path)
    calls = probe.capture_calls(model, [layers[path] for path in first.values()]) if first else {}
    proven: dict[object, Verdict] = {}
    for kind, path in first.items():
        if layers[path] not in calls:
            proven[kind] = "the model's forward does not reach it"
            continue
        try:
            proven[kind] = probe.prove(layers[path], readings[path], calls[layers[path]])
        except structure.NotUnderstood as reason:
            proven[kind] = str(reason)
    return verdicts | {path: proven[kind] for path, kind in kinds.items()}


def _plain_attributes(layer: nn.Module) -> frozenset[tuple[str, object]]:
    """Every plain value on the layer and its parts but the layer's number: layers that differ in one are proven apart."""
    plain = (int, float, bool, str, type(None))
    return frozenset(
        (f"{path}.{name}", value)
        for path, module in layer.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, plain) and name != "layer_idx"
    )


def _plug_attention(model: PreTrainedModel, *, proven: bool) -> str:
    """Sets the "halfbyte" attention if the model takes it and stays isolated under it; returns how packed rows run, and why.

    proven: every layer was, on boundaries; else layers that were left are tried with the others.
    """
    before = model.config._attn_implementation
    if before == attention.NAME:
        return "boundaries"
    if not model._can_set_attn_implementation():
        if proven:  # no attention of its own is left to set; the name says which masks its forward prepares
            model.config._attn_implementation = attention.NAME
            return "boundaries"
        return f"dense mask ({before}): the model does not take another attention function"
    model.set_attn_implementation(attention.NAME)
    if proven:
        return "boundaries"
    try:
        forward.prove_isolation(model)
    except ModelError as error:
        model.set_attn_implementation(before)
        return f"dense mask ({before}): {error.message}"
    return "boundaries"
