"""The results of `facts_gpu.py` as Markdown. Needs neither torch nor a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from reporting import read


def markdown(results: Path) -> str:
    """GEMM rates by kind and state; the rank products; the bus; the host's calls; what other cuBLASLt algorithms gain."""
    rows = read(results)
    of = {what: [r for r in rows if r["what"] == what] for what in ("gemm", "gemm layer", "skinny", "bus", "call", "algorithms")}
    sections = [_gemms(of["gemm"]), _layers(of["gemm layer"]), _skinny(of["skinny"]), _algorithms(of["algorithms"])]
    sections += [_bus(of["bus"]), _calls(of["call"])]
    return "\n\n".join("\n".join(section) for section in sections if len(section) > 2)


def _gemms(rows: list[dict[str, Any]]) -> list[str]:
    text = ["| GEMM, 8,192 tokens | cold, TFLOP/s at MHz | hot, cuBLAS | hot, cuBLASLt |", "| --- | ---: | ---: | ---: |"]
    found: dict[str, dict[str, str]] = {}
    for r in rows:
        if r["way"].endswith("|plain") and "ms" in r:
            found.setdefault(r["way"], {})[f"{r['state']} {r['blas']}"] = f"{r['tflops']}" + (
                f" at {r['sm_mhz']}" if r["sm_mhz"] else ""
            )
    for way, states in found.items():
        group, direction, _ = way.split("|")
        figures = " | ".join(states.get(key, "-") for key in ("cold cublas", "hot cublas", "hot cublaslt"))
        text.append(f"| {group}, {direction} | {figures} |")
    return text


def _layers(rows: list[dict[str, Any]]) -> list[str]:
    text = ["| the four groups of a layer, hot, ms | forward, cuBLAS | forward, cuBLASLt | dX, cuBLAS | dX, cuBLASLt |"]
    text += ["| --- | ---: | ---: | ---: | ---: |"]
    kinds = {r["kind"]: None for r in rows}
    ms = {(r["kind"], r["direction"], r["blas"]): r["ms"] for r in rows}
    for kind in kinds:
        cells = [ms.get((kind, direction, blas)) for direction in ("forward", "dX") for blas in ("cublas", "cublaslt")]
        text.append(f"| {kind} | {' | '.join('-' if c is None else f'{c:.3f}' for c in cells)} |")
    return text


def _skinny(rows: list[dict[str, Any]]) -> list[str]:
    groups = list({r["group"]: None for r in rows})
    text = ["| rank products, us (bytes at copy speed, launches) | " + " | ".join(groups) + " |"]
    text += ["| --- |" + " ---: |" * len(groups)]
    ways = list({r["way"]: None for r in rows})
    found = {(r["way"], r["group"]): r for r in rows}
    for way in ways:
        cells = []
        for group in groups:
            r = found.get((way, group))
            good = r is not None and "us" in r
            cells.append(f"{r['us']:.0f} ({r['floor_us']:.0f}, {r['launches']})" if r is not None and good else "-")
        text.append(f"| {way} | {' | '.join(cells)} |")
    return text


def _algorithms(rows: list[dict[str, Any]]) -> list[str]:
    text = ["| GEMM | columns of the adapter | torch, ms | first of cuBLASLt | best of 16 | gain in turn | gain alone for 0.6 s |"]
    text += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for r in rows:
        figures = f"{r['torch_ms']:.3f} | {r['first_ms']:.3f} | {r['best_ms']:.3f} | {r['gain']:.1%}"
        lasting = r.get("sustained_gain")
        figures += " | -" if lasting is None else f" | {lasting:.1%}"
        text.append(f"| {r['group']}, {r['direction']} | {r['rank']} | {figures} |")
    return text


def _bus(rows: list[dict[str, Any]]) -> list[str]:
    text = [
        "| copies | beside GEMMs | to the host, GB/s | to the device, GB/s | a GEMM, ms |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for r in rows:
        rates = " | ".join(str(r.get(key, "-")) for key in ("d2h_gb_per_s", "h2d_gb_per_s", "gemm_ms"))
        text.append(f"| {r['copies']} | {'yes' if r['beside_gemms'] else 'no'} | {rates} |")
    return text


def _calls(rows: list[dict[str, Any]]) -> list[str]:
    text = ["| host time of a call | us |", "| --- | ---: |"]
    return text + [f"| {r['call']} | {r['us']:.1f} |" for r in rows if "us" in r]


if __name__ == "__main__":
    print(markdown(Path(sys.argv[1])))
