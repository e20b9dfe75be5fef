"""What a plan says where nothing fits, what it may pin, and models that it cannot count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from halfbyte.errors import ModelError, RecipeError
from halfbyte.memory import choose
from halfbyte.memory.advice import advice
from halfbyte.memory.budget import Budget
from halfbyte.memory.plan import Plan, chooser, plan, settled
from memory.test_plan import QWEN3_8B, recipe_of

pytestmark = pytest.mark.cpu

GIB = 1 << 30
MOE = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "num_local_experts": 4,
}
TITLES = ("format.head=nf4", "adapter.rank=8", "data.tokens=1024", "optim.bits=8")


def _set(name: str) -> str:
    return f"{name.partition('=')[0]}={name.partition('=')[2]}"


def exactly(count: int) -> Budget:
    """A GPU of which so many bytes may be used."""
    return Budget("cuda", "a size", count, count, False, "")


def test_every_single_change_saves_what_a_plan_with_it_saves() -> None:
    none = plan(recipe_of(), "2GiB", config=QWEN3_8B)
    assert not none.fits
    singles = {line.partition(" saves ")[0]: line for line in none.advice if " saves " in line}
    assert set(TITLES) <= set(singles)
    for text, line in singles.items():
        changed = plan(recipe_of(_set(text)), "2GiB", config=QWEN3_8B)
        assert f"saves {choose.gib(none.bytes - changed.bytes)}" in line, (line, choose.gib(none.bytes - changed.bytes))
        assert "fits" not in line


def test_a_change_that_suffices_is_marked_and_does() -> None:
    least = plan(recipe_of(), "2GiB", config=QWEN3_8B).bytes
    room = exactly(least - (1 << 20))
    short = plan(recipe_of(), room, config=QWEN3_8B)
    fitting = [line.partition(" saves ")[0] for line in short.advice if line.endswith("and fits")]
    assert fitting and not any(line.startswith("all of these") for line in short.advice)
    for text in fitting:
        assert plan(recipe_of(_set(text)), room, config=QWEN3_8B).fits, text


def test_where_no_single_change_suffices_all_together_and_a_card_are_told() -> None:
    none = plan(recipe_of(), "2GiB", config=QWEN3_8B)
    together = next(line for line in none.advice if line.startswith("all of these together need"))
    changed = plan(recipe_of(*TITLES), "2GiB", config=QWEN3_8B)
    assert f"need {choose.gib(changed.bytes)}, still {choose.gib(changed.bytes - none.budget.bytes)} too much" in together
    assert none.advice[-1].startswith("a smaller model, or with this a card of 6 GiB: rtx2060")
    assert plan(recipe_of(*TITLES), "rtx2060", config=QWEN3_8B).fits
    room = exactly(changed.bytes + (1 << 20))
    assert any(line.endswith("which fits") for line in plan(recipe_of(), room, config=QWEN3_8B).advice)
    assert plan(recipe_of(*TITLES), room, config=QWEN3_8B).fits


def test_experts_are_told_apart_and_a_model_without_attention_is_refused() -> None:
    found = plan(recipe_of(), "16MiB", config=MOE)
    experts = 2 * 2 * 4 * 3 * 64 * 128
    assert f"a dense model: {choose.gib(experts)} are experts of a mixture, which no format packs yet" in found.advice
    note = next(p.note for p in found.parts if p.name == "other weights")
    assert note.startswith("experts (no format packs them yet), ") and "head" in note
    with pytest.raises(ModelError, match="`mamba` is no decoder with attention: its config has no num_attention_heads"):
        plan(recipe_of(), "8GiB", config={"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2})


@pytest.mark.parametrize(("card", "compute"), [("t4", "fp16"), ("rtx2080ti", "fp16"), ("v100", "fp16"), ("rtx3060", "bf16")])
def test_a_card_without_bf16_is_planned_in_fp16(card: str, compute: str) -> None:
    assert chooser(recipe_of(), card, config=MOE).compute == compute


def _pinned(found: Plan) -> int:
    return found.offloaded + found.paged + found.embedded


@pytest.mark.parametrize("gib", [0.25, 1.4, 3.0])
def test_all_that_waits_in_host_memory_shares_one_limit(gib: float) -> None:
    made = chooser(recipe_of(f"memory.host={gib}GiB"), "7GiB", config=QWEN3_8B)
    rungs = made.rungs()
    for rung in rungs:
        waits = sum(p.host for p in made.parts(rung))
        assert waits <= gib * GIB, rung.words()
    assert max(sum(p.host for p in made.parts(rung)) for rung in rungs) > 0.5 * gib * GIB, "the limit is used"
    assert _pinned(settled(made)) <= gib * GIB


def test_the_leanest_way_keeps_to_the_limit_too() -> None:
    """Of a row so long that nothing fits, what all layers would send is 24 GiB."""
    found = plan(recipe_of("memory.host=16GiB", "train.batch=1", "data.tokens=98304"), "16GiB", config=QWEN3_8B)
    assert not found.fits and 14 * GIB < _pinned(found) <= 16 * GIB


@pytest.mark.parametrize(
    ("card", "overrides"),
    [("8GiB", ("memory.host=4GiB", "format.head=nf4")), ("16GiB", ()), ("24GiB", ()), ("24GiB", ("memory.offload=off",))],
    ids=str,
)
def test_the_longest_row_that_a_plan_tells_is_one_that_it_takes(card: str, overrides: tuple[str, ...]) -> None:
    longest = plan(recipe_of(*overrides), card, config=QWEN3_8B).longest
    assert longest is not None
    for more, fits in ((0, True), (4096, False)):
        row = (f"data.tokens={longest + more}", "train.batch=1", *overrides)
        assert plan(recipe_of(*row), card, config=QWEN3_8B).fits == fits


def test_host_memory_of_this_machine_is_shared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose.machine, "ram", lambda: choose.machine.Device("CPU", 4 * GIB, 8 * GIB))
    made = chooser(recipe_of(), "7GiB", config=QWEN3_8B)
    here = replace(made, budget=replace(made.budget, here=True))
    monkeypatch.setattr(choose, "twin", lambda device: "fused")
    assert max(sum(p.host for p in here.parts(rung)) for rung in here.rungs()) <= 2 * GIB
    assert "4.00 GiB are free, and no more than 50% of that is pinned" in settled(here).offload


def test_the_longest_row_keeps_here_what_host_memory_has_no_room_for() -> None:
    rows: list[Any] = [chooser(recipe_of(f"memory.host={gib}GiB"), "24GiB", config=QWEN3_8B).longest() for gib in (3, 20, 200)]
    assert 30_000 < rows[0] < rows[1] < rows[2]
    off = chooser(recipe_of("memory.offload=off", "memory.host=200GiB"), "24GiB", config=QWEN3_8B).longest()
    assert off is not None and off < rows[0]


def test_a_limit_that_is_no_size_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"memory\.host: `plenty` is no size"):
        plan(recipe_of("memory.host=plenty"), "8GiB", config=MOE)


def test_help_in_a_run_names_changes_only() -> None:
    made = chooser(recipe_of(), "24GiB", config=QWEN3_8B)
    told = advice(made, made.rungs()[-1], 0)
    assert told and all(" saves " in line for line in told)
