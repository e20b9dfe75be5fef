"""Proofs of the twins on one device, without pytest: `tests/kernels` runs them here, `bench/kernels_gpu.py` as its gate on a GPU.

    python tests/kernels/checks.py cpu          the twins that a CPU takes
    TRITON_INTERPRET=1 HALFBYTE_KERNELS=fused python tests/kernels/checks.py cpu     the Triton kernels, interpreted
    python tests/kernels/checks.py cuda         the Triton kernels, compiled

A kernel may be as wrong as honest PyTorch, no more: truth is float64, honest is plain PyTorch in the kernel's dtype, and the
kernel's error (Frobenius, and maximum) is at most twice honest's plus one ulp of the output's maximum. Both would let a kernel
cut numbers off where it should round them to nearest, so 16-bit outputs may not be too small or too large on the whole either.
Where the arithmetic is exact, bits are compared. Fresh memory is NaN (`poisoned`), so an element that was never written is found.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from halfbyte.formats import quantize as formats
from halfbyte.formats.packed import Format, Packed
from halfbyte.kernels.cross_entropy import Head, cross_entropy
from halfbyte.kernels.dequantize import dequantize
from halfbyte.kernels.dropout import Dropout, apply
from halfbyte.kernels.dropout import reference as philox
from halfbyte.kernels.lora_linear import LowRank, lora_linear
from kernels.runner import main, named

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = [
    *(Format(kind, block, nested) for kind in ("nf4", "fp4") for block in (32, 64, 4096) for nested in (False, True)),  # type: ignore[arg-type]
    *(Format("int4", block, zero=zero) for block in (32, 128, 6, 11008) for zero in ("none", "int", "float", "min")),  # type: ignore[arg-type]
    Format("int8"),
]
ODD_SHAPES = ((63, 431), (60, 63), (1, 1), (7, 5), (3, 130))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory of `torch.empty` is NaN (or the largest integer)."""
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # operations without a deterministic form only warn: the fill is what is wanted
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def as_wrong_as_honest(name: str, got: Tensor, honest: Tensor, truth: Tensor) -> None:
    """Asserts the bound of this file's docstring."""
    assert got.dtype == honest.dtype and got.shape == truth.shape, f"{name}: {got.dtype} {tuple(got.shape)}"
    assert torch.isfinite(got).all(), f"{name}: not finite"
    ours, theirs = (got.double() - truth), (honest.double() - truth)
    top = truth.abs().max()
    ulp = float(top) * torch.finfo(got.dtype).eps
    for norm, measure in (("Frobenius", torch.linalg.vector_norm), ("maximum", lambda e: e.abs().max())):
        error, bound = float(measure(ours)), 2 * float(measure(theirs)) + ulp
        assert error <= bound, f"{name}: {norm} error {error:.3e} exceeds {bound:.3e} (output maximum {float(top):.3e})"
    if got.element_size() == 2:
        _rounded_to_nearest(name, ours, theirs, truth, torch.finfo(got.dtype).eps)


def _rounded_to_nearest(name: str, ours: Tensor, theirs: Tensor, truth: Tensor, eps: float) -> None:
    """Asserts that errors do not add up to more than an eighth of an ulp a number, either way, but for what chance makes of them.

    To cut off instead of rounding makes numbers smaller by half an ulp each: three times as much.
    """
    sums = [float((error * truth.sign()).sum().abs()) for error in (ours, theirs)]
    bound = 2 * sums[1] + eps / 8 * float(truth.abs().sum()) + 4 * float(torch.linalg.vector_norm(ours))
    assert sums[0] <= bound, f"{name}: errors add up to {sums[0]:.3e}, more than {bound:.3e}: not rounded to nearest"


