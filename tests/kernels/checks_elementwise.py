"""Proofs of the norm, rotary and GLU kernels on one device, as `checks.py`: forward and every gradient against float64 autograd.

    PYTHONPATH=src:tests python -m kernels.checks_elementwise cpu | cuda

Every tensor is a window of a wider buffer of NaN (the augmented layout); after each call what lies outside is still NaN.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.kernels import glu as glus
from halfbyte.kernels import norm, rotary
from halfbyte.kernels.norm import NormSpec
from kernels.checks import DTYPES, as_wrong_as_honest, poisoned
from kernels.runner import main, named

EXTRA = 24


def cases(shapes: Sequence[Any], *others: Iterable[Any]) -> Iterator[Any]:
    """The product of shapes, dtypes and others; fp16 on the first shape only, for it differs in the last rounding alone."""
    return share(c for c in itertools.product(shapes, DTYPES, *others) if c[1] is not torch.float16 or c[0] is shapes[0])


def share(all_of_them: Iterable[Any]) -> Iterator[Any]:
    """Every `parts`-th case from `part` on: a process of several that prove together, as compiling takes most of the time."""
    part, parts = map(int, os.environ.get("HALFBYTE_CHECKS_PART", "0/1").split("/"))
    return itertools.islice(all_of_them, part, None, parts)


class Windows:
    """Makes windows of NaN buffers, and tells whether anything outside of them was written."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.tails: list[Tensor] = []

    def empty(self, rows: int, width: int) -> Tensor:
        """`[rows, width]` of NaN, rows `width + EXTRA` apart."""
        buffer = torch.full((rows, width + EXTRA), float("nan"), dtype=self.dtype, device=self.device)
        self.tails.append(buffer[:, width:])
        return buffer[:, :width]

    def normal(self, rows: int, width: int, scale: float = 1.0) -> Tensor:
        window = self.empty(rows, width)
        window.copy_(torch.randn(rows, width, generator=self.generator) * scale)
        return window

    def vector(self, width: int, dtype: torch.dtype | None = None) -> Tensor:
        return (1 + 0.3 * torch.randn(width, generator=self.generator)).to(self.device, dtype or self.dtype)

    def table(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(rows, width, generator=self.generator).to(self.device, dtype)

    def untouched(self) -> None:
        assert all(tail.isnan().all() for tail in self.tails), "wrote outside of the window"


def leaves(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t.detach().to(dtype).contiguous().requires_grad_() for t in tensors]


# --- norm -------------------------------------------------------------------------------------------------------------

SPECS = [NormSpec("rms", 1e-6), NormSpec("rms", 1e-5, 1.0), NormSpec("layer", 1e-5), NormSpec("layer", 1e-5, 1.0)]
NORM_SHAPES = ((63, 431), (5, 64), (7, 5), (3, 130), (2, 2304))


def plain_norm(r: Tensor, spec: NormSpec, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    w = None if weight is None else weight.to(r.dtype) + spec.offset
    if spec.kind == "rms":
        return functional.rms_norm(r, (r.shape[1],), w, spec.eps)
    return functional.layer_norm(r, (r.shape[1],), w, None if bias is None else bias.to(r.dtype), spec.eps)


def norm_case(
    device: str, shape: tuple[int, int], dtype: torch.dtype, spec: NormSpec, sums: bool, weighted: bool, alias: str
) -> None:
    name = f"norm {shape} {dtype} {spec} sums={sums} weighted={weighted} alias={alias}"
    make = Windows(device, dtype)
    x, delta = make.normal(*shape), make.normal(*shape, scale=0.5) if sums else None
    g, add = make.normal(*shape), make.normal(*shape) if sums else None
    weight = make.vector(shape[1]) if weighted else None
    bias = make.vector(shape[1]) if weighted and spec.kind == "layer" else None
    out = make.empty(*shape)

    def plain(dtype: torch.dtype) -> list[Tensor]:
        (r,) = leaves([x if delta is None else x.to(dtype) + delta.to(dtype)], dtype)
        y = plain_norm(r, spec, *(None if t is None else t.to(dtype) for t in (weight, bias)))
        total = (y * g.to(dtype)).sum() if add is None else (y * g.to(dtype)).sum() + (r * add.to(dtype)).sum()
        return [r.detach(), y.detach(), torch.autograd.grad(total, r)[0]]

    honest, truth = plain(dtype), plain(torch.float64)
    with poisoned():
        residual, rstd, mean = norm.add_norm(x, delta, spec, weight, bias, out)
        norm.add_norm(residual, None, spec, weight, bias, again := make.empty(*shape))
        d = {"d_out": g, "add": add, "none": make.empty(*shape)}[alias]
        assert d is not None
        norm.norm_backward(g, residual, rstd, mean, spec, weight, add, d)
    assert (residual is x) == (delta is None)
    assert residual.is_contiguous() or delta is None
    assert rstd.dtype == torch.float32 and (mean is None) == (spec.kind == "rms")
    # What is recomputed starts from the residual as it was stored; compiled, two kernels may contract sums differently.
    assert device != "cpu" or torch.equal(again, out), f"{name}: the norm is of another residual than is kept"
    for what, *three in zip(("residual", "out", "d"), (residual, out, d), honest, truth, strict=True):
        as_wrong_as_honest(f"{name} {what}", *three)
    make.untouched()


def check_norm(device: str) -> None:
    """Both kinds, with and without sums, weights and an offset; backward in place of either gradient."""
    for shape, dtype, spec in cases(NORM_SHAPES, SPECS):
        for sums, weighted, alias in ((True, True, "none"), (False, True, "d_out"), (True, True, "add"), (True, False, "d_out")):
            norm_case(device, shape, dtype, spec, sums, weighted, alias)


def check_norm_weight_dtypes(device: str) -> None:
    """An fp32 weight beside 16-bit activations gives what the same numbers in 16 bits give."""
    for spec in SPECS:
        make = Windows(device, torch.bfloat16)
        x, weight, bias = make.normal(5, 64), make.vector(64), make.vector(64)
        outs = [make.empty(5, 64) for _ in range(2)]
        norm.add_norm(x, None, spec, weight, bias, outs[0])
        norm.add_norm(x, None, spec, weight.float(), bias.float(), outs[1])
        assert torch.equal(*outs)


# --- rotary -----------------------------------------------------------------------------------------------------------

STYLES: tuple[rotary.Rotation, ...] = ("half", "interleaved", "interleaved-halves", "none")
# tokens, query heads, key heads, head size, elements that turn
HEAD_SHAPES = ((5, 4, 2, 64, 64), (7, 9, 3, 16, 16), (3, 1, 1, 2, 2), (2, 3, 3, 80, 32), (3, 5, 1, 96, 96), (4, 2, 1, 10, 6))


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor, style: rotary.Rotation) -> Tensor:
    """x `[T, n, d]`, as the modelling files write it."""
    if style == "none":
        return x
    size = cos.shape[1]
    if style == "interleaved-halves":
        cos, sin = (t[:, : size // 2].repeat_interleave(2, dim=1) for t in (cos, sin))
    turning, still = x[..., :size], x[..., size:]
    if style == "half":
        turned = torch.cat((-turning[..., size // 2 :], turning[..., : size // 2]), dim=-1)
    else:
        turned = torch.stack((-turning[..., 1::2], turning[..., ::2]), dim=-1).flatten(-2)
    return torch.cat((turning * cos[:, None] + turned * sin[:, None], still), dim=-1)


def plain_head_norm(x: Tensor, weight: Tensor, spec: NormSpec) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight + spec.offset, spec.eps)


class Heads:
    """q, k, v and their gradients: windows of one buffer a kind, as a grouped projection leaves them; or heads before tokens."""

    def __init__(self, make: Windows, shape: tuple[int, int, int, int, int], heads_first: bool) -> None:
        t, q, k, d, _ = shape
        self.widths = (q * d, k * d, k * d)
        self.counts = (q, k, k)
        self.size = d
        self.q, self.k, self.v = self.views(make.normal(t, (q + 2 * k) * d))
        self.d = self.views(make.normal(t, (q + 2 * k) * d))
        if heads_first:
            self.d = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in self.d]
        self.weights = make.vector(d), make.vector(d)

    def views(self, packed: Tensor) -> list[Tensor]:
        parts = packed.split(self.widths, dim=1)
        return [p.unflatten(1, (n, self.size)) for p, n in zip(parts, self.counts, strict=True)]


def rotary_case(
    device: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype, style: rotary.Rotation, first: bool
) -> None:
    name = f"rotary {shape} {dtype} {style} heads_first={first}"
    make = Windows(device, dtype)
    heads = Heads(make, shape, first)
    t, r = shape[0], shape[4]
    tables = [make.table(t, r, torch.float32 if first else dtype) for _ in range(2)]
    cos, sin = (None, None) if style == "none" else tables

    def plain(dtype: torch.dtype) -> list[Tensor]:
        at = leaves([heads.q, heads.k], dtype)
        y = [plain_rotate(x, tables[0].to(dtype), tables[1].to(dtype), style) for x in at]
        back = torch.autograd.grad(y, at, [d.to(dtype) for d in heads.d[:2]])
        return [y[0].detach(), y[1].detach(), torch.cat([*back, heads.d[2].to(dtype)], 1).flatten(1)]

    honest, truth = plain(dtype), plain(torch.float64)
    out = make.empty(t, sum(heads.widths))
    v = heads.v.clone()
    with poisoned():
        rotary.gather_backward(*heads.d, cos, sin, style, out)
        back = [d.clone() for d in heads.d[:2]]
        rotary.rotate(back[0], back[1], cos, sin, style, inverse=True)
        rotary.rotate(heads.q, heads.k, cos, sin, style)
    for what, *three in zip(("q", "k", "packed"), (heads.q, heads.k, out), honest, truth, strict=True):
        as_wrong_as_honest(f"{name} {what}", *three)
    assert torch.equal(torch.cat([*back, heads.d[2]], 1).flatten(1), out), f"{name}: inverse"
    assert torch.equal(heads.v, v), f"{name}: v was touched"
    make.untouched()


def head_norm_case(
    device: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype, style: rotary.Rotation, spec: NormSpec
) -> None:
    name = f"head norm {shape} {dtype} {style} {spec}"
    make = Windows(device, dtype)
    heads = Heads(make, shape, False)
    t, r = shape[0], shape[4]
    tables = [make.table(t, r, dtype) for _ in range(2)]
    cos, sin = (None, None) if style == "none" else tables

    def plain(dtype: torch.dtype) -> list[Tensor]:
        at = leaves([heads.q, heads.k], dtype)
        normed = [plain_head_norm(x, w.to(dtype), spec) for x, w in zip(at, heads.weights, strict=True)]
        y = [plain_rotate(x, tables[0].to(dtype), tables[1].to(dtype), style) for x in normed]
        back = torch.autograd.grad(y, at, [d.to(dtype) for d in heads.d[:2]])
        return [y[0].detach(), y[1].detach(), torch.cat([*back, heads.d[2].to(dtype)], 1).flatten(1)]

    honest, truth = plain(dtype), plain(torch.float64)
    out = make.empty(t, sum(heads.widths))
    with poisoned():
        q_out, k_out, q_rstd, k_rstd = rotary.norm_rotate(heads.q, heads.k, *heads.weights, spec, cos, sin, style)
        rotary.norm_gather_backward(*heads.d, heads.q, heads.k, q_rstd, k_rstd, *heads.weights, spec, cos, sin, style, out)
    assert q_out.is_contiguous() and k_out.is_contiguous() and q_rstd.shape == heads.q.shape[:2]
    for what, *three in zip(("q", "k", "packed"), (q_out, k_out, out), honest, truth, strict=True):
        as_wrong_as_honest(f"{name} {what}", *three)
    make.untouched()


def check_rotary(device: str) -> None:
    """Every style, whole and partial; gradients in any layout; tables in another dtype; tables that differ within a pair."""
    for shape, dtype, style in cases(HEAD_SHAPES, STYLES):
        for heads_first in (False, True):
            rotary_case(device, shape, dtype, style, heads_first)


def check_head_norm(device: str) -> None:
    """RMS norm of each head before the rotation, and through both on the way back."""
    for shape, dtype, style in cases(HEAD_SHAPES, STYLES):
        head_norm_case(device, shape, dtype, style, SPECS[style in ("half", "none")])


# --- glu --------------------------------------------------------------------------------------------------------------

PLAIN: dict[glus.Activation, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}


def glu_case(
    device: str, shape: tuple[int, int], dtype: torch.dtype, activation: glus.Activation, gated: bool, scale: float
) -> None:
    name = f"glu {shape} {dtype} {activation} gated={gated} scale={scale}"
    make = Windows(device, dtype)
    gate, up = make.normal(*shape, scale=scale), make.normal(*shape) if gated else None
    gate[0, -1] = 0.0  # where relu has no slope by convention
    dh, out = make.normal(*shape), make.empty(*shape)

    def plain(dtype: torch.dtype) -> list[Tensor]:
        at = leaves([gate, *([] if up is None else [up])], dtype)
        h = PLAIN[activation](at[0])
        h = h if up is None else h * at[1]
        return [h.detach(), h.detach(), *torch.autograd.grad(h, at, dh.to(dtype))]

    honest, truth = plain(dtype), plain(torch.float64)
    with poisoned():
        glus.glu(gate, up, activation, out)
        glus.glu_backward(dh, gate, up, activation)
    got = [out, dh, gate, *([] if up is None else [up])]
    for what, *three in zip(("h", "h again", "d gate", "d up")[: len(got)], got, honest, truth, strict=True):
        as_wrong_as_honest(f"{name} {what}", *three)
    make.untouched()


def check_glu(device: str) -> None:
    """Every activation, with and without a second factor, small numbers and saturated ones."""
    for shape, dtype, activation in cases(((11, 431), (1, 1), (2, 2048), (3, 1500)), PLAIN):
        for gated, scale in ((True, 1.0), (False, 1.0), (True, 20.0)):
            glu_case(device, shape, dtype, activation, gated, scale)


def check_glu_in_place(device: str) -> None:
    """h over gate, and over up: the same bits."""
    for activation in PLAIN:
        make = Windows(device, torch.bfloat16)
        gate, up, out = make.normal(5, 70), make.normal(5, 70), make.empty(5, 70)
        glus.glu(gate, up, activation, out)
        for place in range(2):
            copies = make.empty(5, 70).copy_(gate), make.empty(5, 70).copy_(up)
            glus.glu(*copies, activation, copies[place])
            assert torch.equal(copies[place], out)
        make.untouched()


# --- sizes ------------------------------------------------------------------------------------------------------------


def check_large(device: str) -> None:
    """Shapes of real models (a GPU only)."""
    if device == "cpu":
        return
    rows = ((33, 4096), (17, 8192), (5, 3584), (3, 16384))
    for shape, spec in share(itertools.product(rows, SPECS)):
        norm_case(device, shape, torch.bfloat16, spec, True, True, "add")
    for shape, activation in share(itertools.product(((33, 14336), (17, 28672)), PLAIN)):
        glu_case(device, shape, torch.bfloat16, activation, True, 1.0)
    heads = ((33, 32, 8, 128, 128), (5, 64, 8, 128, 128), (7, 8, 4, 256, 256), (9, 14, 2, 64, 64), (3, 128, 8, 128, 128))
    for shape, style in share(itertools.product(heads, STYLES)):
        rotary_case(device, shape, torch.bfloat16, style, True)
        head_norm_case(device, shape, torch.bfloat16, style, SPECS[1])


def check_beyond_int32(device: str) -> None:
    """Rows more than 2^31 elements apart (a GPU only)."""
    if device == "cpu" or not list(share([0])):
        return
    far = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device=device)

    def window(values: Tensor) -> Tensor:
        return far.as_strided(values.shape, (2**31 + 16, 1)).copy_(values)

    make = Windows(device, torch.bfloat16)
    x, g, weight, near = make.normal(2, 1024), make.normal(2, 1024), make.vector(1024), make.empty(2, 1024)
    _, rstd, _ = norm.add_norm(x, None, SPECS[0], weight, None, near)
    norm.add_norm(window(x), None, SPECS[0], weight, None, out := window(x))
    assert torch.equal(out, near)
    norm.norm_backward(g, x, rstd, None, SPECS[0], weight, g, near)
    norm.norm_backward(window(g), x, rstd, None, SPECS[0], weight, g, out)
    assert torch.equal(out, near)
    glus.glu(x, g, "silu", near)
    glus.glu(window(x), g, "silu", out)
    assert torch.equal(out, near)
    cos, sin = make.table(2, 128, torch.bfloat16), make.table(2, 128, torch.bfloat16)
    expected, q = x.clone().unflatten(1, (8, 128)), window(x).unflatten(1, (8, 128))
    rotary.rotate(expected[:, :6], expected[:, 6:], cos, sin, "half")
    rotary.rotate(q[:, :6], q[:, 6:], cos, sin, "half")
    assert torch.equal(q, expected)


CHECKS = named(globals())

if __name__ == "__main__":
    sys.exit(main(CHECKS))
