"""The tables of docs/concepts/memory.md, from the raw results of `fits_gpu.py`, `peer_fits.py` and `paged_gpu.py`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import fits_plans
from planned import BESIDE, Case
from reporting import read


def latest(results: Path) -> list[dict[str, Any]]:
    """The lines of the last call that ran each: `all` as a whole, others by card, row and head."""
    rows = read(results)
    last: dict[tuple[Any, ...], int] = {}
    for row in rows:
        last[_line(row)] = max(last.get(_line(row), 0), row.get("call", 1))
    return [row for row in rows if row.get("call", 1) == last[_line(row)]]


def _line(row: dict[str, Any]) -> tuple[Any, ...]:
    if row["what"] in ("all", "verdict", "rates", "note", "left out"):
        return (row["what"],)
    own = (row["card"], row["head"]) if row["what"] == "longest" else (row["card"], row["head"], row["rows"], row["tokens"])
    return row["what"], *own


def cards(results: Path) -> str:
    """Our plans by card, beside Unsloth's best setting that fits."""
    return fits_plans.table(latest(results), read(results.with_name(results.name.replace("-fits", "-peer-fits"))), BESIDE)


def predicted(results: Path) -> str:
    """Plan and truth of everything that ran, by group."""
    text = ["| group | lines | peak: predicted over measured, worst under and over | tokens/s: measured over predicted |"]
    text.append("| --- | ---: | ---: | ---: |")
    rows = [r for r in latest(results) if "peak_GiB" in r]
    for group in dict.fromkeys(r["what"] for r in rows):
        some = [r for r in rows if r["what"] == group]
        peaks = [r["predicted_GiB"] / r["peak_GiB"] - 1 for r in some]
        rates = [r["tokens_per_s"] / r["predicted_tokens_per_s"] - 1 for r in some]
        text.append(f"| {group} | {len(some)} | {_range(peaks, 2)} | {_range(rates, 1)} |")
    some = grid(results)
    rates = [r["tokens_per_s"] / r["predicted_tokens_per_s"] - 1 for r in some]
    text.append(f"| grid | {len(some)} | {_range([r['error'] for r in some], 2)} | {_range(rates, 1)} |")
    return "\n".join(text)


def grid(results: Path) -> list[dict[str, Any]]:
    """What `memory_gpu.py` measured beside it, with the counts as they are: of each case the last call's line, after the first."""
    rows = read(results.with_name(results.name.replace("-fits", "-memory")))
    ran = [row for row in rows if "error" in row and "size" in row and row.get("call", 1) > 1]
    own = [field.name for field in fields(Case)]
    return list({tuple(row.get(name) for name in own): row for row in sorted(ran, key=lambda row: row["call"])}.values())


def _range(errors: list[float], digits: int) -> str:
    low, high = min(errors), max(errors)
    return f"{low:+.{digits}%}" if len(errors) == 1 else f"{low:+.{digits}%} to {high:+.{digits}%}"


def far(results: Path) -> str:
    """The leanest plan, the longest rows, all layers of a large model."""
    text = ["| | allocated, GiB | reserved | driver | host memory, GiB | tokens/s |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for r in latest(results):
        if r["what"] not in ("leanest", "70b", "longest"):
            continue
        head = "16-bit head" if r["head"] == "16bit" else "packed head"
        name = f"{r['size'].upper()}, {head}, {r['rows']} x {r['tokens']:,}"
        if r["what"] == "longest":
            name += f", r = {r['rank']}, {r['card']:g} GiB, {r['layers']} of {r['of']} layers run"
        if "peak_GiB" not in r:
            text.append(f"| {name} | failed | | | | |")
            continue
        whole = f"{r['peak_GiB']} (all layers: {r['whole_GiB']})" if "whole_GiB" in r else str(r["peak_GiB"])
        host = r.get("whole_host_GiB", r["host_GiB"])
        speed = "" if r["what"] == "longest" else f"{r['tokens_per_s']:,}"
        text.append(f"| {name} | {whole} | {r['reserved_GiB']} | {r['driver_GiB']} | {host} | {speed} |")
    return "\n".join(text)


def paged(results: Path) -> str:
    """An optimizer's step with its states in host memory."""
    text = ["| step | rank | bits | ms | states on the GPU, MiB | share paged |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for r in read(results):
        if r["what"] == "step":
            on_gpu = f"{r['mib']:,}" if "mib" in r else ""
            share = f"{r['least']:.0%} at least" if "least" in r else ""
            text.append(f"| {r['who']}, {r['how']} | {r['rank']} | {r['bits']} | {r['ms']:.2f} | {on_gpu} | {share} |")
    return "\n".join(text)
