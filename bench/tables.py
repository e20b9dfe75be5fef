"""The tables of the documentation, made from the raw results; a test holds the pages to them.

    python bench/tables.py          # rewrites every block between <!-- NAME --> and <!-- /NAME --> in docs/concepts

A result that is not there yet gives the line "Not measured yet.".
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import equivalence_gpu
import facts_tables
import fp8_quality_gpu
import memory_tables
import quality
import roofline
from reporting import read
from shapes import SIZES, flops, moved

ROOT = Path(__file__).resolve().parents[1]
CONCEPTS, RESULTS = ROOT / "docs" / "concepts", ROOT / "bench" / "results"
MISSING = "Not measured yet."
ROLES = {
    "nocheckpoint": "4 x 2,048, no recompute",
    "row8192": "1 x 8,192, no recompute",
    "optimizer": "4 x 2,048, no recompute, fused AdamW",
    "packed": "4 x 2,048, packed examples",
    "full": "4 x 2,048, full recompute, offloaded",
    "full-on-gpu": "4 x 2,048, full recompute",
    "short": "1 x 2,048, full recompute",
    "graphs": "1 x 2,048, full recompute",
    "deterministic": "no recompute",
    "fp8": "4 x 2,048, `compute: fp8`",
    "fp8-held": "4 x 2,048, `compute: fp8`, decoded weights held",
    "held": "4 x 2,048, decoded weights held",
    "16bit": "4 x 2,048, 16-bit weights",
    "16bit-short": "1 x 2,048, 16-bit weights",
    "long": "1 x 32,768, full recompute, offloaded",
    "1b": "1B shape, 4 x 2,048",
    "70b": "70B shape, 4 x 2,048",
}

WAYS = ("graphs", "deterministic")
"""Groups that compare ours with and without."""


def name_of(row: dict[str, Any]) -> str:
    fp8 = ", fp8" if row.get("compute") == "fp8" else ""
    fused = ", fused AdamW" if row.get("optimizer") == "ours-fused" else ""
    layers = f", {row['layers']} layers" if row.get("layers") else ""
    graphs = ", CUDA graphs" if row.get("graphs") else ""
    size = f", {row['size'].upper()} shape" if row.get("group") == "graphs" else ""
    strict = ", deterministic" if row.get("deterministic") else ""
    shape = f", {row['rows']} x {row['tokens']:,}" if row.get("group") == "deterministic" else ""
    return f"{row['impl']}{size}{shape}{fp8}{fused}{layers}{graphs}{strict}"


def kernels(results: Path) -> str:
    """Decoding and linear layers by themselves."""
    from kernels_gpu import markdown

    return markdown(results)


def first_figures(results: Path) -> str:
    """The runs before the layers were fused."""
    text = ["| implementation | recompute | tokens/s | peak GiB | resident GiB |", "| --- | --- | --- | --- | --- |"]
    for row in read(results):
        shown = (
            [f"{row['tokens_per_s']:,}", f"{row['peak_GiB']:.1f}", f"{row['resident_GiB']:.1f}"] if "step_s" in row else ["-"] * 3
        )
        text.append(f"| {row['impl']} | {'full' if row['recompute'] else 'none'} | {' | '.join(shown)} |")
    return "\n".join(text)


def throughput(results: Path) -> str:
    """Every run in its order; then ours against each peer, launches and first steps."""
    rows = read(results)
    red = [r for r in rows if r.get("group") == "gate" and r.get("gate") != "green"]
    text = [
        "| measured | implementation | call | tokens/s | trained tokens/s | peak, reserved, driver GiB | of the limit | launches |"
    ]
    text += ["| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for row in rows:
        if row.get("group") in ROLES and row.get("gate") == "green":
            memory = ", ".join(f"{row[k]:.1f}" for k in ("peak_GiB", "reserved_GiB", "driver_GiB") if k in row)
            share = f"{row['share']:.1%}" if "share" in row else "-"
            figures = f"{row['tokens_per_s']:,} | {row['trained_tokens_per_s']:,} | {memory} | {share} | {row.get('launches', 0):,}"
            text.append(f"| {ROLES[row['group']]} | {name_of(row)} | {row.get('call', 1)} | {figures} |")
    sections = [text, ratios(rows), deep(rows), launched(rows), first_steps(rows)]
    if red:
        kinds = ", ".join(f"{r.get('compute')} with recompute {r.get('recompute')}" for r in red)
        sections.append([f"Gradients not proven, so without figures: {kinds}."])
    return "\n\n".join("\n".join(section) for section in sections if section)


def ratios(rows: list[dict[str, Any]]) -> list[str]:
    """Ours (mean of its runs) over each other implementation of a group in the same call on a machine (`call`, where a file holds
    several); `optimizer` stands against ours of `nocheckpoint`, fp8 without a peer against the peers there; our own ways
    against ours without."""
    speeds: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in rows:
        if row.get("group") in ROLES and row.get("gate") == "green" and row["group"] not in ("70b", *WAYS):
            speeds.setdefault((row["group"], row.get("call", 0)), {}).setdefault(row["impl"], []).append(
                row["trained_tokens_per_s"]
            )
    text = ["| measured | ours against | call | ratio |", "| --- | --- | ---: | ---: |"]
    for (group, call), own in speeds.items():
        found = speeds.get(("nocheckpoint", call), {}) | own if group.startswith("fp8") else own
        mine = found.get("halfbyte") or (speeds.get(("nocheckpoint", call), {}).get("halfbyte") if group == "optimizer" else None)
        for impl, other in found.items():
            if mine and impl != "halfbyte":
                text.append(f"| {ROLES[group]} | {impl} | {call} | {mean(mine) / mean(other):.3f} |")
    for way in WAYS:
        some = [row for row in rows if row.get("group") == way and row.get("gate") == "green"]
        for row in (row for row in some if row.get(way)):
            same = ("size", "rows", "tokens", "call")
            other = next((r for r in some if not r.get(way) and all(r.get(key) == row.get(key) for key in same)), None)
            if other is not None:
                ratio = row["trained_tokens_per_s"] / other["trained_tokens_per_s"]
                text.append(f"| {ROLES[way]} | {name_of(other)} | {row.get('call', 1)} | {ratio:.3f} with {way} |")
    return text if len(text) > 2 else []


def deep(rows: list[dict[str, Any]]) -> list[str]:
    """A 70B model from two and four layers: the rest of the step, and 80 times what a layer adds; four beside the peer's."""
    steps: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row.get("group") == "70b" and row.get("gate") == "green":
            steps.setdefault(row["impl"], {})[row["layers"]] = row
    text = []
    for impl, found in steps.items():
        if {2, 4} <= found.keys():
            layer = (found[4]["step_s"] - found[2]["step_s"]) / 2
            seconds = found[2]["step_s"] + 78 * layer
            speed = found[4]["rows"] * found[4]["tokens"] / seconds
            text.append(f"70B, extrapolated from 2 and 4 layers to 80: {impl} {layer * 1e3:.1f} ms a layer, {speed:,.0f} tokens/s.")
    ours = steps.get("halfbyte", {}).get(4)
    for impl, found in steps.items():
        if ours and impl != "halfbyte" and found.get(4, {}).get("call") == ours["call"]:
            times = ours["trained_tokens_per_s"] / found[4]["trained_tokens_per_s"]
            text.append(f"70B, 4 layers: ours against {impl} {times:.3f} (call {ours['call']}).")
    return text


