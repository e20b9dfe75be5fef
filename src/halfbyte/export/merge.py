"""Merge: adapter and base become one ordinary 16-bit model that transformers loads alone.

W' = W + s * B A, layer by layer. Into which W is the question that peers leave open. The adapter was trained on the *dequantised*
base and has learned to make up for its errors; merged into it, the answers stay what they were, to rounding to 16 bits. Merged
into the original weights, both the base's errors and what the adapter did against them change, and nobody knows the
sum beforehand: the report says by how much the logits move.

Cost: the packed base, and one tensor at a time in fp32. The comparison loads the merged model once, when it fits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from halfbyte import machine
from halfbyte.adapters.lora import LoraLinear
from halfbyte.checkpoints import atomic, description, huggingface, names, peft
from halfbyte.checkpoints.base import Source
from halfbyte.checkpoints.config import ModelConfig
from halfbyte.errors import CheckpointError, RecipeError
from halfbyte.export import model as directory
from halfbyte.export import writer
from halfbyte.export.moved import PROBE, Moved, moved
from halfbyte.formats.config import FormatConfig
from halfbyte.formats.packed import Packed
from halfbyte.formats.quantize import dequantize
from halfbyte.layers.linear import Linear4bit

if TYPE_CHECKING:
    from halfbyte.adapters.lora import Adapter
    from halfbyte.checkpoints.base import Base

log = logging.getLogger(__name__)
Into = Literal["dequantised", "original"]


@dataclass(frozen=True)
class MergeReport:
    """What was written. merged: paths of the layers that carried an adapter. bytes: of all weights. moved: against the unmerged
    model on a probe text, None where `note` says why it was not measured."""

    out: Path
    into: Into
    dtype: torch.dtype
    merged: list[str]
    tensors: int
    bytes: int
    shards: int
    moved: Moved | None
    note: str


def merge(
    adapter_dir: str | Path,
    out: str | Path,
    into: Into = "dequantised",
    *,
    base: Base | None = None,
    dtype: torch.dtype | None = None,
    probe: str | None = PROBE,
    shard_bytes: int = writer.SHARD_BYTES,
    other_base: bool = False,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], object] | None = None,
) -> MergeReport:
    """Writes the merged model to `out`, whole or not at all.

    into: `dequantised` (the weights that the adapter was trained on) or `original` (the checkpoint's own, in 16 bits).
    base: loaded as the adapter's record says unless given; it carries the adapter afterwards. dtype: of the result, default
    bf16 (fp16 where the base was fp16). probe: the text of the comparison, None for no comparison.
    Raises CheckpointError (another base, no record of the base, `out` not empty), RecipeError (into, dtype).
    """
    target = Path(out)
    _check(target, into, dtype)
    files = peft.read(adapter_dir)
    base = base or load_base(files, device)
    adapter = peft.load(adapter_dir, base, other_base=other_base)
    dtype = dtype or _default_dtype(base.model)
    frame = writer.skeleton(base.model)
    tied = directory.still_tied(frame, base.model)
    plan = writer.entries(frame, dtype, tied)
    reference = None if probe is None else logits(base.model, base.tokenizer, probe)
    original = None if into == "dequantised" else original_tensors(base, frame)
    flipped = writer.transposed_weights(frame)

    def make(name: str) -> Tensor:
        return merged_tensor(base.model, name, original, transposed=name in flipped)

    with atomic.directory(target) as folder:
        count = writer.write_weights(folder, plan, make, shard_bytes, progress)
        untied = bool(frame.all_tied_weights_keys) and not tied
        directory.write_texts(folder, base, files.template, dtype, untied=untied, end_ids=files.end_ids)
        found, note = _compare(folder, base, reference, probe, dtype, sum(e.nbytes for e in plan))
    log.info("merged into the %s base: %s", into, found or note)
    return MergeReport(
        out=target,
        into=into,
        dtype=dtype,
        merged=_adapted(adapter),
        tensors=len(plan),
        bytes=sum(entry.nbytes for entry in plan),
        shards=count,
        moved=found,
        note=note,
    )


def load_base(files: peft.AdapterFiles, device: torch.device | str) -> Base:
    """The base that the adapter's record names, as it was trained on. Raises CheckpointError without a record."""
    record = files.record
    if record is None:
        raise CheckpointError(
            f"{files.directory} has no {peft.RECORD}, so it does not say on which base and format it was trained",
            hint="name the base (`base=load_base(...)`, --model and --format on the command line)",
            code="adapter.no-record",
        )
    compute = getattr(torch, record.compute)
    return huggingface.load(ModelConfig(name=record.base, revision=record.revision), FormatConfig(**record.format), compute, device)


def merged_tensor(model: nn.Module, name: str, original: Callable[[str], Tensor] | None, *, transposed: bool) -> Tensor:
    """The tensor `name` of the merged model, on the CPU, in the orientation of transformers' own layer.

    original: gives the checkpoint's own tensor of that name; None decodes the base's. transposed: transformers keeps `[K, N]`.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if not isinstance(module, LoraLinear | Linear4bit) or leaf not in ("weight", "bias"):
        own: Tensor = getattr(module, leaf)
        return (own if original is None or own.requires_grad else original(name)).detach().cpu()
    operand = module.operand()
    if leaf == "bias":
        assert operand.bias is not None, f"{name}: the layer has no bias"
        return operand.bias.detach().cpu()
    stored = _dense(operand.weight) if original is None else _oriented(original(name), transposed)
    weight = stored.detach().float().cpu()  # [N, K]
    if operand.lora is not None:
        a, b = operand.lora.a.detach().float().cpu(), operand.lora.b.detach().float().cpu()
        weight = torch.addmm(weight, b, a, alpha=operand.lora.scale)
    return weight.T if transposed else weight


def logits(model: nn.Module, tokenizer: object, text: str) -> Tensor:
    """Logits `[T, V]` of a text, in evaluation mode, on the CPU."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])  # type: ignore[operator]
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    training = model.training
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=ids.to(device), use_cache=False).logits[0].float().cpu()
    model.train(training)
    return found


