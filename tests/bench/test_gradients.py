"""The gradient gate of the benchmark: green for what we say we compute, red for what only looks like it."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte.kernels import fp8

from .test_bench import _tokenizer
from .test_tables import ROOT, bench

pytestmark = pytest.mark.cpu
HONEST, DECODED = fp8.product, fp8.backward_weight


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Our engine with fp8 products on a tiny model, its gradients, and those of the peers."""
    pytest.importorskip("bitsandbytes")
    where = tmp_path_factory.mktemp("fp8")
    _tokenizer(where / "tokenizer")
    script = [sys.executable, str(ROOT / "bench" / "throughput.py"), "make", "--dir", str(where), "--size", "tiny"]
    subprocess.run([*script, "--tokenizer", str(where / "tokenizer")], check=True)
    gradients, engines = bench("gradients"), bench("engines")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers'
        return _loaded(gradients, engines, where)


def _loaded(gradients: Any, engines: Any, where: Path) -> SimpleNamespace:
    case = engines.Case("halfbyte", "tiny", 2, 2, 256, compute="fp8")
    folder = case.directory(str(where))
    batches = engines.feed(case, folder, None, "cpu")[:1]
    engine, watched = gradients.prepared(case, folder, batches, "cpu")
    start = {name: p.detach().clone() for name, p in gradients.learning(engine)}
    truth, honest = gradients.peers(case, folder, start, batches, "cpu")
    return SimpleNamespace(gradients=gradients, engine=engine, watched=watched, truth=truth, honest=honest)


def judged(step: SimpleNamespace) -> dict[str, Any]:
    step.watched.found.clear()
    return step.gradients.verdict(step.gradients.gradients(step.engine), step.truth, step.honest, step.watched.found)  # type: ignore[no-any-return]


def test_what_is_stated_is_green(step: SimpleNamespace) -> None:
    found = judged(step)
    assert found["gate"] == "green", found
    # Not by a bound that lets everything through: e4m3 costs a few percent here, and a product is far closer to the formula.
    assert max(found["honest"].values()) < 0.1 and found["shares"]["product"] < 0.5


def _scaled(rows: Any, weight: Any, bias: Any, columns: Any, out: Tensor, residual: Any = None) -> None:
    HONEST(rows, weight, bias, columns, out, residual)
    out.mul_(1.03)


def _other_scales(rows: Any, weight: Any, bias: Any, columns: Any, out: Tensor, residual: Any = None) -> None:
    HONEST(rows, SimpleNamespace(data=weight.data, scale=weight.scale.flip(1)), bias, columns, out, residual)


def _scales_of_neighbours(rows: Any, weight: Any, bias: Any, columns: Any, out: Tensor, residual: Any = None) -> None:
    HONEST(SimpleNamespace(data=rows.data, scale=rows.scale.roll(1, 0)), weight, bias, columns, out, residual)


def _no_adapter(rows: Any, weight: Any, bias: Any, columns: Any, out: Tensor, residual: Any = None) -> None:
    HONEST(rows, weight, bias, rows.main.shape[1], out, residual)


def _zeros(rows: Any, weight: Any, bias: Any, columns: Any, out: Tensor, residual: Any = None) -> None:
    out.zero_()


def _noise(rows: Any, weight: Any, bias: Any, columns: Any, out: Tensor, residual: Any = None) -> None:
    HONEST(rows, weight, bias, columns, out, residual)
    out.copy_(torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out) * out.float().std())


def _not_a_number(rows: Any, weight: Any, bias: Any, columns: Any, out: Tensor, residual: Any = None) -> None:
    HONEST(rows, weight, bias, columns, out, residual)
    out[0, 0] = float("nan")


@pytest.mark.parametrize("wrong", [_scaled, _other_scales, _scales_of_neighbours, _no_adapter, _zeros, _noise, _not_a_number])
def test_a_wrong_product_is_red(step: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., None]) -> None:
    monkeypatch.setattr("halfbyte.kernels.products.fp8.product", wrong)
    assert judged(step)["gate"] == "red"


def test_one_missing_term_of_the_gradient_is_red(step: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """dX without (s dY B) · A, and dA from s dY B that was never written."""

    def no_a(group: Any, dtype: torch.dtype) -> Any:
        weight, sb = DECODED(group, dtype)
        weight.data[:, group.rows :] = 0
        return weight, sb

    monkeypatch.setattr("halfbyte.kernels.products.fp8.backward_weight", no_a)
    found = judged(step)
    assert found["gate"] == "red" and found["shares"]["product"] > 1
    monkeypatch.setattr("halfbyte.kernels.products.fp8.backward_weight", lambda group, dtype: _without_b(*DECODED(group, dtype)))
    assert judged(step)["gate"] == "red"


def _without_b(weight: Any, sb: Tensor) -> tuple[Any, Tensor]:
    return weight, torch.zeros_like(sb)


def test_what_products_do_not_show_is_red_end_to_end(step: SimpleNamespace) -> None:
    """One matrix in the wrong place, transposed, scaled by 1.2, or missing, with all products as they should be."""
    good, loss = step.gradients.gradients(step.engine)
    name = next(n for n in good if n.endswith("1.mlp.up_proj.lora_a"))
    products = dict.fromkeys((f"{i}" for i in range(8)), 0.3)

    def gate(**other: Tensor) -> str:
        return str(step.gradients.verdict((good | other, loss), step.truth, step.honest, products)["gate"])

    assert gate() == "green"
    for wrong in (good[name].flip(0), good[name] * 1.2, good[name] * 0, -good[name], good[name.replace("up_", "gate_")]):
        assert gate(**{name: wrong}) == "red"
    products.popitem()
    assert gate() == "red"
