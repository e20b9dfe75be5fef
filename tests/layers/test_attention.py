"""The "halfbyte" attention against its definition, for every method that runs on this machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from halfbyte.errors import ModelError
from halfbyte.layers import attention

CAUSAL = nn.Module()


def _reference(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, lengths: tuple[int, ...]) -> Tensor:
    """softmax(s q kᵀ) v in float64, token by token."""
    query, key, value = (x[0].double() for x in (query, key, value))
    share = query.shape[0] // key.shape[0]
    out = torch.empty(query.shape[1], query.shape[0], query.shape[2], dtype=torch.float64)
    starts = [sum(lengths[:i]) for i, n in enumerate(lengths) for _ in range(n)]
    for t in range(query.shape[1]):
        first = starts[t] if window is None else max(starts[t], t - window + 1)
        for h in range(query.shape[0]):
            keys, values = key[h // share, first : t + 1], value[h // share, first : t + 1]
            out[t, h] = torch.softmax(scaling * keys @ query[h, t], 0) @ values
    return out[None]


def _inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, heads, tokens, 8, generator=generator) for heads in (4, 2, 2))  # type: ignore[return-value]


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("lengths", [(5, 9, 1), (6, 6, 6), (18,)])
def test_packed_rows(lengths: tuple[int, ...], window: int | None, host: bool) -> None:
    q, k, v = _inputs(sum(lengths))
    boundaries = (0, *torch.tensor(lengths).cumsum(0).tolist(), sum(lengths))
    out, weights = attention.attention(
        CAUSAL,
        q,
        k,
        v,
        None,
        scaling=0.3,
        sliding_window=window,
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
        boundaries=boundaries if host else None,
    )
    assert weights is None
    torch.testing.assert_close(out.double(), _reference(q, k, v, 0.3, window, lengths), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("queries", [1, 4, 10])
@pytest.mark.parametrize("window", [None, 3])
def test_the_last_queries_of_a_row_as_with_a_cache(queries: int, window: int | None) -> None:
    q, k, v = _inputs(10)
    out, _ = attention.attention(CAUSAL, q[:, :, -queries:], k, v, None, scaling=0.3, sliding_window=window)
    expected = _reference(q, k, v, 0.3, window, (10,))[:, -queries:]
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", attention.REFUSED)
def test_an_argument_that_is_not_built_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=name):
        attention.attention(CAUSAL, *_inputs(4), None, **{name: 30.0})  # type: ignore[arg-type]


def test_the_choice_and_its_reason() -> None:
    def choose(
        device: str, dtype: torch.dtype, lengths: tuple[int, ...] | None, dropout: float = 0.0, head: int = 64
    ) -> tuple[str, str]:
        choice = attention.choose(device, dtype, lengths, dropout, None, head)
        return choice.name, choice.reason

    half, full = torch.bfloat16, torch.float32
    assert choose("cpu", full, (5, 7)) == ("sdpa-loop", "documents of several lengths on cpu")
    assert choose("cpu", full, (7, 7)) == ("sdpa-batched", "all 2 documents have 7 tokens")
    assert choose("cuda", half, (5, 7))[0] == "varlen"
    assert choose("cuda", half, None)[0] == "varlen"
    assert choose("cuda", full, (5, 7)) == ("sdpa-loop", "no variable-length kernel: it needs 16 bits, not torch.float32")
    assert choose("cuda", half, (5, 7), dropout=0.1)[1].endswith("it has no dropout")
    assert choose("cuda", half, (5, 7), head=60)[1].endswith("head size 60")


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 30])
def test_variable_length_kernel(window: int | None) -> None:
    lengths = (50, 130, 1, 75)
    boundaries = (0, 50, 180, 181, 256, 256)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 256, 64, generator=generator).bfloat16() for heads in (4, 2, 2))
    arguments = {"scaling": 0.3, "sliding_window": window, "longest": 130}
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device="cuda")
    out, _ = attention.attention(CAUSAL, q.cuda(), k.cuda(), v.cuda(), None, cu_seqlens=cu_seqlens, **arguments)  # type: ignore[arg-type]
    truth = _reference(q, k, v, 0.3, window, lengths)
    honest, _ = attention.attention(CAUSAL, q, k, v, None, cu_seqlens=cu_seqlens.cpu(), boundaries=boundaries, **arguments)  # type: ignore[arg-type]
    assert (out.cpu().double() - truth).norm() <= 2 * (honest.double() - truth).norm() + 1e-3 * truth.norm()