def launched(rows: list[dict[str, Any]]) -> list[str]:
    """Launches that a layer adds."""
    found = [r for r in rows if r.get("group") == "launches" and "kernels_a_layer" in r]
    text = ["| launches a layer and microbatch | recompute | |", "| --- | --- | ---: |"]
    text += [f"| {r['impl']} | {r['recompute']} | {r['kernels_a_layer']:g} |" for r in found]
    return text if found else []


def first_steps(rows: list[dict[str, Any]]) -> list[str]:
    """The first step with an empty kernel cache and with a filled one."""
    found = [r for r in rows if r.get("group") == "cold" and "first_step_s" in r]
    text = ["| first step | kernel cache | seconds | loading before it, seconds |", "| --- | --- | ---: | ---: |"]
    text += [f"| {r['impl']} | {r['cache']} | {r['first_step_s']:.1f} | {r['load_s']:.1f} |" for r in found]
    return text if found else []


LARGE = 0.2
"""Milliseconds: a GEMM kernel that takes longer multiplies by a weight or the head, a shorter one by an adapter."""


def profiled(results: Path) -> str:
    """A profile as it was printed, `ms launches name` a kernel and step, by part, and what the part cannot do without: the time of
    all kernels is what 100 % are."""
    parts: dict[str, list[float]] = {}
    for ms, launches, name in re.findall(r"^ +([\d.]+) ms +([\d.]+) +(\S.*)$", results.read_text(encoding="utf-8"), re.MULTILINE):
        part = roofline.part_of(name)
        if part == "head":  # the logits of the tiled loss
            part = "base GEMM and head"
        if part == "GEMM of unknown shape":
            part = "base GEMM and head" if float(ms) / float(launches) > LARGE else "LoRA products"
        total = parts.setdefault(part, [0.0, 0.0])
        total[0] += float(ms)
        total[1] += float(launches)
    everything = sum(ms for ms, _ in parts.values())
    least = limits(results.parent)
    text = ["| part | ms a step | share | launches a layer | limit, ms | over it, ms |"]
    text += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for part, (ms, launches) in sorted(parts.items(), key=lambda item: -item[1][0]):
        known = f"{least[part]:.1f} | {ms - least[part]:.1f}" if part in least else f"- | {ms:.1f}"
        text.append(f"| {part} | {ms:.1f} | {ms / everything:.1%} | {launches / 32:.1f} | {known} |")
    whole = sum(least[part] for part in parts if part in least)
    last = f"{sum(n for _, n in parts.values()) / 32:.1f} | {whole:.1f} | {everything - whole:.1f}"
    return "\n".join([*text, f"| all | {everything:.1f} | | {last} |"])


