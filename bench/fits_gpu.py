"""What the plan chooses on cards of many sizes, and how far it carries, on one GPU.

    python bench/fits_gpu.py --out DIR [--only leanest,bound,caps,all,70b,longest] [--cards 8,16]      # adds to DIR/fits_gpu.jsonl
    python bench/fits_gpu.py --table DIR          # with what bench/peer_fits.py has written there: ours beside Unsloth's, by card
    python bench/fits_gpu.py --cpu --out DIR      # the script itself, on tiny models

Models have random packed weights (`planned.py`). A card is a cap on the allocator, 0.75 GiB below its size; the plan has what
`--gpu` leaves it of the size, CUDA's context included. Every line has the peak as allocated, reserved and taken of the device,
beside the predicted one.

- leanest: 8B, rows of 2,048, the last rung of the plan, with a 16-bit and with a packed head.
- bound: 8B, 4 x 2,048, the fastest plan whose peak is no more than 7.9 GiB.
- caps: 8B, the plan for cards of 8 to 80 GiB, 1 x 8,192 and 4 x 2,048.
- all: 8 layers of an 8B under two caps: the chosen plan, the best of every other kind, and others of all sorts that fit; the
  fastest few once more in turn with the chosen one.
- 70b: all 80 layers, one row of 4,096, the last rung.
- longest: 8B, rank 32, one step of the longest row that the plan promises for 8, 16, 24 and 80 GiB, most of them on fewer layers:
  `whole` is the measured peak and what the plan counts for the layers that are missing.

A line whose loss is not finite has no figures.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import fits_plans
import planned
import torch
from planned import GIB, SIZES, Case
from reporting import read

from halfbyte.layers.fused import host
from halfbyte.memory import calibrate, speed
from halfbyte.memory.budget import budget
from halfbyte.memory.choose import Chooser
from halfbyte.memory.parts import CONTEXT
from halfbyte.memory.rungs import Rung

Line = dict[str, Any]
CARDS = (8, 12, 16, 24, 48, 80)
BOUND = 7.9
"""GiB: the peak of Unsloth's full recompute, 4 x 2,048."""
PROMISED = 1.01
"""The truth is no more than so many times the prediction."""
LONGEST = ((8, "nf4", 32), (16, "16bit", 16), (24, "16bit", 6), (80, "16bit", 8))
"""Card in GiB, `format.head`, layers that are run."""
CAPS_OF_ALL = (5.5, 7.0)
"""GiB, for 8 of 32 layers: they leave the layers a quarter of what cards of about 11 and 17 GiB leave 32."""
OTHERS = 14
HOT, BRIEF, ONCE = (0.7, 1.0), (0.3, 0.4), (0.0, 0.0)
"""Seconds of steps before those that are timed, and of those."""
SHOWN = ("what", "card", "rows", "tokens", "head", "layers", "failed", "rung", "tokens_per_s", "predicted_tokens_per_s", "peak_GiB")
SHOWN += ("predicted_GiB", "reserved_GiB", "driver_GiB", "host_GiB", "whole_GiB", "ratio", "seconds", "gate")


def usable(card: float) -> float:
    """GiB that a plan may use of a card."""
    return budget(f"{card}GiB").bytes / GIB


