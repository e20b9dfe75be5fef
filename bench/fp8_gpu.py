"""fp8 products on a CUDA GPU: first the proof, then the figures. Needs torch and triton, no install; about 40 seconds.

    python bench/fp8_gpu.py --out DIR                                        where a layer's time goes, and what a GEMM could take
    python bench/fp8_gpu.py --out DIR --no-gate --only elementwise,decode    any of: parts, gemm, elementwise, rows, layer, decode

Writes DIR/fp8_gpu.jsonl and DIR/fp8_gate.json. The gate is `tests/kernels/checks_fp8.py` on this GPU. Shapes are those of an 8B
Llama 3 with rank 16 everywhere, nf4 nested. Every ratio compares things measured in the same run, in turn; decoded weights are read
from buffers that the L2 cannot hold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402
from reporting import Report  # noqa: E402
from torch import Tensor  # noqa: E402

from halfbyte.formats.packed import Format, Packed  # noqa: E402
from halfbyte.formats.quantize import quantize  # noqa: E402
from halfbyte.kernels import fp8, gemm, glu, norm  # noqa: E402
from halfbyte.kernels.augmented import Group  # noqa: E402
from halfbyte.kernels.fp8 import decode, elementwise, fused, plan  # noqa: E402
from halfbyte.kernels.fp8.decode import Shape  # noqa: E402
from halfbyte.kernels.fp8.parts import Rows, Weight  # noqa: E402
from halfbyte.kernels.gemm import matmul  # noqa: E402
from halfbyte.kernels.lora_linear.members import LowRank, Member  # noqa: E402
from halfbyte.kernels.products import Augmented, Float8  # noqa: E402

GROUPS = {"qkv": ((4096, 1024, 1024), 4096), "o": ((4096,), 4096), "gate+up": ((14336, 14336), 4096), "down": ((4096,), 14336)}
STORED = (Shape(tile=4096, stored_warps=4), Shape(tile=8192, stored_warps=8), Shape(tile=8192, stored_warps=4))
TRANSPOSED = (
    Shape(quads=32, spans=1, transposed_warps=4),
    Shape(quads=32, spans=2, transposed_warps=4),
    Shape(quads=32, spans=2, transposed_warps=8),
    Shape(quads=64, spans=1, transposed_warps=8),
    Shape(quads=64, spans=2, transposed_warps=8),
    Shape(quads=32, spans=4, transposed_warps=8),
)
RUNS = ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16), (8192, 32))
RANK, E4M3 = 16, torch.float8_e4m3fn


def times(functions: dict[str, Callable[[], Any]], repeats: int = 7, warm: int = 2) -> dict[str, float]:
    """Median milliseconds of each, measured in turn."""
    pairs = {
        name: [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for name in functions
    }
    for f in functions.values():
        for _ in range(warm):
            f()
    for i in range(repeats):
        for name, f in functions.items():
            pairs[name][i][0].record()
            f()
            pairs[name][i][1].record()
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in each) for name, each in pairs.items()}


def group(name: str, copies: int = 1) -> list[Group]:
    """The same random group several times, each in memory of its own."""
    outputs, width = GROUPS[name]
    packed = [
        quantize(torch.randn(n, width, device="cuda", dtype=torch.bfloat16) * 0.02, Format("nf4", 64, nested=True)) for n in outputs
    ]
    found = []
    for _ in range(copies):
        members = []
        for p, n in zip(packed, outputs, strict=True):
            own = Packed(p.format, p.shape, p.dtype, *(t.clone() for t in p.tensors()))
            lora = LowRank(torch.randn(RANK, width, device="cuda") * width**-0.5, torch.randn(n, RANK, device="cuda") * 0.01, 2.0)
            members.append(Member(own, None, lora))
        found.append(Group(members))
    return found


def copy_rate() -> float:
    source = torch.empty(1 << 28, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / times({"copy": lambda: target.copy_(source)})["copy"] / 1e6


def bench_decode(report: Report, copy: float) -> None:
    """GB/s (stored bytes read + e4m3 written), adapters' launch included and apart; buffers beyond 4 x the L2."""
    for name in ("gate+up", "qkv"):
        rounds = 3 if name == "gate+up" else 8
        groups = group(name, rounds)
        g = groups[0]
        moved = sum(m.weight.nbytes for m in g.members if isinstance(m.weight, Packed)) + g.rows * g.width
        for back in (False, True):
            weights = [Weight(g.width if back else g.rows, g.rows if back else g.width, g.rank, g.device) for _ in groups]
            small = torch.empty((g.rows, g.rank) if back else (g.rank, g.width), dtype=torch.bfloat16, device="cuda")
            f = decode.backward_weight if back else decode.forward_weight
            shapes = TRANSPOSED if back else STORED

            def run(shape: Shape, f: Any = f, groups: Any = groups, weights: Any = weights, small: Tensor = small) -> None:
                for x, w in zip(groups, weights, strict=True):
                    f(x, plan.of(x), w, small, shape)

            def beside(back: bool = back, groups: Any = groups, weights: Any = weights, small: Tensor = small) -> None:
                for x, w in zip(groups, weights, strict=True):
                    table = decode._tables(x, plan.of(x), decode.SHAPE).adapters
                    fused.adapters(x, plan.of(x), w, small, table, back)

            ms = times({"adapters": beside} | {str(s): partial(run, s) for s in shapes})
            extra = ms["adapters"] / rounds
            for s in shapes:
                each = ms[str(s)] / rounds
                detail = (
                    f"tile {s.tile}, {s.stored_warps} warps"
                    if not back
                    else f"{4 * s.quads} x {64 * s.spans}, {s.transposed_warps} warps"
                )
                rate = moved / (each - extra) / 1e6
                report(what="decode", group=name, transposed=back, shape=detail, us=round(1e3 * each, 1),
                       adapters_us=round(1e3 * extra, 1), gb_per_s=round(rate), of_copy=round(rate / copy, 3),
                       of_copy_with_adapters=round(moved / each / 1e6 / copy, 3))  # fmt: skip


