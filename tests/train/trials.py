"""Steps that find no memory, without pytest: `test_survive.py` runs them here, `bench/survive_gpu.py` on a GPU.

The n-th allocation of a step fails, as a GPU's allocator would; then the same step, from the same start, with the next one.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from halfbyte.adapters import lora
from halfbyte.adapters.config import AdapterConfig
from halfbyte.layers import forward, head
from halfbyte.layers.fused.prepare import prepare
from halfbyte.memory.rungs import Rung, below
from halfbyte.optim.adamw import AdamW
from halfbyte.optim.config import OptimConfig
from halfbyte.optim.flat import flatten
from halfbyte.optim.scaling import LossScale
from halfbyte.train import fusing, loop
from halfbyte.train.ladder import Ladder
from halfbyte.train.signals import Stop
from halfbyte.train.state import Parts, State
from layers.families import NF4, pair
from train import rig

CPU = torch.device("cpu")


class Short(TorchDispatchMode):
    """Inside it, the allocations whose numbers (from 1) are in `fails` raise. made: so many were asked for.

    An allocation is an operation that returns a tensor which is no view and no argument: what is written in place allocates
    nothing.
    """

    def __init__(self, fails: Container[int] = ()) -> None:
        super().__init__()
        self.fails, self.made = fails, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(out.alias_info is None and "Tensor" in str(out.type) for out in func._schema.returns):
            self.made += 1
            if self.made in self.fails:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 2.00 MiB. (allocation {self.made})")
        return func(*args, **(kwargs or {}))


def rungs(*all_rungs: Rung) -> list[Rung]:
    """The same with bytes that fall."""
    return [replace(rung, bytes=len(all_rungs) - i) for i, rung in enumerate(all_rungs)]


def with_ladder(parts: Parts, steps: list[Rung], **more: Any) -> Parts:
    """The run on the first of `steps`, with the others below it."""

    def place(rung: Rung) -> None:
        fusing.use(parts.model, rung)  # type: ignore[arg-type]
        if rung.paged:
            parts.optimizer.page()

    def forget() -> None:
        fusing.forget(parts.model)  # type: ignore[arg-type]

    made = Ladder(steps[0], parts.device, lambda rung: below(steps, rung), place, forget, **more)
    place(steps[0])
    return replace(parts, ladder=made)


def modules(output: Path, bits: int, microbatch: int = 2) -> Parts:
    """All of a tiny GPT-2 learns, its layers run as modules, with dropout of the base."""
    parts = rig.build(output, microbatch=microbatch, bits=bits, steps=4)  # type: ignore[arg-type]
    return with_ladder(parts, rungs(*(Rung(microbatch, again) for again in (False, True))))


def fused(output: Path, bits: int, steps: list[Rung], dropout: float = 0, device: torch.device = CPU) -> Parts:
    """An adapter on a tiny packed Llama, its layers fused, gradients in place."""
    model, _ = pair("llama", NF4)
    model.to(device)
    adapter = lora.attach(model, AdapterConfig(rank=4, dropout=dropout), seed=1)
    flat = flatten(adapter.parameters())
    assert prepare(model, in_place=True).layers == 2
    parts = replace(
        rig.build(output, steps=4),
        model=model,
        head=head.find(model),
        forward=lambda ids, positions, bounds: forward.hidden_states(model, ids, positions, bounds),
        dropout=lambda seed, step, row: adapter.set_dropout_state(seed, step, row, rig.TOKENS),
        weights=flat.named,
        flat=flat,
        optimizer=AdamW(flat, OptimConfig(bits=bits)),  # type: ignore[arg-type]
        scale=LossScale.create(torch.float32, device),
        device=device,
    )
    return with_ladder(parts, steps)


KEEPING = rungs(Rung(2, False), Rung(2, True), Rung(2, True, offload=True))
SMALLER = rungs(Rung(4, False), Rung(2, False), Rung(1, False), Rung(1, True, chunks=8))


@dataclass
class Trial:
    """One optimizer step of a run, tried again and again from the same start. tried: allocations that failed, one at a time."""

    parts: Parts
    tried: int = 0

    def __post_init__(self) -> None:
        self.parts.model.train()
        self.first = self.parts.ladder.rung
        loop.one_step(self.parts, State(step=0), Stop())  # moments that are not zero
        self.start = [t.clone() for t in self._tensors()]
        gc.collect()
        gc.freeze()  # what is collected after each failure is then little

    def _tensors(self) -> list[torch.Tensor]:
        return [*self.parts.optimizer.state_dict().values(), self.parts.flat.values, self.parts.flat.grads]

    def step(self, fails: Iterable[int] = ()) -> tuple[list[torch.Tensor], State, int]:
        """What the step leaves, the state, and the number of allocations."""
        ladder = self.parts.ladder
        ladder.rung = self.first
        ladder.settle()
        with torch.no_grad():
            for tensor, kept in zip(self._tensors(), self.start, strict=True):
                tensor.copy_(kept)
        state = State(step=1)
        with Short(set(fails)) as memory:
            outcome = loop.one_step(self.parts, state, Stop())
        assert outcome is not None and (state.step, outcome.step) == (2, 2)
        return [t.clone() for t in (*self._tensors(), outcome.values)], state, memory.made

    def every(self, stride: int, check: Callable[[list[torch.Tensor], list[torch.Tensor]], None]) -> set[str]:
        """Each `stride`-th allocation fails once; the rungs that were gone to."""
        expected, _, count = self.step()
        assert count > 100
        seen = set()
        for n in range(1, count + 1, stride):
            found, state, made = self.step([n])
            assert made > n, "the failing allocation was the last"
            assert len(state.shortages) <= 1
            seen |= {json.dumps(s["rung"]) for s in state.shortages}
            check(found, expected)
            self.tried += 1
        return seen


def same_bits(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def near(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
