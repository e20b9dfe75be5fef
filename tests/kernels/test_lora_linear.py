"""What `lora_linear` promises besides its numbers (those are in checks.py): what it keeps, what it refuses, how it composes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from halfbyte.formats.packed import Format, Packed
from halfbyte.kernels.lora_linear import Dropout, LowRank, fused, lora_linear, lora_linear_backward_op, lora_linear_op
from halfbyte.kernels.lora_linear.members import Member, deal, describe
from kernels.checks import random_packed

NESTED = Format("nf4", 64, nested=True)


class Group:
    """Two packed weights and a dense one on an input of 60 features; adapters on the first two, a bias on the second."""

    def __init__(self, *, learns: bool = True, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(2, 21, 60, dtype=dtype).requires_grad_()
        self.packed = [random_packed((n, 60), NESTED, "cpu", seed=n) for n in (63, 8)]
        self.dense = torch.randn(5, 60, requires_grad=learns)
        self.bias = torch.randn(8, requires_grad=learns)
        self.loras = [
            LowRank(torch.randn(4, 60, requires_grad=learns), torch.randn(n, 4, requires_grad=learns), 0.5, i)
            for i, n in enumerate((63, 8))
        ]

    def __call__(self, x: Tensor | None = None, mask: Dropout | None = None) -> list[Tensor]:
        weights: list[Packed | Tensor] = [*self.packed, self.dense]
        return lora_linear(self.x if x is None else x, weights, [None, self.bias, None], [*self.loras, None], mask)

    def learned(self) -> list[Tensor]:
        return [self.dense, self.bias, *(t for lora in self.loras for t in (lora.a, lora.b))]

    def arguments(self, mask: Dropout | None = None) -> tuple[object, ...]:
        """What the operator receives."""
        members = [*map(Member, self.packed, [None, self.bias], self.loras), Member(self.dense, None, None)]
        tensors = [t for p in self.packed for t in p.tensors()]
        a, b = [m.a for m in self.loras], [m.b for m in self.loras]
        rest = (None, describe(members), 0.0, 0) if mask is None else (mask.state, describe(members), mask.p, mask.tokens)
        return self.x, tensors, [self.dense], [self.bias], a, b, *rest


def total(ys: list[Tensor]) -> Tensor:
    return torch.stack([(y * y).sum() for y in ys]).sum()


MASK = Dropout(0.25, torch.tensor([1, 2, 3]), 21)


@pytest.mark.cpu
@pytest.mark.parametrize("mask", [None, MASK])
def test_opcheck(mask: Dropout | None) -> None:
    group = Group()
    torch.library.opcheck(lora_linear_op, group.arguments(mask))
    x, packed, dense, biases, a, b, *rest = Group(learns=False).arguments(mask)
    x = x.detach()  # type: ignore[attr-defined]
    xas = [torch.randn(42, 4) for _ in range(2)]
    grads = [torch.randn(2, 21, n) for n in (63, 8, 5)]
    for wants in ([True, True, True, True, True], [False, True, False, False, True]):
        torch.library.opcheck(lora_linear_backward_op, (grads, x, xas, packed, dense, biases, a, b, *rest, wants))


def test_describe_and_deal_are_mirrors() -> None:
    group = Group()
    _, packed, dense, biases, a, b, _, text, *_ = group.arguments()
    dealt = deal(text, packed, dense, biases, a, b)  # type: ignore[arg-type]
    assert describe(dealt) == text
    assert dealt[0].lora == group.loras[0] and dealt[1].bias is group.bias and dealt[2].weight is group.dense
    assert isinstance(dealt[1].weight, Packed) and dealt[1].weight.codes is group.packed[1].codes


def test_what_is_kept_for_backward() -> None:
    """The stored tensors, x, x Aᵀ: no dense weight of a packed one, and no x if neither an A nor a dense weight learns."""
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    for learns in (True, False):
        group = Group(learns=learns)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            group()
        decoded = {p.shape for p in group.packed}
        assert not [t for t in kept if tuple(t.shape) in decoded and t.is_floating_point()]
        assert any(t.data_ptr() == group.packed[0].codes.data_ptr() for t in kept)
        assert any(t.shape == group.x.shape for t in kept) is learns


@pytest.mark.cpu
def test_no_decoded_weight_survives_forward_or_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []

    def spy(decode: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def inner(*args: object) -> Tensor:
            out = decode(*args)
            made.append(weakref.ref(out))
            return out

        return inner

    monkeypatch.setattr(fused, "decode", spy(fused.decode))
    group = Group()
    ys = group()
    gc.collect()
    assert len(made) == 2 and not [r for r in made if r() is not None], "forward"
    total(ys).backward()
    gc.collect()
    assert len(made) == 4 and not [r for r in made if r() is not None], "backward"


@pytest.mark.parametrize("slot", ["codes", "scales", "nested_scales", "nested_offset"])
def test_a_weight_overwritten_before_backward_is_an_error(slot: str) -> None:
    """The peers' silent wrong gradient: a streaming buffer that holds the next layer when backward comes."""
    group = Group()
    ys = group()
    getattr(group.packed[0], slot).copy_(getattr(group.packed[0], slot).clone())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total(ys).backward()


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_give_the_same_gradients(reentrant: bool, mask: Dropout | None) -> None:
    group = Group()
    leaves = [group.x, *group.learned()]
    total(group(mask=mask)).backward()
    want = [t.grad.clone() for t in leaves if t.grad is not None]
    for t in leaves:
        t.grad = None
    total(list(checkpoint(lambda x: tuple(group(x, mask)), group.x, use_reentrant=reentrant))).backward()
    got = [t.grad for t in leaves if t.grad is not None]
    assert len(got) == len(want) == 7
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("wanted", [0, 1, 2, 3, 4, 5, 6])
def test_each_gradient_alone_equals_the_same_among_all(wanted: int) -> None:
    full = Group()
    leaves = [full.x, *full.learned()]
    want = torch.autograd.grad(total(full()), leaves)[wanted]
    alone = Group(learns=False)
    alone.x.requires_grad_(False)
    leaf = [alone.x, *alone.learned()][wanted].requires_grad_()
    (got,) = torch.autograd.grad(total(alone()), [leaf])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_gradients_of_fp32_masters_are_fp32_and_accumulate() -> None:
    group = Group(dtype=torch.bfloat16)
    for count in (1, 2):
        total(group()).backward()
        for t in group.learned():
            assert t.grad is not None and t.grad.dtype == torch.float32
        if count == 1:
            first = [t.grad.clone() for t in group.learned() if t.grad is not None]
    for t, g in zip(group.learned(), first, strict=True):
        assert torch.equal(t.grad, 2 * g)  # type: ignore[arg-type]
    assert group.x.grad is not None and group.x.grad.dtype == torch.bfloat16


