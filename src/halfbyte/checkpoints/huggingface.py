"""Loading a base: from files to a model whose linear weights are packed, without ever holding it in 16 bits.

The model is built as a skeleton on the meta device; tensors arrive one by one, are quantised on the target device and freed. Growth
of anonymous memory: the resident model + 4 x the largest tensor in 16 bits + 100 MiB at most (a test holds it to that).
The result is cached, see `cache`; a checkpoint that is packed already (bitsandbytes) is taken as it is, see `bnb`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace as with_fields

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from halfbyte.checkpoints import bnb, cache, description, hub, names, shards
from halfbyte.checkpoints.base import Base, Progress, Source, silent
from halfbyte.checkpoints.config import ModelConfig
from halfbyte.checkpoints.description import Description
from halfbyte.checkpoints.gguf import GgufTensors
from halfbyte.checkpoints.shards import Header, Tensors
from halfbyte.errors import CheckpointError, MemoryPlanError
from halfbyte.formats.config import FormatConfig
from halfbyte.formats.packed import Format, Packed
from halfbyte.formats.quantize import dequantize
from halfbyte.layers import embedding, swap
from halfbyte.layers.report import Row, SwapReport
from halfbyte.shortage import in_words, is_shortage

log = logging.getLogger(__name__)
STORED_DENSE = "the checkpoint keeps it in 16 bits"


def load(
    model: ModelConfig | str,
    fmt: FormatConfig,
    compute: torch.dtype,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
    *,
    embedding_away: bool = False,
) -> Base:
    """Loads a base: linear weights in `fmt`, everything else in `compute`, all frozen, in eval mode, on `device`.

    embedding_away: the input embedding stays in host memory, where the device reads it (`layers.embedding`); where it cannot, that
    is logged and it comes to the device.
    A checkpoint that is packed already decides the format; it must agree with what `fmt` sets explicitly.
    Raises CheckpointError, UnsafeFileError, ModelError or FormatError; each names the file or tensor. Raises MemoryPlanError
    (`memory.load`) where the device has no room for it.
    """
    wanted = ModelConfig(name=model) if isinstance(model, str) else model
    source, done = hub.locate(wanted), [0, 0]

    def watched(what: str, so_far: int, total: int) -> None:
        done[:] = so_far, total
        progress(what, so_far, total)

    try:
        return _load(source, fmt, compute, device, watched, embedding_away)
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        why = in_words(error, torch.device(device))
    # The error is gone here, and with it the frames that held the model.
    raise _no_room(source.name, fmt, torch.device(device), why, *done)


def _no_room(name: str, fmt: FormatConfig, device: torch.device, why: str, done: int, total: int) -> MemoryPlanError:
    read = f", {done / 2**30:.2f} of {total / 2**30:.2f} GiB of its files were read" if total else ""
    helps = ["end other programs on the device" if device.type == "cuda" else "end other programs"]
    helps += ["format.kind=nf4 stores about 4 bits a weight"] if fmt.kind in ("none", "int8") else []
    helps += ["format.head=nf4 packs the output head, where it is not tied"] if fmt.kind != "none" and fmt.head == "16bit" else []
    helps.append("a smaller model; `halfbyte plan` says what fits")
    return MemoryPlanError(f"{name} could not be loaded in {fmt.kind}: {why}{read}", hint="; ".join(helps), code="memory.load")


def _load(
    source: Source, fmt: FormatConfig, compute: torch.dtype, device: torch.device | str, progress: Progress, embedding_away: bool
) -> Base:
    """`load` of what was found."""
    key = cache.key(source, fmt, compute)
    entry = cache.find(key) if fmt.kind != "none" else None
    described = description.read(source.path)
    net = skeleton(described, compute, source.name)
    tensors = entry if entry is not None else open_tensors(source, net, described)
    headers = tensors.headers()
    if entry is None:
        fmt = settle(fmt, headers, source.name)
    report = _plan(net, headers, fmt)
    fill(net, tensors, report, compute, device, progress, embedding_away=embedding_away)
    report = with_fields(report, rows=_measured(net, report))
    if entry is not None:
        digest = entry.digest
    elif fmt.kind == "none" or any(header.packed for header in headers.values()):
        digest = _digest(key, net)
    else:
        digest = cache.store(key, net)
    adopted = swap.adopt(net)
    report = with_fields(report, layers=adopted.layers, attention=adopted.attention)
    log.info("%s: %s", source.name, report.summary())
    return Base(net, described.tokenizer, source.name, source.revision, fmt, compute, digest, report, source.path)


def inspect(model: ModelConfig | str, fmt: FormatConfig, compute: torch.dtype = torch.bfloat16) -> SwapReport:
    """What `load` would pack and keep, with bytes, and which layers it would try to adopt, from the config alone.

    No weight is downloaded or read; `layers` say what can be adopted if the probe on the weights agrees.
    """
    wanted = ModelConfig(name=model) if isinstance(model, str) else model
    source = hub.locate(wanted, weights=False)
    described = description.read(source.path)
    net = skeleton(described, compute, source.name)
    if described.quantization:
        bnb.check_config(described.quantization, source.name)
        fmt = bnb.format_of(described.quantization, fmt, [path for path, _ in net.named_modules()])
    return with_fields(_plan(net, {}, fmt), layers=swap.readable(net))


def skeleton(described: Description, compute: torch.dtype, name: str) -> PreTrainedModel:
    """The model without weights: parameters on the meta device, buffers (rotary tables) real, eval mode, nothing trainable."""
    with init_empty_weights(include_buffers=False):
        net: PreTrainedModel = AutoModelForCausalLM.from_config(described.config, dtype=compute)  # type: ignore[no-untyped-call]
    net.tie_weights(recompute_mapping=False)
    net.config._name_or_path = name
    if described.generation is not None:
        net.generation_config = described.generation
    net.train(False).requires_grad_(False)
    return net


def open_tensors(source: Source, net: PreTrainedModel, described: Description) -> Tensors:
    """The source's tensors, whatever their layout."""
    if source.path.suffix == ".gguf":
        return GgufTensors(source.path, net)
    bnb.check_config(described.quantization, source.name)
    files = shards.open_directory(source.path)
    return bnb.BnbTensors(files) if described.quantization else files