def original_tensors(base: Base, frame: PreTrainedModel) -> Callable[[str], Tensor]:
    """Reads the checkpoint that the base was made from: a tensor by its name in the model."""
    source = Source(base.source, base.name, base.revision)
    tensors = huggingface.open_tensors(source, frame, description.read(source.path))
    headers = tensors.headers()
    if any(header.packed for header in headers.values()):
        raise CheckpointError(
            f"{base.source} is quantised itself: there are no original weights to merge into", hint="merge into: dequantised"
        )
    found = names.match(frame, headers, writer.transposed_weights(frame)).tensors

    def read(name: str) -> Tensor:
        # Tied weights are stored once, under the other's name; a trained one of them has parted the two.
        tensor = tensors.read(found[name] if name in found else found[frame.all_tied_weights_keys[name]])
        assert isinstance(tensor, Tensor)
        return tensor

    return read


def _dense(weight: Packed | Tensor) -> Tensor:
    return dequantize(weight, torch.float32) if isinstance(weight, Packed) else weight


def _oriented(tensor: Tensor, transposed: bool) -> Tensor:
    return tensor.T if transposed else tensor


def _check(target: Path, into: str, dtype: torch.dtype | None) -> None:
    if into not in ("dequantised", "original"):
        raise RecipeError(f"cannot merge into {into!r}", hint="into is `dequantised` or `original`")
    if dtype not in (None, torch.bfloat16, torch.float16, torch.float32):
        raise RecipeError(f"cannot write weights as {dtype}", hint="dtype is bfloat16, float16 or float32")
    if target.is_dir() and any(target.iterdir()):
        raise CheckpointError(f"{target} is not empty", hint="name a new directory", code="checkpoint.not-empty")


def _default_dtype(model: nn.Module) -> torch.dtype:
    packed = [m.packed.dtype for m in model.modules() if isinstance(m, Linear4bit)]
    return torch.float16 if packed and all(dtype == torch.float16 for dtype in packed) else torch.bfloat16


def _adapted(adapter: Adapter) -> list[str]:
    return sorted(name.rpartition(".")[0] for name, _, role in adapter.parameters() if role == "lora_a")


def _compare(
    folder: Path, base: Base, reference: Tensor | None, probe: str | None, dtype: torch.dtype, nbytes: int
) -> tuple[Moved | None, str]:
    """Loads what was written with transformers alone and compares its logits with the unmerged ones."""
    if reference is None or probe is None:
        return None, "not compared: no probe text was given"
    wanted = nbytes * base.compute.itemsize // dtype.itemsize
    free = machine.ram().free
    if wanted > 0.8 * free:
        return None, f"not compared: the merged model needs {wanted / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=base.compute, local_files_only=True)
    return moved(reference, logits(model, base.tokenizer, probe)), ""
