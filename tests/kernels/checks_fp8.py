"""Proofs of the fp8 twins on one device: `test_fp8.py` runs them here, `bench/fp8_gpu.py` as its gate on a GPU.

    python tests/kernels/checks_fp8.py cpu|cuda [NAME ...]       (HALFBYTE_KERNELS, TRITON_INTERPRET: as for checks.py)

Decoding and rounding to e4m3 are exact: bits of the reference. Products: truth is float64 on the e4m3 operands, honest is fp32 and
one rounding. The adapter is as exact as in bf16: shown on weights that are zero, so that nothing hides its error. What e4m3
itself costs is bounded against float64 on the unrounded operands: a relative error of 2^-4 at most, about 0.037 measured.
"""

from __future__ import annotations

import itertools
import sys

import torch
from torch import Tensor

from halfbyte.formats import quantize as formats
from halfbyte.formats.packed import Format, Packed
from halfbyte.kernels import fp8, norm
from halfbyte.kernels import glu as glu_plain
from halfbyte.kernels.augmented import Group
from halfbyte.kernels.dropout import Dropout
from halfbyte.kernels.dropout import reference as philox
from halfbyte.kernels.fp8 import plan, reference
from halfbyte.kernels.fp8.parts import COLUMNS, E4M3, Rows, Weight
from halfbyte.kernels.lora_linear import LowRank
from halfbyte.kernels.lora_linear.members import Member
from halfbyte.kernels.norm import NormSpec
from halfbyte.kernels.products import Augmented, Float8
from kernels.checks import as_wrong_as_honest, poisoned
from kernels.runner import main, named

NESTED = Format("nf4", 64, nested=True)
GROUPS: dict[str, tuple[tuple[Format | None, ...], tuple[int, ...], int]] = {
    "nested": ((NESTED, NESTED, NESTED), (8, 8, 3), 192),
    "one, no adapter": ((Format("nf4", 64),), (0,), 128),
    "small blocks, int8": ((Format("fp4", 32, nested=True), Format("int8")), (5, 0), 96),
    "dense, int4": ((None, Format("int4", 32, zero="min")), (0, 16), 48),
    "large blocks": ((Format("nf4", 128), Format("nf4", 128)), (16, 24), 256),
    "unlike": ((Format("nf4", 64), Format("nf4", 32)), (4, 4), 64),
    "ragged": ((Format("nf4", 64, nested=True),), (4,), 80),
}
"""Formats, ranks and width of the members of a group; the heights are `HEIGHTS`."""
HEIGHTS = (144, 80, 16)
"""Rows of the members."""


def normal(*shape: int, seed: int, device: str, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device)


def group_of(name: str, device: str, weight: float = 0.05, b: float = 0.01) -> Group:
    """A group of `GROUPS`; weight and b: standard deviations."""
    kinds, ranks, width = GROUPS[name]
    members = []
    for i, (kind, rank, height) in enumerate(zip(kinds, ranks, HEIGHTS, strict=False)):
        w = normal(height, width, seed=i, device="cpu", scale=weight)
        stored: Packed | Tensor = w.bfloat16().to(device) if kind is None else formats.quantize(w, kind).to(device)
        a, bs = normal(rank, width, seed=10 + i, device=device, scale=width**-0.5), normal(height, rank, seed=20 + i, device=device)
        members.append(Member(stored, None, LowRank(a, bs * b, 1.7, layer=i) if rank else None))
    return Group(members)