@dataclass
class Bench:
    """Models are kept while cases share them. tiny: on a CPU."""

    device: str
    rates: speed.Rates
    cards: tuple[int, ...] = CARDS
    it: planned.Ready | None = None
    made_of: object = None
    begun: float = field(default_factory=time.monotonic)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def case(self, size: str, rank: int, rows: int, tokens: int, **more: Any) -> Case:
        """As asked for; on a CPU a tiny one in its place."""
        found = Case(size, rank, rows, tokens, "plan", **more)
        return found if self.device == "cuda" else replace(found, size="tiny4", tokens=min(tokens, 64), layers=0, cap=0)

    def chooser(self, case: Case, room: float = 1 << 20) -> Chooser:
        """room: GiB that the plan may use, context included."""
        return planned.chooser_of(case, self.rates, self.dtype, self.device, int(room * GIB))

    def model(self, case: Case) -> planned.Ready:
        if self.made_of != case.made_of or self.it is None:
            self.it = None
            host.forget()
            gc.collect()
            planned.cap(0, self.device)
            self.it, self.made_of = planned.ready(case, self.dtype, self.device), case.made_of
        return self.it

    def line(
        self,
        what: str,
        case: Case,
        chooser: Chooser,
        rung: Rung,
        card: float = 0,
        *,
        times: tuple[float, float] | None = HOT,
        **more: Any,
    ) -> Line:
        """Runs it. card: GiB; the case's cap is what is enforced. times: see HOT; None: one step, whose seconds are also those of
        what a first step compiles and measures."""
        found: Line = {"what": what, "card": card, **asdict(case), "rung": rung.words(), "microbatch": rung.microbatch, **more}
        found["layers"] = chooser.s.layers
        tokens, rounds = case.rows * case.tokens, case.rows // rung.microbatch
        parts = chooser.parts(rung)
        found |= {
            "predicted_GiB": round(sum(planned.allocated(chooser, rung).values()) / GIB, 3),
            "predicted_tokens_per_s": round(tokens / chooser.seconds(rung)),
            "host_GiB": round(sum(p.host for p in parts) / GIB, 3),
        }
        try:
            step = planned.use(case, self.model(case), rung, self.device)
            loss = math.nan

            def once() -> None:
                nonlocal loss
                loss = step(rounds)

            seconds, steps = planned.first(once, self.device) if times is None else planned.timed(once, self.device, *times)
        except (torch.OutOfMemoryError, MemoryError) as error:
            return found | {"failed": str(error)}
        finally:
            host.forget()
        if not math.isfinite(float(loss)):
            return found | {"gate": "red", "loss": float(loss)}
        found |= {"gate": "green", "seconds": round(seconds, 4), "steps": steps, "tokens_per_s": round(tokens / seconds)}
        return found | planned.peaks()


def leanest(bench: Bench) -> Iterator[Line]:
    for head in ("16bit", "nf4"):
        case = bench.case("8b", 16, 1, 2048, head=head)
        chooser = bench.chooser(case, 0)
        yield bench.line("leanest", case, chooser, chooser.rungs()[-1])


def bound(bench: Bench) -> Iterator[Line]:
    case = bench.case("8b", 16, 4, 2048)
    chooser = bench.chooser(case, BOUND / PROMISED + CONTEXT["cuda"] / GIB)
    yield bench.line("bound", case, chooser, planned.chosen(chooser), most_GiB=BOUND)


def caps(bench: Bench) -> Iterator[Line]:
    for tokens, rows in ((8192, 1), (2048, 4)):
        before: Line = {}
        for card in bench.cards:
            case = bench.case("8b", 16, rows, tokens, cap=card)
            chooser = bench.chooser(case, usable(card))
            rung = planned.chosen(chooser)
            if before.get("rung") == rung.words() and "failed" not in before:
                yield before | {"card": card, "cap": card, "as": "on the card before"}
                continue
            before = bench.line("caps", case, chooser, rung, card)
            yield before


def every_plan(bench: Bench) -> Iterator[Line]:
    """`ratio`: the chosen plan's seconds over the least of all."""
    for cap in CAPS_OF_ALL:
        case = bench.case("8b", 16, 4, 2048, cap=cap, layers=8)
        chooser = bench.chooser(case, usable(cap))
        best = planned.chosen(chooser)
        others = fits_plans.others(chooser, best, OTHERS if bench.device == "cuda" else 3)
        lines: list[Line] = []
        for rung in (best, *others):
            lines.append(bench.line("all", case, chooser, rung, cap, times=BRIEF, chosen=rung is best))
            yield lines[-1]
        ran = [(line, rung) for line, rung in zip(lines, (best, *others), strict=True) if "seconds" in line]
        few = sorted(ran, key=lambda pair: pair[0]["seconds"])[:4]
        again: dict[str, list[float]] = {}
        for _ in range(2):
            for _, rung in [(lines[0], best), *few]:
                found = bench.line("all", case, chooser, rung, cap, times=BRIEF)
                again.setdefault(rung.words(), []).append(found.get("seconds", math.inf))
        least = {words: min(times) for words, times in again.items()}
        fastest = min(least, key=lambda words: least[words])
        ratio = round(least[best.words()] / least[fastest], 4)
        yield {"what": "verdict", "card": cap, "tried": len(lines), "ratio": ratio, "chosen": best.words(), "fastest": fastest}


