"""The "halfbyte" attention against its definition, for every method that runs on this machine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from halfbyte.errors import ModelError
from halfbyte.kernels.attention import Documents
from halfbyte.layers import attention

CAUSAL = nn.Module()


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int | None,
    lengths: tuple[int, ...],
    cap: float | None = None,
) -> Tensor:
    """softmax(cap(s q kᵀ)) v in float64, token by token."""
    query, key, value = (x[0].double() for x in (query, key, value))
    share = query.shape[0] // key.shape[0]
    out = torch.empty(query.shape[1], query.shape[0], query.shape[2], dtype=torch.float64)
    starts = [sum(lengths[:i]) for i, n in enumerate(lengths) for _ in range(n)]
    for t in range(query.shape[1]):
        first = starts[t] if window is None else max(starts[t], t - window + 1)
        for h in range(query.shape[0]):
            keys, values = key[h // share, first : t + 1], value[h // share, first : t + 1]
            scores = scaling * keys @ query[h, t]
            out[t, h] = torch.softmax(scores if cap is None else cap * torch.tanh(scores / cap), 0) @ values
    return out[None]


def _inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, heads, tokens, 8, generator=generator) for heads in (4, 2, 2))  # type: ignore[return-value]


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("lengths", [(5, 9, 1), (6, 6, 6), (18,)])
def test_packed_rows(lengths: tuple[int, ...], window: int | None, cap: float | None, host: bool) -> None:
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
        softcap=cap,
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
        boundaries=boundaries if host else None,
    )
    assert weights is None
    torch.testing.assert_close(out.double(), _reference(q, k, v, 0.3, window, lengths, cap), atol=1e-5, rtol=1e-5)


def test_dropout_runs_document_by_document() -> None:
    q, k, v = _inputs(15)
    documents = Documents.of(torch.tensor([0, 5, 14, 15], dtype=torch.int32), torch.device("cpu"), 15)
    torch.manual_seed(0)
    out, _ = attention.attention(CAUSAL, q, k, v, None, dropout=0.5, scaling=0.3, documents=documents)
    none, _ = attention.attention(CAUSAL, q, k, v, None, scaling=0.3, documents=documents)
    torch.testing.assert_close(none.double(), _reference(q, k, v, 0.3, None, (5, 9, 1)), atol=1e-5, rtol=1e-5)
    assert not torch.equal(out, none)
    changed = [torch.cat([x[:, :, :5] * 2, x[:, :, 5:]], 2) for x in (q, k, v)]
    torch.manual_seed(0)
    moved, _ = attention.attention(CAUSAL, *changed, None, dropout=0.5, scaling=0.3, documents=documents)
    assert torch.equal(moved[:, 5:], out[:, 5:]) and not torch.equal(moved[:, :5], out[:, :5])


@pytest.mark.parametrize("queries", [1, 4, 10])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_the_last_queries_of_a_row_as_with_a_cache(queries: int, window: int | None, cap: float | None) -> None:
    q, k, v = _inputs(10)
    out, _ = attention.attention(CAUSAL, q[:, :, -queries:], k, v, None, scaling=0.3, sliding_window=window, softcap=cap)
    expected = _reference(q, k, v, 0.3, window, (10,), cap)[:, -queries:]
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", attention.REFUSED)
def test_an_argument_that_is_not_built_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=name):
        attention.attention(CAUSAL, *_inputs(4), None, **{name: 30.0})  # type: ignore[arg-type]
