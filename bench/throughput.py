"""Training speed and memory on one GPU, ours and the peers in turn: real shapes, random weights, the correctness gate first.

    python bench/throughput.py make --dir M --tokenizer DIR [--size 8b,1b,70b]        random checkpoints, in 4 bits (and 8b in 16)
    python bench/throughput.py all  --dir M --out bench/results/NAME.jsonl [--only nocheckpoint,full] [--data alpaca.json]
    python bench/throughput.py run  --dir M --impl halfbyte --rows 4 --tokens 2048 --recompute full        one case, one JSON line
    python bench/throughput.py gate | launches | table

A step is forward, backward, clipping (ours) and AdamW on rows of 2,048 tokens: random ones, one document a row, or with `--packed`
the examples of `--data`, packed. Every case runs in a process of its own, in the order ours, peer, ours. `share` is what the
arithmetic of a step (`shapes.py`) would take at the rate of its own GEMM shapes, measured right after the steps, over what the step
takes. Peers need bitsandbytes, PEFT, Liger and Unsloth installed. Correctness gate: LoRA gradients against the peer's
(`gradients.py`) before anything is timed, and in every run a loss near ln(vocabulary).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from engines import Case
from shapes import SIZES

SMALL_VOCABULARY = 49_152
"""Of the two- and four-layer models that prove gradients and count launches."""


def _turns(*peers: str, **settings: Any) -> list[Case]:
    """Ours, the peers, ours again."""
    return [Case(impl, **settings) for impl in ("halfbyte", *peers, "halfbyte")]


CASES: dict[str, list[Case]] = {
    "nocheckpoint": _turns("unsloth", "peft-bnb-liger"),
    "row8192": _turns("unsloth", rows=1, tokens=8192),
    "optimizer": [Case("unsloth", optimizer="ours-fused")],
    "packed": _turns("unsloth", packed=True),
    "full": _turns("unsloth", "peft-bnb-liger", recompute="full", offload=True),
    "full-on-gpu": [Case("halfbyte", recompute="full")],
    "short": _turns("unsloth", "peft-bnb-liger", rows=1, recompute="full"),
    "fp8": [Case("halfbyte", compute="fp8"), Case("unsloth"), Case("halfbyte", compute="fp8")],
    "16bit": _turns("halfbyte-bf16"),
    "16bit-short": _turns("halfbyte-bf16", rows=1),
    "long": _turns("unsloth", rows=1, tokens=32768, recompute="full", offload=True)[:2],
    "1b": _turns("unsloth", "peft-bnb-liger", size="1b"),
    "70b": [Case(impl, size="70b", layers=layers) for impl in ("halfbyte", "unsloth") for layers in (4, 2)],
}
LAUNCHES = [Case(impl, recompute=r) for impl in ("halfbyte", "unsloth") for r in ("none", "full")]
COLD = [Case("halfbyte"), Case("unsloth")]
SPECIAL = ("launches", "cold")


def make(args: argparse.Namespace) -> None:
    """Write Llama checkpoints with random weights: DIR/SIZE-LAYERS in bitsandbytes' nf4, DIR/SIZE-LAYERS-dense in bf16."""
    for size in args.size.split(","):
        whole = SIZES[size].layers
        _make(args, size, whole, SIZES[size].vocabulary, dense=size in ("8b", "tiny") and not args.no_dense)
        if size == "70b":
            _make(args, size, 2, SIZES[size].vocabulary)
        elif size in ("8b", "tiny"):
            for layers in sorted({2, 4} - {whole}):
                _make(args, size, layers, SMALL_VOCABULARY)


def _make(args: argparse.Namespace, size: str, layers: int, vocabulary: int, dense: bool = False) -> None:
    import torch
    from gputime import DEVICE
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from halfbyte.checkpoints.base import Base
    from halfbyte.export import quantize as export
    from halfbyte.formats.config import FormatConfig
    from halfbyte.formats.packed import Format
    from halfbyte.layers import swap

    shape, start = SIZES[size], time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    tokenizer.pad_token = tokenizer.unk_token  # not the end of an answer: that one is learned
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    out = Case("halfbyte", size, layers).directory(args.dir)
    if dense:
        folder = Case("halfbyte-bf16", size, layers).directory(args.dir)
        model.save_pretrained(folder, max_shard_size="4GB")
        tokenizer.save_pretrained(folder)
    report = swap.pack(model, None, Format("nf4", 64, nested=True))
    export.save(Base(model, tokenizer, size, None, FormatConfig(), torch.bfloat16, "", report, out), out)
    print(json.dumps({"made": str(out), "dense": dense, "seconds": round(time.perf_counter() - start, 1)}), flush=True)


