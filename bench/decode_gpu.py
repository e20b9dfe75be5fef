"""Decoding groups of weights on a CUDA GPU: first the proof, then bytes moved over a copy's, by variant. Needs torch and triton.

    python bench/decode_gpu.py --out DIR          # under a minute; writes DIR/decode_gpu.jsonl and DIR/decode_gate.json
    python bench/decode_gpu.py --table FILE       # such a file as Markdown

The gate: every variant and the packages' own proofs, bit for bit; if one is off, nothing is reported and the exit code is 1.
It runs in processes side by side, which also compile what is measured afterwards.
Groups are those of an 8B Llama 3 with adapters of rank 16; each is decoded into S (kernels/augmented), so the bytes are the stored
weights, A and B read, and all of S written but its unused corner. Buffers rotate over more than four times the L2.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402
from reporting import Report, passed, read  # noqa: E402
from torch import Tensor  # noqa: E402

from halfbyte.formats import quantize as formats  # noqa: E402
from halfbyte.formats.packed import Format, Packed  # noqa: E402
from halfbyte.kernels.augmented import Group, fused  # noqa: E402
from halfbyte.kernels.dequantize import decode, dequantize  # noqa: E402
from halfbyte.kernels.dequantize import fused as one  # noqa: E402
from halfbyte.kernels.dequantize.words import Tiling  # noqa: E402
from halfbyte.kernels.lora_linear.members import LowRank, Member  # noqa: E402
from kernels import checks, checks_augmented  # noqa: E402

GROUPS = {"q+k+v": ((4096, 1024, 1024), 4096), "gate+up": ((14336, 14336), 4096), "down": ((4096,), 14336), "o": ((4096,), 4096)}
FORMATS = {"nested": Format("nf4", 64, nested=True), "plain": Format("nf4", 64)}

VARIANTS = {
    "default": None,
    "8192/8": Tiling(weights=8192, warps=8, policy="evict_first", dependent=False),
    "8192/8, dependent": Tiling(weights=8192, warps=8),
    "4096/4": Tiling(),
    "4096/4, evict first": Tiling(policy="evict_first"),
    "4096/8": Tiling(warps=8, lookup="shuffle2"),
    "2048/4": Tiling(weights=2048, lookup="shuffle2"),
}
RANK = 16
BF16 = torch.bfloat16
WORKERS = 12


def random_member(rows: int, width: int, fmt: Format, seed: int) -> Member:
    """Random codes and scales: the time does not depend on them, and quantising does take time."""
    torch.manual_seed(seed)
    n = rows * width
    blocks = n // fmt.block

    def stored(count: int) -> Tensor:
        return torch.randint(0, 256, (count,), dtype=torch.uint8, device="cuda")

    def floats(count: int) -> Tensor:
        return torch.rand(count, device="cuda").view(torch.uint8)

    empty = stored(0)
    outer = (floats(-(-blocks // 256)), floats(1)) if fmt.nested else (empty, empty)
    scales = stored(blocks) if fmt.nested else floats(blocks)
    weight = Packed(fmt, (rows, width), BF16, stored(n // 2), scales, *outer, empty)
    a, b = torch.randn(RANK, width, device="cuda"), torch.randn(rows, RANK, device="cuda")
    return Member(weight, None, LowRank(a, b, 2.0))


def random_group(name: str, fmt: Format, rows: int | None = None) -> Group:
    """A group of `GROUPS`; `rows`: with so many a member instead."""
    outputs, width = GROUPS[name]
    return Group([random_member(rows or n, width, fmt, seed) for seed, n in enumerate(outputs)])


# --- gate -------------------------------------------------------------------------------------------------------------


def check_variant(variant: str, name: str, kind: str) -> None:
    """All of S, with rows that fill no tile."""
    group = random_group(name, FORMATS[kind], rows=67)
    group.plan = fused.Plan(group, VARIANTS[variant])
    with checks.poisoned():
        got = group.matrix(BF16)
    assert checks_augmented.same(got, checks_augmented.expected(group, BF16)), "not the bits of the reference"


def check_decode(fmt: Format, dtype: torch.dtype) -> None:
    """`decode` alone: whole and odd shapes."""
    for shape in ((64, 4096), (67, 14336), (33, 2080), (63, 431)):
        packed = checks.random_packed(shape, fmt, "cuda")
        with checks.poisoned():
            got = decode(packed, dtype)
        assert torch.equal(got, formats.dequantize(packed, dtype)), f"{shape}"


def jobs() -> dict[str, Callable[[], None]]:
    """Every proof by name; of `checks`, which compiles for minutes, what concerns the fast way."""
    found: dict[str, Callable[[], None]] = {}
    for variant in VARIANTS:
        for name in GROUPS:
            for kind in FORMATS:
                found[f"{variant}: {name} {kind}"] = lambda v=variant, n=name, k=kind: check_variant(v, n, k)  # type: ignore[misc]
    for name in ("masters", "hold", "products"):
        found[f"augmented: {name}"] = lambda f=checks_augmented.CHECKS[name]: f("cuda")  # type: ignore[misc]
    for name in checks_augmented.GROUPS:
        found[f"augmented: {name}"] = lambda n=name: checks_augmented.prove_group("cuda", n)  # type: ignore[misc]
    for fmt in (*FORMATS.values(), *checks_augmented.INT4):
        for dtype in checks.DTYPES:
            found[f"decode: {fmt} {dtype}"] = lambda f=fmt, d=dtype: check_decode(f, d)  # type: ignore[misc]
    found["decode: every code"] = lambda: checks.check_dequantize_every_code("cuda")
    found["decode: beyond 2^31"] = lambda: checks.check_dequantize_beyond_int32("cuda")
    return found


def gate() -> dict[str, str]:
    """Every job, over some processes: name to "" or what went wrong."""
    command = [sys.executable, __file__, "--out", "", "--worker"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(WORKERS)
    ]
    found: dict[str, str] = {}
    for i, process in enumerate(running):
        stdout, stderr = process.communicate(timeout=120)
        try:
            found |= json.loads(stdout.splitlines()[-1])
        except (IndexError, json.JSONDecodeError):
            found[f"worker {i}"] = stderr[-2000:] or "no answer"
    missing = set(jobs()) - set(found)
    return found | dict.fromkeys(missing, "did not run")


def work(index: int) -> None:
    """Every WORKERS-th job, from `index` on."""
    import traceback

    found = {}
    for name, job in list(jobs().items())[index::WORKERS]:
        try:
            job()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc(limit=-3)[-2000:]
    print(json.dumps(found))


# --- figures ----------------------------------------------------------------------------------------------------------


def milliseconds(launches: list[Callable[[], Any]], repeats: int = 3) -> float:
    """Of one launch: the median over `repeats` runs of all of them back to back."""
    for launch in launches:
        launch()
    found = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000)  # the queue fills meanwhile, so that the host's time does not show
        start.record()
        for launch in launches:
            launch()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop) / len(launches))
    return statistics.median(found)


def in_a_graph(launches: list[Callable[[], Any]]) -> float:
    """The same out of a CUDA graph of all launches."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    return milliseconds([graph.replay] * 3) / len(launches)


