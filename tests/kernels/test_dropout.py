"""The mask: known answers, independence of the microbatch, statistics, and the same mask in backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbyte.kernels.dropout import Dropout, dropout, dropout_op
from halfbyte.kernels.dropout.reference import keep, philox

ONES = 0xFFFFFFFF
KNOWN = [
    # counter, key, result: the known-answer vectors that Random123 (Salmon et al., SC 2011) publishes for philox4x32-10
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


def state(seed: int = 1, step: int = 2, row: int = 3) -> Tensor:
    return torch.tensor([seed, step, row])


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], result: tuple[int, ...]) -> None:
    words = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))  # type: ignore[arg-type]
    assert tuple(int(w) for w in words) == result


def test_the_mask_does_not_depend_on_the_microbatch() -> None:
    """Six rows at once, or two by two, or one by one."""
    tokens, width = 7, 63
    whole = keep((6 * tokens, width), state(row=10), 0.4, tokens, 5)
    for m in (1, 2, 3):
        parts = [keep((m * tokens, width), state(row=10 + first), 0.4, tokens, 5) for first in range(0, 6, m)]
        assert torch.equal(torch.cat(parts), whole)


def test_every_key_changes_the_mask() -> None:
    base = keep((40, 64), state(), 0.5, 10, 0)
    others = [keep((40, 64), s, 0.5, 10, 0) for s in (state(seed=2), state(seed=1 + 2**32), state(step=3), state(row=4))]
    others += [keep((40, 64), state(), 0.5, 10, 1)]
    for other in others:
        assert 0.45 < float((other == base).double().mean()) < 0.55


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_statistics(p: float) -> None:
    """The share of zeros, that neighbours are independent, and that the mean is kept; five standard errors."""
    mask = keep((512, 256), state(), p, 128, 0)
    n, dropped = mask.numel(), (~mask).double()
    error = (p * (1 - p) / n) ** 0.5
    assert abs(float(dropped.mean()) - p) < 5 * error
    flat = dropped.flatten() - p
    for lag in (1, 2, 3, 4, 256):
        assert abs(float((flat[lag:] * flat[:-lag]).mean())) < 5 * p * (1 - p) / n**0.5
    y = dropout(torch.ones(512, 256), Dropout(p, state(), 128), 0)
    assert abs(float(y.double().mean()) - 1) < 5 * error / (1 - p)


def test_backward_makes_the_same_mask_again() -> None:
    x = torch.randn(3, 20, 63, requires_grad=True)
    mask = Dropout(0.3, state(), 20)
    y = dropout(x, mask, 4)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(grad != 0, y != 0)
    assert torch.equal(grad, dropout(torch.ones_like(x), mask, 4))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropout(x, mask, 4)
    assert [t.shape for t in saved] == [(3,)], "only the state is kept"


def test_a_state_that_moved_on_before_backward_is_an_error() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    mask = Dropout(0.5, state(), 4)
    y = dropout(x, mask, 0)
    mask.state[1] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_opcheck() -> None:
    torch.library.opcheck(dropout_op, (torch.randn(2, 6, 63, requires_grad=True), state(), 0.3, 6, 1))
