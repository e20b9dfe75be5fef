"""Kernels on this CPU: decoding by twin, the GEMM by dtype, one group forward and backward, dropout.

    python bench/kernels_cpu.py [--threads 2]        # a minute; JSON lines

Weights are the three shapes of SmolLM2-135M's layers. Correctness gate: `tests/kernels/checks.py`. Every pair is measured in turn.
Besides the lower quartile of the wall time stands that of the process's CPU time, which a busy machine distorts less.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402

from halfbyte.formats.packed import Format  # noqa: E402
from halfbyte.formats.quantize import quantize  # noqa: E402
from halfbyte.kernels.dequantize import cpu, reference  # noqa: E402
from halfbyte.kernels.dropout import Dropout, dropout  # noqa: E402
from halfbyte.kernels.lora_linear import LowRank, lora_linear  # noqa: E402
from kernels import checks  # noqa: E402
from kernels.runner import outcomes  # noqa: E402

FORMATS = (Format("nf4", 64, nested=True), Format("fp4", 64), Format("int4", 64), Format("int4", 64, zero="float"), Format("int8"))
TOKENS, WIDTH, OUTPUTS = 1024, 576, 1536


def times(functions: dict[str, Callable[[], Any]], repeats: int = 25) -> dict[str, float]:
    """Lower quartile of milliseconds, wall and CPU, measured in turn."""
    wall: dict[str, list[float]] = {name: [] for name in functions}
    busy: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 2):
        for name, f in functions.items():
            at, used = time.perf_counter(), time.process_time()
            f()
            wall[name].append(time.perf_counter() - at)
            busy[name].append(time.process_time() - used)
    found = {}
    for name in functions:
        found[f"{name}_ms"] = round(sorted(wall[name][2:])[repeats // 4] * 1e3, 3)
        found[f"{name}_cpu_ms"] = round(sorted(busy[name][2:])[repeats // 4] * 1e3, 3)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    red = {name: text for name, text in outcomes(checks.CHECKS, "cpu").items() if text}
    if red:
        print(f"no figures, these checks are red: {red}", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__}))

    for fmt in FORMATS:
        packed = quantize(torch.randn(OUTPUTS, WIDTH), fmt, name="bench")
        out = torch.empty(OUTPUTS, WIDTH, dtype=torch.bfloat16)
        found = times(
            {"cpu": lambda p=packed, o=out: cpu.decode(p, o), "reference": lambda p=packed, o=out: reference.decode(p, o)}
        )
        print(json.dumps({"what": "dequantize", "format": f"{fmt.kind} {fmt.zero} nested={fmt.nested}"} | found))

    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.randn(TOKENS, WIDTH).to(dtype), torch.randn(OUTPUTS, WIDTH).to(dtype)
        found = times({"gemm": lambda x=x, w=w: x @ w.T})
        print(
            json.dumps(
                {"what": "gemm", "dtype": str(dtype), "gflops": round(2 * TOKENS * WIDTH * OUTPUTS / found["gemm_ms"] / 1e6)}
                | found
            )
        )

    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_()
        weights = [quantize(torch.randn(OUTPUTS, WIDTH), FORMATS[0], name="bench") for _ in range(2)]
        loras = [
            LowRank(torch.randn(16, WIDTH, requires_grad=True), torch.randn(OUTPUTS, 16, requires_grad=True), 2.0) for _ in weights
        ]
        leaves = [x, *(t for lora in loras for t in (lora.a, lora.b))]
        grads = [torch.randn(TOKENS, OUTPUTS).to(dtype) for _ in weights]

        def forward(x: Any = x, weights: Any = weights, loras: Any = loras) -> Any:
            return lora_linear(x, weights, [None, None], loras)

        def both(forward: Any = forward, leaves: Any = leaves, grads: Any = grads) -> Any:
            return torch.autograd.grad(forward(), leaves, grads)

        print(json.dumps({"what": "lora_linear gate+up", "dtype": str(dtype)} | times({"forward": forward, "both": both})))

    x = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16)
    mask = Dropout(0.05, torch.tensor([1, 2, 3]), 256)
    print(json.dumps({"what": "dropout", "shape": [TOKENS, WIDTH]} | times({"dropout": lambda: dropout(x, mask, 0)})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