def bench_rows(report: Report, copy: float) -> None:
    """quantise_rows, bytes read and written, against a copy."""
    for width in (4096, 14336, 28672):
        x = torch.randn(8192, width + 32, device="cuda", dtype=torch.bfloat16)[:, :width]
        small = torch.randn(8192, 32, device="cuda", dtype=torch.bfloat16)
        rows = Rows(8192, width, 32, x.device)
        ms = times({str(w): partial(fused.quantize_rows, x, rows.main, rows.scale, small, w) for w in (4, 8, 16, 32)})
        tail = times({"tail": partial(fused.fill_tail, rows, small)})["tail"]
        for warps, each in ms.items():
            rate = 3 * 8192 * width / each / 1e6
            report(what="quantize", width=width, warps=int(warps), us=round(each * 1e3, 1), gb_per_s=round(rate),
                   of_copy=round(rate / copy, 3), tail_alone_us=round(tail * 1e3, 1))  # fmt: skip


def bench_parts(report: Report, tokens: int = 8192) -> None:
    """Microseconds of everything that a group launches, in fp8 as a layer runs it and in bf16, and the sums over a layer."""
    total: dict[str, float] = {}
    for name in GROUPS:
        g = group(name)[0]
        for way in ("forward", "back"):
            us = {k: 1e3 * v for k, v in times(_pieces(g, name, way, tokens), repeats=5).items()}
            report(what="part", tokens=tokens, group=name, way=way, us={k: round(v, 1) for k, v in us.items()})
            for part, value in us.items():
                total[part] = total.get(part, 0.0) + value
        torch.cuda.empty_cache()
    ours = sum(v for k, v in total.items() if not k.startswith("bf16") and k != "decode, held")
    theirs = sum(v for k, v in total.items() if k.startswith("bf16"))
    report(what="part", tokens=tokens, group="a layer", us={k: round(v, 1) for k, v in total.items()}, fp8_us=round(ours, 1),
           bf16_us=round(theirs, 1), of_step_ms={k: round(32e-3 * v, 2) for k, v in total.items()})  # fmt: skip


