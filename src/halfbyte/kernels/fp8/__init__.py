"""`fp8`: the products of a group of frozen weights in e4m3, forward and for the gradient of the input, adapters beside them.

    forward     [X | XA] · [W | s*B]ᵀ        W [N, K]  -> e4m3 [N, K + 3R], a scale a row
    backward    [dY | s dY B] · [W ; A]      W transposed -> e4m3 [K, N + 3R], a scale a span of columns of W (Hopper multiplies
                                             fp8 only along the contiguous dimension of both operands)

Why: the tensor cores of sm_89 and newer do twice the fp8 products of bf16 ones, and a 4-bit weight decodes to one byte as easily as
to two. Activations and gradients take one scale a row (token), found on the fly. The adapter stays as exact as in bf16: its small
product XA is made in bf16, and enters the large one as pairs of e4m3, high + low, in three columns a rank.
Why e4m3 for gradients too: with a scale a row the range of e5m2 is not needed, and its error is twice as large (docs/LOG.md).
Cost: a relative error of some 3 % an operand, which averages out over the inner dimension; a pass over X and dY unless the kernel
in front writes `Rows` itself. (N + R)-like scratch of one byte a weight, or that for good in both layouts where a group holds them
(`Group.float8_held`): then a call writes the adapter's columns, and decodes only where the adapter has outgrown the weight's scale.

Twins: Triton on CUDA; the reference elsewhere, which emulates the arithmetic in fp32 (tests only: `compute: fp8` needs a GPU).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halfbyte.kernels import gemm, norm
from halfbyte.kernels import glu as glu_plain
from halfbyte.kernels.dispatch import twin
from halfbyte.kernels.fp8 import plan, reference
from halfbyte.kernels.fp8.parts import E4M3, Plan, Rows, Weight
from halfbyte.kernels.glu import Activation
from halfbyte.kernels.norm import NormSpec

if TYPE_CHECKING:
    from halfbyte.kernels.augmented import Group

__all__ = [
    "E4M3",
    "Activation",
    "NormSpec",
    "Rows",
    "Weight",
    "add_norm",
    "backward_weight",
    "fill_tail",
    "forward_adapter",
    "forward_weight",
    "glu",
    "glu_backward",
    "held_bytes",
    "norm_backward",
    "product",
    "quantize_both",
    "quantize_rows",
    "why_not",
]

why_not = plan.why_not


def quantize_rows(x: Tensor, out8: Tensor, scale: Tensor) -> None:
    """x `[T, K]` (rows strided) to e4m3 `out8` `[T, K]` (rows strided) and fp32 `scale` `[T, 1]`: x is about out8 * scale.

    scale = amax(row) / 448, so nothing saturates; a row that is not finite stays so. One launch, one read.
    """
    if twin(x.device) == "fused":
        from halfbyte.kernels.fp8 import fused

        fused.quantize_rows(x, out8, scale)
    else:
        reference.quantize_rows(x, out8, scale)


def quantize_both(x: Tensor, small: Tensor, rows: Rows) -> None:
    """x `[T, K]` and what the adapter made of it, small `[T, R]` (XA, or s dY B), into `rows`, one launch, nothing saturates."""
    if twin(x.device) == "fused":
        from halfbyte.kernels.fp8 import fused

        fused.quantize_rows(x, rows.main, rows.scale, small)
    else:
        reference.quantize_both(x, small, rows)


def fill_tail(rows: Rows, small: Tensor) -> None:
    """The adapter's columns behind rows that were quantised without them: saturates where small is 16 times the row's largest."""
    if twin(small.device) == "fused":
        from halfbyte.kernels.fp8 import fused

        fused.fill_tail(rows, small)
    else:
        reference.fill_tail(rows, small)


def add_norm(
    x: Tensor, delta: Tensor | None, spec: NormSpec, weight: Tensor | None, bias: Tensor | None, out: Tensor, rows: Rows | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`kernels.norm.add_norm`; with `rows` also norm(residual) quantised, in the same pass."""
    if rows is not None and twin(x.device) == "fused":
        from halfbyte.kernels.fp8 import elementwise

        return elementwise.add_norm(x, delta, spec, weight, bias, out, rows)
    found = norm.add_norm(x, delta, spec, weight, bias, out)
    if rows is not None:
        quantize_rows(out, rows.main, rows.scale)
    return found


def norm_backward(
    d_out: Tensor,
    residual: Tensor,
    rstd: Tensor,
    mean: Tensor | None,
    spec: NormSpec,
    weight: Tensor | None,
    add: Tensor | None,
    out: Tensor,
    rows: Rows | None,
) -> None:
    """`kernels.norm.norm_backward`; with `rows` also `out` quantised, in the same pass."""
    if rows is not None and twin(out.device) == "fused":
        from halfbyte.kernels.fp8 import elementwise

        elementwise.norm_backward(d_out, residual, rstd, mean, spec, weight, add, out, rows)
        return
    norm.norm_backward(d_out, residual, rstd, mean, spec, weight, add, out)
    if rows is not None:
        quantize_rows(out, rows.main, rows.scale)