def random_packed(shape: tuple[int, ...], fmt: Format, device: str, seed: int = 0) -> Packed:
    """A packed normal weight with one all-zero block, on `device`."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.05
    weight.view(-1)[: fmt.block] *= 0
    return formats.quantize(weight, fmt).to(device)


# --- dequantize -------------------------------------------------------------------------------------------------------


def check_dequantize(device: str) -> None:
    """Every format, odd shapes, every dtype: the bits of `formats.dequantize`."""
    for fmt in FORMATS:
        for shape in ODD_SHAPES:
            packed = random_packed(shape, fmt, device)
            for dtype in DTYPES:
                want = formats.dequantize(packed, dtype)
                with poisoned():
                    assert torch.equal(dequantize(packed, dtype), want), f"{fmt} {shape} {dtype}"


def check_dequantize_shapes(device: str) -> None:
    """Any rank for codebooks; a buffer of the caller's, of which nothing outside the weight is touched."""
    for shape in ((5,), (3, 7, 11), (2, 3, 4, 5)):
        packed = random_packed(shape, Format("nf4", 64, nested=True), device)
        assert torch.equal(dequantize(packed, torch.bfloat16), formats.dequantize(packed, torch.bfloat16)), shape
    packed = random_packed((63, 60), Format("nf4", 64), device)
    scratch = torch.full((63 * 60 + 200,), float("nan"), dtype=torch.bfloat16, device=device)
    view = scratch[100:-100].view(63, 60)
    assert dequantize(packed, out=view) is view
    assert torch.equal(view, formats.dequantize(packed, torch.bfloat16))
    assert scratch[:100].isnan().all() and scratch[-100:].isnan().all(), "wrote outside of the buffer"


def check_dequantize_every_code(device: str) -> None:
    """Every byte under every kind of scale: negative and tiny ones, and codes 0 and 8 of fp4, as foreign files have them."""
    scales = torch.tensor([1.0, -3e-4, 1e-30, 6.0e4, 0.1, 7e-42, 0.0, -0.7])
    for kind in ("nf4", "fp4"):
        codes = torch.arange(256, dtype=torch.uint8).repeat(8)
        empty = torch.empty(0, dtype=torch.uint8)
        packed = Packed(Format(kind, 512), (8, 512), torch.float32, codes, scales.view(torch.uint8), empty, empty, empty).to(device)  # type: ignore[arg-type]
        for dtype in DTYPES:
            assert torch.equal(dequantize(packed, dtype), formats.dequantize(packed, dtype)), f"{kind} {dtype}"


