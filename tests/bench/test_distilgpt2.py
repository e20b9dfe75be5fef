"""The numbers of the DistilGPT-2 walk-through (docs/concepts/layers.md), computed anew."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "bench" / "distilgpt2.py"
DOCS = Path(__file__).parents[2] / "docs" / "concepts" / "layers.md"


@pytest.mark.cpu
def test_the_walk_through() -> None:
    spec = importlib.util.spec_from_file_location("distilgpt2_bench", SCRIPT)
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    numbers = bench.walk_through(torch.float16)

    assert numbers["base_parameters"] == 81_912_576
    assert numbers["weights_in_4_bits"] == 42_467_328
    assert numbers["c_attn_code_bytes"] == 884_736 == 768 * 3 * 768 // 2
    assert numbers["trainable_parameters"] == 589_824
    assert numbers["trainable_percent"] == 0.7149  # of base and adapter together
    assert numbers["layers_adopted"] == 6

    kept = 81_912_576 - 42_467_328
    blocks = {name: n * k // 64 for name, n, k in (("attn", 2304, 768), ("proj", 768, 768), ("fc", 3072, 768), ("out", 768, 3072))}
    scales = 6 * sum(b + 4 * -(-b // 256) + 4 for b in blocks.values())
    assert numbers["bytes_before"] == 2 * 81_912_576 == 163_825_152
    assert numbers["packed_bytes_after"] == 42_467_328 // 2 + scales
    assert numbers["bytes_after"] == 2 * kept + 42_467_328 // 2 + scales

    text = DOCS.read_text()
    for name in (
        "base_parameters",
        "weights_in_4_bits",
        "c_attn_code_bytes",
        "trainable_parameters",
        "bytes_before",
        "bytes_after",
    ):
        assert f"{numbers[name]:,}" in text, name