def _pieces(g: Group, name: str, way: str, tokens: int) -> dict[str, Callable[[], Any]]:
    back, bf16 = way == "back", torch.bfloat16
    inner, outputs = (g.rows, g.width) if back else (g.width, g.rows)
    x = torch.randn(tokens, inner + g.rank, device="cuda", dtype=bf16)
    out = torch.empty(tokens, outputs + g.rank, device="cuda", dtype=bf16)[:, :outputs]
    rows, weight = Rows(tokens, inner, g.rank, x.device), Weight(outputs, inner, g.rank, x.device)
    small = torch.empty((g.rows, g.rank) if back else (g.rank, g.width), dtype=bf16, device="cuda")
    decoded = decode.backward_weight if back else decode.forward_weight
    right = small if back else small.T
    fp8.quantize_both(x[:, :inner], x[:, inner:], rows)
    decoded(g, plan.of(g), weight, small)
    held = group(name)[0]
    held.float8_held = True
    # The kernel in front has quantised these already; only the adapter's columns are left to write.
    ready = (name, way) in (("qkv", "forward"), ("gate+up", "forward"), ("down", "forward"), ("gate+up", "back"))
    residual = torch.randn(tokens, outputs, device="cuda", dtype=bf16) if name in ("o", "down") and way == "forward" else None
    pieces: dict[str, Callable[[], Any]] = {
        "decode": lambda: decoded(g, plan.of(g), weight, small),
        "decode, held": lambda: (fp8.backward_weight if back else fp8.forward_weight)(held, bf16),
        "rank product": lambda: matmul(x[:, :inner], right, x[:, inner:]),
        "tail" if ready else "quantise": (lambda: fp8.fill_tail(rows, x[:, inner:]))
        if ready
        else (lambda: fp8.quantize_both(x[:, :inner], x[:, inner:], rows)),
        "product": lambda: fp8.product(rows, weight, None, None, out, residual),
        "bf16 decode": lambda: g.matrix(bf16),
        "bf16 rank product": lambda: matmul(x[:, :inner], right, x[:, inner:]),
    }
    matrix = g.matrix(bf16)
    whole = matrix[:, : g.width] if back else matrix[: g.rows].T
    pieces["bf16 product"] = lambda: matmul(x, whole, out, c=residual, beta=0.0 if residual is None else 1.0)
    return pieces