def limits(folder: Path) -> dict[str, float]:
    """Milliseconds by part of a step of the 8B shape, 4 x 2,048 tokens: operations over the rate of the step's GEMM shapes run hot,
    bytes over the rate of a large copy, both as measured."""
    steps = read(folder / "2026-11-22-h200-steps.jsonl")
    hot = mean(r["hot_tflops"] for r in steps if r.get("group") == "nocheckpoint" and r["impl"] == "halfbyte")
    size, tokens = SIZES["8b"], 4 * 2048
    found = {part: work / hot / 1e9 for part, work in flops(size, size.layers, tokens, tokens, [2048] * 4).items()}
    found["base GEMM and head"] = found.pop("base GEMM") + found.pop("head")
    moves = moved(size, size.layers, tokens, steps_trainable(steps), recompute=False)
    return found | {part: count / copied(folder) / 1e6 for part, count in moves.items()}


def steps_trainable(rows: list[dict[str, Any]]) -> int:
    """Numbers that learn in the runs of `rows`."""
    return next(int(r["trainable"]) for r in rows if "trainable" in r)


def copied(folder: Path) -> float:
    """GB/s, read and written, of a copy of a GiB."""
    return float(next(r["gb_per_s"] for r in read(folder / "2026-11-22-h200-decode.jsonl") if r.get("what") == "copy"))


def attended(results: Path) -> str:
    """Attention's methods on packed rows."""
    text = ["| row | method | deterministic | forward, ms | backward, ms | the same bits in 5 runs |"]
    text += ["| --- | --- | --- | ---: | ---: | --- |"]
    for r in read(results):
        if r["kind"] == "time" and r["form"] == "views":
            equal = r["bit-equal in 5 runs"]
            differs = ", ".join(name for name, same in equal.items() if not same)
            asked = "yes" if r["deterministic"] else "no"
            figures = f"{r['forward ms']:.2f} | {r['backward ms']:.2f} | {f'all but {differs}' if differs else 'all'}"
            text.append(f"| {r['row'].replace('x', ' x ')} | {r['method']} | {asked} | {figures} |")
    return "\n".join(text)


def optimized(results: Path) -> str:
    """Clipping and the optimizer's step."""
    text = ["| clip and step | ms | host, us |", "| --- | ---: | ---: |"]
    text += [f"| {r['who']} | {r['ms']:.2f} | {r['host_us']:,.0f} |" for r in read(results) if r["what"] == "clip and step"]
    return "\n".join(text)


def multiplied(results: Path) -> str:
    """The packed products of a token with the shape that runs, against a large copy."""
    copy = copied(results.parent)
    text = ["| product for one row of x | us | GB/s | of a copy |", "| --- | ---: | ---: | ---: |"]
    for r in read(results):
        if r["what"] == "product" and r["shape"] == "16 warps x 1":
            name = f"{r['group']}, 16 bits" if r["group"] == "head" else f"{r['group']}, adapter inside"
            text.append(f"| {name} | {r['us']:.1f} | {r['gb_per_s']:,} | {r['gb_per_s'] / copy:.1%} |")
    return "\n".join(text)


