"""What `throughput.py` measures, by name: ours, the peers, ours again; and which checkpoint and which proof every run needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engines import Case


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
    "graphs": [Case("halfbyte", size, rows=1, recompute="full", graphs=on) for size in ("8b", "1b") for on in (False, True)],
    "deterministic": [
        Case("halfbyte", rows=m, tokens=n, deterministic=on) for m, n in ((4, 2048), (1, 8192)) for on in (False, True)
    ],
    "fp8": [Case("halfbyte", compute="fp8"), Case("unsloth"), Case("halfbyte", compute="fp8")],
    "fp8-held": [Case("halfbyte", compute="fp8", held=True)],
    "held": [Case("halfbyte", held=True)],
    "16bit": _turns("halfbyte-bf16"),
    "16bit-short": _turns("halfbyte-bf16", rows=1),
    "long": _turns("unsloth", rows=1, tokens=32768, recompute="full", offload=True)[:2],
    "1b": _turns("unsloth", "peft-bnb-liger", size="1b"),
    "70b": [Case(impl, size="70b", layers=layers) for impl in ("halfbyte", "unsloth") for layers in (4, 2)],
    "launches": [Case(impl, recompute=r) for impl in ("halfbyte", "unsloth") for r in ("none", "full")],
    "cold": [Case("halfbyte"), Case("unsloth")],
    "smoke": [Case("halfbyte", size="tiny", rows=1, tokens=64)],
}
"""`launches` counts kernels on two and four layers; `cold` runs the first step with an empty and with a filled kernel cache;
`smoke` shows on any machine that the command works, and is no part of "all"."""

PROOF_LAYERS = 2


def select(cases: list[Case], impls: list[str] | None, once: bool) -> list[Case]:
    """Those of a group that are asked for: of some implementations only, no case twice."""
    some = [case for case in cases if impls is None or case.impl in impls]
    return list(dict.fromkeys(some)) if once else some


def proof(case: Case) -> Case:
    """The two-layer case whose gradients stand for those of `case`."""
    size = "tiny" if case.size == "tiny" else "8b"
    plain = Case("halfbyte")
    usual = {"rows": plain.rows, "tokens": plain.tokens, "optimizer": plain.optimizer, "packed": plain.packed}
    return replace(case, impl=plain.impl, size=size, layers=PROOF_LAYERS, **usual)


def checkpoints(name: str, case: Case) -> list[Case]:
    """A case for every checkpoint that a run of `case` in the group `name` reads."""
    layers = (2, 4) if name == "launches" else (case.layers,)
    return [Case("halfbyte-bf16" if case.dense else "halfbyte", case.size, n) for n in layers]
