"""Which path the decoder layers take in a run: the fused layer where the device's kernels are the fused twins, else modules.

The path is chosen, proven (`layers.fused.prove`, and isolation of packed examples once more) and told before the first step; layers
that cannot take it are named with the reason and run their modules. Evaluation takes the same path; generation has a cache and
goes through modules. Neither choice is kept in a checkpoint's stead: both follow from recipe and machine.
Cost: two forwards and backwards of a few tokens for each kind of layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from transformers import PreTrainedModel

from halfbyte import machine
from halfbyte.errors import RecipeError
from halfbyte.kernels.dispatch import VARIABLE, twin
from halfbyte.kernels.products import Augmented, Float8, Products
from halfbyte.layers import forward
from halfbyte.layers.decoder import DecoderLayer
from halfbyte.layers.fused.keep import EVERYTHING, INPUTS
from halfbyte.layers.fused.prepare import prepare
from halfbyte.train.choices import Choice

Asked = Literal["auto", "on", "off"]
SHARE = 0.5
"""Of the host memory that is free, what waiting layer inputs may pin: pinned memory is out of reach for everybody else."""


def require(offload: Asked, device: torch.device) -> None:
    """Raises RecipeError (memory.offload) where offloading is asked for and the device's layers do not run fused."""
    if offload == "on" and (device.type != "cuda" or twin(device) != "fused"):
        raise _no_offload(f"it is part of the fused layers, which need CUDA with Triton (and {VARIABLE} not set to reference)")


def place(
    model: PreTrainedModel,
    device: torch.device,
    *,
    compute: str,
    recompute: bool,
    offload: Asked,
    tokens: int,
    tell: Callable[[str], None],
) -> dict[str, Choice]:
    """Puts the layers on their path; the choices `layers` and `offload`. Gradients of the adapter must lie in flat buffers.

    compute: by name. tokens: of a microbatch. Raises RecipeError (memory.offload), ModelError (`model.leak`).
    """
    if twin(device) != "fused":
        why = f"auto: the kernels of this {device.type} device are the {twin(device)} ones"
        return {"layers": Choice("modules", why), "offload": Choice("off", "auto: layers that run as modules keep their inputs")}
    layers = [m for m in model.modules() if isinstance(m, DecoderLayer)]
    chosen = offloading(offload, device, recompute, len(layers) * pinned(tokens, model))
    keep = replace(INPUTS if recompute else EVERYTHING, offload=chosen.value == "on")
    products: Products = Float8() if compute == "fp8" else Augmented()
    done = prepare(model, keep, products, in_place=True)
    for line in done.reasons():
        tell(f"layers left to their modules: {line}")
    if not done.layers:
        if offload == "on":
            raise _no_offload("no layer of this model runs fused")
        why = "auto: no layer can run fused" if done.total else "auto: the model's layers are not adopted"
        return {"layers": Choice("modules", why), "offload": Choice("off", "auto: layers that run as modules keep their inputs")}
    forward.prove_isolation(model)
    what = "each layer's input is kept, the rest computed again" if recompute else "everything that backward reads is kept"
    return {
        "layers": Choice(f"fused ({done.layers} of {done.total})", f"auto: proven against their modules; {what}"),
        "offload": chosen,
    }


def offloading(asked: Asked, device: torch.device, recompute: bool, wanted: int) -> Choice:
    """Whether layer inputs wait in host memory. wanted: bytes that they pin there."""
    if asked != "auto":
        return Choice(asked, "asked for")
    if device.type != "cuda":
        return Choice("off", "auto: the layers run in host memory")
    if not recompute:
        return Choice("off", "auto: without recompute, layer inputs are a small part of what is kept")
    free = machine.ram().free
    told = f"layer inputs take {wanted / 2**20:,.0f} MiB of host memory, {free / 2**20:,.0f} MiB are free"
    if wanted > SHARE * free:
        return Choice("off", f"auto: {told}, and more than {SHARE:.0%} of that is not pinned")
    return Choice("on", f"auto: {told}")


def pinned(tokens: int, model: PreTrainedModel) -> int:
    """Bytes of host memory that one layer's input takes: torch pins powers of two."""
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    bytes_ = tokens * embedding.shape[1] * embedding.dtype.itemsize
    return 1 << (bytes_ - 1).bit_length()


def _no_offload(why: str) -> RecipeError:
    return RecipeError(f"memory.offload: on cannot be had here: {why}", hint="set `memory.offload: auto`", code="memory.offload")