def check_dequantize_beyond_int32(device: str) -> None:
    """More than 2^31 elements (a GPU only): the last block lands where it belongs."""
    if device == "cpu":
        return
    n, tail = 2**31 + 4096, 8192
    codes = torch.zeros(n // 2, dtype=torch.uint8, device=device)
    codes[-tail // 2 :] = torch.arange(tail // 2, device=device).to(torch.uint8)
    scales = torch.ones(n // 64, device=device)
    empty = codes[:0]
    packed = Packed(Format("nf4", 64), (n,), torch.bfloat16, codes, scales.view(torch.uint8), empty, empty, empty)
    last = Packed(
        Format("nf4", 64),
        (tail,),
        torch.bfloat16,
        codes[-tail // 2 :],
        scales[-tail // 64 :].view(torch.uint8),
        empty,
        empty,
        empty,
    )
    got = dequantize(packed)
    assert torch.equal(got[-tail:], formats.dequantize(last))
    assert bool((got[:-tail] == -1.0).all())


# --- dropout ----------------------------------------------------------------------------------------------------------


def dropout_below(x: Tensor, mask: Dropout) -> Tensor:
    """Below the operator, which knows no start."""
    return apply([x], mask, 5)[0]


def check_dropout(device: str) -> None:
    """The bits of the reference, odd sizes and a short last row included."""
    state = torch.tensor([123456789012345, 7, 2**32 - 2], device=device)
    for length, width, tokens in ((10, 63, 5), (7, 60, 7), (9, 431, 4), (5, 8, 100), (1, 1, 1), (12, 3000, 6)):
        for dtype in DTYPES:
            x = torch.randn(length, width, device=device).to(dtype)
            for p in (0.0, 0.3, 0.999):
                with poisoned():
                    got = dropout_below(x, Dropout(p, state, tokens))
                whole = philox.dropout(x, state, p, tokens, 5)
                assert torch.equal(got, whole), f"{length} {width} {tokens} {dtype} {p}"
                for start in {1, tokens - 1, length // 2} & set(range(length)):
                    with poisoned():
                        got = dropout_below(x[start:], Dropout(p, state, tokens, start))
                    assert torch.equal(got, whole[start:]), f"from {start}: {length} {width} {tokens} {dtype} {p}"


# --- lora_linear ------------------------------------------------------------------------------------------------------


def formula(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], loras: list[LowRank | None], masks: list[Tensor], p: float
) -> list[Tensor]:
    """Plain PyTorch in the dtype of x; `masks` are bool `[T, K]`."""
    ys = []
    for w, bias, lora, mask in zip(weights, biases, loras, masks, strict=True):
        y = x @ w.to(x.dtype).T
        if bias is not None:
            y = y + bias.to(x.dtype)
        if lora is not None:
            dropped = torch.where(mask.view(x.shape), x / (1 - p), 0.0)
            y = y + lora.scale * ((dropped @ lora.a.to(x.dtype).T) @ lora.b.to(x.dtype).T)
        ys.append(y)
    return ys


def _leaf(*shape: int, seed: int, device: str, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(device).requires_grad_()


def check_lora_linear(device: str) -> None:
    """A mixed group: forward, and the gradients of x, A, B, a dense weight and a bias, against float64."""
    for dtype in DTYPES:
        for p in (0.0, 0.25):
            with poisoned():
                _check_group(device, dtype, p, rows=3, tokens=21, width=60, outputs=(431, 63, 60, 1))


def _check_group(device: str, dtype: torch.dtype, p: float, rows: int, tokens: int, width: int, outputs: tuple[int, ...]) -> None:
    kinds = (Format("nf4", 64, nested=True), None, Format("int4", 32, zero="float"), Format("int8"))
    weights: list[Packed | Tensor] = [
        _leaf(n, width, seed=i, device=device) if fmt is None else random_packed((n, width), fmt, device, seed=i)
        for i, (n, fmt) in enumerate(zip(outputs, kinds, strict=True))
    ]
    biases = [None, _leaf(outputs[1], seed=10, device=device), _leaf(outputs[2], seed=11, device=device), None]
    loras: list[LowRank | None] = [
        LowRank(_leaf(r, width, seed=20 + i, device=device), _leaf(n, r, seed=30 + i, device=device, scale=0.1), 0.7, layer=i)
        for i, (n, r) in enumerate(zip(outputs, (8, 3, 8, 1), strict=True))
    ]
    loras[3] = None
    x = _leaf(rows, tokens, width, seed=40, device=device).detach().to(dtype).requires_grad_()
    state = torch.tensor([7, 3, 100], device=device)
    keep = [philox.keep((rows * tokens, width), state, p, tokens, layer) for layer in range(4)]
    mask = Dropout(p, state, tokens) if p else None

    leaves = [x, weights[1], biases[1], biases[2], *(t for lora in loras if lora is not None for t in (lora.a, lora.b))]
    cotangents = [_leaf(rows, tokens, n, seed=50 + i, device=device).detach().to(dtype) for i, n in enumerate(outputs)]
    dense = [formats.dequantize(w, torch.float32) if isinstance(w, Packed) else w for w in weights]

    def results(ys: list[Tensor], gs: list[Tensor], at: list[Tensor]) -> list[Tensor]:
        return [*ys, *torch.autograd.grad(ys, at, gs)]

    got = results(lora_linear(x, weights, biases, loras, mask), cotangents, leaves)  # type: ignore[arg-type]
    honest = results(formula(x, dense, biases, loras, keep, p), cotangents, leaves)  # type: ignore[arg-type]
    exact = {id(t): t.detach().double().requires_grad_() for t in leaves if isinstance(t, Tensor)}
    truth = results(
        formula(
            exact[id(x)],
            [exact.get(id(w), w.double()) for w in dense],
            [None if b is None else exact[id(b)] for b in biases],
            [None if m is None else LowRank(exact[id(m.a)], exact[id(m.b)], m.scale, m.layer) for m in loras],
            keep,
            p,
        ),
        [g.double() for g in cotangents],
        list(exact.values()),
    )
    names = [f"y{i}" for i in range(4)] + ["dx", "dW1", "db1", "db2", "dA0", "dB0", "dA1", "dB1", "dA2", "dB2"]
    for name, *three in zip(names, got, honest, truth, strict=True):
        as_wrong_as_honest(f"{name} {dtype} p={p}", *three)


# --- cross_entropy ----------------------------------------------------------------------------------------------------


def plain_cross_entropy(hidden: Tensor, labels: Tensor, head: Head) -> Tensor:
    """Plain PyTorch on the labelled rows: logits in the dtype of hidden, the loss in fp32 (float64 stays float64)."""
    kept = labels != -100
    z = hidden[kept] @ head.weight.to(hidden.dtype).T
    z = z.to(torch.promote_types(torch.float32, z.dtype))
    if head.bias is not None:
        z = z + head.bias
    z = z * head.scale
    if head.cap:
        z = head.cap * torch.tanh(z / head.cap)
    return torch.nn.functional.cross_entropy(z, labels[kept], reduction="sum")


def check_cross_entropy(device: str) -> None:
    """Loss and the gradients of hidden, weight and bias against float64; every head, one chunk and several; a row a chunk once."""
    for dtype in DTYPES:
        for bias, scale, cap in ((False, 1.0, 0.0), (True, 0.25, 0.0), (True, 2.0, 5.0), (False, 1.0, 30.0)):
            for chunk_bytes in (*((1,) if cap == 5.0 else ()), 431 * 4 * 7, 1 << 26):
                with poisoned():
                    _check_head(device, dtype, bias, scale, cap, chunk_bytes)


def _check_head(device: str, dtype: torch.dtype, bias: bool, scale: float, cap: float, chunk_bytes: int) -> None:
    hidden = _leaf(3, 21, 60, seed=1, device=device).detach().to(dtype).requires_grad_()
    weight = _leaf(431, 60, seed=2, device=device, scale=0.3)
    b = _leaf(431, seed=3, device=device) if bias else None
    labels = torch.randint(0, 431, (3, 21), generator=torch.Generator().manual_seed(4))
    labels[torch.rand(3, 21, generator=torch.Generator().manual_seed(5)) < 0.4] = -100
    labels = labels.to(device)
    leaves = [hidden, weight] + ([] if b is None else [b])

    def results(loss: Tensor, at: list[Tensor]) -> list[Tensor]:
        return [loss, *torch.autograd.grad(loss * 0.37, at)]

    loss, correct = cross_entropy(
        hidden, labels, Head(weight, b, scale, cap), labelled=int((labels != -100).sum()), chunk_bytes=chunk_bytes
    )
    got = results(loss, leaves)
    honest = results(plain_cross_entropy(hidden, labels, Head(weight, b, scale, cap)), leaves)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    truth = results(plain_cross_entropy(exact[0], labels, Head(exact[1], exact[2] if bias else None, scale, cap)), exact)
    for name, *three in zip(("loss", "dh", "dW", "db"), got, honest, truth, strict=False):
        as_wrong_as_honest(f"{name} {dtype} bias={bias} scale={scale} cap={cap} chunk={chunk_bytes}", *three)
    assert correct.dtype == torch.int64 and 0 <= int(correct) <= int((labels != -100).sum())


CHECKS = named(globals())

if __name__ == "__main__":
    sys.exit(main(CHECKS))