def seventy(bench: Bench) -> Iterator[Line]:
    case = bench.case("70b", 16, 1, 4096, layers=SIZES["70b"][3])
    chooser = bench.chooser(case, 0)
    yield bench.line("70b", case, chooser, chooser.rungs()[-1], times=ONCE)


def longest(bench: Bench) -> Iterator[Line]:
    """Under the card's cap, less what the missing layers would hold."""
    for card, head, layers in (one for one in LONGEST if one[0] in bench.cards):
        of_all = bench.chooser(bench.case("8b", 32, 1, 2048, bits=8, layers=32, head=head), usable(card))
        tokens = of_all.longest() or 0
        case = bench.case("8b", 32, 1, tokens, bits=8, layers=32, head=head)
        of_all = bench.chooser(case, usable(card))
        rung = planned.chosen(of_all)
        part = replace(case, layers=layers if bench.device == "cuda" else 2, size="8b" if bench.device == "cuda" else "tiny4")
        chooser = bench.chooser(part)
        fewer = replace(rung, lean_layers=round(rung.lean_layers * chooser.s.layers / of_all.s.layers))
        missing = sum(planned.allocated(of_all, rung).values()) - sum(planned.allocated(chooser, fewer).values())
        away = sum(p.host for p in of_all.parts(rung))
        part = replace(part, cap=card - missing / GIB)
        whole = {"of": of_all.s.layers, "whole_host_GiB": round(away / GIB, 1)}
        found = bench.line("longest", part, chooser, fewer, card, times=None, **whole)
        if "peak" in found:
            found["whole_GiB"] = round((found["peak"] + missing) / GIB, 3)
        yield found


GROUPS: dict[str, Callable[[Bench], Iterator[Line]]] = {
    "leanest": leanest,
    "bound": bound,
    "caps": caps,
    "all": every_plan,
    "70b": seventy,
    "longest": longest,
}


def table(folder: Path) -> str:
    """Ours beside Unsloth's best setting that fits, as Markdown."""
    ours = read(folder / "fits_gpu.jsonl")
    file = folder / "peer_fits.jsonl"
    theirs = read(file) if file.exists() else []
    return fits_plans.table(ours, theirs, planned.BESIDE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("--only", default=",".join(GROUPS), help="comma-separated, in this order")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds after which no further line is begun")
    parser.add_argument("--cards", default=",".join(map(str, CARDS)), help="GiB, comma-separated: of the groups caps and longest")
    parser.add_argument("--cpu", action="store_true", help="tiny models, no figures of memory")
    parser.add_argument("--table", type=Path, help="only print the table of this folder")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return
    unknown = set(names := args.only.split(",")) - set(GROUPS)
    if unknown:
        sys.exit(f"no such groups: {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    where, device = Path(args.out), "cpu" if args.cpu else "cuda"
    where.mkdir(parents=True, exist_ok=True)
    dtype = torch.float32 if args.cpu else torch.bfloat16
    rates = (None if args.cpu else calibrate.rates(dtype)) or speed.tabulated("h200")
    bench = Bench(device, rates, tuple(map(int, args.cards.split(","))))
    with (where / "fits_gpu.jsonl").open("a") as file:

        def tell(line: Line) -> None:
            line["at_s"] = round(time.monotonic() - bench.begun, 1)
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(*([f"{k}={line[k]}" for k in SHOWN if line.get(k) not in (None, 0)] or [json.dumps(line)]), flush=True)

        tell({"what": "rates", **asdict(rates)})
        for name in names:
            for line in GROUPS[name](bench):
                tell(line)
                if time.monotonic() - bench.begun > args.budget:
                    tell({"what": "left out", "failed": f"no time left in {name}"})
                    return


if __name__ == "__main__":
    main()
