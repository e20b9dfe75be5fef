"""The plan: what it chooses, what it says, and the layout of its JSON."""

from __future__ import annotations

import io
import itertools
import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from rich.console import Console

from halfbyte.config import Recipe
from halfbyte.errors import MemoryPlanError, RecipeError
from halfbyte.layers.fused.keep import EVERYTHING, INPUTS, OFFLOADED, Keep, keeping
from halfbyte.machine import Device
from halfbyte.memory import budget as budgets
from halfbyte.memory import speed
from halfbyte.memory.budget import GIB, Budget, budget, budget_here
from halfbyte.memory.choose import Chooser
from halfbyte.memory.gpus import CARDS
from halfbyte.memory.lengths import Lengths
from halfbyte.memory.measure import peak_rss, ram, rss
from halfbyte.memory.parts import parts
from halfbyte.memory.plan import Plan, compute_of, json_schema, plan, rates_of
from halfbyte.memory.rungs import Rung
from halfbyte.memory.shapes import shapes, skeleton
from halfbyte.memory.table import render, size
from halfbyte.recipe import recipe_from
from support import QWEN3_8B, SMOLLM2

pytestmark = pytest.mark.cpu


def recipe_of(*overrides: str) -> Recipe:
    return recipe_from({"model": "m", "data": {"train": "a.jsonl"}}, list(overrides))


def test_products_in_fp8_are_counted_and_timed_as_such() -> None:
    """Two layouts of a byte a weight are held where 16 bits hold one of two; the step is a third faster, less than its products."""
    wide, narrow = (plan(recipe_of(f"compute={c}", "memory.microbatch=4"), "h200", config=QWEN3_8B) for c in ("bf16", "fp8"))
    held = {p.compute: next(part.bytes for part in p.parts if part.name == "decoded weights") for p in (wide, narrow)}
    assert narrow.rung.decoded and 1.0 < held["fp8"] / held["bf16"] < 1.04
    assert wide.seconds is not None and narrow.seconds is not None and 1.3 < wide.seconds / narrow.seconds < 1.6


def test_held_out_rows_are_scored_in_16_bits_which_a_plan_in_fp8_counts() -> None:
    """Short rows: a weight of gate and up in bf16 is more than all that a step in fp8 needs besides."""
    short, long = recipe_of("data.tokens=256"), recipe_of("data.tokens=8192")
    narrow = {part.name: part.bytes for part in parts(QWEN3_8B, short, recompute=True, compute="fp8")}
    assert narrow["decode scratch"] == 2 * (2 * 12288 + 32) * (4096 + 32) and "backward" not in narrow
    for recipe, compute in ((short, "bf16"), (long, "fp8")):
        assert "scored" not in {part.name for part in parts(QWEN3_8B, recipe, recompute=True, compute=compute)}


def test_a_card_without_fp8_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"compute: fp8 needs compute capability 8.9 or newer, which a100-80g has not") as caught:
        plan(recipe_of("compute=fp8"), "a100-80g", config=SMOLLM2)
    assert caught.value.code == "recipe.compute"
    assert plan(recipe_of("compute=fp8"), "rtx4060ti", config=SMOLLM2).compute == "fp8"