def test_an_unused_output_has_no_say() -> None:
    group = Group()
    y = group()[1]
    got = torch.autograd.grad((y * y).sum(), group.loras[1].b)[0]
    one = lora_linear(group.x, [group.packed[1]], [group.bias], [group.loras[1]])[0]
    want = torch.autograd.grad((one * one).sum(), group.loras[1].b)[0]
    torch.testing.assert_close(got, want)


def test_outputs_may_be_changed_in_place() -> None:
    """Falcon adds its attention into its MLP's output in place."""
    group = Group()
    ys = group()
    for y in ys:
        y += 1.0
    total(ys).backward()
    again = Group()
    total([y + 1.0 for y in again()]).backward()
    assert torch.equal(group.x.grad, again.x.grad)  # type: ignore[arg-type]


def test_a_transposed_input_and_an_expanded_gradient() -> None:
    group = Group()
    turned = torch.randn(21, 2, 60).transpose(0, 1)
    for y, want in zip(group(turned), group(turned.contiguous()), strict=True):
        torch.testing.assert_close(y, want)
        y.sum().backward(retain_graph=True)


@pytest.mark.cpu
def test_compiles_as_a_whole() -> None:
    """Forward and backward as one graph, no break; the operators stay opaque."""
    group = Group()

    def run(x: Tensor) -> Tensor:
        return total(group(x * 2.0, MASK))

    leaves = [group.x, *group.learned()]
    want = torch.autograd.grad(run(group.x), leaves)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(group.x), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
