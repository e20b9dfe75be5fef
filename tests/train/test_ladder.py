"""Where a run begins: on the plan's rung, on a checkpoint's while it fits, on the one that it fell to."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from halfbyte.memory.plan import Plan, plan
from halfbyte.memory.rungs import Rung
from halfbyte.recipe import recipe_from
from halfbyte.train import ladder
from halfbyte.train.choices import Choice
from support import QWEN3_8B

RECIPE = recipe_from({"model": "m", "data": {"train": "a.jsonl"}})


def planned(card: str) -> Plan:
    return plan(RECIPE, card, config=QWEN3_8B)


def kept(rung: Rung) -> dict[str, Choice]:
    """What a checkpoint of a run on this rung holds."""
    return {"microbatch": Choice(rung.microbatch, "planned"), "recompute": Choice("on" if rung.recompute else "off", "planned")}


def test_what_a_checkpoint_holds_is_taken_while_it_fits() -> None:
    small, large = planned("10GiB"), planned("80GiB")
    rung, choices = ladder.begin(large, RECIPE, kept(small.rung), [])
    assert rung.microbatch == small.rung.microbatch and rung.recompute == small.rung.recompute
    assert choices["microbatch"].reason == choices["recompute"].reason == "planned; kept from the checkpoint"


def test_what_does_not_fit_any_more_is_not_taken() -> None:
    small, large = planned("10GiB"), planned("80GiB")
    assert large.rung.bytes > 2 * small.budget.bytes
    rung, choices = ladder.begin(small, RECIPE, kept(large.rung), [])
    assert rung.bytes <= small.budget.bytes
    assert choices["recompute"] == Choice("on", small.reason)
    few = replace(large.rung, microbatch=RECIPE.train.batch)
    assert ladder.begin(small, RECIPE, kept(few), [])[0] == small.rung


@pytest.mark.parametrize("card", ["10GiB", "24GiB"])
def test_a_run_goes_on_where_it_fell_to(card: str) -> None:
    here = planned(card)
    fallen = here.smaller(here.rung)
    assert fallen is not None
    rung, choices = ladder.begin(here, RECIPE, kept(here.rung), [{"step": 7, "why": "x", "rung": asdict(fallen)}])
    assert rung == fallen
    assert choices["offload"].reason == "memory ran short at step 7; kept from the checkpoint"


def test_and_further_down_where_that_does_not_fit() -> None:
    small, large = planned("10GiB"), planned("80GiB")
    fallen = large.smaller(large.rung)
    assert fallen is not None and fallen.bytes > small.budget.bytes
    rung, choices = ladder.begin(small, RECIPE, {}, [{"step": 7, "why": "x", "rung": asdict(fallen)}])
    assert rung == small.rung
    assert choices["offload"].reason.startswith("memory ran short at step 7; the fastest")
