"""The correctness gate of `throughput.py`: our LoRA gradients against transformers + PEFT + bitsandbytes, on the same bytes.

Two layers of the shape that is measured, one checkpoint in bitsandbytes' format for both, the same A and B (B not zero), the same
rows: ours packed into one, theirs side by side. Truth is the peer in fp32, honest the peer as it trains, in bf16 autocast. Green:
for every kind of matrix our error is at most twice the honest one's and a bf16 step (2^-8), and the losses agree alike.

With fp8 compute honest is the peer with the stated arithmetic emulated under it (`emulation.py`): a product of e4m3 numbers is off
by about 4 %, and a gradient passes through more than a dozen. For every matrix of every layer our error is at most 1.25 times the
emulation's, the angle to truth as small alike, and the two are no further apart than paths are that share their weights' errors;
and every product of the step is the stated one on its own operands. What e4m3 would hide in the rest of the layers is what the
gate of the same layers in 16 bits is for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from emulation import Watched, emulate
from engines import STANDING, Case, Engine, Rows, feed, ours, peft, products_of

E4M3 = 1.25
"""How many times an emulation's error an fp8 path's may be."""
CLOSE = 0.9
"""How far from the emulation it may be, in units of the emulation's error. Paths that share only the weights' errors: 1."""
PRODUCTS = 8
"""Forward and back of four groups: what is watched in a step."""
NONE = 1e9
"""The share of a bound of what is no number, or is not there."""
Gradients = tuple[dict[str, Any], float]
"""Gradients by parameter in fp64 on the host, and the loss."""


def gate(case: Case, where: Path, device: str, rows: int = 2, tokens: int = 512) -> dict[str, Any]:
    """{"gate": "green" or "red", "ours": error by kind of matrix, "honest": ..., "of_bound": the worst share of a bound}."""
    case = replace(case, impl="halfbyte", rows=rows, tokens=tokens, optimizer="theirs", packed=False)
    batches = feed(case, where, None, device)[:1]
    engine, watched = prepared(case, where, batches, device)
    start = {name: p.detach().clone() for name, p in learning(engine)}
    got = gradients(engine, before=2 if case.graphs else 0)
    del engine
    STANDING.close()  # peers run as they come
    _free()
    truth, honest = peers(case, where, start, batches, device)
    return verdict(got, truth, honest, None if watched is None else watched.found)


def prepared(case: Case, where: Path, batches: list[Rows], device: str) -> tuple[Engine, Watched | None]:
    """Our engine with B that is not zero; for fp8 with every product watched."""
    import torch

    watched = Watched(products_of(case)) if case.compute == "fp8" else None
    engine = ours(case, where, batches, device, watched)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in learning(engine):
            if name.endswith("lora_b"):
                p.copy_(torch.randn(p.shape, generator=generator).to(p) * 0.02)
    if watched is not None:
        watched.found.clear()  # of the proof in `prepare`
    return engine, watched


def learning(engine: Engine) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in engine.model.named_parameters() if p.requires_grad]


def gradients(engine: Engine, before: int = 0) -> Gradients:
    """before: calls that go ahead, as those which record graphs."""
    for _ in range(before):
        engine.forward_backward(0)
    for _, p in learning(engine):
        p.grad.zero_()
    loss = engine.forward_backward(0)
    return {name: p.grad.detach().double().cpu() for name, p in learning(engine)}, float(loss)


def peers(case: Case, where: Path, start: dict[str, Any], batches: list[Rows], device: str) -> tuple[Gradients, Gradients]:
    """Truth and honest."""
    import torch

    peer, found = Case("peft-bnb", case.size, case.layers, case.rows, case.tokens), []
    for dtype in (torch.float32, torch.bfloat16):
        model = peft(peer, where, device, dtype)
        if case.compute == "fp8" and dtype == torch.bfloat16:
            emulate(model)
        found.append(_theirs(model, start, batches[0].ids.view(case.rows, case.tokens), device, dtype))
        del model
        _free()
    return found[0], found[1]


def verdict(got: Gradients, truth: Gradients, honest: Gradients, products: dict[str, float] | None) -> dict[str, Any]:
    """What `gate` returns. products: what the watched ones took of their bound, of an fp8 step."""
    kinds = _by_kind(truth[0])
    named = kinds if products is None else {name: [name] for name in truth[0]}
    mine, theirs = _errors(got[0], truth[0], named), _errors(honest[0], truth[0], named)
    shares = {"error": _worst(mine[n] / ((2 if products is None else E4M3) * theirs[n] + 2**-8) for n in named)}
    shares["loss"] = abs(got[1] - truth[1]) / (2 * abs(honest[1] - truth[1]) + 2**-8 * truth[1])
    if products is not None:
        angles, limits = _angles(got[0], truth[0]), _angles(honest[0], truth[0])
        apart = _errors(got[0], honest[0], named)
        shares["angle"] = _worst(angles[n] / (E4M3**2 * limits[n] + 2**-15) for n in named)
        shares["distance"] = _worst(apart[n] / (CLOSE * theirs[n] + 2**-8) for n in named)
        shares["product"] = _worst(products.values()) if len(products) == PRODUCTS else NONE
    of_bound = _worst(shares.values())
    errors = {"ours": _errors(got[0], truth[0], kinds), "honest": _errors(honest[0], truth[0], kinds)}
    return {
        "gate": "green" if of_bound <= 1 else "red",
        "of_bound": round(of_bound, 3),
        "shares": {k: float(f"{v:.3g}") for k, v in shares.items()},
        **{k: round(v[1], 5) for k, v in {"loss": got, "loss_truth": truth, "loss_honest": honest}.items()},
        **{name: {k: float(f"{v:.3g}") for k, v in by.items()} for name, by in errors.items()},
        **({} if products is None else {"products": {k: float(f"{v:.3g}") for k, v in products.items()}}),
    }


def _worst(shares: Iterable[float]) -> float:
    """The largest, where what is no number is larger than all."""
    return max(share if math.isfinite(share) else NONE for share in shares)


def _theirs(model: Any, start: dict[str, Any], ids: Any, device: str, dtype: Any) -> tuple[dict[str, Any], float]:
    """The peer's gradients under our names, from our A and B."""
    import torch

    names = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                ours_name = name.removeprefix("base_model.model.").replace("lora_A.default.weight", "lora_a")
                ours_name = ours_name.replace("lora_B.default.weight", "lora_b")
                p.copy_(start[ours_name])
                names[ours_name] = p
    assert names.keys() == start.keys(), sorted(names.keys() ^ start.keys())[:4]
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {name: p.grad.detach().double().cpu() for name, p in names.items()}, float(loss.detach())


def _by_kind(truth: dict[str, Any]) -> dict[str, list[str]]:
    """Names of the matrices of one kind ("q_proj.lora_a") in all layers."""
    kinds: dict[str, list[str]] = {}
    for name in truth:
        kinds.setdefault(".".join(name.split(".")[-2:]), []).append(name)
    return kinds


def _errors(got: dict[str, Any], truth: dict[str, Any], named: dict[str, list[str]]) -> dict[str, float]:
    """Relative Frobenius error of the matrices of each name together."""
    sums = {
        kind: [sum(float(t.square().sum()) for t in of) for of in ([got[n] - truth[n] for n in names], [truth[n] for n in names])]
        for kind, names in named.items()
    }
    return {kind: (wrong / size) ** 0.5 for kind, (wrong, size) in sums.items()}


def _angles(got: dict[str, Any], truth: dict[str, Any]) -> dict[str, float]:
    """1 - cosine of every matrix."""
    return {n: 1 - float((got[n] * t).sum() / (got[n].norm() * t.norm())) for n, t in truth.items()}


def _free() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