def settle(asked: FormatConfig, headers: dict[str, Header], name: str) -> FormatConfig:
    """The format that a packed checkpoint decides, else the one asked for. Raises CheckpointError where they contradict."""
    stored = sorted({h.packed for h in headers.values() if h.packed}, key=repr)
    if not stored:
        return asked
    if len(stored) > 1:
        raise CheckpointError(f"{name} mixes formats: {', '.join(map(repr, stored))}", hint="one format a model is supported")
    found = stored[0]
    have = {"kind": found.kind, "block": found.block, "nested": found.nested}
    wrong = [
        f"{k} is {have[k]}, not {getattr(asked, k)}" for k in have if k in asked.model_fields_set and getattr(asked, k) != have[k]
    ]
    if wrong:
        hint = "leave those keys of `format` out, or give the original 16-bit model"
        raise CheckpointError(f"{name} is quantised already: {'; '.join(wrong)}", hint=hint, code="checkpoint.format")
    if have != {k: getattr(asked, k) for k in have}:
        log.info("format: %s, block %d, nested %s (%s is quantised already)", found.kind, found.block, found.nested, name)
    return asked.model_copy(update=have)


def fill(
    net: PreTrainedModel,
    tensors: Tensors,
    report: SwapReport,
    compute: torch.dtype,
    device: torch.device | str,
    progress: Progress = silent,
    *,
    embedding_away: bool = False,
) -> None:
    """Reads every tensor into `net`, packing what `report` says. If names do not match, raises before anything is read."""
    headers = tensors.headers()
    packed = {row.path: row.format for row in report.packed}
    turned = {row.path for row in report.rows if row.kind == "conv1d"}
    matched = names.match(net, headers, turned)
    wanted = dict(matched.tensors)
    for target, source in matched.both:
        _settle_tie(net, tensors, target, source, wanted)
    in_fp32 = _in_fp32(net)
    total = sum(headers[origin].nbytes for origin in wanted.values())
    done, waits = 0, embedding.path_of(net) if embedding_away else ""
    for name, origin in wanted.items():
        progress(name, done, total)
        value = tensors.read(origin)
        if name in packed:
            swap.pack_module(net, name.removesuffix(".weight"), value.to(device), packed[name])
        else:
            dtype = torch.float32 if in_fp32(name) else compute
            _set(net, name, _dense(value, name in turned, dtype), "cpu" if name == waits else device)
        done += headers[origin].nbytes
        del value
    progress("", total, total)
    net.tie_weights(recompute_mapping=False)
    if waits and (reason := embedding.send(net, torch.device(device))):
        log.warning("the input embedding stays on the device: %s", reason)
    nn.Module.to(net, device)
    assert not any(t.is_meta for t in [*net.parameters(), *net.buffers()]), "a tensor was left without memory"


