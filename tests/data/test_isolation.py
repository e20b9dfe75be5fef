"""Logits of every example in a packed row equal those of the example alone, on the rows that the loader makes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from halfbyte.data.config import DataConfig
from halfbyte.data.loader import Loader
from halfbyte.data.prepare import prepare
from halfbyte.layers import forward, swap
from halfbyte.layers.decoder import DecoderLayer
from support import chats, tiny_model, tiny_tokenizer, write_jsonl


@pytest.mark.parametrize(("family", "adopted"), [("llama", True), ("gpt2", True), ("falcon", True), ("gptj", False)])
def test_logits_of_a_packed_example_equal_those_of_the_example_alone(family: str, adopted: bool, tmp_path: Path) -> None:
    config = DataConfig(train=[{"path": str(write_jsonl(tmp_path / "chats.jsonl", chats(12)))}], eval=0, tokens=160)
    data = prepare(config, tiny_tokenizer(), 0, tmp_path / "cache").train
    model, plain = tiny_model(family), tiny_model(family)
    swap.adopt(model)
    assert any(isinstance(m, DecoderLayer) for m in model.modules()) == adopted
    (part,) = Loader(data, 160, 2, seed=0).at(0).microbatches(2)
    with torch.no_grad():
        hidden = forward.hidden_states(model, part.input_ids, part.position_ids, part.cu_seqlens)
        logits = model.get_output_embeddings()(hidden)[0]
        bounds = sorted(set(part.cu_seqlens.tolist()))
        assert len(bounds) > 5, "several examples must share the row"
        for start, stop in pairwise(bounds):
            alone = plain(input_ids=part.input_ids[:, start:stop], use_cache=False).logits[0]
            torch.testing.assert_close(logits[start:stop], alone, atol=2e-5, rtol=1e-4)
