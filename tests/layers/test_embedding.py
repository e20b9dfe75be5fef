"""The input embedding in host memory: the same numbers under the same names, and who must keep it on the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from halfbyte.adapters import lora
from halfbyte.adapters.config import AdapterConfig
from halfbyte.checkpoints import huggingface
from halfbyte.formats.config import FormatConfig
from halfbyte.generate import chat
from halfbyte.layers import embedding
from halfbyte.layers.fused.prepare import prepare
from layers.families import gradients_of, learned
from support import save_tiny, tiny_model


@pytest.mark.parametrize("family", ["llama", "gemma3", "granite"])
def test_the_same_bits_from_host_memory(family: str) -> None:
    """Gemma 3 and Granite multiply what they look up."""
    model, adapter = learned(AdapterConfig(rank=4), family)
    if embedding.stays(model):
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
        model.all_tied_weights_keys = {}
    prepare(model)
    hidden, expected = gradients_of(model, adapter)
    table = model.get_input_embeddings().weight
    before, place = table.detach().clone(), table.data_ptr()
    names = list(model.state_dict())
    assert embedding.away(model) is None and embedding.send(model, torch.device("cpu")) == ""
    assert model.get_input_embeddings().weight is table and table.data_ptr() != place and table.data_ptr() % 4096 == 0
    assert torch.equal(table, before) and list(model.state_dict()) == names
    found = embedding.away(model)
    assert found is table and embedding.send(model, torch.device("cpu")) == ""
    got_hidden, got = gradients_of(model, adapter)
    assert torch.equal(got_hidden, hidden) and all(torch.equal(got[name], grad) for name, grad in expected.items())
    place = table.data_ptr()
    embedding.bring_back(model, torch.device("cpu"))
    assert embedding.away(model) is None and table.data_ptr() != place and torch.equal(table, before)


def test_who_keeps_it_on_the_device() -> None:
    tied = tiny_model("llama", tie_word_embeddings=True).requires_grad_(False)
    assert "output head too" in embedding.stays(tied) and "output head too" in embedding.send(tied, torch.device("cpu"))
    assert embedding.away(tied) is None
    learning = tiny_model("llama").requires_grad_(False)
    lora.attach(learning, AdapterConfig(rank=4, modules_to_save=["embed_tokens"]), 0)
    assert embedding.stays(learning)


@pytest.mark.parametrize("kind", ["nf4", "none"])
def test_a_base_is_loaded_with_its_embedding_there(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both times, also from the cache; the digest of the base is the same."""
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    save_tiny(tmp_path / "model")
    fmt = FormatConfig(kind=kind)  # type: ignore[arg-type]
    here = huggingface.load(str(tmp_path / "model"), fmt, torch.float32)
    for _ in range(2):
        base = huggingface.load(str(tmp_path / "model"), fmt, torch.float32, embedding_away=True)
        assert embedding.away(base.model) is not None and embedding.away(here.model) is None
        assert base.digest == here.digest
        theirs = here.model.state_dict()
        assert all(torch.equal(t, theirs[name]) for name, t in base.model.state_dict().items())
        prompt = [{"role": "user", "content": "hello"}]
        assert chat.generate(base, prompt, 4).text == chat.generate(here, prompt, 4).text


@pytest.mark.gpu
def test_a_gpu_reads_it_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is a tensor of the device that its allocator knows nothing of; training and the token engine read the same bits."""
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    cuda = torch.device("cuda", 0)
    save_tiny(tmp_path / "model")
    here, there = (
        huggingface.load(str(tmp_path / "model"), FormatConfig(), torch.bfloat16, cuda, embedding_away=away)
        for away in (False, True)
    )
    table, expected = embedding.away(there.model), here.model.get_input_embeddings().weight
    assert table is not None and table.is_cuda and torch.equal(table, expected)
    ids = torch.randint(0, len(table), (5000,), device=cuda)
    assert torch.equal(torch.nn.functional.embedding(ids, table), torch.nn.functional.embedding(ids, expected))
    before = torch.cuda.memory_allocated()
    assert embedding.send(here.model, cuda) == ""
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before - table.nbytes
    prompt = [{"role": "user", "content": "hello"}]
    assert chat.generate(here, prompt, 8).text == chat.generate(there, prompt, 8).text
    assert next(there.model.parameters()).device == cuda
