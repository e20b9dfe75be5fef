"""Seconds of a microbatch whose layers use the bus: by hand, one wait at a time."""

from __future__ import annotations

import pytest

from halfbyte.layers.fused.keep import EVERYTHING, keeping
from halfbyte.memory import bus, timeline
from halfbyte.memory.tape import Passage
from halfbyte.memory.timeline import Stage


def test_nothing_sent_is_a_sum() -> None:
    assert bus.seconds(1.0, [2.0, 3.0], [0.0, 0.0], 0.5) == 7.5


def test_short_copies_hide_but_for_the_one_that_backward_begins_with() -> None:
    """Ten layers, copies half as long as a forward: only the last layer's way back is waited for."""
    whole = bus.seconds(1.0, [2.0] * 10, [0.5] * 10, 0.5)
    assert whole == pytest.approx(10 + 0.5 + 0.5 + 20)
    assert bus.seconds(1.0, [2.0] * 10, [0.5] * 9 + [0.0], 0.5) == pytest.approx(10 + 0.5 + 20), "a last layer that sends nothing"


def test_a_layer_waits_for_the_copies_of_the_second_before_it() -> None:
    """Copies of 3 where a layer takes 1: out until 4, 7, 10; the third layer's are waited for since backward begins with them."""
    assert bus.seconds(1.0, [10.0] * 3, [3.0] * 3, 0.0) == pytest.approx(10 + 3 + 30)
    # The fourth may only begin to send once the second has: it ends at 8, and so do its own copies behind the third's.
    assert bus.seconds(1.0, [10.0] * 4, [3.0] * 4, 0.0) == pytest.approx(13 + 3 + 40)


def test_even_work_is_faster_than_all_of_it_in_the_first_layers() -> None:
    first, spread = [4.0] * 5 + [0.0] * 5, [4.0, 0.0] * 5
    assert bus.seconds(2.0, [4.0] * 10, spread, 1.0) < bus.seconds(2.0, [4.0] * 10, first, 1.0) - 2


def test_gaps_are_left_by_gate_and_up_alone() -> None:
    def stage(away: tuple[str, ...]) -> Stage:
        return Stage(keeping(("qkv", "inputs"), away), 0, 100, 100, Passage(0, {}), Passage(0, {}))

    assert timeline.gaps((stage(("qkv", "inputs")), stage(("qkv",)))) == 50
    assert timeline.gaps((stage(("qkv",)), Stage(EVERYTHING, 9, 0, 0, Passage(0, {}), Passage(0, {})))) == 0