def test_the_embedding_waits_in_host_memory_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many bytes fewer as it has; slower by the bus alone; left on the GPU while something as fast fits."""
    size = 2 * 151_936 * 4096
    roomy, tight = plan(recipe_of(), "80GiB", config=QWEN3_8B), plan(recipe_of(), "7GiB", config=QWEN3_8B)
    assert not roomy.embedded and roomy.embedding == "auto: it stays while memory is not short"
    assert tight.embedded == size and tight.embedding == "auto: faster than what else would fit" and tight.rung.embedding_away
    assert "1.16 GiB of the embedding in host memory" in " ".join(tight.table().split())
    one = ("memory.microbatch=1", "memory.recompute=off", "memory.offload=off", "optim.paged=never")
    here, there = (plan(recipe_of(*one, f"memory.embedding={e}"), "rtx4090", config=QWEN3_8B) for e in ("gpu", "host"))
    assert there.embedding == "asked for" and here.bytes - there.bytes == size
    assert here.seconds is not None and there.seconds is not None
    assert there.seconds - here.seconds == pytest.approx(8 * 2048 * 4096 * 2 / (speed.GATHER * 25e9))
    assert any(
        a.startswith("memory.embedding=host saves 1.16 GiB")
        for a in plan(recipe_of(*one, "memory.embedding=gpu"), "4GiB", config=QWEN3_8B).advice
    )
    monkeypatch.setattr("halfbyte.machine.ram", lambda: Device("CPU", GIB, 64 * GIB))
    monkeypatch.setattr("halfbyte.memory.choose.twin", lambda device: "fused")
    short = plan(recipe_of(), Budget("cuda", "rtx4090", 7 * GIB, 7 * GIB, True, ""), config=QWEN3_8B)
    assert not short.embedded and short.embedding.startswith(
        "auto: it would take 1.16 GiB of host memory; 1.00 GiB are free, and no more than 50% of that"
    )


def test_an_embedding_that_must_stay() -> None:
    tied = plan(recipe_of(), "1GiB", config=SMOLLM2)
    assert tied.embedding == "auto: it is the output head too (tied), which the loss reads as a whole"
    learning = plan(recipe_of("adapter.modules_to_save=[embed_tokens]"), "24GiB", config=QWEN3_8B)
    assert learning.embedding == "auto: it learns"
    with pytest.raises(RecipeError, match=r"memory.embedding: host cannot be had here: it is the output head too") as caught:
        plan(recipe_of("memory.embedding=host"), "24GiB", config=SMOLLM2)
    assert caught.value.code == "memory.embedding"


def test_8b_on_cards() -> None:
    """An 8B fits a 12 GB card with something computed again or away, a 141 GiB one keeps everything, and a 4 GB one is refused."""
    small, large = (plan(recipe_of(), card, config=QWEN3_8B) for card in ("rtx3060", "h200"))
    assert small.fits and (small.recompute != "none" or small.offloaded)
    assert large.fits and large.recompute == "none" and not large.offloaded
    assert large.rung.decoded and not small.rung.decoded, "decoded weights are held where there is room"
    assert large.rung.chunks < 1 <= small.rungs[-1].chunks, "and so are logits of more tokens at a time"
    sizes = {p.name: p.bytes for p in large.parts}
    assert sizes["decoded weights"] > 13 << 30 and "decode scratch" not in sizes and sum(sizes.values()) == large.bytes
    none = plan(recipe_of(), "4GiB", config=QWEN3_8B)
    assert not none.fits and none.advice and none.spare < 0
    with pytest.raises(MemoryPlanError, match=r"needs .* GiB and 4GiB has 3.76 GiB") as caught:
        none.require()
    assert caught.value.code == "memory.no-fit"


def test_more_memory_never_chooses_worse() -> None:
    order = [plan(recipe_of(), f"{g}GiB", config=QWEN3_8B) for g in (10, 16, 24, 40, 80, 141)]
    seconds = [p.rung.seconds for p in order]
    assert seconds == sorted(seconds, reverse=True) and seconds[0] > seconds[-1]
    assert all(p.fits and p.bytes <= p.budget.bytes for p in order)
    longest = [p.longest or 0 for p in order]
    assert longest == sorted(longest) and longest[0] > 2048


def test_rungs_go_down_in_bytes_and_up_in_seconds() -> None:
    """From the fastest to the leanest; each is what its parts say, and what is planned is the fastest that fits."""
    found = plan(recipe_of(), "16GiB", config=QWEN3_8B)
    bytes_, seconds = [r.bytes for r in found.rungs], [r.seconds for r in found.rungs]
    assert bytes_ == sorted(bytes_, reverse=True) and len(set(bytes_)) == len(bytes_) > 8
    assert seconds == sorted(seconds)
    assert found.rung == next(r for r in found.rungs if r.bytes <= found.budget.bytes)
    below = found.smaller(found.rung)
    assert below is not None and below.bytes < found.bytes
    assert found.smaller(found.rungs[-1]) is None


def test_the_choice_is_as_fast_as_the_fastest_of_all_that_were_tried_one_by_one() -> None:
    """Against every pair of choices of a coarser list, counted layer by layer."""
    recipe, card = recipe_of("data.tokens=4096", "memory.microbatch=1", "optim.paged=never"), budget("rtx3060")
    found = plan(recipe, card, config=QWEN3_8B)
    s = shapes(skeleton(QWEN3_8B, torch.bfloat16), recipe.format, recipe.adapter)
    chooser = Chooser(s, recipe, card, "bf16", rates_of(recipe, card, torch.bfloat16))
    some = [EVERYTHING, INPUTS, OFFLOADED, keeping(("qkv", "attended", "mid")), keeping(("attended",), away=("x", "attended"))]
    best = float("inf")
    for lean, rest in itertools.permutations(some, 2):
        for k in range(0, s.layers + 1, 3):
            rung = Rung(1, True, True, lean=lean.spec(), lean_layers=k, rest=rest.spec())
            if sum(p.bytes for p in chooser.parts(rung)) <= card.bytes:
                best = min(best, chooser.seconds(rung))
    assert found.rung.seconds <= 1.01 * best < float("inf")
    assert found.rung.seconds == pytest.approx(chooser.seconds(found.rung))


def seconds(work: Callable[[], object]) -> float:
    """Of the processor."""
    began = time.process_time()
    work()
    return time.process_time() - began


def test_planning_takes_about_a_second() -> None:
    """In a loop's time: a slow processor, or other work on it, slows both. Ten million turns take 0.3 to 0.7 s, a plan three times
    as long."""
    plan(recipe_of(), "24GiB", config=QWEN3_8B)
    turns = seconds(lambda: sum(i * i for i in range(10_000_000)))
    assert seconds(lambda: plan(recipe_of("train.batch=16"), "24GiB", config=QWEN3_8B)) < 5 * turns


@pytest.mark.parametrize("override", ["memory.microbatch=2", "memory.recompute=on", "memory.recompute=off"])
def test_what_was_asked_is_kept(override: str) -> None:
    found = plan(recipe_of(override), "141GiB", config=SMOLLM2)
    if "microbatch" in override:
        assert (found.microbatch, found.microbatches) == (2, 4)
    else:
        assert found.recompute == ("all" if override.endswith("on") else "none")


def test_bytes_are_the_sum_of_parts() -> None:
    found = plan(recipe_of(), "24GiB", config=SMOLLM2)
    assert found.bytes == sum(p.bytes for p in found.parts)
    assert found.microbatch * found.microbatches == 8
    assert found.parameters.base == 134_515_008
    assert found.parameters.packed == 106_168_320


def test_what_waits_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it gains and there is room for it; the reason says how much."""
    monkeypatch.setattr("halfbyte.memory.choose.twin", lambda device: "fused")
    here = Budget("cuda", "rtx4090", 12 * GIB, 24 * GIB, True, "")

    def planned(free: int, *overrides: str) -> Plan:
        monkeypatch.setattr("halfbyte.machine.ram", lambda: Device("CPU", free * GIB, 64 * GIB))
        return plan(recipe_of("memory.microbatch=4", *overrides), here, config=QWEN3_8B)

    roomy, tight = planned(64, "memory.recompute=on"), planned(4, "memory.recompute=on")
    told = r"auto: it takes .* GiB of host memory; 64.00 GiB are free, and no more than 50% of that is pinned"
    assert roomy.offloaded > 2 * GIB and re.fullmatch(told, roomy.offload)
    assert f"{roomy.offloaded / GIB:.2f} GiB of activations in host memory" in " ".join(roomy.table().split())
    assert tight.offloaded <= 2 * GIB and tight.rung.seconds > roomy.rung.seconds
    off = planned(64, "memory.recompute=on", "memory.offload=off")
    assert off.offload == "asked for" and off.offloaded == 0
    everything = planned(64, "memory.recompute=off", "memory.offload=on")
    assert everything.offloaded > 8 * GIB and everything.offload == "asked for"
    assert all("x" in keep.away for keep in everything.rung.keeps(36))
    elsewhere = plan(recipe_of("memory.recompute=on"), "12GiB", config=QWEN3_8B)
    assert elsewhere.offloaded and elsewhere.offload.endswith("of host memory; 24.00 GiB are assumed")


