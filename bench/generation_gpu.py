"""Generation on a CUDA GPU: the proof, then tokens a second of an 8B model. The products alone: `gemv_gpu.py`.

    python bench/generation_gpu.py --out DIR [--limit 80]      # gate, then the engine: `generation_engine.py`
    python bench/generation_gpu.py --out DIR --only gate|engine

The gate: every kernel against float64 (`tests/kernels/checks_generation.py`), its checks side by side. If it is red nothing is
reported and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "bench")]

import generation_engine  # noqa: E402
import torch  # noqa: E402
from reporting import passed  # noqa: E402
from side_by_side import Job, together  # noqa: E402


def proofs() -> dict[str, Job]:
    """The kernels' checks by name."""
    from kernels import checks_generation as checks

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    found: dict[str, Job] = {f"decode_step {dtype}": (checks.check_decode_step, ("cuda", (dtype,))) for dtype in (bf16, fp32)}
    found["likeliest"] = (checks.check_likeliest, ("cuda",))
    found |= {f"fed products {dtype}": (checks.check_fed_products, ("cuda", (dtype,))) for dtype in (bf16, fp16)}
    for number in range(len(checks.CASES)):
        found[f"packed_gemv {number}"] = (checks.check_packed_gemv, ("cuda", (bf16,), None, (number,)))
    found["packed_gemv fp16"] = (checks.check_packed_gemv, ("cuda", (fp16,), None, (1, 2)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=("gate", "engine"))
    parser.add_argument("--limit", type=float, default=80, help="seconds after which no further setup is measured")
    options = parser.parse_args()
    if options.only == "gate":
        options.out.mkdir(parents=True, exist_ok=True)
        return 0 if passed(together(proofs(), options.limit), options.out / "generation_gate.json") else 1
    return generation_engine.measure(options.out, options.limit, False, {} if options.only == "engine" else proofs())


if __name__ == "__main__":
    sys.exit(main())