def _case(args: argparse.Namespace) -> Case:
    return Case(**{field.name: getattr(args, field.name) for field in fields(Case)})


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
    from dataclasses import replace

    from gputime import DEVICE
    from gradients import gate as prove

    case = replace(_case(args), layers=2)
    found = prove(case, case.directory(args.dir), DEVICE)
    print(json.dumps({"what": "gradients", "compute": case.compute, "recompute": case.recompute, "offload": case.offload} | found))
    sys.exit(0 if found["gate"] == "green" else 1)


def everything(args: argparse.Namespace) -> None:
    """The gate, then the chosen cases, each in a fresh process; lines to --out and, in short, to the terminal."""
    chosen = list(CASES) + list(SPECIAL) if args.only == "all" else args.only.split(",")
    unknown = set(chosen) - set(CASES) - set(SPECIAL)
    assert not unknown, f"no such cases: {', '.join(sorted(unknown))}; there are {', '.join([*CASES, *SPECIAL])}"
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with out.open("a") as file:

        def one(command: str, words: list[str], group: str, more: dict[str, str] | None = None, **note: Any) -> dict[str, Any]:
            left = args.budget - (time.monotonic() - begun)
            words = [*words, "--dir", args.dir, *(["--data", args.data] if args.data else [])]
            found = {"failed": "no time left", "case": words} if left < 15 else _spawn(command, words, more or {}, left)
            line = {"group": group, **found, **note}
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(*(f"{k}={str(line[k])[-400:]}" for k in SHOWN if line.get(k) not in (None, False, "")), flush=True)
            return line

        proven = set()
        for kind in sorted({_kind(case) for name in chosen for case in _cases(name) if case.impl == "halfbyte"}):
            compute, recompute, offload = kind
            proof = Case("halfbyte", args.proof_size, 2, recompute=recompute, offload=offload, compute=compute)
            if one("gate", proof.arguments(), "gate").get("gate") == "green":
                proven.add(kind)
        for name in chosen:
            for case in _cases(name):
                if case.impl == "halfbyte" and _kind(case) not in proven:
                    print(f"group={name}: no figures for {_kind(case)}, its gradients are not proven", flush=True)
                elif name == "cold":
                    with tempfile.TemporaryDirectory() as folder:
                        caches = {f"{n}_CACHE_DIR": f"{folder}/{n}" for n in ("TRITON", "TORCHINDUCTOR")}
                        for cache in ("empty", "warm"):
                            one("run", [*case.arguments(), "--first"], name, caches, cache=cache)
                else:
                    one("launches" if name == "launches" else "run", case.arguments(), name)


def _cases(name: str) -> list[Case]:
    return {"launches": LAUNCHES, "cold": COLD}.get(name) or CASES[name]


def _kind(case: Case) -> tuple[str, str, bool]:
    """What a proof of gradients is valid for."""
    return case.compute, case.recompute, case.offload


SHOWN = (
    *("group", "impl", "size", "layers", "rows", "tokens", "recompute", "offload", "compute", "optimizer", "cache", "gate"),
    *("tokens_per_s", "trained_tokens_per_s", "step_s", "host_s", "peak_GiB", "reserved_GiB", "driver_GiB", "share", "hot_tflops"),
    *("sm_mhz", "launches", "kernels_a_layer", "first_step_s", "load_s", "of_bound", "failed"),
)


def _spawn(command: str, words: list[str], more: dict[str, str], limit: float) -> dict[str, Any]:
    """The JSON line of one process, or why there is none."""
    call = [sys.executable, __file__, command, *words]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=min(limit, 180), env=os.environ | more)
    except subprocess.TimeoutExpired:
        return {"failed": "took too long", "case": words}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return {"failed": done.stderr[-1500:], "case": words}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["make", "run", "gate", "launches", "all", "table"])
    parser.add_argument("--dir", default="model", help="where the checkpoints are")
    parser.add_argument("--tokenizer", help="a tokenizer's folder, for make")
    parser.add_argument("--no-dense", action="store_true", help="make no 16-bit checkpoint")
    parser.add_argument("--data", help="examples for packed rows")
    parser.add_argument("--out", default="bench/results/throughput.jsonl")
    parser.add_argument("--only", default="all", help="comma-separated: " + ", ".join([*CASES, *SPECIAL]))
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which `all` starts no further run")
    parser.add_argument("--proof-size", default="8b", choices=SIZES, help="shape of the gradient gate in `all`")
    parser.add_argument("--first", action="store_true", help="only the first step")
    for field in fields(Case):
        if field.name in ("offload", "packed"):
            parser.add_argument(f"--{field.name}", action="store_true")
        else:
            default = "halfbyte" if field.name == "impl" else field.default
            parser.add_argument(f"--{field.name}", type=type(default), default=default)
    args = parser.parse_args()
    if args.command == "table":
        from tables import throughput

        print(throughput(Path(args.out)))
        return
    {"make": make, "run": run, "gate": gate, "launches": launches, "all": everything}[args.command](args)


if __name__ == "__main__":
    main()