def test_a_rung_says_what_each_layer_keeps() -> None:
    sent = keeping(("qkv",), away=("x", "qkv"))
    rung = Rung(1, True, True, lean=sent.spec(), lean_layers=2, rest=EVERYTHING.spec())
    assert [keep.offload for keep in rung.keeps(6)] == [True, False, False, True, False, False], "spread: they share the bus"
    other = replace(rung, lean=EVERYTHING.spec(), rest=sent.spec(), lean_layers=1)
    assert [keep.offload for keep in other.keeps(3)] == [True, True, False], "backward begins with one that need not wait"
    both = replace(rung, rest=keeping(("inputs",), away=("inputs",)).spec())
    assert [keep == sent for keep in both.keeps(4)] == [False, True, False, True], (
        "those that send less are spread too, to the last"
    )
    first = Rung(1, True, lean=INPUTS.spec(), lean_layers=2, rest=EVERYTHING.spec())
    assert first.keeps(3) == [INPUTS, INPUTS, EVERYTHING], "the first: backward reaches them last"
    assert first.words() == "1 row at once, 2 layers keep their inputs, the others everything"
    for keep in (EVERYTHING, INPUTS, OFFLOADED, sent, keeping(("mid",), tile=4096)):
        assert Keep.from_spec(keep.spec()) == keep
    assert Rung(**json.loads(json.dumps(asdict(rung)))) == rung