def bench_elementwise(report: Report) -> None:
    """Norm and GLU that write e4m3 too, against the plain kernels with and without a pass that quantises; 8,192 tokens."""
    tokens, hidden, features = 8192, 4096, 14336
    x, delta = (torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight, spec = torch.ones(hidden, device="cuda", dtype=torch.bfloat16), norm.NormSpec("rms", 1e-5)
    out = torch.empty(tokens, hidden + 48, device="cuda", dtype=torch.bfloat16)[:, :hidden]
    both = torch.randn(tokens, 2 * features + 32, device="cuda", dtype=torch.bfloat16)
    gate, up = both[:, :features], both[:, features : 2 * features]
    h = torch.randn(tokens, features, device="cuda", dtype=torch.bfloat16)
    small, middle, large = (Rows(tokens, width, 32, x.device) for width in (hidden, features, 2 * features))
    plain: dict[str, Callable[[], Any]] = {
        "add_norm": lambda: norm.add_norm(x, delta, spec, weight, None, out),
        "glu": lambda: glu.glu(gate, up, "silu", h),
        "glu_backward": lambda: glu.glu_backward(h, gate, up, "silu"),
    }
    after = {
        "add_norm": lambda: fp8.quantize_rows(out, small.main, small.scale),
        "glu": lambda: fp8.quantize_rows(h, middle.main, middle.scale),
        "glu_backward": lambda: fp8.quantize_rows(both[:, : 2 * features], large.main, large.scale),
    }
    fused_ = {
        "add_norm": lambda run: elementwise.add_norm(x, delta, spec, weight, None, out, small, run[1]),
        "glu": lambda run: elementwise.glu(gate, up, "silu", h, middle, run),
        "glu_backward": lambda run: elementwise.glu_backward(h, gate, up, "silu", large, run),
    }
    for name in plain:
        run: dict[str, Callable[[], Any]] = {"plain": plain[name], "quantize": after[name]}
        shapes = ((hidden, 4), (hidden, 8)) if name == "add_norm" else RUNS
        run |= {f"one launch, {s[0]} at a time, {s[1]} warps": partial(fused_[name], s) for s in shapes}
        report(what="elementwise", kernel=name, us={k: round(1e3 * v, 1) for k, v in times(run).items()})


def bench_gemm(report: Report, tokens: int = 8192) -> None:
    """TFLOP/s of the base product (adapters' columns not counted): bf16 augmented, fp8 with every kind of scale."""
    total: dict[str, float] = {}
    for name, (outputs, width) in GROUPS.items():
        n, r = sum(outputs), RANK * len(outputs)
        r = -(-r // 16) * 16
        for way, inner, out_width in (("forward", width, n), ("back", n, width)):
            ms = _gemms(tokens, inner, out_width, r)
            for key, value in ms.items():
                total[key] = total.get(key, 0.0) + value
            flop = 2 * tokens * inner * out_width
            report(what="gemm", tokens=tokens, group=name, way=way, **{k: round(flop / v / 1e9) for k, v in ms.items()})
    report(what="gemm", tokens=tokens, group="a layer", ms={k: round(v, 3) for k, v in total.items()})


def _gemms(tokens: int, inner: int, outputs: int, rank: int) -> dict[str, float]:
    x = torch.randn(tokens, inner + rank, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(outputs, inner + rank, device="cuda", dtype=torch.bfloat16) * 0.02
    out = torch.empty(tokens, outputs + 32, device="cuda", dtype=torch.bfloat16)[:, :outputs]
    rows, weight = Rows(tokens, inner, rank, x.device), Weight(outputs, inner, rank, x.device)
    rows.data.copy_((torch.randn(tokens, inner + 3 * rank, device="cuda") * 60).to(E4M3))
    weight.data.copy_((torch.randn(outputs, inner + 3 * rank, device="cuda") * 60).to(E4M3))
    rows.scale.fill_(1e-3)
    weight.scale.fill_(1e-3)
    plain_x, plain_w = rows.main.contiguous(), weight.data[:, :inner].contiguous()
    tight_x, tight_w = rows.data.contiguous(), weight.data.contiguous()
    one = torch.full((), 1e-3, device="cuda")
    residual = torch.randn(tokens, outputs, device="cuda", dtype=torch.bfloat16)
    small, sb = torch.randn(tokens, rank, device="cuda", dtype=torch.bfloat16), w[:, inner:]

    def scaled(a: Tensor, b: Tensor, sa: Tensor, sw: Tensor, fast: bool = True) -> None:
        torch.ops.aten._scaled_mm.out(a, b.t(), sa, sw, None, None, torch.bfloat16, fast, out=out)

    def afterwards() -> None:
        scaled(plain_x, plain_w, rows.scale, weight.scale)
        out.addmm_(small, sb.T)

    return times(
        {
            "bf16 augmented": lambda: torch.mm(x, w.T, out=out),
            "rowwise": lambda: scaled(plain_x, plain_w, rows.scale, weight.scale),
            "tensorwise": lambda: scaled(plain_x, plain_w, one, one),
            "rowwise, exact sums": lambda: scaled(plain_x, plain_w, rows.scale, weight.scale, False),
            "(a) rowwise, then addmm_": afterwards,
            "(b) the same, rows in no whole lines": lambda: scaled(tight_x, tight_w, rows.scale, weight.scale),
            "(b) tensorwise, adapter inside": lambda: scaled(rows.data, weight.data, one, one),
            "(b) rowwise, adapter inside": lambda: scaled(rows.data, weight.data, rows.scale, weight.scale),
            "the same, chosen": lambda: gemm.scaled(rows.data, weight.data.t(), rows.scale, weight.scale, out),
            "the same, chosen, with a residual": lambda: gemm.scaled(
                rows.data, weight.data.t(), rows.scale, weight.scale, out, c=residual
            ),
        },
        repeats=5,
        warm=1,
    )


def bench_layer(report: Report) -> None:
    """All linear layers, forward and dX, decode and quantising included: bf16, fp8, and fp8 whose rows come quantised."""
    groups = {name: group(name)[0] for name in GROUPS}
    for tokens in (8192, 2048):
        data = {}
        for name, g in groups.items():
            x = torch.randn(tokens, g.width + g.rank, device="cuda", dtype=torch.bfloat16)
            dy = torch.randn(tokens, g.rows + g.rank, device="cuda", dtype=torch.bfloat16)
            rows = [Float8().rows(g, tokens, back) for back in (False, True)]
            for r, source in zip(rows, (x[:, : g.width], dy[:, : g.rows]), strict=True):
                assert r is not None
                fp8.quantize_rows(source, r.main, r.scale)
            data[name] = (x, dy, torch.empty_like(dy)[:, : g.rows], torch.empty_like(x)[:, : g.width], rows)

        def layer(products: Any, ready: bool = False, only: str = "", data: Any = data) -> None:
            for name, g in groups.items():
                if only in ("", name):
                    x, dy, y, dx, rows = data[name]
                    products.project(g, x, y, None, None, rows[0] if ready else None)
                    products.project_back(g, dy, dx, None, rows[1] if ready else None)

        variants = {"bf16": (Augmented(), False), "fp8": (Float8(), False), "fp8, rows ready": (Float8(), True)}
        for only in ("", *GROUPS):
            ms = times({k: partial(layer, *v, only) for k, v in variants.items()}, repeats=5, warm=2)
            report(what="layer", tokens=tokens, group=only or "a layer", ms={k: round(v, 3) for k, v in ms.items()},
                   speedup={k: round(ms["bf16"] / v, 3) for k, v in ms.items()})  # fmt: skip
        started = time.perf_counter()
        for _ in range(5):
            layer(Float8())
        cpu = (time.perf_counter() - started) / 5
        torch.cuda.synchronize()
        report(what="layer", tokens=tokens, group="a layer", cpu_ms_to_launch=round(1e3 * cpu, 3))


def _proven(out: Path, report: Report) -> bool:
    """The checks on this GPU."""
    from kernels import checks_fp8, runner

    found = runner.outcomes(checks_fp8.CHECKS, "cuda")
    (out / "fp8_gate.json").write_text(json.dumps(found, indent=1))
    red = {name: text for name, text in found.items() if text}
    for name, text in red.items():
        print(f"RED {name}\n{text}", flush=True)
    report(what="gate", green=len(found) - len(red), of=len(found), red=sorted(red), gpu=torch.cuda.get_device_name(),
           torch=torch.__version__)  # fmt: skip
    return not red


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="parts,gemm,elementwise")
    parser.add_argument("--no-gate", action="store_true", help="after a green run of the same files")
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    file = (out / "fp8_gpu.jsonl").open("a")
    report = Report(file)

    if not options.no_gate and not _proven(out, report):
        print("no figures: a kernel that is wrong has no speed")
        return 1
    torch.manual_seed(0)
    wanted = options.only.split(",")
    copy = copy_rate()
    report(what="copy", gb_per_s=round(copy))
    for name, bench in (("parts", lambda: bench_parts(report)),
                        ("decode", lambda: bench_decode(report, copy)), ("rows", lambda: bench_rows(report, copy)),
                        ("gemm", lambda: bench_gemm(report)), ("layer", lambda: bench_layer(report)),
                        ("elementwise", lambda: bench_elementwise(report))):  # fmt: skip
        if name in wanted:
            bench()
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