def bench_copy(report: Callable[..., None]) -> float:
    """GB/s of copies, read + written, and of fills: large ones, which all figures are held against, and ones of a group's size."""
    best = 0.0
    for mib in (1024, 256, 64, 24):
        count = max(4, 512 // mib)
        halves = [torch.empty(2, mib << 20, dtype=torch.uint8, device="cuda") for _ in range(count)]
        ms = milliseconds([lambda h=h: h[0].copy_(h[1]) for h in halves] * max(1, 16 // count))  # type: ignore[misc]
        rate = 2 * (mib << 20) / ms / 1e6
        best = best or rate
        fill = milliseconds([lambda h=h: h[0].view(torch.int32).fill_(1) for h in halves] * max(1, 16 // count))  # type: ignore[misc]
        report(what="copy", mib=mib, us=round(ms * 1e3, 1), gb_per_s=round(rate), fill_gb_per_s=round((mib << 20) / fill / 1e6))
    return best


def traffic(group: Group) -> int:
    """Bytes that decoding a group into S must read and write."""
    read = sum(m.weight.nbytes + 4 * (m.lora.a.numel() + m.lora.b.numel()) for m in group.members if m.lora is not None)
    return read + 2 * ((group.rows + group.rank) * (group.width + group.rank) - group.rank**2)


def figures(moved: float, ms: float, graph_ms: float, copy: float) -> dict[str, float]:
    """Of launches one after the other, and of the same in a CUDA graph."""
    us, graph_us = ms * 1e3, graph_ms * 1e3
    share, graph_share = (moved / each / 1e3 / copy for each in (us, graph_us))
    return {"us": round(us, 2), "of_copy": round(share, 4), "graph_us": round(graph_us, 2), "graph_of_copy": round(graph_share, 4)}


def bench_groups(report: Report, copy: float) -> None:
    """Every variant on every group, plain and nested."""
    total: dict[tuple[str, str], list[float]] = {}
    for name in GROUPS:
        for kind, fmt in FORMATS.items():
            if not report.fits(f"{name} {kind}"):
                continue
            groups = [random_group(name, fmt)]
            moved = traffic(groups[0])
            groups += [random_group(name, fmt) for _ in range(max(2, -(-220_000_000 // moved) - 1))]
            outs = [torch.empty(g.rows + g.rank, g.width + g.rank, dtype=BF16, device="cuda") for g in groups]
            rounds = max(1, 24 // len(groups))
            for variant, tiling in VARIANTS.items():
                plans = [fused.Plan(g, tiling) for g in groups]
                launches = [lambda p=p, o=o: p.launch(o, True) for p, o in zip(plans, outs, strict=True)] * rounds  # type: ignore[misc]
                ms = milliseconds(launches)
                seconds = total.setdefault((variant, kind), [0.0, 0.0, 0.0])
                seconds[0] += ms
                seconds[1] += moved
                seconds[2] += (graph := in_a_graph(launches))
                report(what="group", group=name, format=kind, variant=variant, **figures(moved, ms, graph, copy))
            plans = [fused.Plan(g) for g in groups]
            adapters = milliseconds([lambda p=p, o=o: p.launch(o, False) for p, o in zip(plans, outs, strict=True)] * 4)  # type: ignore[misc]
            report(what="adapters only", group=name, format=kind, us=round(adapters * 1e3, 2))
    for (variant, kind), (ms, moved, graph) in total.items():
        report(what="a layer", format=kind, variant=variant, **figures(moved, ms, graph, copy))


def bench_single(report: Callable[..., None], copy: float) -> None:
    """`decode` of one weight, in words and by the general kernel, and bf16 beside fp32."""
    for shape in ((4096, 4096), (14336, 4096)):
        for kind, fmt in FORMATS.items():
            count = max(3, 220_000_000 // (shape[0] * shape[1] * 5 // 2) + 1)
            weights = [random_member(*shape, fmt, i).weight for i in range(count)]
            outs = [torch.empty(shape, dtype=BF16, device="cuda") for _ in weights]
            for way, f in (("words", one.decode), ("general", one._decode_four)):
                ms = milliseconds([lambda f=f, w=w, o=o: f(w, o) for w, o in zip(weights, outs, strict=True)] * 4)  # type: ignore[misc]
                rate = (weights[0].nbytes + outs[0].nbytes) / ms / 1e6  # type: ignore[union-attr]
                report(what="decode", shape=shape, format=kind, way=way, us=round(ms * 1e3, 2), of_copy=round(rate / copy, 4))


def bench_host(report: Callable[..., None]) -> None:
    """Microseconds of the host a call, on weights so small that the GPU never is behind."""
    group = random_group("q+k+v", FORMATS["nested"], rows=16)
    single = group.members[0].weight
    assert isinstance(single, Packed)
    calls: dict[str, Callable[[], Any]] = {
        "Group.matrix, q+k+v": lambda: group.matrix(BF16),
        "decode": lambda: decode(single, BF16),
        "dequantize (operator)": lambda: dequantize(single, BF16),
        "torch.empty": lambda: torch.empty(64, 4096, dtype=BF16, device="cuda"),
    }
    for name, call in calls.items():
        found = []
        for _ in range(5):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(200):
                call()
            found.append((time.perf_counter() - begin) / 200)
        report(what="host", call=name, us=round(statistics.median(found) * 1e6, 2))


def markdown(results: Path) -> str:
    """Variants down, groups across: microseconds and share of a copy."""
    rows = read(results)
    text = ["| variant | format | " + " | ".join(GROUPS) + " | a layer |", "| --- | --- |" + " ---: |" * (len(GROUPS) + 1)]
    for variant in VARIANTS:
        for kind in FORMATS:
            mine = [r for r in rows if r.get("variant") == variant and r["format"] == kind]
            cells = [f"{r['us']:.1f} us, {r['of_copy']:.1%}" for r in mine]
            if cells:
                text.append(f"| {variant} | {kind} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path)
    where.add_argument("--table", type=Path)
    parser.add_argument("--limit", type=float, default=50, help="seconds after which no further group is measured")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        print(markdown(options.table))
        return 0
    if options.worker is not None:
        work(options.worker)
        return 0
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    found = gate()
    if not passed(found, out / "decode_gate.json"):
        return 1
    with (out / "decode_gpu.jsonl").open("w") as file:
        report = Report(file, options.limit)
        report.machine()
        copy = bench_copy(report)
        bench_host(report)
        bench_groups(report, copy)
        if report.fits("single"):
            bench_single(report, copy)
        report.done()
    return 0


if __name__ == "__main__":
    sys.exit(main())