def test_speeds_of_cards_and_of_none() -> None:
    known, unknown = plan(recipe_of(), "rtx4090", config=QWEN3_8B), plan(recipe_of(), "24GiB", config=QWEN3_8B)
    assert known.rates == "tabulated for rtx4090" and known.tokens_per_second is not None and known.seconds is not None
    assert known.tokens_per_second * known.seconds == pytest.approx(8 * 2048)
    assert unknown.tokens_per_second is None and unknown.rates == ""
    run = plan(recipe_of("train.max_steps=100"), "rtx4090", config=QWEN3_8B)
    assert run.run_seconds == pytest.approx(100 * known.seconds)
    assert "tokens/s" in run.table() and "longest row that fits" in run.table()


def test_graphs_take_the_hosts_time_away_where_there_is_room() -> None:
    """SmolLM2's layers compute for less time than a host needs to launch them; an 8B's do not."""

    def seconds(config: dict[str, Any], graphs: str, card: str = "rtx4090", *more: str) -> float:
        found = plan(recipe_of(f"train.graphs={graphs}", "train.batch=1", *more), card, config=config).seconds
        assert found is not None
        return found

    assert seconds(SMOLLM2, "auto") == seconds(SMOLLM2, "on") < 0.7 * seconds(SMOLLM2, "off")
    assert seconds(SMOLLM2, "auto", "rtx4090", "adapter.dropout=0.1") == seconds(SMOLLM2, "off", "rtx4090", "adapter.dropout=0.1")
    assert seconds(QWEN3_8B, "auto") == pytest.approx(seconds(QWEN3_8B, "off"), rel=0.02)


def test_lengths_of_documents_decide_the_seconds_and_no_byte() -> None:
    """Attention is timed by the sum of squares; what runs beside it stays as it is."""
    one = ("data.tokens=16384", "memory.microbatch=1", "memory.recompute=off", "memory.offload=off", "optim.paged=never")

    def planned(document: float | None) -> Plan:
        known = None if document is None else Lengths(900, 90_000, 5, 100, 16_384, document, 16384, 40, 0.98, 15)
        return plan(recipe_of(*one), "h200", config=QWEN3_8B, lengths=known)

    unknown, rows, chats = planned(None), planned(16384), planned(512)
    assert unknown.seconds == rows.seconds and rows.seconds is not None and chats.seconds is not None
    assert {p.bytes for p in (unknown, rows, chats)} == {chats.bytes} and chats.longest == rows.longest
    rate, query = speed.ATTENTION_SHARE * speed.tabulated("h200").gemm, 32 * 128
    less = 8 * 36 * 3.5 * 2.0 * query * 16384 * (16384 - 512) / rate  # 8 rows, 36 layers, forward and 2.5 times that backward
    assert rows.seconds - chats.seconds == pytest.approx(less, rel=1e-6) and chats.seconds < 0.8 * rows.seconds
    assert unknown.run_seconds is None and chats.steps == 15 and chats.run_seconds == pytest.approx(15 * chats.seconds)
    told = " ".join(chats.table().split())
    assert "data: 900 documents of 5 to 16,384 tokens (median 100): 40 rows of 16,384 an epoch, 98.0% full, attention 3.1%" in told
    assert "15 steps" in told and "lengths unknown" in " ".join(unknown.table().split())


