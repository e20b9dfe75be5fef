"""AdamW (arXiv 1711.05101) over the flat buffers: all groups in one launch, clipping inside, moments in 32 or 8 bits.

Where memory is short the moments wait in host memory and pass through the GPU in chunks (`paged`).

Why one pass: an optimizer is memory traffic, and a launch a group, a clipped copy of the gradient and a pass to zero it are
more of it. Why functional: the moments are ours, exist before the first forward pass (a step can then not run out of memory)
and are saved as plain tensors. Cost: 8 bytes a trainable parameter, or 2.03 with `optim.bits: 8`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.formats.tiling import flat_tiles
from halfbyte.kernels import adamw
from halfbyte.kernels.adamw import BLOCK, Moments, Part, Rule
from halfbyte.kernels.dispatch import twin
from halfbyte.optim.config import OptimConfig
from halfbyte.optim.flat import SEGMENT, Flat, FlatGroup, Segment
from halfbyte.optim.paged import Pages

MATRICES = ("lora_a", "lora_b", "dense")


class AdamW:
    """One learning rate a group: the schedule's, times `lora_plus` for B (arXiv 2402.12354). Only matrices decay.

    pages: where the moments are while they are not on the device, None while they are. A step is applied span by span (one span
    where nothing is paged): one that an exception ends goes on, called again, where it ended.
    """

    def __init__(self, flat: Flat, config: OptimConfig, paged: bool = False) -> None:
        assert SEGMENT % BLOCK == 0, "an 8-bit block would straddle two parameters"
        self.flat, self.bits = flat, config.bits
        self.rule = Rule(config.beta1, config.beta2, config.eps, _parts(flat, config))
        self.kept = adamw.scratch(self.rule, flat.values.device)
        self.pages: Pages | None = None
        self.applied = 0
        if paged:
            self._on(Pages(len(flat.values), self.bits, flat.values.device))
        else:
            spans = _spans(flat.values, self.bits)
            self._cut(adamw.moments(flat.values, self.bits), spans)
            self.resident = [self.moments.part(span) for span in spans]

    def page(self, pages: Pages | None = None) -> None:
        """From now on the moments are in host memory; nothing is done where they are already. pages: built for the flat buffer."""
        if self.pages is not None:
            return
        assert self.applied == 0, "a step is half applied"
        pages = pages or Pages(len(self.flat.values), self.bits, self.flat.values.device)
        for target, source in zip(pages.moments.fields(), self.moments.fields(), strict=True):
            target.copy_(source)
        self._on(pages)

    @torch.no_grad()
    def clip(self, loss: Tensor, scale: Tensor, largest: float) -> Tensor:
        """Measure the gradient of `loss * scale` in the flat buffer; the next `step` unscales it and clips it to norm `largest`
        (0: never). Returns fp32 `[4]`: loss, norm before clipping, found_inf (1 where one is not finite), scale. No host sync.
        """
        return adamw.measure(self.flat.grads, loss, scale, largest, self.kept)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply the gradient as `clip` measured it, and zero it. Where found_inf was set, zero it only."""

        def update(i: int, moments: Moments) -> None:
            values, grads, rule = self.pieces[i]
            adamw.step(values, grads, moments, lr, rule, self.kept)
            self.applied = i + 1

        if self.pages is not None:
            self.pages.walk(self.applied, update)
        else:
            for i in range(self.applied, len(self.pieces)):
                update(i, self.resident[i])
        self.applied = 0

    def _on(self, pages: Pages) -> None:
        self.pages, self.resident = pages, []
        self._cut(pages.moments, pages.spans)
        pages.open()  # behind the device's moments, whose memory this may be

    def _cut(self, moments: Moments, spans: list[slice]) -> None:
        """moments: where they are from now on. pieces: values, gradients and rule of each span."""
        values, grads = self.flat.values, self.flat.grads
        self.moments = moments
        self.pieces = [(values[span], grads[span], self.rule.part(span)) for span in spans]

    @property
    def resident_bytes(self) -> int:
        """Of moments on the device; the two chunks of them that are there where they are paged."""
        there = self.resident if self.pages is None else self.pages.slots
        return sum(field.nbytes for moments in there for field in moments.fields())

    def state_dict(self) -> dict[str, Tensor]:
        """Step `count`, and the moments a parameter in its shape (`first.NAME`, `second.NAME`); 8-bit ones as they are, their
        scales beside them (`first_scales.NAME`, one for 256 elements). Views, not copies: of host memory while they are paged."""
        if self.pages is not None:
            self.pages.finish()
        found = {"count": self.kept.count}
        fields = {"first": self.moments.first, "second": self.moments.second}
        scales = {"first_scales": self.moments.first_scales, "second_scales": self.moments.second_scales}
        start = 0
        for group in self.flat.groups:
            end = start + len(group.values)
            for segment in group.segments:
                found |= {f"{kind}.{segment.name}": group.view(field[start:end], segment) for kind, field in fields.items()}
                blocks = _blocks(start, group, segment)
                found |= {f"{kind}.{segment.name}": field[blocks] for kind, field in scales.items() if field is not None}
            start = end
        return found

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """The mirror of `state_dict`, exact, wherever the moments were then and are now. The names and shapes must be this run's
        (checked by the caller's identity)."""
        own = self.state_dict()
        assert own.keys() == tensors.keys(), sorted(own.keys() ^ tensors.keys())[:4]
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _spans(values: Tensor, bits: int) -> list[slice]:
    """What is applied at once: everything, but tiles where the twin makes copies of what it changes."""
    which, n = twin(values.device), len(values)
    if which == "fused" or (which == "cpu" and bits == 32):
        return [slice(0, n)]
    return list(flat_tiles(n, BLOCK, values.device))


def _parts(flat: Flat, config: OptimConfig) -> tuple[Part, ...]:
    found, end = [], 0
    for group in flat.groups:
        end += len(group.values) // BLOCK
        rate = config.lora_plus if group.role == "lora_b" else 1.0
        found.append(Part(end, rate, config.weight_decay if group.role in MATRICES else 0.0))
    return tuple(found)


def _blocks(start: int, group: FlatGroup, segment: Segment) -> slice:
    """The segment's blocks of 256 in the whole buffer; start: the group's first element."""
    first = (start + segment.offset) // BLOCK
    return slice(first, first - (-group.view(group.values, segment).numel() // BLOCK))
