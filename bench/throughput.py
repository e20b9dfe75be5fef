"""Training speed and memory on one GPU, ours and the peers in turn: real shapes, random weights, the correctness gate first.

    python bench/throughput.py all --dir M --tokenizer DIR --out bench/results/NAME.jsonl [--cases nocheckpoint,full] [--limit 500]
                                   [--data alpaca.json]                      makes the checkpoints it needs; `packed` needs --data
    python bench/throughput.py run --dir M --impl halfbyte --rows 4 --tokens 2048 --recompute full        one case, one JSON line
    python bench/throughput.py make | gate | launches --dir M [the same]            its checkpoint, its proof, its kernels
    python bench/throughput.py table --out NAME.jsonl

A step is forward, backward, clipping (ours) and AdamW on rows of 2,048 tokens: random ones, one document a row, or with `--packed`
the examples of `--data`, packed. Every case (`cases.py`) runs in a process of its own, in the order ours, peer, ours
(`in_turn.py`). `share` is what the arithmetic of a step (`shapes.py`) would take at the rate of its own GEMM shapes, measured right
after the steps, over what the step takes. Peers need bitsandbytes, PEFT, Liger and Unsloth installed. Correctness gate: LoRA
gradients against the peer's (`gradients.py`) before anything is timed, and in every run a loss near ln(vocabulary).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import fields, replace
from pathlib import Path

from cases import CASES, PROOF_LAYERS, select
from engines import Case


def _case(args: argparse.Namespace) -> Case:
    return Case(**{field.name: getattr(args, field.name) for field in fields(Case)})


def make(args: argparse.Namespace) -> None:
    """The random checkpoint of a case; one JSON line."""
    from random_model import make as write

    print(json.dumps(write(_case(args), args.dir, args.tokenizer)), flush=True)


def run(args: argparse.Namespace) -> None:
    """One case in this process; one JSON line."""
    from measured import measure

    print(json.dumps(measure(_case(args), args.dir, args.data, args.first)), flush=True)


def launches(args: argparse.Namespace) -> None:
    """The kernels of one layer in this process; one JSON line."""
    from measured import launches as count

    print(json.dumps(count(_case(args), args.dir, args.data)), flush=True)


def gate(args: argparse.Namespace) -> None:
    """The proof of gradients, on two layers; one JSON line, exit code 1 when it is red."""
    from gputime import DEVICE
    from gradients import gate as prove

    case = replace(_case(args), layers=PROOF_LAYERS)
    found = prove(case, case.directory(args.dir), DEVICE)
    print(
        json.dumps(
            {
                "what": "gradients",
                "compute": case.compute,
                "recompute": case.recompute,
                "offload": case.offload,
                "held": case.held,
                "graphs": case.graphs,
                "deterministic": case.deterministic,
            }
            | found
        )
    )
    sys.exit(0 if found["gate"] == "green" else 1)


def everything(args: argparse.Namespace) -> None:
    """The proofs, then the chosen cases."""
    from in_turn import Turns

    names = [name for name in CASES if name != "smoke"] if args.cases == "all" else args.cases.split(",")
    unknown = set(names) - set(CASES)
    assert not unknown, f"no such cases: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}"
    assert args.data or not any(case.packed for name in names for case in CASES[name]), "packed rows need --data"
    chosen = {name: select(CASES[name], args.impls.split(",") if args.impls else None, args.once) for name in names}
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        Turns(args.dir, args.tokenizer, args.data, args.limit, file).everything(chosen)


def table(args: argparse.Namespace) -> None:
    """The lines of --out as Markdown."""
    from tables import throughput

    print(throughput(Path(args.out)))


COMMANDS = {"make": make, "run": run, "gate": gate, "launches": launches, "all": everything, "table": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--dir", default="model", help="where the checkpoints are, or are made")
    parser.add_argument("--tokenizer", help="a tokenizer's folder, for the checkpoints that are made")
    parser.add_argument("--data", help="examples for packed rows")
    parser.add_argument("--out", default="bench/results/throughput.jsonl", help="lines are added")
    parser.add_argument("--cases", default="all", help="comma-separated: " + ", ".join(CASES))
    parser.add_argument("--impls", help="comma-separated: only these; a group without one of ours is compared with nothing")
    parser.add_argument("--once", action="store_true", help="every case of a group once, not ours before and after the peers")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which `all` starts no further case")
    parser.add_argument("--first", action="store_true", help="only the first step")
    for field in fields(Case):
        if field.type == "bool":
            parser.add_argument(f"--{field.name}", action="store_true")
        else:
            default = "halfbyte" if field.name == "impl" else field.default
            parser.add_argument(f"--{field.name}", type=type(default), default=default)
    args = parser.parse_args()
    COMMANDS[args.command](args)


if __name__ == "__main__":
    main()