def test_modules_are_planned_where_the_layers_run_so(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Budget("cuda", "a card", 80 * GIB, 80 * GIB, True, "")
    found = {}
    for kernels in ("fused", "reference"):
        monkeypatch.setattr("halfbyte.memory.choose.twin", lambda device, kernels=kernels: kernels)
        found[kernels] = plan(recipe_of("memory.microbatch=2", "memory.recompute=off"), here, config=QWEN3_8B)
    assert found["reference"].bytes > plain(found["fused"])
    assert found["reference"].offload == "auto: only fused layers can"


def plain(found: Plan) -> int:
    """Bytes without decoded weights, which are held only because there is room."""
    return found.bytes - sum(p.bytes for p in found.parts if p.name == "decoded weights")


def test_format_and_length_change_the_bytes() -> None:
    base = plain(plan(recipe_of("memory.microbatch=1"), "80GiB", config=QWEN3_8B))
    assert plain(plan(recipe_of("memory.microbatch=1", "format=none"), "80GiB", config=QWEN3_8B)) > base + 9 * GIB
    assert plain(plan(recipe_of("memory.microbatch=1", "data.tokens=4096"), "80GiB", config=QWEN3_8B)) > base


def test_json_is_what_the_schema_says() -> None:
    found = plan(recipe_of(), "24GiB", config=SMOLLM2).as_dict()
    schema = json_schema()
    assert set(schema["required"]) == set(found) == set(schema["properties"])
    part = schema["$defs"]["Part"]["properties"]
    again = json.loads(json.dumps(found))
    assert all(set(p) == set(part) for p in again["parts"])
    assert again["version"] == 7 and again["lengths"] is None and again["tokens_per_second"] is None


def test_table_is_readable_without_colour() -> None:
    text = plan(recipe_of(), "rtx4090", config=QWEN3_8B).table()
    assert "\x1b" not in text
    for word in ("packed weights", "activations", "in all", "yes, it fits", "microbatch: ", "rtx4090"):
        assert word in text
    assert "no, it does not fit" in plan(recipe_of(), "2GiB", config=QWEN3_8B).table()


def test_bars_are_as_wide_as_the_terminal_allows() -> None:
    found = plan(recipe_of(), "rtx4090", config=QWEN3_8B)
    for width, wide in ((110, 72), (60, 40)):
        out = io.StringIO()
        render(found, Console(file=out, width=width, no_color=True))
        (bar,) = (line for line in out.getvalue().splitlines() if line.startswith("["))
        assert "…" not in out.getvalue() and f"{size(found.bytes)}  {'█' * min(24, (width - 40) // 2)} " in out.getvalue()
        assert bar.index("]") == wide + 1 and bar.endswith(" free") and len(bar) <= width


@pytest.mark.parametrize(
    ("asked", "total"),
    [
        ("24GiB", 24 * GIB),
        ("24 gib", 24 * GIB),
        ("24GB", 24 * 10**9),
        ("512MiB", GIB // 2),
        ("rtx4090", 24 * GIB),
        ("RTX 4090", 24 * GIB),
        ("GeForce RTX 3060", 12 * GIB),
        ("a100-80g", 80 * GIB),
        ("4090", 24 * GIB),
        ("A100 80GB", 80 * GIB),
        ("a100-40gb", 40 * GIB),
        ("NVIDIA H100 80GB", 80 * GIB),
        ("Tesla T4", 16 * GIB),
        ("RTX 4060 Ti 16GB", 16 * GIB),
        ("rtx4060ti-8g", 8 * GIB),
    ],
)
def test_budgets(asked: str, total: int) -> None:
    found = budget(asked)
    assert found.total == total and 0.9 * total < found.bytes < total and not found.here


@pytest.mark.parametrize(
    ("asked", "hint"),
    [("rtx409", "did you mean `rtx4090`?"), ("24", "a size has a unit: 24GiB"), ("24 moons", "give a size")],
)
def test_budgets_that_are_not(asked: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        budget(asked)
    assert hint in caught.value.hint


def test_cards_are_plausible() -> None:
    assert all(4 <= size <= 200 for size in CARDS.values())
    assert all(name == name.lower() and " " not in name for name in CARDS)


def test_this_machine() -> None:
    here = ram()
    assert 0 < here.free <= here.total
    # The kernel counts pages in batches a thread, so the two readings may be a little apart.
    assert 0 < rss() <= peak_rss() + (4 << 20) < here.total
    assert budget("auto").here


def test_a_cap_in_a_recipe_is_one_on_the_runs_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is looked at all the same: what is free of it, of host memory, and its kernels."""
    gpu = Budget("cuda", "NVIDIA H200", 100 * GIB, 140 * GIB, True, "free now")
    monkeypatch.setattr(budgets, "_of_this_machine", lambda: gpu)
    capped = budget_here("16GiB")
    assert capped.here and capped.name == gpu.name and capped.bytes == budget("16GiB").bytes and "memory.gpu: 16GiB" in capped.note
    assert budget_here("rtx3060").bytes == budget("rtx3060").bytes and budget_here("rtx3060").here
    assert budget_here("200GiB") == budget_here() == gpu
    cpu = Budget("cpu", "CPU", 20 * GIB, 24 * GIB, True, "available RAM")
    monkeypatch.setattr(budgets, "_of_this_machine", lambda: cpu)
    assert budget_here("8GiB").kind == "cpu" and 7.7 * GIB < budget_here("8GiB").bytes < 8 * GIB
    with pytest.raises(RecipeError, match=r"memory\.gpu is rtx3060, and this machine has no GPU"):
        budget_here("rtx3060")


def test_no_speed_is_told_of_layers_as_modules() -> None:
    found = plan(recipe_of("adapter.kind=none", "format=none"), "13GiB", config=SMOLLM2)
    assert found.neighbours and all(one.gain is None for one in found.neighbours)
    assert "speed" not in found.table()


@pytest.mark.parametrize(("supported", "compute"), [(True, "bf16"), (False, "fp16")])
def test_the_card_that_is_here_says_whether_it_has_bf16(supported: bool, compute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported and not including_emulation)
    here = Budget("cuda", "Tesla T4", 14 * GIB, 15 * GIB, True, "")
    assert compute_of(recipe_of(), here) == compute == compute_of(recipe_of(), budget("14GiB"))
    assert compute_of(recipe_of(), budget("t4")) == "fp16"


def test_unknown_model_type() -> None:
    from halfbyte.errors import ModelError

    config: dict[str, Any] = {"model_type": "zork"}
    with pytest.raises(ModelError, match="does not know the model type `zork`"):
        plan(recipe_of(), "24GiB", config=config)


def test_moments_wait_in_host_memory_where_nothing_else_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left on the GPU while they fit; `always` and `never` decide; what the host has no room for is not pinned."""
    monkeypatch.setattr("halfbyte.memory.choose.twin", lambda device: "fused")
    monkeypatch.setattr("halfbyte.machine.ram", lambda: Device("CPU", 64 * GIB, 64 * GIB))
    large = ("adapter.rank=256", "memory.microbatch=1")

    def planned(gib: float, *overrides: str) -> Plan:
        given = Budget("cuda", "a card", int(gib * GIB), int(gib * GIB), True, "")
        return plan(recipe_of(*large, *overrides), given, config=QWEN3_8B)

    roomy = planned(80)
    moments = next(p for p in roomy.parts if p.name == "optimizer")
    assert not roomy.paged and moments.host == 0 and moments.bytes > 4 * GIB
    lean = planned(80, "optim.paged=never").rungs[-1].bytes
    tight = planned((lean - GIB) / GIB)
    assert tight.fits and tight.rung.paged and tight.paging == "auto: faster than what else would fit"
    assert tight.paged == moments.bytes and next(p.host for p in tight.parts if p.name == "optimizer") == moments.bytes
    assert next(p for p in tight.parts if p.name == "optimizer").bytes == 2 * 8 * (1 << 22)
    assert "of AdamW's moments" in " ".join(tight.table().split())
    never = planned((lean - GIB) / GIB, "optim.paged=never")
    assert not never.fits and not never.paged and any(a.startswith("optim.paged=always saves") for a in never.advice)
    always = planned(80, "optim.paged=always", "optim.bits=8")
    assert always.rung.paged and always.paging == "asked for" and always.paged == pytest.approx(moments.bytes / 4, rel=0.02)
    monkeypatch.setattr("halfbyte.machine.ram", lambda: Device("CPU", 1 * GIB, 64 * GIB))
    assert not planned((lean - GIB) / GIB).fits
