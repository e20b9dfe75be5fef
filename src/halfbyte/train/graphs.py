"""The layers' forward and backward as two CUDA graphs a shape: one launch each, where launching takes longer than computing.

Why: a layer is some eighty launches with full recompute, and the host needs longer for them than a fast GPU for a few thousand
tokens. The loss and the update stay outside: how many tokens are learned differs from row to row. What the graphs read lies still:
token ids, positions and boundaries are copied to where they were recorded, and boundaries are filled up with empty documents, so
that a few graphs serve every row. Weights, adapters and the flat gradients never move. The numbers are those of the launches.

`auto` runs the first rows as launches and then as graphs, compares the fastest of `ROUNDS` on the device, and says what it found.
Cost: what layers allocate in a step stays theirs between steps, so the loss and the update no longer share it; and libraries have
workspaces of their own on the stream that records.

Letters: T tokens of the microbatch, D documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.errors import RecipeError
from halfbyte.kernels.attention import Documents, Wanted
from halfbyte.layers import forward
from halfbyte.layers.decoder import DecoderLayer
from halfbyte.layers.fused.layer import Fused
from halfbyte.memory.parts import WORKSPACES
from halfbyte.pinned import to_device
from halfbyte.shortage import is_shortage
from halfbyte.train.choices import Choice

Asked = Literal["auto", "on", "off"]
ROUNDS = 3
"""Rows that each way is timed on, behind one that compiles or records."""
GAIN = 0.02
"""Share of a row's time that graphs must save to stay."""
LEAST_BOUNDS = 8
"""Documents that a graph has room for, at least; then twice as many, and so on."""
MOST = 8
"""Shapes that are recorded; rows of further ones are launched."""

Shape = tuple[int, int | None, int]
"""T; how many documents if they are equally long, else None; documents that there is room for."""


class Recorder(Protocol):
    """Records what a function launches, and launches it again."""

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        """The replay of what `body` launched; nothing has run when it returns, or all of it: a replay runs it anew."""
        ...

    def beside(self, body: Callable[[], Tensor]) -> Tensor:
        """What `body` returns, run as launches where recording will take place."""
        ...

    def stamp(self) -> Callable[[], float | None]:
        """Marks this moment of the device; called later, its milliseconds, or None as long as it has not come."""
        ...


class CudaRecorder:
    """CUDA graphs of one stream, in one pool of memory: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()
        self.zero: torch.cuda.Event | None = None

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            body()
        return graph.replay

    def beside(self, body: Callable[[], Tensor]) -> Tensor:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            out = body()
        current.wait_stream(self.stream)
        out.record_stream(current)
        return out

    def stamp(self) -> Callable[[], float | None]:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self.zero = zero = self.zero or event
        return lambda: zero.elapsed_time(event) if event.query() else None  # type: ignore[no-untyped-call]


@dataclass
class Recorded:
    """Static memory of a shape and the replays over it. ids, positions: int64 `[1, T]`; documents: with room; grad `[1, T, H]`."""

    ids: Tensor
    positions: Tensor
    documents: Documents
    live: Tensor | None = None
    grad: Tensor | None = None
    forward: Callable[[], None] | None = None
    backward: Callable[[], None] | None = None

    def take(self, ids: Tensor, positions: Tensor, bounds: Tensor) -> None:
        """The next row into its place."""
        self.ids.copy_(ids, non_blocking=True)
        self.positions.copy_(positions, non_blocking=True)
        self.documents.cu_seqlens.copy_(to_device(bounds, ids.device), non_blocking=True)


class _Replay(torch.autograd.Function):
    """Hidden states `[1, T, H]` of what `recorded` has taken; its gradients go where they were recorded to."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, recorded: Recorded) -> Tensor:
        assert recorded.forward is not None
        recorded.forward()
        ctx.recorded = recorded
        assert recorded.live is not None
        return recorded.live.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, None]:
        recorded: Recorded = ctx.recorded
        assert recorded.grad is not None and recorded.backward is not None
        recorded.grad.copy_(grads[0])
        recorded.backward()
        return None, None


