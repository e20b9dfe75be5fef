"""What `compute: fp8` says it computes, in plain torch and without our kernels: the honest path of its gradient gate.

    Y  = e4m3(X) · e4m3(W)ᵀ + XA · s*Bᵀ          X a scale a row; W a scale a row
    dX = e4m3(dY) · e4m3(W) + (s dY B) · A        dY a scale a row of the whole group; W a scale every 64 columns

in fp32 with one rounding to the dtype at hand, everything else as it is. A scale is the largest number over 448; that of a weight
also leaves room for 16 times the largest number of the adapter beside it (`halfbyte.kernels.fp8`).

- `emulate` puts this under a PEFT model of transformers: end to end, with nothing of ours.
- `Watched` stands between our layers and the products that they run with, and compares each product with the formula on the very
  operands of the step. End to end two honest paths are nearly as far apart as either is from fp32, since a difference of one bf16
  step in front of a rounding to 3 bits becomes a whole step of e4m3; a single product has no such excuse.

Letters: T = tokens, N = outputs and K = inputs of a group, R = ranks.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.formats import quantize as formats
from halfbyte.formats.packed import Packed
from halfbyte.kernels.augmented import Group
from halfbyte.kernels.dropout import Dropout
from halfbyte.kernels.fp8 import Rows
from halfbyte.kernels.products import Products

LARGEST, HEADROOM, SPAN = 448.0, 16.0, 64


def e4m3(x: Tensor, top: Tensor) -> Tensor:
    """x `[M, K]` fp32 as e4m3 says it, where `top` (it broadcasts) becomes the largest number."""
    scale = top.clamp_min(1e-30) / LARGEST
    return (x / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() * scale


def by_row(x: Tensor) -> Tensor:
    """X or dY: a scale a row."""
    x = x.float()
    return e4m3(x, x.abs().amax(1, keepdim=True))


def weight_forward(w: Tensor, sb: Tensor) -> Tensor:
    """W `[N, K]`, a scale a row; sb `[N, R]`."""
    return e4m3(w, torch.maximum(w.abs().amax(1), HEADROOM * _largest(sb, 1))[:, None])


def weight_back(w: Tensor, a: Tensor) -> Tensor:
    """W `[N, K]`, a scale every `SPAN` columns; a `[R, K]`."""
    top = torch.maximum(w.abs().amax(0), HEADROOM * _largest(a, 0))
    return e4m3(w, top.view(-1, SPAN).amax(1).repeat_interleave(SPAN))


def _largest(x: Tensor, dimension: int) -> Tensor:
    return x.abs().amax(dimension) if x.numel() else x.new_zeros(x.shape[1 - dimension])


@dataclass(frozen=True)
class Parts:
    """What is rounded to e4m3: all of it, or one of the three to see what it costs."""

    activations: bool = True
    weights: bool = True
    gradients: bool = True


class _Product(torch.autograd.Function):
    """(x `[T, K]`, group) -> the base products of its members, `[T, N_i]` each. One node, so that the gradients share a scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Emulated) -> tuple[Tensor, ...]:
        ctx.group = group
        parts = group.parts
        w, sb, _ = group.matrices()
        left = by_row(x) if parts.activations else x.float()
        y = left @ (weight_forward(w, sb) if parts.weights else w).T
        return tuple(y.to(x.dtype).split(group.heights, 1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        dy, parts = torch.cat(grads, 1), ctx.group.parts
        w, _, a = ctx.group.matrices()
        left = by_row(dy) if parts.gradients else dy.float()
        return (left @ (weight_back(w, a) if parts.weights else w)).to(dy.dtype), None


class Emulated:
    """The frozen weights of PEFT modules that share an input. The adapters stay with PEFT: the first member multiplies for all."""

    def __init__(self, modules: list[Any], parts: Parts) -> None:
        self.modules, self.parts, self.waiting = modules, parts, list[Tensor]()
        self.weights = [_dense(m.base_layer.weight) for m in modules]
        self.heights = [w.shape[0] for w in self.weights]

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """fp32 W `[N, K]`, and all s*B and A of the group, which its scales depend on."""
        b = [m.lora_B["default"].weight.detach().float() * m.scaling["default"] for m in self.modules]
        return torch.cat(self.weights), torch.cat(b), torch.cat([m.lora_A["default"].weight.detach().float() for m in self.modules])

    def next(self, x: Tensor) -> Tensor:
        if not self.waiting:
            self.waiting = list(_Product.apply(x.flatten(0, -2), self))  # type: ignore[no-untyped-call]
        return self.waiting.pop(0).view(*x.shape[:-1], -1)


class _Base(nn.Module):
    """Stands where a member's base layer stood."""

    def __init__(self, group: Emulated) -> None:
        super().__init__()
        self.group = [group]

    def forward(self, x: Tensor) -> Tensor:
        return self.group[0].next(x)


def _dense(weight: Any) -> Tensor:
    """fp32 weights of a bitsandbytes parameter, decoded without going through 16 bits, or of a plain one."""
    if getattr(weight, "quant_state", None) is None:
        return weight.detach().float()  # type: ignore[no-any-return]
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(weight.quant_state)
    state.dtype = torch.float32
    return dequantize_4bit(weight.data, state)


def emulate(model: nn.Module, parts: Parts | None = None) -> nn.Module:
    """`model`: a Llama of transformers under PEFT, every linear layer adapted. Its base products run as above from now on."""
    for layer in [m for name, m in model.named_modules() if name.split(".")[-1].isdigit() and hasattr(m, "self_attn")]:
        attention, mlp = layer.self_attn, layer.mlp
        for modules in (
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
            [mlp.gate_proj, mlp.up_proj],
            [mlp.down_proj],
        ):
            group = Emulated(modules, parts or Parts())
            for m in modules:
                m.base_layer = _Base(group)
    return model


@dataclass
class Watched:
    """`inner`, with every product compared: found holds, by way and shape of the group, the worst share of `bound` it took.

    A product may be off by twice the rounding of its output and `SHARE` of what e4m3 itself costs (tensor cores add fp8 products
    with fewer bits than fp32 has). A lost adapter or a scale that is 2 % wrong is more than that.
    """

    inner: Products
    found: dict[str, float] = field(default_factory=dict)
    SHARE = 0.25

    @property
    def error(self) -> float:
        return self.inner.error

    @property
    def padded_to(self) -> int:
        return self.inner.padded_to

    @property
    def holds(self) -> bool:
        return self.inner.holds

    def rows(self, group: Group, tokens: int, back: bool = False) -> Rows | None:
        return self.inner.rows(group, tokens, back)

    def project(
        self,
        group: Group,
        x: Tensor,
        out: Tensor,
        bias: Tensor | None,
        mask: Dropout | None,
        rows: Rows | None = None,
        residual: Tensor | None = None,
    ) -> Tensor | None:
        assert mask is None and bias is None, "the gate has neither"
        left = x[:, : group.width].clone()
        xa = self.inner.project(group, x, out, bias, mask, rows, residual)
        w, sb, a = _matrices(group)
        small = (left.float() @ a.to(x.dtype).float().T).to(x.dtype).float() @ sb.T + (0 if residual is None else residual.float())
        self._judge("forward", group, out, by_row(left) @ weight_forward(w, sb).T + small, left.float() @ w.T + small)
        return xa

    def project_back(self, group: Group, dy: Tensor, out: Tensor | None, mask: Dropout | None, rows: Rows | None = None) -> None:
        left = dy[:, : group.rows].clone()
        self.inner.project_back(group, dy, out, mask, rows)
        if out is None:
            return
        w, sb, a = _matrices(group)
        small = (left.float() @ sb.to(dy.dtype).float()).to(dy.dtype).float() @ a
        self._judge("back", group, out, by_row(left) @ weight_back(w, a) + small, left.float() @ w + small)

    def _judge(self, way: str, group: Group, got: Tensor, stated: Tensor, exact: Tensor) -> None:
        error, rounding = (got.float() - stated).norm(), (stated.to(got.dtype).float() - stated).norm()
        share = float(error / (2 * rounding + self.SHARE * (stated - exact).norm()))
        name = f"{way} {group.rows} x {group.width}"
        self.found[name] = max(self.found.get(name, 0.0), share if share == share else math.inf)


def _matrices(group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 W `[N, K]`, s*B `[N, R]` and A `[R, K]` of one of our groups."""
    parts = [formats.dequantize(m.weight, torch.float32) if isinstance(m.weight, Packed) else m.weight for m in group.members]
    w = torch.cat([p.float() for p in parts])
    sb, a = w.new_zeros(group.rows, group.rank), w.new_zeros(group.rank, group.width)
    for m, n, r in zip(group.members, group.row_slices, group.rank_slices, strict=True):
        if m.lora is not None and r is not None:
            sb[n, r], a[r] = m.lora.scale * m.lora.b.detach().float(), m.lora.a.detach().float()
    return w, sb, a
