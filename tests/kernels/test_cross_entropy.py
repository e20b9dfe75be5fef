"""What `cross_entropy` promises besides its numbers (those are in checks.py): counts, memory, what is computed at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from halfbyte.formats.packed import Format
from halfbyte.formats.quantize import quantize
from halfbyte.kernels.cross_entropy import Head, chunked, cross_entropy, cross_entropy_op, expand_rows_op
from halfbyte.kernels.cross_entropy.parts import PLAIN, Task, Wants


def example(t: int = 40, v: int = 431) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, v, (t,))
    labels[::3] = -100
    return torch.randn(t, 60, requires_grad=True), torch.randn(v, 60), labels


def test_correct_counts_the_labelled_rows_that_are_predicted() -> None:
    hidden, weight, labels = example()
    best = (hidden @ weight.T).argmax(1)
    labels = torch.where(labels == -100, labels, best)
    labels[1] = (best[1] + 1) % 431
    assert int(cross_entropy(hidden, labels, Head(weight))[1]) == int((labels != -100).sum()) - 1


def test_no_label_at_all_is_a_loss_of_zero() -> None:
    hidden, weight, labels = example()
    loss, correct = cross_entropy(hidden, torch.full_like(labels, -100), Head(weight))
    loss.backward()
    assert float(loss.detach()) == 0 and int(correct) == 0 and hidden.grad is not None and not hidden.grad.any()


def test_the_chunk_size_does_not_change_the_result() -> None:
    hidden, weight, labels = example()
    found = []
    for rows in (1, 7, 1000):
        loss, _ = cross_entropy(hidden, labels, Head(weight, scale=0.5, cap=20.0), chunk_bytes=4 * 431 * rows)
        found.append((loss.detach(), *torch.autograd.grad(loss, hidden)))
    for loss, grad in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(grad, found[0][1], rtol=1e-5, atol=1e-6)


class Largest(TorchDispatchMode):
    """Records the most elements that any tensor made inside has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.numel())
        return out


class Fresh(Largest):
    """The same, views of `known` not counted."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.known = known.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() != self.known:
            self.elements = max(self.elements, out.numel())
        return out


def largest(rows: int, chunk_bytes: int) -> int:
    """Elements of the largest tensor that 400 positions of which `rows` are labelled make, on a head of 2000 x 2."""
    labels = torch.full((400,), -100)
    labels[:rows] = 5
    with Largest() as seen, torch.no_grad():  # below the operator, which a mode does not see into
        wants = Wants(True, False, False)
        chunked.cross_entropy(Task(torch.randn(400, 2), labels, Head(torch.randn(2000, 2)), PLAIN, wants, rows, chunk_bytes))
    return seen.elements


def test_logits_exist_in_chunks_only_and_unlabelled_rows_never() -> None:
    assert largest(rows=400, chunk_bytes=4 * 2000 * 50) == 50 * 2000
    assert largest(rows=3, chunk_bytes=1 << 30) == 3 * 2000


def test_the_weight_has_a_gradient_only_if_it_learns() -> None:
    hidden, weight, labels = example()
    loss, _ = cross_entropy(hidden, labels, Head(weight))
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(loss, weight)
    with torch.no_grad():
        assert not cross_entropy(hidden, labels, Head(weight.requires_grad_()))[0].requires_grad


def test_opcheck() -> None:
    hidden, weight, labels = example()
    bias = torch.randn(431, requires_grad=True)
    kept = int((labels != -100).sum())
    numbers = [0.5, 10.0, 0.1, 1e-3]
    dense = (hidden, weight.requires_grad_(), [], "", bias, labels, numbers, 1 << 16, kept, [True, True, True], "auto")
    torch.library.opcheck(cross_entropy_op, dense)
    packed = quantize(torch.randn(431, 64), Format("nf4", 64, nested=True), name="head")
    stored = (torch.randn(40, 64, requires_grad=True), None, list(packed.tensors()), packed.spec, None, labels, numbers)
    torch.library.opcheck(cross_entropy_op, (*stored, 1 << 16, kept, [True, False, False], "auto"))
    torch.library.opcheck(expand_rows_op, (torch.randn(kept, 60), labels, torch.tensor(0.5)))


def test_a_frozen_weight_costs_no_product_of_its_size() -> None:
    """A frozen head: nothing of its size is made."""
    hidden, weight, labels = torch.randn(8, 500), torch.randn(2000, 500), torch.arange(8)
    with Fresh(weight) as seen, torch.no_grad():
        chunked.cross_entropy(Task(hidden, labels, Head(weight), PLAIN, Wants(True, False, False), 8, 1 << 20))
    assert seen.elements < 2000 * 500
