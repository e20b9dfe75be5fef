"""How many launches a token takes: recorded, none of them run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.test_tables import bench
from halfbyte.adapters import lora
from halfbyte.adapters.config import AdapterConfig
from halfbyte.generate.engine import Engine
from halfbyte.generate.reading import read
from halfbyte.layers import swap
from support import packed_base

LAYERS = 8
SIZES = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
         "num_key_value_heads": 1}  # fmt: skip


def launches(monkeypatch: pytest.MonkeyPatch, family: str, rows: int, rank: int) -> list[str]:
    """Kernels of ours and operations of torch in one token, in order."""
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    model = packed_base(family, **SIZES).model.to(torch.bfloat16)
    assert all(row.adopted for row in swap.adopt(model).layers)
    if rank:
        lora.attach(model, AdapterConfig(rank=rank), 0)
    read(model)
    found: list[str] = []

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not f.is_view:
                found.append(f.overloadpacket.__name__)
            return f(*args, **(kwargs or {}))

    monkeypatch.setenv("HALFBYTE_KERNELS", "fused")
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: found.append(self.fn.__name__))
    engine = Engine(model, rows, 64, 8)
    with torch.no_grad(), Operations():
        engine._step()
    return found


@pytest.mark.parametrize(("family", "rows", "rank"), [("llama", 1, 0), ("llama", 1, 4), ("qwen3", 2, 4)])
def test_a_layer_is_five_launches(monkeypatch: pytest.MonkeyPatch, family: str, rows: int, rank: int) -> None:
    found = launches(monkeypatch, family, rows, rank)
    first, count, layers = bench("profile_fold").period(found, LAYERS)
    assert (count, layers) == (5, LAYERS)
    # q/k/v with the norm, attention, output and residual, gate and up with norm and activation, down and residual.
    assert sorted(found[first : first + 5]) == ["_attend", "_gemv", "_gemv", "_gemv", "_gemv"]
    # Nobody stands in front of the first layer's q/k/v to norm them or to make A x. At the end: the head with the last norm.
    assert found[: -5 * LAYERS - 4] == ["index_select", *(["_normalise", "_low_rank"] if rank else [])]
    assert found[-4:] == ["_gemv", "_likeliest", "index_copy_", "add_"]


def test_more_rows_take_a_few_launches_more(monkeypatch: pytest.MonkeyPatch) -> None:
    found = launches(monkeypatch, "llama", 4, 4)
    assert bench("profile_fold").period(found, LAYERS)[1:] == (11, LAYERS)
