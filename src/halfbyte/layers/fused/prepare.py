"""Putting the fused path under the adopted layers of a model, and taking it away."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.kernels.products import Augmented, Products
from halfbyte.layers import probe
from halfbyte.layers.decoder import DecoderLayer
from halfbyte.layers.fused import final
from halfbyte.layers.fused.forward import Room, buffer
from halfbyte.layers.fused.keep import EVERYTHING, INPUTS, Keep
from halfbyte.layers.fused.layer import Fused
from halfbyte.layers.fused.prove import prove
from halfbyte.layers.structure import NotUnderstood, Structure

log = logging.getLogger("halfbyte")


@dataclass(frozen=True)
class Preparation:
    """layers: how many run fused. left: reason by path of those that do not. norm: why the norm behind the layers runs as its
    module; "" where it is fused too."""

    layers: int
    left: dict[str, str] = field(default_factory=dict)
    norm: str = ""

    @property
    def total(self) -> int:
        """Adopted layers, fused or not."""
        return self.layers + len(self.left)

    def reasons(self) -> list[str]:
        """Why layers are left, a line a reason: `model.layers.0-3: dropout of the base is active`."""
        by_reason: dict[str, list[str]] = {}
        for path, reason in self.left.items():
            by_reason.setdefault(reason, []).append(path)
        return [f"{_named(paths)}: {reason}" for reason, paths in by_reason.items()]

    def summary(self) -> str:
        """One line for people."""
        left = f" (left: {'; '.join(self.reasons())})" if self.left else ""
        return f"{self.layers} of {self.total} fused{left}" + (f"; the last norm as a module: {self.norm}" if self.norm else "")


def _named(paths: list[str]) -> str:
    """`model.layers.0-3, model.layers.7`: neighbours are told as a range."""
    ranges: list[list[str]] = []
    for path in paths:
        stem, _, number = path.rpartition(".")
        if ranges and number.isdigit() and ranges[-1][-1] == f"{stem}.{int(number) - 1}":
            ranges[-1].append(path)
        else:
            ranges.append([path])
    return ", ".join(r[0] if len(r) == 1 else f"{r[0]}-{r[-1].rpartition('.')[2]}" for r in ranges)


def prepare(
    model: PreTrainedModel,
    keep: Keep | Sequence[Keep] = EVERYTHING,
    products: Products | None = None,
    *,
    in_place: bool = False,
    decoded: bool = False,
) -> Preparation:
    """Every adopted layer that can runs fused from now on, and the norm behind them, in the dtype of the model's activations.

    keep: of every layer, or one each (`set_keep` changes it later). products: how groups multiply (default: in the activations'
    dtype). in_place: gradients of A and B are added to `parameter.grad`, which must exist (`optim.flat.flatten`), and never pass
    through autograd. A layer that recomputes by `layers.recompute` stops doing so: `keep` decides. Weights in that dtype move
    into the matrices that products read (`layers.fused.holding`; `remove` gives them back); decoded: weights in a format are
    decoded into such matrices too, once.
    """
    remove(model)
    products, room = products or Augmented(), Room()
    layers = {path: m for path, m in model.named_modules() if isinstance(m, DecoderLayer)}
    keeps = dict(zip(layers, _each(keep, len(layers)), strict=True))
    dtype = next(p.dtype for p in model.get_input_embeddings().parameters())
    left: dict[str, str] = {}
    built: dict[str, Fused] = {}
    for path, layer in layers.items():
        try:
            built[path] = Fused(layer, layer.structure, dtype, keeps[path], products, in_place, room)
        except NotUnderstood as reason:
            left[path] = str(reason)
    left |= _disproved(model, {path: layers[path] for path in built}, dtype, products)
    for path in built.keys() - left.keys():
        layers[path].fused = built[path]
        layers[path].gradient_checkpointing = False
        if products.holds or decoded:
            built[path].hold(packed=decoded)
    norm = _final(model, layers, dtype, room) if len(left) < len(layers) else ""
    done = Preparation(len(layers) - len(left), left, norm)
    log.info("decoder layers: %s", done.summary())
    return done


def set_keep(model: PreTrainedModel, keep: Keep | Sequence[Keep]) -> None:
    """What the fused layers keep from the next forward on. keep: of every adopted layer, or one each."""
    layers = [m for m in model.modules() if isinstance(m, DecoderLayer)]
    for layer, one in zip(layers, _each(keep, len(layers)), strict=True):
        if isinstance(layer.fused, Fused):
            layer.fused.keep = one


def _each(keep: Keep | Sequence[Keep], layers: int) -> Sequence[Keep]:
    return [keep] * layers if isinstance(keep, Keep) else keep


def _final(model: PreTrainedModel, layers: dict[str, DecoderLayer], dtype: torch.dtype, room: Room) -> str:
    """Fuses the norm behind the layers, which hands its gradient to the last of them; the reason if it cannot."""
    last = list(layers.values())[-1].fused

    def behind(x: Tensor) -> Tensor:
        return buffer(last.parts.down, x, x.shape[1]) if isinstance(last, Fused) else torch.empty_like(x)

    return final.fuse(model, dtype, room, behind)


def _disproved(model: PreTrainedModel, layers: dict[str, DecoderLayer], dtype: torch.dtype, products: Products) -> dict[str, str]:
    """The layers of a kind whose proof fails, with the reason. One proof a kind: layers of one structure differ in numbers only."""
    first: dict[Structure, str] = {}
    for path, layer in layers.items():
        first.setdefault(layer.structure, path)
    calls = probe.capture_calls(model, [layers[path] for path in first.values()]) if first else {}
    reasons: dict[Structure, str] = {}
    for structure, path in first.items():
        layer = layers[path]
        if layer not in calls:
            reasons[structure] = "the model's forward does not reach it"
            continue
        try:
            prove(layer, Fused(layer, structure, dtype, INPUTS, products, False, Room()), calls[layer])
        except NotUnderstood as reason:
            reasons[structure] = str(reason)
    return {path: reasons[layer.structure] for path, layer in layers.items() if layer.structure in reasons}


def remove(model: PreTrainedModel) -> None:
    """Every layer runs its modules again, and so does the norm behind them."""
    final.remove(model)
    for module in model.modules():
        if isinstance(module, DecoderLayer):
            if isinstance(module.fused, Fused):
                module.fused.release()
            module.fused = None