def dense_of(group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """float64 W `[N, K]`, s*B `[N, R]` and A `[R, K]`, the adapter's from fp32."""
    parts = [formats.dequantize(m.weight, torch.float32) if isinstance(m.weight, Packed) else m.weight for m in group.members]
    sb, a = reference.adapters(group)
    return torch.cat([p.double() for p in parts]), sb.double(), a.double()


def same_bits(name: str, got: Tensor, want: Tensor) -> None:
    got, want = (t.view(torch.uint8) if t.dtype == E4M3 else t for t in (got, want))
    assert torch.equal(got, want), f"{name}: {int((got != want).sum())} of {want.numel()} differ"


def outlying(tokens: int, width: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows of very different sizes, a few columns far larger than the rest, one row of zeros."""
    x = normal(tokens, width, seed=40, device=device) * torch.logspace(-6, 2, tokens, device=device)[:, None]
    x[:, ::37] *= 30
    x[tokens // 2] = 0
    return x.to(dtype)


# --- what is exact ------------------------------------------------------------------------------------------------------


def check_fp8_rows(device: str) -> None:
    """Odd widths, strided rows, every dtype: bits; largest number 448; zeros stay zeros."""
    for width in (63, 431, 80, 1):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            whole = outlying(7, width + 16, device, dtype)
            x = whole[:, :width]
            out, want = Rows(7, width, 16, torch.device(device)), Rows(7, width, 16, torch.device(device))
            with poisoned():
                out.data.view(torch.uint8).fill_(0x7F)
                fp8.quantize_rows(x, out.main, out.scale)
            reference.quantize_rows(x, want.main, want.scale)
            same_bits(f"rows {width} {dtype}", out.main.contiguous(), want.main.contiguous())
            same_bits(f"scales {width} {dtype}", out.scale, want.scale)
            assert out.tail.isnan().all(), "wrote behind the row"
            tops = out.main.float().abs().amax(1)
            assert bool(((tops >= 447) | (x.float().abs().amax(1) < 1e-30)).all()), "a row does not use the range"


def check_fp8_rows_not_finite(device: str) -> None:
    """A row with an infinity or a NaN is not finite in the product's terms; its neighbours are untouched."""
    x = normal(5, 64, seed=1, device=device).bfloat16()
    x[1, 3], x[3, 9] = float("inf"), float("nan")
    out = Rows(5, 64, 0, torch.device(device))
    fp8.quantize_rows(x, out.main, out.scale)
    back = out.main.float() * out.scale
    assert torch.isfinite(back).all(1).tolist() == [True, False, True, False, True]


def check_fp8_tail(device: str) -> None:
    """Three columns a rank, bits; the pair is as exact as bf16."""
    x, rank = outlying(9, 64, device), 16
    rows, want = Rows(9, 64, rank, torch.device(device)), Rows(9, 64, rank, torch.device(device))
    fp8.quantize_rows(x, rows.main, rows.scale)
    want.scale.copy_(rows.scale)
    small = (normal(9, rank, seed=3, device=device) * x.float().abs().amax(1, keepdim=True)).bfloat16()
    fp8.fill_tail(rows, small)
    reference.fill_tail(want, small)
    same_bits("tail", rows.tail.contiguous(), want.tail.contiguous())
    high, low, again = (t.float() for t in rows.tail.chunk(3, 1))
    assert torch.equal(high, again)
    error = ((high + low) * rows.scale * 16 - small.float()).norm() / small.float().norm()
    assert error < 2**-8, f"the pair is off by {error}"


def check_fp8_weights(device: str) -> None:
    """Every group in both layouts: the bits of the reference, scales and casts included, nothing left unwritten."""
    for name in GROUPS:
        group = group_of(name, device)
        found = plan.of(group)
        n, k, r = group.rows, group.width, group.rank
        for back in (False, True):
            want = Weight(k if back else n, n if back else k, r, torch.device(device))
            small = torch.empty((n, r) if back else (r, k), dtype=torch.bfloat16, device=device)
            with poisoned():
                got, cast = (fp8.backward_weight if back else fp8.forward_weight)(group, torch.bfloat16)
            (reference.backward_weight if back else reference.forward_weight)(group, found, want, small)
            same_bits(f"{name} back={back}", got.data, want.data)
            same_bits(f"{name} back={back} scale", got.scale, want.scale)
            same_bits(f"{name} back={back} adapter", cast, small)


def check_fp8_held(device: str) -> None:
    """Weights that are kept from call to call: the bits of fresh ones, where the adapter moves a little, and where it outgrows
    the scales of some rows and spans."""
    for name in ("nested", "one, no adapter", "large blocks", "unlike"):
        kept, fresh = group_of(name, device), group_of(name, device)
        kept.float8_held = True
        seen = set()
        for growth in (None, 1.01, 300.0, 1.0, 1e-4):
            for group in (kept, fresh):
                for m in group.members:
                    if growth is not None and m.lora is not None:
                        m.lora.b[1:].mul_(growth)
                        m.lora.a[:, 3:].mul_(growth)
            for back in (False, True):
                (got, cast), (want, other) = (
                    (fp8.backward_weight if back else fp8.forward_weight)(g, torch.bfloat16) for g in (kept, fresh)
                )
                same_bits(f"{name} back={back} {growth}", got.data, want.data)
                same_bits(f"{name} back={back} {growth} scale", got.scale, want.scale)
                same_bits(f"{name} back={back} {growth} adapter", cast, other)
                seen.add(got.data.data_ptr())
        assert len(seen) == 2 or not all(plan.of(kept).fast), f"{name}: not held"
        kept.release()
        assert kept.float8 is None and not kept.float8_held


def check_fp8_weight_error(device: str) -> None:
    """Decoded to e4m3, a weight is within half a step (2^-4) of itself, or of its row's smallest step."""
    for name in GROUPS:
        group = group_of(name, device)
        w = dense_of(group)[0]
        for back in (False, True):
            weight, _ = (fp8.backward_weight if back else fp8.forward_weight)(group, torch.bfloat16)
            truth = w.T if back else w
            got = weight.data[:, : truth.shape[1]].double() * weight.scale.double().T
            bound = truth.abs() * 2**-4 * 1.01 + weight.scale.double().T * 2**-10 * 1.01
            # Formats that come by way of bf16 are rounded before.
            bound = bound + truth.abs() * 2**-8
            assert bool(((got - truth).abs() <= bound).all()), f"{name} back={back}"


def check_fp8_both(device: str) -> None:
    """Rows and the adapter's columns in one launch, bits; a row whose adapter is 100 times as large does not saturate."""
    x, rank = outlying(9, 431, device), 16
    small = normal(9, rank, seed=3, device=device) * x.float().abs().amax(1, keepdim=True)
    small[4:] *= 100
    rows, want = Rows(9, 431, rank, torch.device(device)), Rows(9, 431, rank, torch.device(device))
    fp8.quantize_both(x, small.bfloat16(), rows)
    reference.quantize_both(x, small.bfloat16(), want)
    same_bits("both", rows.data, want.data)
    same_bits("scale", rows.scale, want.scale)
    high, low, _ = (t.float() for t in rows.tail.chunk(3, 1))
    assert ((high + low) * rows.scale * 16 - small).norm() / small.norm() < 2**-7


def check_fp8_elementwise(device: str) -> None:
    """Norm and GLU that write e4m3 too: the plain kernel's numbers, and exactly those quantised."""
    for width in (63, 80, 431):
        wide = normal(5, 2 * width + 16, seed=1, device=device).bfloat16()
        x, delta = wide[:, :width], normal(5, width, seed=2, device=device).bfloat16()
        weight, bias = (normal(width, seed=i, device=device) for i in (3, 4))
        rows, want = (Rows(5, 2 * width, 0, torch.device(device)) for _ in range(2))
        half = Rows(5, width, 0, torch.device(device))
        for spec, b in ((NormSpec("rms", 1e-6, 1.0), None), (NormSpec("layer", 1e-5), bias)):
            out, plain = torch.empty(5, width + 16, dtype=torch.bfloat16, device=device)[:, :width], torch.empty_like(delta)
            got = fp8.add_norm(x, delta, spec, weight, b, out, half)
            other = norm.add_norm(x, delta, spec, weight, b, plain)
            assert torch.equal(got[0], other[0]) and torch.allclose(got[1], other[1]), f"norm {spec}"
            assert (out.float() - plain.float()).abs().max() <= 2**-7 * plain.float().abs().max(), f"norm {spec}"
            reference.quantize_rows(out, want.main[:, :width], want.scale)
            same_bits(f"norm {spec}", half.main.contiguous(), want.main[:, :width].contiguous())
            same_bits(f"norm {spec} scale", half.scale, want.scale)
            for add in (None, delta):
                d, plain_d = torch.empty(5, width + 16, dtype=torch.bfloat16, device=device)[:, :width], torch.empty_like(delta)
                fp8.norm_backward(out, got[0], got[1], got[2], spec, weight, add, d, half)
                norm.norm_backward(out, got[0], got[1], got[2], spec, weight, add, plain_d)
                assert (d.float() - plain_d.float()).abs().max() <= 2**-7 * plain_d.float().abs().max(), f"norm back {spec}"
                reference.quantize_rows(d, want.main[:, :width], want.scale)
                same_bits(f"norm back {spec}", half.main.contiguous(), want.main[:, :width].contiguous())
                same_bits(f"norm back {spec} scale", half.scale, want.scale)
        gate, up = wide[:, :width], wide[:, width : 2 * width]
        h, dh = torch.empty_like(delta), normal(5, width, seed=5, device=device).bfloat16()
        fp8.glu(gate, up, "silu", h, half)
        plain_h, plain_wide, plain_dh = torch.empty_like(h), wide.clone(), dh.clone()
        glu_plain.glu(gate, up, "silu", plain_h)
        assert (h.float() - plain_h.float()).abs().max() <= 2**-7 * plain_h.float().abs().max(), "glu"
        reference.quantize_rows(h, want.main[:, :width], want.scale)
        same_bits("glu", half.main.contiguous(), want.main[:, :width].contiguous())
        fp8.glu_backward(dh, gate, up, "silu", rows)
        glu_plain.glu_backward(plain_dh, plain_wide[:, :width], plain_wide[:, width : 2 * width], "silu")
        assert (wide.float() - plain_wide.float()).abs().max() <= 2**-7 * plain_wide.float().abs().max(), "glu backward"
        assert (dh.float() - plain_dh.float()).abs().max() <= 2**-7 * plain_dh.float().abs().max(), "glu backward"
        reference.quantize_rows(wide[:, : 2 * width], want.main, want.scale)
        same_bits("glu backward", rows.main, want.main)
        same_bits("glu backward scale", rows.scale, want.scale)
        _check_ungated(wide[:, :width], half, Rows(5, width, 0, torch.device(device)), delta)
    # Rows longer than what a program takes at a time, either way.
    gate, dh = (normal(3, 4216, seed=i, device=device).bfloat16()[:, :4200] for i in (6, 7))
    _check_ungated(gate, *(Rows(3, 4200, 0, torch.device(device)) for _ in range(2)), dh.contiguous())


def _check_ungated(gate: Tensor, rows: Rows, want: Rows, dh: Tensor) -> None:
    """An MLP without `up`: h forward, h and d gate backward."""
    h, plain = torch.empty_like(dh), torch.empty_like(dh)
    fp8.glu(gate, None, "gelu_tanh", h, rows)
    glu_plain.glu(gate, None, "gelu_tanh", plain)
    assert (h.float() - plain.float()).abs().max() <= 2**-7 * plain.float().abs().max(), "ungated"
    reference.quantize_rows(h, want.main, want.scale)
    same_bits("ungated", rows.main.contiguous(), want.main.contiguous())
    got, plain_h, plain_gate = dh.clone(), dh.clone(), gate.clone()
    fp8.glu_backward(got, gate, None, "gelu_tanh", rows)
    glu_plain.glu_backward(plain_h, plain_gate, None, "gelu_tanh")
    for ours, honest in ((got, plain_h), (gate, plain_gate)):
        assert (ours.float() - honest.float()).abs().max() <= 2**-7 * honest.float().abs().max(), "ungated backward"
    reference.quantize_rows(gate, want.main, want.scale)
    same_bits("ungated backward", rows.main.contiguous(), want.main.contiguous())
    same_bits("ungated backward scale", rows.scale, want.scale)


# --- products -----------------------------------------------------------------------------------------------------------


def check_fp8_product(device: str) -> None:
    """Into rows of a wider matrix, with a bias and a residual, with and without the adapter's columns; the last one is measured."""
    shapes = [(33, 96, 144, 16), (64, 256, 80, 0), (5, 64, 16, 16), *([(8192, 4096, 4096, 16)] if device != "cpu" else [])]
    for tokens, inner, outputs, rank in shapes:
        rows, weight = Rows(tokens, inner, rank, torch.device(device)), Weight(outputs, inner, rank, torch.device(device))
        for t, seed in ((rows.data, 1), (weight.data, 2)):
            t.copy_(reference.e4m3(normal(*t.shape, seed=seed, device=device, scale=60)))
        rows.scale.copy_(normal(tokens, 1, seed=3, device=device).abs() * 0.01)
        weight.scale.copy_(normal(1, outputs, seed=4, device=device).abs() * 0.01)
        for columns in (None, inner):
            for bias, residual in itertools.product(
                (None, normal(outputs, seed=5, device=device).bfloat16()),
                (None, normal(tokens, outputs, seed=6, device=device).bfloat16()),
            ):
                wide = torch.full((tokens, outputs + 16), float("nan"), dtype=torch.bfloat16, device=device)
                fp8.product(rows, weight, bias, columns, wide[:, :outputs], residual)
                left, right = rows.data[:, :columns].double(), weight.data[:, :columns].double()
                truth = (left @ right.T) * rows.scale.double() * weight.scale.double()
                truth = truth if bias is None else truth + bias.double()
                truth = truth if residual is None else truth + residual.double()
                honest = torch.empty(tokens, outputs, dtype=torch.bfloat16, device=device)
                reference.product(rows, weight, bias, columns, honest, residual)
                as_wrong_as_honest(f"product {tokens} {inner} {outputs} {columns}", wide[:, :outputs], honest, truth)
                assert wide[:, outputs:].isnan().all(), "wrote behind the row"


def _through(group: Group, device: str, products: Augmented | Float8, mask: Dropout | None, bias: Tensor | None) -> list[Tensor]:
    """Y, XA, dX and s dY B of a group."""
    n, k, r = group.rows, group.width, group.rank
    x = torch.full((37, k + r), float("nan"), dtype=torch.bfloat16, device=device)
    x[:, :k] = normal(37, k, seed=50, device=device)
    dy = torch.full((37, n + r), float("nan"), dtype=torch.bfloat16, device=device)
    dy[:, :n] = normal(37, n, seed=51, device=device)
    y, dx = (torch.full((37, width), float("nan"), dtype=torch.bfloat16, device=device) for width in (n, k))
    xa = products.project(group, x, y, bias, mask)
    products.project_back(group, dy, dx, mask)
    return [y, dx] if xa is None else [y, dx, xa, dy[:, n:]]


def _truth(group: Group, device: str, mask: Dropout | None, bias: Tensor | None) -> list[Tensor]:
    w, sb, a = dense_of(group)
    x, dy = (normal(37, width, seed=50 + i, device=device).bfloat16().double() for i, width in enumerate((group.width, group.rows)))
    xa, tail = torch.zeros(37, group.rank, dtype=torch.float64, device=device), dy @ sb
    dx = dy @ w
    for m, ranks in zip(group.members, group.rank_slices, strict=True):
        if m.lora is not None and ranks is not None:
            keep = (
                torch.ones_like(x) if mask is None else philox.keep(tuple(x.shape), mask.state, mask.p, mask.tokens, m.lora.layer)
            )  # type: ignore[arg-type]
            keep = keep.double() / (1.0 if mask is None else 1 - mask.p)
            xa[:, ranks] = (x * keep) @ a[ranks].T
            dx += (tail[:, ranks] @ a[ranks]) * keep
    y = x @ w.T + xa @ sb.T + (0 if bias is None else bias.double())
    return [y, dx] if not group.rank else [y, dx, xa, tail]


def check_fp8_group(device: str) -> None:
    """Forward, and the gradient of the input, against float64 on what was not rounded: within what e4m3 costs."""
    for name in GROUPS:
        group = group_of(name, device)
        bias = normal(group.rows, seed=60, device=device).bfloat16()
        for mask in (None, Dropout(0.25, torch.tensor([7, 3, 100], device=device), 37)):
            truth = _truth(group, device, mask, bias)
            got, plain = (_through(group, device, products, mask, bias) for products in (Float8(), Augmented()))
            for what, ours, bf16, exact in zip(("Y", "dX"), got, plain, truth, strict=False):
                error = float((ours.double() - exact).norm() / exact.norm())
                assert error < 0.045, f"{name} {what}: relative error {error:.4f}"
                assert float((bf16.double() - exact).norm() / exact.norm()) < 0.01, f"{name} {what}: bf16 is off"
            for what, ours, honest, exact in zip(("XA", "s dY B"), got[2:], plain[2:], truth[2:], strict=False):
                as_wrong_as_honest(f"{name} {what}", ours, honest, exact)


def check_fp8_adapter(device: str) -> None:
    """The adapter inside the fp8 product is as exact as in bf16: shown on weights of zero, for small and for large B.

    Backward its floor is 4e-5 of a row's largest gradient, so a B near zero is shown forward only.
    """
    for name in ("nested", "large blocks", "small blocks, int8"):
        for b in (1e-5, 0.01, 1.0):
            group = group_of(name, device, weight=0.0, b=b)
            truth = _truth(group, device, None, None)
            got, honest = (_through(group, device, products, None, None) for products in (Float8(), Augmented()))
            for what, *three in zip(("Y", "dX") if b > 1e-3 else ("Y",), got, honest, truth, strict=False):
                as_wrong_as_honest(f"{name} {what} b={b}", *three)


def check_fp8_moved(device: str) -> None:
    """A weight or an adapter that moves to other memory is noticed; one that changes in place is read afresh."""
    group = group_of("nested", device)
    first = fp8.forward_weight(group, torch.bfloat16)[0].data.clone()
    assert group.members[0].lora is not None
    group.members[0].lora.b.mul_(2)
    second = fp8.forward_weight(group, torch.bfloat16)[0].data
    k = group.width
    assert not torch.equal(first[:, k:].view(torch.uint8), second[:, k:].view(torch.uint8))
    assert first.shape[1] == k + COLUMNS * group.rank
    before = group.float8
    other = Group(
        [Member(m.weight.to(device) if isinstance(m.weight, Packed) else m.weight, m.bias, m.lora) for m in group.members]
    )
    plan.of(other)
    assert group.float8 is before


CHECKS = named(globals())


if __name__ == "__main__":
    sys.exit(main(CHECKS))
