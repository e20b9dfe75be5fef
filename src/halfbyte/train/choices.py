"""What `auto` becomes on this machine, with the reason: compute dtype and number of CPU threads, by a short measurement.

Why measured: whether bf16 is faster than fp32 on a CPU depends on the instructions it has (8 times faster, or 20 times
slower), and two logical cores can be slower than one. Why kept: a resumed run is exact only with the same arithmetic, so the
choices travel with the checkpoint and are not made again. Cost: about a second, at the start of the first run only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from halfbyte.config import Compute
from halfbyte.errors import RecipeError
from halfbyte.kernels import fp8

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.bfloat16}
"""What is stored and kept; with fp8 only the large products are made in e4m3."""
PROBE = (512, 576, 1536)
ROUNDS = 3
KEPT = "; kept from the checkpoint"
UNTIMED = "auto: a deterministic run chooses nothing by the clock"
ROOM = 4
"""Decoded weights are held on a CPU when the plan leaves this many times their size: other programs want memory too."""


@dataclass(frozen=True)
class Choice:
    """value: what it became; reason: `asked for`, or why `auto` became this."""

    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.value} ({self.reason})"


def require(asked: Compute, device: torch.device) -> None:
    """Raises RecipeError (recipe.compute) where `compute: fp8` is asked for and the device has no such products."""
    reason = fp8.can_compute(device) if asked == "fp8" else None
    if reason:
        raise RecipeError(f"compute: fp8 cannot be had here: {reason}", hint="set `compute: bf16` or `auto`", code="recipe.compute")


def compute(asked: Compute, device: torch.device) -> Choice:
    """The compute dtype by name: bf16, fp16, fp32, or fp8 if that was asked for."""
    if asked != "auto":
        return Choice(asked, "asked for")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Choice("bf16", "auto: the GPU computes in bf16")
        return Choice("fp16", "auto: the GPU has no bf16; fp16 with loss scaling")
    if torch.are_deterministic_algorithms_enabled():
        return Choice("fp32", UNTIMED)
    seconds = {name: _gemm_seconds(DTYPES[name]) for name in ("fp32", "bf16")}
    name = min(seconds, key=lambda key: seconds[key])
    measured = ", ".join(f"{key} {1e3 * value:.1f} ms" for key, value in seconds.items())
    return Choice(name, f"auto: measured on this CPU, {measured} a product of {PROBE[0]}x{PROBE[1]}x{PROBE[2]}")


def threads(device: torch.device) -> Choice:
    """CPU threads for torch: OMP_NUM_THREADS if it is set, else the faster of torch's own number (the cores) and half of it."""
    if device.type != "cpu":
        return Choice(torch.get_num_threads(), "torch's own: the work is on the GPU")
    if "OMP_NUM_THREADS" in os.environ:
        return Choice(torch.get_num_threads(), "OMP_NUM_THREADS")
    cores = torch.get_num_threads()
    if torch.are_deterministic_algorithms_enabled():
        return Choice(cores, UNTIMED)
    candidates = sorted({cores, max(1, cores // 2)}, reverse=True)
    if len(candidates) == 1:
        return Choice(cores, "auto: one core")
    before, seconds = torch.get_num_threads(), {}
    for count in candidates:
        torch.set_num_threads(count)
        seconds[count] = _gemm_seconds(torch.float32)
    torch.set_num_threads(before)
    best = min(candidates, key=lambda count: seconds[count])
    return Choice(best, "auto: measured, " + ", ".join(f"{count} threads {1e3 * seconds[count]:.1f} ms" for count in candidates))


def decoded(wanted: int, spare: int) -> Choice:
    """Whether modules on a CPU hold decoded weights during the run, `on` or `off`; the same bits, so it is never kept.

    wanted: bytes that they take. spare: bytes that the plan leaves free. On a GPU the plan decides (`Rung.decoded`).
    """
    if not wanted:
        return Choice("off", "auto: there is nothing to decode")
    gain = "decoding would cost as much as some tens of tokens a product"
    told = f"they take {wanted / 2**20:,.0f} MiB, the plan leaves {max(spare, 0) / 2**20:,.0f} MiB"
    if spare < ROOM * wanted:
        return Choice("off", f"auto: {told}, less than {ROOM} times as much; each product decodes its weight afresh")
    return Choice("on", f"auto: {told}; {gain}")


def _gemm_seconds(dtype: torch.dtype) -> float:
    """The best of a few products, after one that warms up."""
    rows, inner, columns = PROBE
    a, b = torch.ones(rows, inner, dtype=dtype), torch.ones(columns, inner, dtype=dtype)
    best = float("inf")
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        torch.nn.functional.linear(a, b)
        best = min(best, time.perf_counter() - started)
    return best


def document(choices: Mapping[str, Choice]) -> dict[str, Any]:
    """For `choices.json`."""
    return {name: asdict(choice) for name, choice in choices.items()}


def from_document(stored: Mapping[str, Any]) -> dict[str, Choice]:
    """The mirror of `document`."""
    return {name: Choice(entry["value"], entry["reason"]) for name, entry in stored.items()}


def device(tell: Callable[[str], None]) -> torch.device:
    """The device of a run: the first GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if torch.cuda.device_count() > 1:
        tell(f"device: cuda:0; {torch.cuda.device_count()} GPUs are here and this version uses one")
    return torch.device("cuda", 0)


def settle(name: str, asked: Any, kept: Mapping[str, Choice], decide: Callable[[], Choice]) -> Choice:
    """What was asked for; else what the checkpoint holds; else what `decide` finds."""
    if asked != "auto":
        return Choice(asked, "asked for")
    if name in kept:
        return Choice(kept[name].value, kept[name].reason.removesuffix(KEPT) + KEPT)
    return decide()
