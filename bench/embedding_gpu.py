"""Rows of an embedding that is in host memory, read by a CUDA GPU in place, beside a table on the GPU.

    python bench/embedding_gpu.py --out DIR       # about 20 s; writes DIR/embedding_gpu.jsonl

Gate: the table of 128,256 x 4,096 numbers is the same bits from both sides, whole and row by row, and the allocator has its bytes
back. Reported: ms of a lookup of so many tokens (all different; and as text has them, the frequent ones often), bytes a second, and
that over a large copy's on the bus (`memory.speed.GATHER` is what the plan counts with); the same lookup on the GPU.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]

import torch  # noqa: E402
from reporting import Report  # noqa: E402
from torch import Tensor  # noqa: E402

from halfbyte.layers import embedding  # noqa: E402
from halfbyte.memory import calibrate, speed  # noqa: E402
from halfbyte.memory.shapes import skeleton  # noqa: E402

VOCABULARY, HIDDEN = 128_256, 4096
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}


def milliseconds(ids: Tensor, table: Tensor) -> float:
    """Of a lookup: the median of 20, each waited for."""
    times = []
    for _ in range(23):
        torch.cuda.synchronize()
        began = time.perf_counter()
        torch.nn.functional.embedding(ids, table)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return sorted(times[3:])[10]


def lookups(report: Report, table: Tensor, here: Tensor, bus: float) -> None:
    """Tokens by tokens."""
    generator = torch.Generator("cuda").manual_seed(0)
    for tokens in (128, 512, 2048, 8192, 32768):
        even = torch.randint(0, VOCABULARY, (tokens,), generator=generator, device="cuda")
        rank = torch.rand(tokens, generator=generator, device="cuda").mul_(torch.tensor(float(VOCABULARY)).log()).exp_()
        for kind, ids in (("even", even), ("as text", rank.long().clamp_(max=VOCABULARY - 1))):
            there, on_gpu = milliseconds(ids, table), milliseconds(ids, here)
            rate = tokens * HIDDEN * 2 / (there / 1e3)
            report(
                what="lookup",
                tokens=tokens,
                kind=kind,
                ms=round(there, 4),
                on_gpu_ms=round(on_gpu, 4),
                gb_per_s=round(rate / 1e9, 2),
                of_bus=round(rate / bus, 3),
            )


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.INFO)
    device = torch.device("cuda", 0)
    with (args.out / "embedding_gpu.jsonl").open("w") as file:
        report = Report(file)
        report(what="machine", gpu=torch.cuda.get_device_name(), torch=torch.__version__)
        model = skeleton(CONFIG, torch.bfloat16)
        module = model.get_input_embeddings()
        values = torch.randn(VOCABULARY, HIDDEN, device=device, dtype=torch.bfloat16)
        module.weight = torch.nn.Parameter(values.clone(), requires_grad=False)
        before = torch.cuda.memory_allocated()
        began = time.monotonic()
        why = embedding.send(model, device)
        seconds, freed = time.monotonic() - began, before - torch.cuda.memory_allocated()
        table = embedding.away(model)
        if why or table is None:
            report(what="gate", ok=False, reason=why)
            return 1
        ids = torch.randperm(VOCABULARY, device=device)[:20_000]
        same = (
            torch.equal(table, values)
            and torch.equal(module(ids), values[ids])
            and torch.equal(table[:64].cpu(), values[:64].cpu())
        )
        ok = same and freed == values.nbytes
        report(what="gate", ok=ok, same=same, freed_mib=freed >> 20, seconds_to_send=round(seconds, 2), device=str(table.device))
        if not ok:
            return 1
        rates = calibrate.rates() or speed.TYPICAL
        report(what="rates", bus_gb_per_s=round(rates.bus / 1e9, 1), counted_with=speed.GATHER)
        lookups(report, table, values, rates.bus)
    return 0


if __name__ == "__main__":
    sys.exit(main())
