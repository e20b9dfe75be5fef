"""Putting the fused path under the adopted layers of a model, and taking it away."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from halfbyte.kernels.products import Augmented, Products
from halfbyte.layers import probe
from halfbyte.layers.decoder import DecoderLayer
from halfbyte.layers.fused.forward import Room
from halfbyte.layers.fused.keep import EVERYTHING, INPUTS, Keep
from halfbyte.layers.fused.layer import Fused
from halfbyte.layers.fused.prove import prove
from halfbyte.layers.structure import NotUnderstood, Structure

log = logging.getLogger("halfbyte")


@dataclass(frozen=True)
class Preparation:
    """layers: how many run fused. left: reason by path of those that do not."""

    layers: int
    left: dict[str, str] = field(default_factory=dict)

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
        return f"{self.layers} of {self.total} fused" + (f" (left: {'; '.join(self.reasons())})" if self.left else "")


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
    model: PreTrainedModel, keep: Keep | Sequence[Keep] = EVERYTHING, products: Products | None = None, *, in_place: bool = False
) -> Preparation:
    """Every adopted layer that can runs fused from now on, in the dtype of the model's activations.

    keep: of every layer, or one each (`set_keep` changes it later). products: how groups multiply (default: in the activations'
    dtype). in_place: gradients of A and B are added to `parameter.grad`, which must exist (`optim.flat.flatten`), and never pass
    through autograd. A layer that recomputes by `layers.recompute` stops doing so: `keep` decides.
    """
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
    done = Preparation(len(layers) - len(left), left)
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
    """Every layer runs its modules again."""
    for module in model.modules():
        if isinstance(module, DecoderLayer):
            module.fused = None