@dataclass
class Graphs:
    """Hidden states of packed rows for training, as launches or as graphs; launches for everything else.

    choice: what was asked for. tell: what was found. on: None until that is known. room: bytes that the plan leaves. needs: bytes
    that a step takes and gives back, as measured so far, and workspaces.
    """

    model: PreTrainedModel
    wanted: Wanted
    recorder: Recorder | None
    tell: Callable[[str], None]
    choice: Choice
    room: int = 0
    needs: Callable[[], int] = lambda: 0
    on: bool | None = None
    seen: dict[Shape, int] = field(default_factory=dict)
    recorded: dict[Shape, Recorded] = field(default_factory=dict)
    rows: list[tuple[str, Callable[[], float | None]]] = field(default_factory=list)
    """How each row ran and when it began, until the choice is made."""

    def __call__(self, ids: Tensor, positions: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The last hidden state `[1, T, H]`; boundaries int32 `[D + 1]` on the CPU."""
        if self.on is not False and torch.is_grad_enabled():
            documents = Documents.of(cu_seqlens, torch.device("cpu"), ids.shape[1], self.wanted)
            shape = (ids.shape[1], documents.equal, _room(len(documents.boundaries or ()) - 1))
            self._compare()
            out = self._recorded(ids, positions, documents, shape)
            if out is not None:
                return out
            self._stamp("launches")
        return forward.hidden_states(self.model, ids, positions, cu_seqlens, self.wanted)

    def _recorded(self, ids: Tensor, positions: Tensor, documents: Documents, shape: Shape) -> Tensor | None:
        """By a graph, or beside as launches what is recorded the next time; None for a row that neither is for."""
        visit = self.seen[shape] = self.seen.get(shape, -1) + 1
        one = self.recorded.get(shape)
        if one is None:
            if self.on is False or visit < (1 if self.on else ROUNDS) or len(self.recorded) == MOST or not self._fits():
                return None
            self._stamp("beside")
            one = self.recorded[shape] = _static(ids, positions, documents, shape)
            one.take(ids, positions, _filled(documents, shape[2]))
            return self._recorder.beside(lambda: self._run(one))
        one.take(ids, positions, _filled(documents, shape[2]))
        if one.backward is None and not self._record(one):
            return None
        self._stamp("graphs")
        anchor = torch.zeros((), device=ids.device, requires_grad=True)
        out: Tensor = _Replay.apply(anchor, one)  # type: ignore[no-untyped-call]
        return out

    def drop(self) -> None:
        """Memory ran short, or layers keep something else now: launches from here on."""
        if self.on is not False and self.recorded:
            self.tell("graphs: off (the plan changed; launches again)")
        self.on = False
        self.recorded.clear()
        self.rows.clear()

    @property
    def _recorder(self) -> Recorder:
        assert self.recorder is not None, "off where there is none"
        return self.recorder

    def _run(self, one: Recorded) -> Tensor:
        # Nothing that another row's boundaries have left in the documents may be recorded.
        documents = replace(one.documents, _kept={})
        with torch.enable_grad():
            return forward.through(self.model, one.ids, one.positions, documents)

    def _record(self, one: Recorded) -> bool:
        """Both graphs of a shape; what cannot be recorded runs as launches from now on."""

        def ahead() -> None:
            one.live = self._run(one)

        def back() -> None:
            assert one.live is not None and one.grad is not None
            torch.autograd.backward(one.live, one.grad)

        try:
            one.forward = self._recorder.record(ahead)
            assert one.live is not None
            one.grad = torch.empty_like(one.live)
            one.backward = self._recorder.record(back)
        except RuntimeError as error:
            why = "memory ran short" if is_shortage(error) else str(error).splitlines()[0]
            self._settle(False, f"recording failed: {why}")
            return False
        return True

    def _fits(self) -> bool:
        """Whether the plan leaves what graphs hold between steps."""
        needs = self.needs()
        if self.choice.value == "on" or needs <= self.room:
            return True
        self._settle(False, f"auto: they hold {needs / 2**30:.2f} GiB between steps, {self.room / 2**30:.2f} are spare")
        return False

    def _stamp(self, way: str) -> None:
        if self.on is None:
            self.rows.append((way, self._recorder.stamp()))

    def _compare(self) -> None:
        """When enough rows of both ways are done on the device: the choice. A row lasts until the next one begins."""
        if self.on is not None or sum(way == "graphs" for way, _ in self.rows) <= ROUNDS:
            return
        times = [(way, stamp()) for way, stamp in self.rows]
        spans: dict[str, list[float]] = {"launches": [], "graphs": [], "beside": []}
        for (way, begun), (_, ended) in itertools.pairwise(times):
            if begun is not None and ended is not None:
                spans[way].append(ended - begun)
        if len(spans["graphs"]) < ROUNDS or len(spans["launches"]) < 2:
            return
        graphs, launches = min(spans["graphs"]), min(spans["launches"])
        why = "asked for" if self.choice.value == "on" else "auto"
        faster = graphs <= launches * (1 - GAIN)
        self._settle(self.choice.value == "on" or faster, f"{why}: measured {graphs:.1f} ms a row, {launches:.1f} as launches")

    def _settle(self, on: bool, why: str) -> None:
        self.on = on
        self.tell(f"graphs: {'on' if on else 'off'} ({why})")
        self.rows.clear()
        if not on:
            self.recorded.clear()


def _static(ids: Tensor, positions: Tensor, documents: Documents, shape: Shape) -> Recorded:
    """Memory for rows of a shape. Of documents of several lengths nothing but a bound is known beforehand."""
    count = shape[2] if documents.equal is None else documents.equal
    cu_seqlens = torch.empty(count + 1, dtype=torch.int32, device=ids.device)
    known = (None, ids.shape[1]) if documents.equal is None else (documents.boundaries, documents.longest)
    return Recorded(torch.empty_like(ids), torch.empty_like(positions), Documents(cu_seqlens, *known, documents.wanted))


def _room(documents: int) -> int:
    """Documents that a graph for so many has room for."""
    room = LEAST_BOUNDS
    while room < documents:
        room *= 2
    return room


def _filled(documents: Documents, room: int) -> Tensor:
    """int32 `[room + 1]`: boundaries with empty documents behind; of equally long ones, the boundaries alone."""
    bounds = torch.tensor(documents.boundaries, dtype=torch.int32)
    if documents.equal is not None:
        return bounds
    return torch.cat([bounds, bounds[-1:].expand(room + 1 - len(bounds))])


def of(
    asked: Asked, model: PreTrainedModel, device: torch.device, wanted: Wanted, room: int, tell: Callable[[str], None]
) -> Graphs:
    """For a run, with its choice. Raises RecipeError (train.graphs) where they are asked for in vain."""
    why = "asked for" if asked == "off" else obstacle(model, device)
    if why and asked == "on":
        raise RecipeError(f"`train.graphs: on` cannot be had here: {why}", hint="set `train.graphs: auto`", code="train.graphs")
    if why:
        told = Choice("off", why if asked == "off" else f"auto: {why}")
        return Graphs(model, wanted, None, tell, told, on=False)

    def needs() -> int:
        return torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device) + WORKSPACES

    told = Choice("on", "asked for") if asked == "on" else Choice("auto", "the first steps show whether they are faster")
    return Graphs(model, wanted, CudaRecorder(device), tell, told, room, needs)


def obstacle(model: PreTrainedModel, device: torch.device) -> str:
    """Why the layers cannot be recorded; "" where they can."""
    if device.type != "cuda":
        return f"a {device.type} device has none"
    layers = [m for m in model.modules() if isinstance(m, DecoderLayer)]
    fused = [m.fused for m in layers if isinstance(m.fused, Fused)]
    if not fused or len(fused) < len(layers) or not forward.uses_boundaries(model):
        return "not all layers run fused"
    if any(one.drops for one in fused):
        return "dropout is numbered by the host"
    if any(one.keep.away for one in fused):
        return "kept activations wait in host memory"
    return ""
