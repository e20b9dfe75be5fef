"""Proofs of the loss beyond `checks.py`: label smoothing, z-loss, packed heads, every method; values and gradients against float64.

python tests/kernels/checks_loss.py cuda        on a GPU: the gate of bench/loss_gpu.py
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from halfbyte.formats import quantize as formats
from halfbyte.formats.packed import Format, Packed
from halfbyte.kernels.cross_entropy import Extras, Head, Method, cross_entropy, slices
from halfbyte.kernels.dequantize import dequantize
from kernels.checks import DTYPES, as_wrong_as_honest, poisoned
from kernels.runner import main, named

HEADS = ((False, 1.0, 0.0), (True, 0.25, 0.0), (True, 2.0, 5.0))
EXTRAS = (Extras(0.1, 0.0), Extras(0.0, 1e-2), Extras(0.2, 1e-1))
METHODS: tuple[Method, ...] = ("chunked", "exact", "tiled")
PACKED = (Format("nf4", 64, nested=True), Format("nf4", 64), Format("int8"))


def plain(hidden: Tensor, labels: Tensor, head: Head, extras: Extras) -> Tensor:
    """Plain PyTorch on the labelled rows: torch's own label smoothing, and z-loss by its formula (float64 stays float64)."""
    kept = labels != -100
    assert isinstance(head.weight, Tensor)
    z = hidden[kept] @ head.weight.to(hidden.dtype).T
    z = z.to(torch.promote_types(torch.float32, z.dtype))
    if head.bias is not None:
        z = z + head.bias
    z = z * head.scale
    if head.cap:
        z = head.cap * torch.tanh(z / head.cap)
    loss = torch.nn.functional.cross_entropy(z, labels[kept], reduction="sum", label_smoothing=extras.smoothing)
    return loss + extras.z * torch.logsumexp(z, 1).square().sum()


