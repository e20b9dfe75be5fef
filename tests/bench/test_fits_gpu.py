"""The benchmark of plans under caps: what is held against the chosen plan, the table beside the peer, and that it runs."""

from __future__ import annotations

import pytest
import torch

from .test_tables import bench

OURS = [
    {"what": "caps", "card": 16, "rows": 4, "tokens": 2048, "tokens_per_s": 15000, "peak_GiB": 15.0, "reserved_GiB": 15.1},
    {"what": "caps", "card": 8, "rows": 4, "tokens": 2048, "failed": "no memory"},
    {"what": "caps", "card": 12, "rows": 1, "tokens": 8192, "tokens_per_s": 12000, "peak_GiB": 11.0},
    {"what": "bound", "card": 0, "most_GiB": 7.9, "rows": 4, "tokens": 2048, "tokens_per_s": 14000, "peak_GiB": 7.85},
]
THEIRS = [
    {"setting": "slow", "batch": 4, "tokens": 2048, "tokens_per_s": 10000, "peak_GiB": 7.8},
    {"setting": "fast", "batch": 4, "tokens": 2048, "tokens_per_s": 12500, "peak_GiB": 15.2},
    {"setting": "too large", "batch": 4, "tokens": 2048, "tokens_per_s": 16000, "peak_GiB": 15.3},
    {"setting": "no figures", "batch": 4, "tokens": 2048, "failed": "no memory"},
]


def test_ours_stands_beside_the_fastest_setting_that_fits_the_same_card() -> None:
    lines = bench("fits_plans").table(OURS, THEIRS, 0.75).splitlines()[2:]
    assert "fast" in lines[0] and lines[0].endswith("| 1.20 |")
    assert "failed" in lines[1] and "none" in lines[1]
    assert "none" in lines[2] and lines[2].endswith("| - |")
    assert "slow" in lines[3] and lines[3].endswith("| 1.40 |")


def test_what_is_held_against_the_plan_fits_and_is_of_every_kind() -> None:
    planned, plans = bench("planned"), bench("fits_plans")
    case = planned.Case("1b", 16, 4, 2048, "plan", cap=6, layers=4)
    chooser = planned.chooser_of(case, planned.speed.tabulated("h200"), torch.bfloat16, "cpu", 3 << 30)
    chosen = planned.chosen(chooser)
    others = plans.others(chooser, chosen, 12)
    assert len(others) == 12 == len({r.words() for r in others} - {chosen.words()})
    for rung in others:
        assert rung.bytes == sum(p.bytes for p in chooser.parts(rung)) <= chooser.budget.bytes
    assert len({(r.microbatch, r.paged) for r in others}) >= 4
    assert min(r.seconds for r in others) < 1.2 * chosen.seconds, "the plan has no rival"


def test_the_peer_is_tried_with_every_row_count_and_way_to_recompute() -> None:
    peer = bench("peer_fits")
    settings = peer.settings()
    assert len(settings) == len(set(settings)) == 12
    assert {way for way, *_ in settings} == set(peer.WAYS)
    assert {(m, t) for _, m, _, t in settings} == {(1, 8192), (4, 2048), (2, 2048), (1, 2048)}


@pytest.mark.cpu
def test_a_group_runs_on_a_tiny_model() -> None:
    fits = bench("fits_gpu")
    lines = list(fits.leanest(fits.Bench("cpu", fits.speed.tabulated("h200"))))
    assert [line["head"] for line in lines] == ["16bit", "nf4"]
    assert all(line["gate"] == "green" and line["tokens_per_s"] > 0 for line in lines)
