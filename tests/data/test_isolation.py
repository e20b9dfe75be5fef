"""Logits of every example in a packed row equal those of the example alone, on the rows that the loader makes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte.data.batch import MicroBatch
from halfbyte.data.config import DataConfig
from halfbyte.data.loader import Loader
from halfbyte.data.prepare import prepare
from halfbyte.errors import RecipeError
from halfbyte.kernels.attention import choice
from halfbyte.kernels.attention.flex import Flex
from halfbyte.kernels.attention.sdpa import Sdpa
from halfbyte.layers import forward, swap
from halfbyte.layers.decoder import DecoderLayer
from support import chats, tiny_model, tiny_tokenizer, write_jsonl


@pytest.fixture
def part(tmp_path: Path) -> MicroBatch:
    """Two rows of several chats each, as one row."""
    config = DataConfig(train=[{"path": str(write_jsonl(tmp_path / "chats.jsonl", chats(12)))}], eval=0, tokens=160)
    data = prepare(config, tiny_tokenizer(), 0, tmp_path / "cache").train
    (found,) = Loader(data, 160, 2, seed=0).at(0).microbatches(2)
    assert len(set(found.cu_seqlens.tolist())) > 5, "several examples must share the row"
    return found


def packed(model: Any, part: MicroBatch, wanted: Any = "auto") -> Tensor:
    device = next(model.parameters()).device
    ids, positions = part.input_ids.to(device), part.position_ids.to(device)
    with torch.no_grad():
        hidden = forward.hidden_states(model, ids, positions, part.cu_seqlens, wanted)
        found: Tensor = model.get_output_embeddings()(hidden)[0]
    return found


def alone(model: Any, part: MicroBatch) -> Tensor:
    ids = part.input_ids.to(next(model.parameters()).device)
    bounds = sorted(set(part.cu_seqlens.tolist()))
    with torch.no_grad():
        return torch.cat([model(input_ids=ids[:, a:b], use_cache=False).logits[0] for a, b in pairwise(bounds)])


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's advice to compile flex_attention
@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llama", Sdpa()), ("gpt2", Sdpa()), ("falcon", Sdpa()), ("gptj", None),
        pytest.param("llama", Flex(compiled=False), marks=pytest.mark.cpu),
        pytest.param("gpt2", Flex(compiled=False), marks=pytest.mark.cpu),
    ],
    ids=lambda v: v if isinstance(v, str) else v.name if v else "dense mask",
)  # fmt: skip
def test_logits_of_a_packed_example_equal_those_of_the_example_alone(
    family: str, method: Any, part: MicroBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the three back ends of a CPU: by documents, flex_attention's block mask, and (where no layer is adopted) a dense mask."""
    ran: list[str] = []

    def method_of(*_: object) -> Any:
        ran.append(method.name)
        return choice.Choice(method, "")

    monkeypatch.setattr(choice, "_chosen", {})
    monkeypatch.setattr(choice, "choose", method_of)
    model, plain = tiny_model(family), tiny_model(family)
    swap.adopt(model)
    assert any(isinstance(m, DecoderLayer) for m in model.modules()) == (method is not None)
    torch.testing.assert_close(packed(model, part), alone(plain, part), atol=2e-5, rtol=1e-4)
    assert set(ran) == ({method.name} if method else set())


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", ["flash", "flex", "sdpa"])
def test_on_a_gpu(wanted: str, part: MicroBatch, tmp_path: Path) -> None:
    """In bf16 no further from the truth than the examples alone, and not a bit moved by what the neighbours say."""
    shape = {"hidden_size": 256, "intermediate_size": 512}
    truth = alone(tiny_model("llama", **shape).cuda(), part)
    model, plain = (tiny_model("llama", **shape).cuda().bfloat16() for _ in range(2))
    swap.adopt(model)
    found = packed(model, part, wanted)
    error: Callable[[Tensor], float] = lambda x: float((x.float() - truth).norm() / truth.norm())  # noqa: E731
    assert error(found) <= 2 * error(alone(plain, part)) + 2**-8
    first = int(part.cu_seqlens[1])
    part.input_ids[:, first:] = (part.input_ids[:, first:] + 7) % 256
    assert torch.equal(packed(model, part, wanted)[:first], found[:first])


@pytest.mark.gpu
def test_cudnn_is_refused_documents_of_several_lengths(part: MicroBatch) -> None:
    model = tiny_model("llama", hidden_size=256, intermediate_size=512).cuda().bfloat16()
    swap.adopt(model)
    with pytest.raises(RecipeError, match="documents of several lengths"):
        packed(model, part, "cudnn")
