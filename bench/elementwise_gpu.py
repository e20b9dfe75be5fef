"""Norm, rotary and GLU kernels on a CUDA GPU: first the proof, then bandwidth and the host's cost a call. Needs torch and triton.

    python bench/elementwise_gpu.py --out DIR [--limit 50]     # writes DIR/elementwise_gpu.jsonl and DIR/gate.json

The gate is `tests/kernels/checks_elementwise.py` on this GPU, shared by processes since compiling takes its time; a red check and
nothing is reported. Every kernel runs at several tiles, against `torch.compile` of the same region (the shipped reference, or the
plain formula where that compiles better) and against eager PyTorch. `gb_per_s` counts the bytes that have to move; `of_copy` is
its share of what a large copy reaches in this run. Buffers rotate, so that no call finds its inputs in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402
from gputime import turns  # noqa: E402
from reporting import BEGUN, Report, passed  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional  # noqa: E402

from halfbyte.kernels import glu, norm, rotary  # noqa: E402
from halfbyte.kernels.glu import fused as fused_glu  # noqa: E402
from halfbyte.kernels.norm import fused as fused_norm  # noqa: E402
from halfbyte.kernels.rotary import fused as fused_rotary  # noqa: E402

T, H, F, HQ, HK, D, EXTRA = 8192, 4096, 14336, 32, 8, 128, 64
SPEC = norm.NormSpec("rms", 1e-5)
SETS = 3
TILES = {
    "norm": ((1, 4), (1, 8), (2, 8)),
    "rotary": ((1, 2), (1, 4), (2, 4)),
    "glu": ((1024, 4), (2048, 4), (2048, 8)),
}
GATES, WARMERS = 9, 3
Call = Callable[[dict[str, Tensor]], Any]


def buffers(tokens: int) -> dict[str, Tensor]:
    """One set of what all kernels need; rows in the augmented layout where the layer has them so."""

    def wide(width: int) -> Tensor:
        return torch.randn(tokens, width + EXTRA, device="cuda", dtype=torch.bfloat16)[:, :width]

    def full(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    qkv, gate_up = wide((HQ + 2 * HK) * D), wide(2 * F)
    angles = torch.rand(tokens, D // 2, device="cuda").repeat(1, 2) * 6
    return {
        "x": full(tokens, H), "delta": full(tokens, H), "normed": wide(H), "weight": full(H),
        "rstd": torch.rand(tokens, device="cuda"),
        "q": qkv[:, : HQ * D].unflatten(1, (HQ, D)), "k": qkv[:, HQ * D : (HQ + HK) * D].unflatten(1, (HK, D)),
        "dq": full(tokens, HQ, D), "dk": full(tokens, HK, D), "dv": full(tokens, HK, D), "packed": wide((HQ + 2 * HK) * D),
        "q_rstd": torch.rand(tokens, HQ, device="cuda"), "k_rstd": torch.rand(tokens, HK, device="cuda"), "head": full(D),
        "cos": angles.cos().bfloat16(), "sin": angles.sin().bfloat16(),
        "gate": gate_up[:, :F], "up": gate_up[:, F:], "h": wide(F),
    }  # fmt: skip


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]


def plain_norm(b: dict[str, Tensor]) -> Tensor:
    r = b["x"] + b["delta"]
    b["normed"].copy_(functional.rms_norm(r, (H,), b["weight"], 1e-5))
    return r


def plain_norm_backward(b: dict[str, Tensor]) -> None:
    r, g = b["x"].float(), b["normed"].float() * b["weight"].float()
    unit = r * b["rstd"][:, None]
    d = (g - unit * (g * unit).mean(-1, keepdim=True)) * b["rstd"][:, None]
    b["normed"].copy_(d + b["delta"].float())


def plain_rotary(b: dict[str, Tensor]) -> None:
    b["q"].copy_(plain_rotate(b["q"], b["cos"], b["sin"]))
    b["k"].copy_(plain_rotate(b["k"], b["cos"], b["sin"]))


def plain_gather(b: dict[str, Tensor]) -> None:
    back = [plain_rotate(b[n], b["cos"], -b["sin"]).flatten(1) for n in ("dq", "dk")]
    b["packed"].copy_(torch.cat([*back, b["dv"].flatten(1)], 1))


def plain_norm_rotate(b: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(plain_rotate(functional.rms_norm(b[n], (D,), b["head"], 1e-5), b["cos"], b["sin"]) for n in ("q", "k"))


def plain_norm_gather(b: dict[str, Tensor]) -> None:
    names = ("dq", "dk", "dv", "q", "k", "q_rstd", "k_rstd", "head", "head")
    rotary.reference.norm_gather_backward(*(b[n] for n in names), SPEC, b["cos"], b["sin"], "half", b["packed"])  # type: ignore[arg-type]


def plain_glu(b: dict[str, Tensor]) -> None:
    b["h"].copy_(functional.silu(b["gate"]) * b["up"])


def plain_glu_backward(b: dict[str, Tensor]) -> None:
    glu.reference.glu_backward(b["h"], b["gate"], b["up"], "silu")


def ours(name: str, tile: tuple[int, int] | None) -> Call:
    """A kernel on a set of buffers, with a tile or, None, through the public function that picks it."""
    how: dict[str, Any] = {} if tile is None else {"tile": tile}
    n, r, g = (fused_norm, fused_rotary, fused_glu) if tile else (norm, rotary, glu)
    calls: dict[str, Call] = {
        "add_norm": lambda b: n.add_norm(b["x"], b["delta"], SPEC, b["weight"], None, b["normed"], **how),
        "norm_backward": lambda b: n.norm_backward(
            b["normed"], b["x"], b["rstd"], None, SPEC, b["weight"], b["delta"], b["normed"], **how
        ),
        "rotate": lambda b: r.rotate(b["q"], b["k"], b["cos"], b["sin"], "half", **how),
        "gather_backward": lambda b: r.gather_backward(b["dq"], b["dk"], b["dv"], b["cos"], b["sin"], "half", b["packed"], **how),
        "norm_rotate": lambda b: r.norm_rotate(b["q"], b["k"], b["head"], b["head"], SPEC, b["cos"], b["sin"], "half", **how),
        "norm_gather_backward": lambda b: r.norm_gather_backward(
            b["dq"], b["dk"], b["dv"], b["q"], b["k"], b["q_rstd"], b["k_rstd"], b["head"], b["head"], SPEC, b["cos"], b["sin"],
            "half", b["packed"], **how,
        ),
        "glu": lambda b: g.glu(b["gate"], b["up"], "silu", b["h"], **how),
        "glu_backward": lambda b: g.glu_backward(b["h"], b["gate"], b["up"], "silu", **how),
    }  # fmt: skip
    return calls[name]


# name: family of tiles, elements of 2 bytes that move for a token, and the region for torch.compile and eager
KERNELS: dict[str, tuple[str, int, Call]] = {
    "add_norm": ("norm", 4 * H, plain_norm),
    "norm_backward": ("norm", 4 * H, plain_norm_backward),
    "rotate": ("rotary", 2 * (HQ + HK) * D + 2 * D, plain_rotary),
    "gather_backward": ("rotary", 2 * (HQ + 2 * HK) * D + 2 * D, plain_gather),
    "norm_rotate": ("rotary", 2 * (HQ + HK) * D + 2 * D, plain_norm_rotate),
    "norm_gather_backward": ("rotary", (3 * (HQ + HK) + 2 * HK) * D + 2 * D, plain_norm_gather),
    "glu": ("glu", 3 * F, plain_glu),
    "glu_backward": ("glu", 6 * F, plain_glu_backward),
}


def times(functions: dict[str, Callable[[], Any]], repeats: int = 12) -> dict[str, float]:
    """Median milliseconds of each, measured in turn after a first call."""
    for f in functions.values():
        f()
    return turns(functions, repeats)


def host_us(f: Callable[[], Any], calls: int = 150) -> float:
    """Microseconds of the host a call: the GPU lags behind, its queue holds more than these calls."""
    f()
    best = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            f()
        best.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return min(best)


def copy_rate() -> float:
    source = torch.empty(1 << 29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / times({"copy": lambda: target.copy_(source)})["copy"] / 1e6


def bench(report: Report, regions: dict[str, tuple[Call, float]]) -> None:
    sets, short = [buffers(T) for _ in range(SETS)], [buffers(2048) for _ in range(SETS)]
    copy = copy_rate()
    report(what="copy", gb_per_s=round(copy))
    for name, (family, elements, region) in KERNELS.items():
        if not report.fits(name):
            continue
        default = ours(name, None)
        calls: dict[str, Call] = {str(tile): ours(name, tile) for tile in TILES[family]}
        calls |= {"default": default, "eager": region}
        compiled, seconds = regions.get(name, (None, None))
        if compiled:
            calls["torch.compile"] = compiled
        for tokens, group in ((T, sets), (2048, short)):
            chosen = calls if tokens == T else {"default": default}
            ms = times({kind: lambda call=call, group=group: [call(b) for b in group] for kind, call in chosen.items()})  # type: ignore[misc]
            for kind, value in ms.items():
                rate = 2 * elements * tokens * SETS / value / 1e6
                report(what=name, tokens=tokens, kind=kind, us=round(value / SETS * 1e3, 1), gb_per_s=round(rate),
                       of_copy=round(rate / copy, 3))  # fmt: skip
        # On the large shape, as another one would be compiled anew; the GPU lags behind, so it is the host that is timed.
        timed = {kind: calls[kind] for kind in ("default", "torch.compile", "eager") if kind in calls}
        us = {kind: round(host_us(lambda call=call: call(sets[0])), 1) for kind, call in timed.items()}  # type: ignore[misc]
        report(what="host", kernel=name, us=us, torch_compile_s=seconds)
    report(what="host", kernel="glu", us={"launched by hand": round(by_hand(sets[0]), 1)})


def by_hand(b: dict[str, Tensor]) -> float:
    """Host microseconds of the compiled GLU kernel without Triton's dispatcher: what is to be had if launches ever matter."""
    tile = fused_glu.tile_of(F)
    tiles = -(-F // tile[0])
    arguments = (
        b["gate"], b["up"], b["h"], b["gate"].stride(0), b["up"].stride(0), b["h"].stride(0),
        "silu", fused_glu.ROOT_2_OVER_PI, fused_glu.CUBIC, F, tiles, tile[0], False,
    )  # fmt: skip
    launch = fused_glu._glu[(T * tiles,)](*arguments, num_warps=tile[1])[(T * tiles, 1, 1)]
    return host_us(lambda: launch(*arguments))


def warm(part: int) -> None:
    """Compiles every `WARMERS`-th variant into Triton's cache on disk."""
    b = buffers(16)
    variants = [(name, tile) for name, (family, _, _) in KERNELS.items() for tile in (None, *TILES[family])]
    for name, tile in variants[part::WARMERS]:
        ours(name, tile)(b)
    torch.cuda.synchronize()


def start(logs: Path) -> list[subprocess.Popen[bytes]]:
    """Processes that prove, and that compile the variants; each writes to `logs`."""
    path = os.pathsep.join((str(ROOT / "src"), str(ROOT / "tests")))
    commands = [[sys.executable, "-m", "kernels.checks_elementwise", "cuda"]] * GATES
    commands += [[sys.executable, __file__, "--warm", str(i)] for i in range(WARMERS)]
    running = []
    for i, command in enumerate(commands):
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        if i < GATES:
            environment["HALFBYTE_CHECKS_PART"] = f"{i}/{GATES}"
        with (logs / f"{i}.out").open("wb") as out, (logs / f"{i}.err").open("wb") as err:
            running.append(subprocess.Popen(command, env=environment, stdout=out, stderr=err))
    return running


def gate(running: list[subprocess.Popen[bytes]], logs: Path, out: Path) -> bool:
    """True if all checks of all parts are green."""
    red: dict[str, str] = {}
    checks: set[str] = set()
    for i, process in enumerate(running):
        code = process.wait(timeout=240)
        text = (logs / f"{i}.out").read_text()
        found = json.loads(text) if i < GATES and text else {}
        checks |= set(found)
        red |= {f"{name}, part {i}": said for name, said in found.items() if said}
        if code and not any(found.values()):
            red[f"process {i}"] = (logs / f"{i}.err").read_text()[-2000:]
    return passed(dict.fromkeys(sorted(checks), "") | red, out / "gate.json")


def compiled_regions(b: dict[str, Tensor], limit: float) -> dict[str, tuple[Call, float]]:
    """Regions through torch.compile, the seconds of their first calls (other cores are busy); none begins after `limit`."""
    found: dict[str, tuple[Call, float]] = {}
    for name, (_, _, region) in KERNELS.items():
        if time.monotonic() - BEGUN > limit:
            print(f"not compiled by torch within {limit:g} s: {name}", flush=True)
            continue
        compiled = torch.compile(region, dynamic=False)
        begin = time.perf_counter()
        compiled(b)
        torch.cuda.synchronize()
        found[name] = compiled, round(time.perf_counter() - begin, 2)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path)
    what.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=50, help="seconds after which no further kernel is measured")
    options = parser.parse_args()
    if options.out is None:
        warm(options.warm)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        running = start(Path(folder))
        regions = compiled_regions(buffers(T), options.limit / 2)
        if not gate(running, Path(folder), options.out):
            return 1
    with (options.out / "elementwise_gpu.jsonl").open("w") as lines:
        report = Report(lines, options.limit)
        report.machine()
        bench(report, regions)
        report.done()
    return 0


if __name__ == "__main__":
    sys.exit(main())
