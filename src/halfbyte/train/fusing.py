"""Which path the decoder layers take in a run: the fused layer where the device's kernels are the fused twins, else modules.

The path is chosen, proven (`layers.fused.prove`, and isolation of packed examples once more) and told before the first step; layers
that cannot take it are named with the reason and run their modules. Evaluation takes the same path, in a run and without one
(`attached`); generation reads prompts with the same forward and makes tokens with kernels of its own (`generate/`). A checkpoint
tells the choices and does not decide them again: they follow from recipe and machine.
Cost: two forwards and backwards of a few tokens for each kind of layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from halfbyte.errors import RecipeError
from halfbyte.kernels.dispatch import VARIABLE, twin
from halfbyte.kernels.products import Augmented, Float8, Products
from halfbyte.layers import forward, recompute
from halfbyte.layers.decoder import DecoderLayer
from halfbyte.layers.fused import host
from halfbyte.layers.fused.layer import Fused
from halfbyte.layers.fused.prepare import prepare, remove
from halfbyte.memory.plan import ASKED
from halfbyte.memory.rungs import Rung
from halfbyte.train.choices import Choice

Asked = Literal["auto", "on", "off"]


def require(offload: Asked, device: torch.device) -> None:
    """Raises RecipeError (memory.offload) where offloading is asked for and the device's layers do not run fused."""
    if offload == "on" and (device.type != "cuda" or twin(device) != "fused"):
        raise _no_offload(f"it is part of the fused layers, which need CUDA with Triton (and {VARIABLE} not set to reference)")


def place(
    model: PreTrainedModel,
    device: torch.device,
    *,
    compute: str,
    rung: Rung,
    offload: Choice,
    decoded: Choice,
    tell: Callable[[str], None],
) -> dict[str, Choice]:
    """Puts the layers on their path; the choices `layers`, `offload` and `decoded weights`. Gradients of the adapter must lie in
    flat buffers.

    compute: by name. rung: what layers keep. offload: `on` or `off`, as planned. decoded: whether there is room for decoded
    weights. Raises RecipeError (`memory.offload`, `recipe.compute`) where what was asked for needs fused layers
    and none can be; ModelError (`model.leak`).
    """
    if twin(device) != "fused":
        why = f"the kernels of this {device.type} device are the {twin(device)} ones"
        return _modules(compute, offload, device, decoded, why)
    layers = sum(isinstance(m, DecoderLayer) for m in model.modules())
    products: Products = Float8() if compute == "fp8" else Augmented()
    # Elsewhere the modules hold them (`layers.decoded`).
    done = prepare(model, rung.keeps(layers), products, in_place=True, decoded=device.type == "cuda" and decoded.value == "on")
    for line in done.reasons():
        tell(f"layers left to their modules{', in bf16' if compute == 'fp8' else ''}: {line}")
    if not done.layers:
        why = "no layer can run fused" if done.total else "the model's layers are not adopted"
        return _modules(compute, offload, device, decoded, why)
    forward.prove_isolation(model)
    return {
        "layers": Choice(f"fused ({done.layers} of {done.total})", f"auto: proven against their modules; {rung.kept()}"),
        "offload": offload,
        "decoded weights": decoded,
    }


@contextmanager
def attached(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """While inside, adopted layers run fused where the device's kernels are the fused ones: evaluation without a run.

    Layers that a run has put on their path stay on it. What cannot run fused is logged with its reason.
    """
    layers = [m for m in model.modules() if isinstance(m, DecoderLayer)]
    if twin(device) != "fused" or any(layer.fused is not None for layer in layers):
        yield
        return
    recomputing = [layer.gradient_checkpointing for layer in layers]
    prepare(model)
    try:
        yield
    finally:
        remove(model)
        for layer, recompute in zip(layers, recomputing, strict=True):
            layer.gradient_checkpointing = recompute


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """While inside, fused layers multiply in the compute dtype, `compute: fp8` too: so an adapter is scored as it will be used."""
    found = [fused for _, fused in _fused(model)]
    for fused in found:
        fused.exact = True
    try:
        yield
    finally:
        for fused in found:
            fused.exact = False


def _modules(compute: str, offload: Choice, device: torch.device, decoded: Choice, why: str) -> dict[str, Choice]:
    """The choices where no layer runs fused; an error where something was asked for that only they have."""
    if offload == Choice("on", ASKED):
        raise _no_offload(why)
    if compute == "fp8":
        raise RecipeError(f"compute: fp8 cannot be had here: {why}", hint="set `compute: bf16` or `auto`", code="recipe.compute")
    return {
        "layers": Choice("modules", f"auto: {why}"),
        "offload": Choice("off", "auto: layers that run as modules keep their inputs"),
        "decoded weights": Choice("off", "auto: on a GPU only fused layers hold them") if device.type == "cuda" else decoded,
    }


def use(model: PreTrainedModel, rung: Rung) -> None:
    """Every layer keeps for backward what the rung says, on the path where `place` has put it."""
    recompute.set_recompute(model, rung.recompute)
    layers = [m for m in model.modules() if isinstance(m, DecoderLayer)]
    for layer, keep in zip(layers, rung.keeps(len(layers)), strict=True):
        if isinstance(layer.fused, Fused):
            layer.fused.keep = keep
            layer.fused.decode(rung.decoded)
            layer.gradient_checkpointing = False


def decoded_bytes(model: PreTrainedModel) -> int:
    """Of weights that fused layers hold decoded."""
    return sum(fused.decoded_bytes for _, fused in _fused(model))


def forget(model: PreTrainedModel) -> None:
    """Drops what layers hold of a step that did not end."""
    for _, fused in _fused(model):
        fused.room.buffer = fused.room.rows = None
    host.forget()


def _fused(model: nn.Module) -> list[tuple[DecoderLayer, Fused]]:
    return [(m, m.fused) for m in model.modules() if isinstance(m, DecoderLayer) and isinstance(m.fused, Fused)]


def _no_offload(why: str) -> RecipeError:
    return RecipeError(f"memory.offload: on cannot be had here: {why}", hint="set `memory.offload: auto`", code="memory.offload")