def decoded(results: Path) -> str:
    """The four groups of a layer decoded by what runs: microseconds and the share of a copy's rate, one by one and in a graph."""
    rows = read(results)
    text = [
        "| decoded with adapter | scales | us | of a copy | in a graph, us | of a copy |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if "variant" in row and row["variant"] == DECODED[row["format"]]:
            alone, graph = (f"{row[us]:.1f} | {row[share]:.1%}" for us, share in (("us", "of_copy"), ("graph_us", "graph_of_copy")))
            text.append(f"| {row.get('group', 'all four')} | {row['format']} | {alone} | {graph} |")
    return "\n".join(text)


def generated(results: Path) -> str:
    """Tokens a second of the engine as a caller sees it (256 tokens behind a short prompt), and replays of its graph by depth."""
    rows = [r for r in read(results) if r["what"] == "engine" and "ms_at_256" in r and r["early"] and not r["cut"]]
    bf16 = {r["rows"]: r["ms_at_256"] for r in rows if r["weights"] == "bf16"}
    text = [
        "| weights | rows | tokens/s, a caller's | ms a token, 256 before it | 1,984 before it | against bf16 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        ratio = f"{bf16[r['rows']] / r['ms_at_256']:.2f}" if r["rows"] in bf16 else "-"
        text.append(
            f"| {r['weights']} | {r['rows']} | {r['tokens_per_s']:,} | {r['ms_at_256']:.3f} | {r['ms_at_1984']:.3f} | {ratio} |"
        )
    return "\n".join(text)


def losses(results: Path) -> str:
    """The loss of the 8B shape over its products: those of all labelled rows in one piece, and those that it runs itself."""
    rows = [r for r in read(results) if r["what"] == "loss" and r["case"].startswith("8B")]
    text = ["| case | | ms | of one piece | MiB |", "| --- | --- | ---: | ---: | ---: |"]
    for r in rows:
        if r["name"] in ("bare", "bare 1024", "default", "exact", "tiled", "smoothing and z", "nf4 head"):
            extra = "" if r["extra_mib"] is None else f"{r['extra_mib']:.0f}"
            text.append(f"| {r['case']} | {r['name']} | {r['ms']:.2f} | {r['of_bare']:.3f} | {extra} |")
    return "\n".join(text)


DECODED = {"nested": "4096/4, dependent, normal", "plain": "2048/4, dependent, normal"}
"""The variant of `bench/decode_gpu.py` that `kernels.dequantize.words.tiling_of` takes, by the format's scales."""


TABLES: list[tuple[str, str, Callable[[Path], str], str]] = [
    ("quality.md", "quality", quality.markdown, "2026-11-22-h200-quality.jsonl"),
    ("performance.md", "before", first_figures, "2026-11-22-h200-throughput.jsonl"),
    ("performance.md", "kernels", kernels, "2026-11-22-h200-kernels.jsonl"),
    ("performance.md", "throughput", throughput, "2026-11-22-h200-steps.jsonl"),
    ("performance.md", "profile", profiled, "2026-11-22-h200-profile.txt"),
    ("performance.md", "attention", attended, "2026-11-22-h200-attention.jsonl"),
    ("performance.md", "optimizer", optimized, "2026-11-22-h200-optimizer.jsonl"),
    ("performance.md", "decode", decoded, "2026-11-22-h200-decode.jsonl"),
    ("performance.md", "generation", generated, "2026-11-22-h200-generation.jsonl"),
    ("performance.md", "gemv", multiplied, "2026-11-22-h200-gemv.jsonl"),
    ("performance.md", "loss", losses, "2026-11-22-h200-loss.jsonl"),
    ("performance.md", "fp8", lambda results: fp8_quality_gpu.verdict(results)[0], "2026-11-22-h200-fp8-quality.jsonl"),
    ("performance.md", "roofline", roofline.markdown, "2026-11-22-h200-roofline.jsonl"),
    ("performance.md", "facts", facts_tables.markdown, "2026-11-22-h200-facts.jsonl"),
    ("performance.md", "equivalence", equivalence_gpu.markdown, "2026-11-22-h200-equivalence.jsonl"),
    ("memory.md", "cards", memory_tables.cards, "2026-11-22-h200-fits.jsonl"),
    ("memory.md", "predicted", memory_tables.predicted, "2026-11-22-h200-fits.jsonl"),
    ("memory.md", "far", memory_tables.far, "2026-11-22-h200-fits.jsonl"),
    ("memory.md", "paged", memory_tables.paged, "2026-11-22-h200-paged.jsonl"),
]


def block(table: Callable[[Path], str], results: str) -> str:
    """What stands between the markers."""
    file = RESULTS / results
    return table(file) if file.exists() else MISSING


def pattern(marker: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {marker} -->\n)(.*?)\n?(<!-- /{marker} -->)", re.DOTALL)


def main() -> int:
    for page, marker, table, results in TABLES:
        path = CONCEPTS / page
        text = path.read_text(encoding="utf-8")
        new = block(table, results)
        found = pattern(marker).search(text)
        assert found, f"{page} has no markers `{marker}`"
        made = text[: found.start(2)] + new + "\n" + text[found.start(3) :]
        if made != text:
            path.write_text(made, encoding="utf-8")
            print(f"{page}: {marker} rewritten from {results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
