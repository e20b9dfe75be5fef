"""The moments of a microbatch, counted by hand: what waits, what is on its way to host memory or back, and what one layer takes."""

from __future__ import annotations

from dataclasses import replace

from halfbyte.layers.fused.keep import INPUTS, keeping
from halfbyte.memory.tape import LIBRARY, SCRATCH, Passage
from halfbyte.memory.timeline import Ends, Stage, moments, peak

FORWARD, BACKWARD = Passage(100, {SCRATCH: 30}), Passage(130, {SCRATCH: 20, LIBRARY: 40})
HERE = Stage(INPUTS, 10, 0, 0, FORWARD, BACKWARD)
AWAY = Stage(keeping((), away=("x",)), 6, 4, 4096, FORWARD, BACKWARD)
ENDS = Ends(hidden=5, logits=7, tables=2)


def found(*layers: Stage) -> list[tuple[str, int, int]]:
    return [(m.name, m.bytes, m.kept) for m in moments(layers, ENDS)]


def test_what_stays_adds_up_and_goes_again() -> None:
    """The loss: the norm's input and output and, while it runs, the gradient and the logits: 2 x 5 + 7 + 5."""
    assert found(HERE, HERE, HERE) == [
        *(("forward", 0 + 100 + 2, 2), ("forward", 10 + 102, 12), ("forward", 20 + 102, 22)),
        ("loss", 30 + 2 + 22, 32 + 5),
        *(("backward", 20 + 2 + 130, 22), ("backward", 10 + 2 + 130, 12), ("backward", 2 + 130, 2)),
    ]
    assert Ends(5, 3, 2).loss == Ends(5, 0, 2).loss == 20, "the norm behind the layers, backwards"


def test_two_layers_are_on_their_way_out_and_one_comes_back_ahead() -> None:
    """The embedding's output, 5, is held by the model's own forward when the first layers' inputs are long gone."""
    forward = [0, 6 + 4, 12 + 8, 18 + 8 + 5]
    backward = [18 + 4, 12 + 4, 6 + 4, 0]
    assert [bytes_ for _, bytes_, _ in found(AWAY, AWAY, AWAY, AWAY)] == [
        *(waits + 100 + 2 for waits in forward),
        24 + 2 + 8 + 22,
        *(waits + 2 + 130 for waits in backward),
    ]


def test_layers_that_stay_start_the_copies_of_those_below() -> None:
    assert [bytes_ for _, bytes_, _ in found(AWAY, HERE, HERE)] == [
        *(102, 6 + 4 + 102, 16 + 4 + 102),
        26 + 2 + 4 + 22,
        *(16 + 4 + 2 + 130, 6 + 4 + 2 + 130, 0 + 2 + 130),
    ]


def test_the_largest_moment_names_its_parts() -> None:
    top = peak([HERE, HERE], ENDS)
    assert (top.name, top.bytes, top.kept, top.scratch, top.library) == ("backward", 142, 12, 20, 40)
    scored = peak([replace(HERE, scored=Passage(200, {SCRATCH: 120})), HERE], ENDS)
    assert (scored.name, scored.bytes, scored.kept, scored.scratch) == ("scored", 5 + 2 + 200, 5 + 2, 120)
    loud = peak([HERE, HERE], Ends(hidden=5, logits=500, tables=2))
    assert (loud.name, loud.bytes) == ("loss", 22 + 10 + 505)
