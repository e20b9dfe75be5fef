"""Layers as graphs, with a recorder that runs the recorded function again: the same numbers, and when they are taken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from halfbyte.adapters.config import AdapterConfig
from halfbyte.errors import RecipeError
from halfbyte.layers import forward
from halfbyte.layers.fused.keep import EVERYTHING, INPUTS, OFFLOADED, Keep
from halfbyte.layers.fused.prepare import prepare
from halfbyte.optim.flat import flatten
from halfbyte.train import graphs
from halfbyte.train.choices import Choice
from halfbyte.train.graphs import MOST, Graphs
from layers.families import learned, weight_of

pytestmark = pytest.mark.cpu

ROWS = [(7, 16, 1, 10), (34,), (3, 31), (17, 17), (5, 5, 5, 5, 5, 9), (1, 33), (34,), (17, 17), (2,) * 17, (30, 4)] * 3
"""Lengths of the documents of rows of 34 tokens: several graphs' worth, in no order."""


class Again:
    """A replay runs the function again. Rows by graph last `fast`, others `slow` milliseconds."""

    def __init__(self, slow: float = 2.0, fast: float = 1.0, breaks: str = "") -> None:
        self.slow, self.fast, self.breaks = slow, fast, breaks
        self.bodies: list[Callable[[], None]] = []
        self.replays = self.beside_runs = 0
        self.now = 0.0

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        if self.breaks:
            raise RuntimeError(self.breaks)
        ahead = len(self.bodies) % 2 == 0
        self.bodies.append(body)
        if ahead:  # so that its output is there; a backward that ran now would be added twice
            body()

        def replay() -> None:
            self.replays += ahead
            body()

        return replay

    def beside(self, body: Callable[[], Tensor]) -> Tensor:
        self.beside_runs += 1
        return body()

    def stamp(self) -> Callable[[], float]:
        before, self.seen = getattr(self, "seen", 0), self.replays
        self.now += self.fast if self.replays > before else self.slow
        now = self.now
        return lambda: now


def inputs(lengths: tuple[int, ...], number: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(0, 250, (1, sum(lengths)), generator=torch.Generator().manual_seed(number))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return ids, positions, torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def run(
    recorder: Again | None, keep: Keep = EVERYTHING, choice: str = "auto", room: int = 1, needs: int = 0, count: int = len(ROWS)
) -> tuple[Graphs, list[tuple[Tensor, Tensor]], list[str]]:
    """Rows of `ROWS` by graphs, or without a recorder as launches: hidden states and flat gradients of each; what was told."""
    model, adapter = learned(AdapterConfig(rank=4))
    flat = flatten(adapter.parameters())
    assert prepare(model, keep, in_place=True).layers
    told: list[str] = []
    on = False if recorder is None else None
    made = Graphs(model, "auto", recorder, told.append, Choice(choice, ""), room, lambda: needs, on)
    found = []
    for number, lengths in enumerate(ROWS[:count]):
        flat.grads.zero_()
        hidden = made(*inputs(lengths, number))
        (hidden * weight_of(hidden)).sum().backward()
        found.append((hidden.detach().clone(), flat.grads.clone()))
    return made, found, told


@pytest.mark.parametrize("keep", [EVERYTHING, INPUTS], ids=["keep", "recompute"])
def test_rows_by_graph_give_the_bits_of_launches(keep: Keep) -> None:
    recorder = Again()
    made, found, told = run(recorder, keep)
    _, expected, _ = run(None, keep)
    assert made.on and told == ["graphs: on (auto: measured 1.0 ms a row, 2.0 as launches)"]
    assert recorder.replays > len(ROWS) / 3 and recorder.beside_runs == len(made.recorded) == len(recorder.bodies) / 2
    assert {shape[1:] for shape in made.recorded} >= {(1, 8), (2, 8), (None, 8)}
    for (hidden, grads), (hidden_expected, grads_expected) in zip(found, expected, strict=True):
        assert torch.equal(hidden, hidden_expected) and torch.equal(grads, grads_expected) and grads.any()


def test_what_is_no_faster_is_not_kept() -> None:
    made, found, told = run(Again(slow=1.0, fast=0.99))
    assert made.on is False and not made.recorded and told == ["graphs: off (auto: measured 1.0 ms a row, 1.0 as launches)"]
    assert len(found) == len(ROWS)
    made, _, told = run(Again(slow=1.0, fast=0.99), choice="on")
    assert made.on and told[0].startswith("graphs: on (asked for")


def test_without_room_nothing_is_recorded() -> None:
    recorder = Again()
    made, _, told = run(recorder, room=2**30, needs=2**31, count=8)
    assert made.on is False and not recorder.bodies and not recorder.beside_runs
    assert told == ["graphs: off (auto: they hold 2.00 GiB between steps, 1.00 are spare)"]


def test_what_cannot_be_recorded_is_launched() -> None:
    _, found, told = run(Again(breaks="operation not permitted when stream is capturing\nmore"))
    _, expected, _ = run(None)
    assert told == ["graphs: off (recording failed: operation not permitted when stream is capturing)"]
    assert all(torch.equal(a, b) for one, other in zip(found, expected, strict=True) for a, b in zip(one, other, strict=True))


def test_no_more_shapes_than_most_are_recorded_and_none_without_gradients() -> None:
    model, adapter = learned(AdapterConfig(rank=4))
    flatten(adapter.parameters())
    prepare(model, in_place=True)
    made = Graphs(model, "auto", Again(), lambda line: None, Choice("on", ""), on=True)
    for tokens in range(2, MOST + 6):
        for visit in range(3):
            made(*inputs((tokens,), visit)).sum().backward()
    assert len(made.recorded) == MOST
    seen = dict(made.seen)
    with torch.no_grad():
        assert torch.equal(made(*inputs((9,), 1)), forward.hidden_states(model, *inputs((9,), 1)))
    assert made.seen == seen
    made.drop()
    assert made.on is False and not made.recorded


def test_the_reason_for_launches_is_told_and_asking_in_vain_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = learned(AdapterConfig(rank=4))
    flatten(adapter.parameters())
    cpu, cuda = torch.device("cpu"), torch.device("cuda")

    def why(model: nn.Module) -> str:
        return graphs.obstacle(model, cuda)  # type: ignore[arg-type]

    made = graphs.of("auto", model, cpu, "auto", 0, print)
    assert str(made.choice) == "off (auto: a cpu device has none)" and made.on is False
    with pytest.raises(RecipeError, match="a cpu device has none") as caught:
        graphs.of("on", model, cpu, "auto", 0, print)
    assert caught.value.code == "train.graphs"
    assert why(model) == "not all layers run fused"
    prepare(model, in_place=True)
    assert why(model) == ""
    prepare(model, OFFLOADED, in_place=True)
    assert why(model) == "kept activations wait in host memory"
    dropping, adapter = learned(AdapterConfig(rank=4, dropout=0.1))
    flatten(adapter.parameters())
    prepare(dropping, in_place=True)
    assert why(dropping) == "dropout is numbered by the host"