def example(device: str, dtype: torch.dtype, v: int = 431, h: int = 60, t: int = 63) -> tuple[Tensor, Tensor, Tensor]:
    """hidden; weight, fp32, of numbers that `dtype` holds: truth sees what the twins multiply; labels, two fifths of them none."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(t, h, generator=generator).to(device, dtype).requires_grad_()
    weight = (torch.randn(v, h, generator=generator) * 0.3).to(device, dtype).float()
    labels = torch.randint(0, v, (t,), generator=generator)
    labels[torch.rand(t, generator=generator) < 0.4] = -100
    return hidden, weight, labels.to(device)


def compare(
    name: str, device: str, dtype: torch.dtype, kind: tuple[bool, float, float], extras: Extras, method: Method, v: int = 431
) -> None:
    """One head: the loss and the gradients of hidden, weight and bias."""
    hidden, weight, labels = example(device, dtype, v)
    weight = weight.requires_grad_()
    has_bias, scale, cap = kind
    bias = torch.randn(v, generator=torch.Generator().manual_seed(3)).to(device).requires_grad_() if has_bias else None
    leaves = [hidden, weight] + ([] if bias is None else [bias])

    def results(loss: Tensor, at: list[Tensor]) -> list[Tensor]:
        return [loss, *torch.autograd.grad(loss * 0.37, at)]

    loss, correct = cross_entropy(
        hidden, labels, Head(weight, bias, scale, cap), extras=extras, chunk_bytes=v * 4 * 20, method=method
    )
    got = results(loss, leaves)
    honest = results(plain(hidden, labels, Head(weight, bias, scale, cap), extras), leaves)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    truth = results(plain(exact[0], labels, Head(exact[1], exact[2] if has_bias else None, scale, cap), extras), exact)
    for part, *three in zip(("loss", "dh", "dW", "db"), got, honest, truth, strict=False):
        as_wrong_as_honest(f"{part} {name} {dtype} {kind} {extras} {method}", *three)
    assert 0 <= int(correct) <= int((labels != -100).sum())


@contextlib.contextmanager
def in_slices() -> Iterator[None]:
    """Packed heads decoded a hundred rows at a time, or as few as their scales allow."""
    before, slices.SLICE_BYTES = slices.SLICE_BYTES, 64 * 2 * 100
    try:
        yield
    finally:
        slices.SLICE_BYTES = before


def check_extras(device: str) -> None:
    """Smoothing and z-loss: every head with each of them, spread over the dtypes."""
    for i, dtype in enumerate(DTYPES):
        for j, kind in enumerate(HEADS):
            with poisoned():
                compare("extras", device, dtype, kind, EXTRAS[(i + j) % 3], "chunked")


def check_methods(device: str) -> None:
    """Every method, at an odd and at a round vocabulary, and with all that a head can have."""
    for method in METHODS:
        for dtype, kind, extras, v in (
            (torch.bfloat16, HEADS[0], Extras(), 63),
            (torch.bfloat16, HEADS[0], Extras(), 512),
            (torch.float16, HEADS[2], EXTRAS[2], 431),
        ):
            with poisoned():
                compare("methods", device, dtype, kind, extras, method, v)


def check_packed_head(device: str) -> None:
    """A packed head gives what its decoded weight gives, in slices or whole; the error of honest PyTorch at most."""
    for fmt in PACKED:
        for dtype in DTYPES[:2]:
            hidden, weight, labels = example(device, dtype, v=431, h=64)
            packed = formats.quantize(weight.cpu(), fmt).to(device)
            dense = formats.dequantize(packed, torch.float32)
            with poisoned(), in_slices():
                loss, _ = cross_entropy(hidden, labels, Head(packed, scale=0.5, cap=20.0), chunk_bytes=431 * 4 * 20)
                got = [loss, *torch.autograd.grad(loss * 0.37, hidden)]
            honest_loss = plain(hidden, labels, Head(dense, None, 0.5, 20.0), Extras())
            honest = [honest_loss, *torch.autograd.grad(honest_loss * 0.37, hidden)]
            exact = hidden.detach().double().requires_grad_()
            true_loss = plain(exact, labels, Head(dense.double(), None, 0.5, 20.0), Extras())
            truth = [true_loss, *torch.autograd.grad(true_loss * 0.37, exact)]
            for part, *three in zip(("loss", "dh"), got, honest, truth, strict=True):
                as_wrong_as_honest(f"{part} {fmt} {dtype}", *three)


def check_slices(device: str) -> None:
    """The slices of a packed weight are its rows, to the bit; the last one is short."""
    for fmt in (*PACKED, Format("fp4", 32, nested=True)):
        for shape in ((1000, 64), (700, 192), (513, 96)):
            packed: Packed = formats.quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)), fmt).to(device)
            whole = dequantize(packed, torch.float32)
            parts = list(slices.slices(packed, slice_bytes=shape[1] * 2 * 256))
            assert len(parts) > 1 and parts[-1][0].stop == shape[0], f"{fmt} {shape}"
            for at, part in parts:
                assert torch.equal(dequantize(part, torch.float32), whole[at]), f"{fmt} {shape} {at}"


def check_hits(device: str) -> None:
    """Equal logits: the first one is the prediction, in one block of the kernel (16,384 logits; a tile: 256) and in two."""
    near = ((5, 5), (5, 400), (400, 5), (7, 8), (8, 7), (511, 511))
    far = ((5, 30_000), (30_000, 5), (20_001, 20_000), (39_999, 39_999))
    for v, ties, methods in ((512, near, METHODS), (40_000, far, METHODS[:1])):
        for first, second in ties:
            weight = torch.zeros(v, 16, device=device, dtype=torch.bfloat16)
            weight[first], weight[second] = 1.0, 1.0
            hidden = torch.ones(1, 16, device=device, dtype=torch.bfloat16)
            for method in methods:
                _, correct = cross_entropy(hidden, torch.tensor([first], device=device), Head(weight), method=method)
                assert int(correct) == int(first <= second), f"{first} {second} {method}"


def check_bits(device: str) -> None:
    """Two calls give the same bits; no label at all gives zeros; a chunk without the reach of any label is no NaN."""
    hidden, weight, labels = example(device, torch.bfloat16)
    head = Head(weight.bfloat16(), scale=0.5, cap=20.0)
    found = []
    for _ in range(2):
        with poisoned():
            loss, correct = cross_entropy(hidden, labels, head, chunk_bytes=431 * 2 * 7)
            found.append([loss.detach(), correct, *torch.autograd.grad(loss, hidden)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with poisoned():
        loss, correct = cross_entropy(hidden, torch.full_like(labels, -100), head, labelled=0)
        (grad,) = torch.autograd.grad(loss, hidden)
    assert float(loss.detach()) == 0 and int(correct) == 0 and not grad.any()


CHECKS = named(globals())

if __name__ == "__main__":
    sys.exit(main(CHECKS))
