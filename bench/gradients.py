"""The correctness gate of `throughput.py`: our LoRA gradients against transformers + PEFT + bitsandbytes, on the same bytes.

Two layers of the shape that is measured, one checkpoint in bitsandbytes' format for both, the same A and B (B not zero), the same
rows: ours packed into one, theirs side by side. Truth is the peer in fp32, honest the peer as it trains, in bf16 autocast. Green:
for every kind of matrix our error is at most twice the honest one's and a bf16 step (2^-8), and the losses agree alike. fp8 compute
has a bound of its own: a product of e4m3 numbers is off by about 4 %, and a gradient passes through more than a dozen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines import Case, feed, ours, peft

FP8_BOUND = 0.2


def gate(case: Case, where: Path, device: str, rows: int = 2, tokens: int = 512) -> dict[str, Any]:
    """{"gate": "green" or "red", "ours": error by kind of matrix, "honest": ..., "bound": ...}."""
    import torch

    case = Case("halfbyte", case.size, case.layers, rows, tokens, case.recompute, case.offload, case.compute)
    batches = feed(case, where, None, device)[:1]
    engine = ours(case, where, batches, device)
    matrices = {name: p for name, p in engine.model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in matrices.items():
            if name.endswith("lora_b"):
                p.copy_(torch.randn(p.shape, generator=generator).to(p) * 0.02)
    start = {name: p.detach().clone() for name, p in matrices.items()}
    got, loss = _ours(engine)
    del engine, matrices
    _free()
    peer = Case("peft-bnb", case.size, case.layers, rows, tokens)
    found = {}
    for kind, dtype in (("truth", torch.float32), ("honest", torch.bfloat16)):
        found[kind] = _theirs(peft(peer, where, device, dtype), start, batches[0].ids.view(rows, tokens), device, dtype)
        _free()
    (truth, exact), (honest, near) = found["truth"], found["honest"]
    errors = {"ours": _errors(got, truth), "honest": _errors(honest, truth)}
    bounds = {kind: FP8_BOUND if case.compute == "fp8" else 2 * error + 2**-8 for kind, error in errors["honest"].items()}
    losses = {"loss": loss, "loss_truth": exact, "loss_honest": near}
    green = all(errors["ours"][kind] <= bound for kind, bound in bounds.items())
    green = green and abs(loss - exact) <= 2 * abs(near - exact) + 2**-8 * exact * (8 if case.compute == "fp8" else 1)
    rounded = {name: {k: float(f"{v:.3g}") for k, v in by.items()} for name, by in (errors | {"bound": bounds}).items()}
    worst = max(errors["ours"][kind] / bound for kind, bound in bounds.items())
    return {
        "gate": "green" if green else "red",
        "of_bound": round(worst, 3),
        **{k: round(v, 5) for k, v in losses.items()},
        **rounded,
    }


def _ours(engine: Any) -> tuple[dict[str, Any], float]:
    """Our gradients by parameter, and the loss."""
    loss = engine.forward_backward(0)
    return {n: p.grad.detach().double().cpu() for n, p in engine.model.named_parameters() if p.requires_grad}, float(loss)


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


def _errors(got: dict[str, Any], truth: dict[str, Any]) -> dict[str, float]:
    """Relative Frobenius error by kind of matrix ("q_proj.lora_a"), over all layers."""
    sums: dict[str, list[float]] = {}
    for name, exact in truth.items():
        total = sums.setdefault(".".join(name.split(".")[-2:]), [0.0, 0.0])
        total[0] += float((got[name] - exact).square().sum())
        total[1] += float(exact.square().sum())
    return {kind: (wrong / size) ** 0.5 for kind, (wrong, size) in sums.items()}


def _free() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