def _format(fmt: FormatConfig) -> Format | None:
    return None if fmt.kind == "none" else Format.from_config(fmt)


def _plan(net: PreTrainedModel, headers: dict[str, Header], fmt: FormatConfig) -> SwapReport:
    """What is packed: the defaults and skip rules; in a packed checkpoint, only what it holds packed."""
    report = swap.plan_packing(net, fmt.skip, _format(fmt), Format.of_head(fmt))
    if fmt.kind == "none":
        return with_fields(report, rows=[_kept(net, row, "format: none") if row.packed else row for row in report.rows])
    if not any(header.packed for header in headers.values()):
        return report
    turned = {row.path for row in report.rows if row.kind == "conv1d"}
    origin = names.match(net, headers, turned).tensors
    dense = {row.path for row in report.packed if row.kind != "head" and not headers[origin[row.path]].packed}
    return with_fields(report, rows=[_kept(net, row, STORED_DENSE) if row.path in dense else row for row in report.rows])


def _kept(net: PreTrainedModel, row: Row, reason: str) -> Row:
    return with_fields(row, packed=False, reason=reason, bytes=net.get_parameter(row.path).nbytes)


def _measured(net: PreTrainedModel, report: SwapReport) -> list[Row]:
    """The rows with the bytes that are held now."""
    return [row if row.packed else with_fields(row, bytes=net.get_parameter(row.path).nbytes) for row in report.rows]


def _settle_tie(net: PreTrainedModel, tensors: Tensors, target: str, source: str, wanted: dict[str, str]) -> None:
    """The config ties two weights, the file holds both: one is enough if they are equal; if not, they are not tied."""
    first, second = tensors.read(wanted[target]), tensors.read(wanted[source])
    if isinstance(first, Tensor) and isinstance(second, Tensor) and torch.equal(first, second):
        del wanted[target]
        return
    log.warning("%s and %s are tied by the config but differ in the file: they stay apart", target, source)
    net.all_tied_weights_keys.pop(target)
    net.config.tie_word_embeddings = False


def _in_fp32(net: PreTrainedModel) -> Callable[[str], bool]:
    """Whether transformers keeps this parameter in fp32, whatever the compute dtype is."""
    listed = [*(net._keep_in_fp32_modules or ()), *(net._keep_in_fp32_modules_strict or ())]
    pattern = re.compile("|".join(rf"(^|\.){re.escape(name)}(\.|$)" for name in listed) or r"(?!)")
    return lambda name: pattern.search(name) is not None


def _dense(value: Tensor | Packed, turned: bool, dtype: torch.dtype) -> Tensor:
    """A kept weight in `dtype`; one that the checkpoint holds packed (an output head, say) is decoded."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    decoded = dequantize(value, dtype)
    return decoded.T.contiguous() if turned else decoded


def _set(net: nn.Module, name: str, value: Tensor, device: torch.device | str) -> None:
    """Gives a parameter or a buffer of the skeleton its value: a copy, so that no file stays mapped."""
    path, _, leaf = name.rpartition(".")
    module = net.get_submodule(path)
    value = value.to(device, copy=True).contiguous()
    if leaf in module._parameters:
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    else:
        module.register_buffer(leaf, value.to(module.get_buffer(leaf).dtype))


def _digest(key: str, net: nn.Module) -> str:
    known = cache.recall(key)
    if known is None:
        tensors, specs = cache.contents(net)
        known = cache.digest_of(cache.sums_of(tensors), specs)
        cache.remember(key, known)
    return known