def glu(gate: Tensor, up: Tensor | None, activation: Activation, out: Tensor, rows: Rows | None) -> None:
    """`kernels.glu.glu`; with `rows` also h quantised, in the same pass."""
    if rows is not None and twin(gate.device) == "fused":
        from halfbyte.kernels.fp8 import elementwise

        elementwise.glu(gate, up, activation, out, rows)
        return
    glu_plain.glu(gate, up, activation, out)
    if rows is not None:
        quantize_rows(out, rows.main, rows.scale)


def glu_backward(dh: Tensor, gate: Tensor, up: Tensor | None, activation: Activation, rows: Rows | None) -> None:
    """`kernels.glu.glu_backward`; with `rows` also [d gate | d up] `[T, 2F]` quantised (without `up`, d gate), in the same pass.

    gate and up lie behind each other in one tensor.
    """
    if rows is not None and twin(gate.device) == "fused":
        from halfbyte.kernels.fp8 import elementwise

        elementwise.glu_backward(dh, gate, up, activation, rows)
        return
    glu_plain.glu_backward(dh, gate, up, activation)
    if rows is not None:
        both = gate if up is None else gate.as_strided((gate.shape[0], 2 * gate.shape[1]), gate.stride())
        quantize_rows(both, rows.main, rows.scale)


def forward_weight(group: Group, dtype: torch.dtype) -> tuple[Weight, Tensor]:
    """`[W | s*B]` in e4m3, `[N, K + 3R]`, and A `[R, K]` in `dtype`."""
    found, device = plan.of(group), group.device
    weight = _weight(group, found, back=False)
    a = torch.empty(group.rank, group.width, dtype=dtype, device=device)
    if twin(device) == "fused":
        from halfbyte.kernels.fp8 import decode

        decode.forward_weight(group, found, weight, a)
    else:
        reference.forward_weight(group, found, weight, a)
    return weight, a


def backward_weight(group: Group, dtype: torch.dtype) -> tuple[Weight, Tensor]:
    """`[W ; A]` transposed in e4m3, `[K, N + 3R]`, and s*B `[N, R]` in `dtype`."""
    found, device = plan.of(group), group.device
    weight = _weight(group, found, back=True)
    sb = torch.empty(group.rows, group.rank, dtype=dtype, device=device)
    if twin(device) == "fused":
        from halfbyte.kernels.fp8 import decode

        decode.backward_weight(group, found, weight, sb)
    else:
        reference.backward_weight(group, found, weight, sb)
    return weight, sb


def _weight(group: Group, found: Plan, back: bool) -> Weight:
    """Room for a decoded weight: the one of the last call where the group holds it, and all of it decodes straight to e4m3."""
    outputs, inner = (group.width, group.rows) if back else (group.rows, group.width)
    if not (group.float8_held and all(found.fast)):
        return Weight(outputs, inner, group.rank, group.device)
    name = f"held, back={back}"
    kept = found.tables.get(name)
    if not isinstance(kept, Weight):
        kept = found.tables[name] = Weight(outputs, inner, group.rank, group.device, held=True)
    return kept


def held_bytes(group: Group) -> int:
    """Of the weights that a group holds in e4m3."""
    tables = group.float8.tables.values() if isinstance(group.float8, Plan) else ()
    return sum(weight.nbytes for weight in tables if isinstance(weight, Weight))


def forward_adapter(group: Group, dtype: torch.dtype) -> Tensor:
    """A `[R, K]` alone."""
    return reference.adapters(group)[1].to(dtype)


def product(
    rows: Rows, weight: Weight, bias: Tensor | None, columns: int | None, out: Tensor, residual: Tensor | None = None
) -> None:
    """out `[T, outputs]` (rows strided) = rows · weightᵀ + bias + residual; `columns`: of the inner ones, all by default."""
    if out.is_cuda and twin(out.device) == "fused":
        left, right = rows.data[:, :columns], weight.data[:, :columns]
        gemm.scaled(left, right.t(), rows.scale, weight.scale, out, bias, residual)
    else:
        reference.product(rows, weight, bias, columns, out, residual)


def can_compute(device: torch.device) -> str | None:
    """Why `device` has no fp8 products, or None where it has."""
    if device.type != "cuda":
        return "fp8 products need an NVIDIA GPU of compute capability 8.9 or newer"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return f"fp8 products need compute capability 8.9 or newer, and {torch.cuda.get_device_name(device)} has {major}.{minor}"
    return None
