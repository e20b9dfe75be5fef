"""Plan and truth of a run's memory: what is planned for its rung, what is there, the table of both, and `memory.png`.

What is there all the time is counted tensor by tensor; the rest of the peak is what the step took. A plan counts the same rest as
activations, loss, backward, scratch and workspaces, which only a recorded step tells apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.formats.packed import SLOTS
from halfbyte.layers import embedding
from halfbyte.layers.linear import Linear4bit
from halfbyte.memory import curve, picture
from halfbyte.memory.choose import Chooser
from halfbyte.memory.curve import DECODED, Curve
from halfbyte.memory.rungs import Rung
from halfbyte.memory.table import size
from halfbyte.memory.watch import Watch
from halfbyte.optim.adamw import AdamW
from halfbyte.train import fusing

PICTURE = "memory.png"
RECORDED = 3
"""The step that is recorded: the first ones also measure, compile and fill caches."""
STEP = "the step"


@dataclass(frozen=True)
class Memory:
    """planned, actual: bytes by part, `the step` for all that is not there all the time. peak: the sum of `actual`, the largest of
    any step (what tensors take on a GPU, of the process on a CPU); planned_peak: the same as planned. reserved, driver: on a GPU,
    what the allocator held at most, and what is taken of the device at the end."""

    planned: Mapping[str, int]
    actual: Mapping[str, int]
    planned_peak: int
    peak: int
    reserved: int
    driver: int

    def lines(self) -> list[str]:
        """A table for people."""
        found = [f"  {'memory by part':<18}{'planned':>12}{'actual':>12}"]
        for name in sorted({*self.planned, *self.actual}, key=lambda n: (n == STEP, -self.planned.get(n, 0))):
            found.append(f"    {name:<16}{size(self.planned.get(name, 0)):>12}{size(self.actual.get(name, 0)):>12}")
        found.append(f"    {'in all':<16}{size(self.planned_peak):>12}{size(self.peak):>12}{self._off()}")
        if self.reserved:
            found.append(f"    {'reserved':<28}{size(self.reserved):>12}\n    {'driver':<28}{size(self.driver):>12}")
        return found

    def _off(self) -> str:
        return f"  ({self.planned_peak / self.peak - 1:+.1%})" if self.peak and self.planned_peak else ""


@dataclass(frozen=True)
class Account:
    """chooser: of the run's plan. decoded: bytes of decoded weights that modules hold on a CPU. started: resident bytes of the
    process before anything was loaded. full: all weights learn."""

    chooser: Chooser
    model: PreTrainedModel
    optimizer: AdamW
    decoded: int
    started: int
    full: bool

    def curve(self, rung: Rung) -> Curve:
        """As planned."""
        return curve.planned(self.chooser, rung, self.decoded)

    def watch(self, device: torch.device, record: int | None) -> Watch:
        """For the loop."""
        return Watch(device, lru_cache(lambda rung: self.curve(rung).peak), self.standing, record)

    def told(self, rung: Rung, tell: Callable[[str], None]) -> None:
        """What is held that the plan, as it was printed, does not count: on a CPU, decoded weights, for which it left room."""
        if self.decoded:
            whole = size(self.curve(rung).peak)
            tell(f"memory: {size(self.decoded)} of decoded weights are held beside the plan's parts, {whole} in all")

    def standing(self) -> dict[str, int]:
        """Bytes that are there all the time, by part."""
        flat = self.optimizer.flat
        own = {flat.values.untyped_storage().data_ptr()}
        if (table := embedding.away(self.model)) is not None:
            own.add(table.untyped_storage().data_ptr())
        packed, other = _weights(self.model, own)
        found = {"weights" if self.full else "adapter": flat.values.nbytes, "gradients": flat.grads.nbytes}
        found["optimizer"] = self.optimizer.resident_bytes
        if self.full:
            found["other weights"] = other
        else:
            found |= {"packed weights": packed, "other weights": other}
        found[DECODED] = fusing.decoded_bytes(self.model) if self.chooser.budget.kind == "cuda" else self.decoded
        if self.chooser.budget.kind == "cpu":
            found["context"] = self.started
        return {name: count for name, count in found.items() if count}

    def memory(self, rung: Rung, watch: Watch) -> Memory:
        """Plan and truth at the end of a run."""
        planned, actual = self.curve(rung), self.standing()
        at_peak, reserved_driver = planned.at_peak(), watch.outer()
        steady = {name: at_peak[name] for name in at_peak if name in actual}
        steady[STEP] = planned.peak - sum(steady.values())
        actual[STEP] = max(0, watch.peak - sum(actual.values()))
        return Memory(steady, actual, planned.peak, watch.peak, *reserved_driver)

    def draw(self, output: Path, name: str, rung: Rung, watch: Watch) -> None:
        """Writes `memory.png`. Raises OSError."""
        memory = self.memory(rung, watch)
        what = "allocated" if self.chooser.budget.kind == "cuda" else "of the process"
        levels = {f"largest of the run, {what}": memory.peak, "reserved": memory.reserved, "driver": memory.driver}
        picture.draw(
            output / PICTURE,
            picture.title(name, self.chooser, rung),
            self.curve(rung),
            watch.recorded,
            {label: count for label, count in levels.items() if count},
            picture.room(self.chooser, rung),
        )


def _weights(model: nn.Module, own: set[int]) -> tuple[int, int]:
    """Bytes of packed weights and of all others, shared memory once, without what lies in the storages of `own`."""
    packed = other = 0
    seen = set(own)
    for module in model.modules():
        tensors = [*module._parameters.items(), *module._buffers.items()]
        for name, tensor in tensors:
            if not isinstance(tensor, Tensor) or (place := tensor.untyped_storage().data_ptr()) in seen:
                continue
            seen.add(place)
            if isinstance(module, Linear4bit) and name in SLOTS:
                packed += tensor.untyped_storage().nbytes()
            else:
                other += tensor.untyped_storage().nbytes()
    return packed, other
