"""The layer forwards, in stages. Each stage fills what is missing of `Activations`, so the same code recomputes in backward.

Letters: T tokens, H hidden, N outputs of a group, R its ranks, F features of the MLP. A buffer `[T, K + R]` holds a group's input
and room for XA behind it; `[T, N + R]` a group's output and room for what backward puts behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfbyte.kernels import attention, fp8, rotary
from halfbyte.kernels.attention import Documents, Method
from halfbyte.kernels.dropout import Dropout
from halfbyte.kernels.fp8 import Rows
from halfbyte.kernels.products import Products
from halfbyte.layers.fused.keep import Keep
from halfbyte.layers.fused.parts import LayerParts, Norm
from halfbyte.layers.fused.projection import Projection
from halfbyte.layers.structure import Structure


@dataclass(frozen=True)
class Call:
    """What a layer is called with beside its input. cos, sin: `[T, r]` or None. mask: the dropout of the adapters' inputs."""

    parts: LayerParts
    keep: Keep
    documents: Documents
    cos: Tensor | None
    sin: Tensor | None
    mask: Dropout | None
    products: Products
    in_place: bool
    room: Room


class Room:
    """What the layers of a model hand to each other: the last gradient with the room behind it, and the rotary tables.

    Why: autograd passes on a view of it, and the layer below wants the columns behind (its s dY B) without a copy. The buffer is
    held until then, so a gradient at its address is that gradient.
    """

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.rows: Rows | None = None
        self._tables: tuple[object, int, Tensor, Tensor] | None = None

    def tables(self, tokens: int, embeddings: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
        """cos and sin `[T, r]` of tables `[1 or B, S, r]`: made once for layers that are called with the same ones."""
        if embeddings is None:
            return None, None
        known = self._tables
        if known is None or known[0] is not embeddings or known[1] != tokens:
            cos, sin = (t.reshape(-1, t.shape[-1]) for t in embeddings)
            times = tokens // cos.shape[0]
            known = (embeddings, tokens, cos if times == 1 else cos.repeat(times, 1), sin if times == 1 else sin.repeat(times, 1))
            self._tables = known
        return known[2], known[3]

    def leave(self, buffer: Tensor, width: int, rows: Rows | None = None) -> Tensor:
        """The view `[T, width]` to hand down. rows: the same gradient in e4m3, where products are in fp8."""
        self.buffer, self.rows = buffer, rows
        return buffer[:, :width]

    def buffer_of(self, grad: Tensor, p: Projection) -> Tensor | None:
        """The `[T, N + R]` that was left and that `grad` `[T, N]` stands in: nobody else has it."""
        found, shape = self.buffer, (grad.shape[0], p.rows + p.rank)
        if found is None or found.shape != shape or found.data_ptr() != grad.data_ptr() or found.stride() != grad.stride():
            return None
        return found

    def take(self, grad: Tensor, p: Projection) -> tuple[Tensor, Rows | None]:
        """`[T, N + R]` that begins with `grad` `[T, N]`: the buffer it stands in, with its `rows`, or a copy."""
        found, rows = self.buffer_of(grad, p), self.rows
        self.buffer = self.rows = None
        if found is not None:
            return found, rows
        out = buffer(p, grad, p.rows)
        out[:, : p.rows].copy_(grad)
        return out, None


@dataclass
class Activations:
    """What exists of a layer between forward and backward; None is not there (yet, or any more).

    x `[T, H]`. normed, normed_mlp: `[T, H + R]`. qkv `[T, N + R]`: rotated in place, or before the q/k norm. q, k: what attention
    read where a q/k norm stands before it. attended `[T, N_q]`. attended_raw, mlp_raw `[T, H]`: inputs of the norms behind the
    branches. mid `[T, H]`. rows_mlp: normed_mlp in e4m3, until it is multiplied. inputs `[T, N + R]`: gate and up. xa_*: XA
    `[T, R]` of the groups. rstd_*, mean_*: fp32 `[T]`.
    """

    x: Tensor | None = None
    normed: Tensor | None = None
    rstd: Tensor | None = None
    mean: Tensor | None = None
    qkv: Tensor | None = None
    q: Tensor | None = None
    k: Tensor | None = None
    q_rstd: Tensor | None = None
    k_rstd: Tensor | None = None
    attended: Tensor | None = None
    residuals: tuple[Tensor, ...] = ()
    method: Method | None = None
    attended_raw: Tensor | None = None
    attended_rstd: Tensor | None = None
    attended_mean: Tensor | None = None
    mid: Tensor | None = None
    normed_mlp: Tensor | None = None
    mid_rstd: Tensor | None = None
    mid_mean: Tensor | None = None
    inputs: Tensor | None = None
    mlp_raw: Tensor | None = None
    mlp_rstd: Tensor | None = None
    mlp_mean: Tensor | None = None
    rows_mlp: Rows | None = None
    xa_qkv: Tensor | None = None
    xa_out: Tensor | None = None
    xa_inputs: Tensor | None = None
    xa_down: Tensor | None = None


def forward(call: Call, x: Tensor) -> tuple[Tensor, Activations]:
    """x `[T, H]` through the layer; and what `keep` keeps of all that was computed on the way, x among it."""
    a = Activations(x=x)
    fill(call, a, forget=True)
    out = _down_in_tiles(call, a) if call.keep.tile else down(call, a)
    _forget_the_rest(call.keep, a)
    return out, a


def fill(call: Call, a: Activations, forget: bool = False) -> None:
    """Computes what is missing of everything that backward reads, from the input on. forget: what is not kept goes again as soon as
    nothing here reads it any more. The norms' numbers a row are small and stay, and so does XA of what is not computed again."""
    if a.qkv is None:
        projected(call, a)
    if a.attended is None:
        s = call.parts.structure
        q, k, v = heads(call, a)
        a.method = attention.method(q, k, v, call.documents, scale_of(s), s.window, s.cap)
        out, a.residuals = a.method.forward(q, k, v, call.documents, scale_of(s), s.window, s.cap)
        a.attended = out.flatten(1)
        del q, k, v, out
    if forget:
        _forget_qkv(call, a)
    if a.mid is None:
        _mid(call, a)
    if forget and not call.keep.attended:
        a.attended, a.residuals = None, ()
    if a.inputs is None and not call.keep.tile:
        mlp_inputs(call, a)


def _forget_qkv(call: Call, a: Activations) -> None:
    """What attention has read, and its input where the MLP has one of its own; residuals that would hold what is to go or to wait
    elsewhere."""
    keep = call.keep
    if a.method is not None and a.method.holds_operands and not (keep.here("qkv") and keep.here("attended")):
        a.residuals = ()
    a.xa_qkv = _outliving(a.xa_qkv, keep.here("normed")) if keep.qkv else None
    if not keep.qkv:
        a.qkv = a.q = a.k = None
    if not keep.normed and not call.parts.structure.norms.parallel:
        a.normed = None


def _forget_the_rest(keep: Keep, a: Activations) -> None:
    a.xa_inputs = _outliving(a.xa_inputs, keep.here("normed")) if keep.inputs else None
    if not keep.normed:
        a.normed = a.normed_mlp = None
    if not keep.mid:
        a.mid = a.attended_raw = a.xa_out = None
    if not keep.inputs:
        a.inputs = a.mlp_raw = None


def part_with_normed(a: Activations) -> None:
    """Forgets the norm of the layer's input, not the XA that may stand behind it; `normed` makes it again."""
    a.xa_qkv = _outliving(a.xa_qkv, False)
    a.normed = None


def buffer(p: Projection, like: Tensor, width: int) -> Tensor:
    """`[T, width + R]`."""
    return like.new_empty(like.shape[0], width + p.rank)


def project(
    call: Call, p: Projection, x: Tensor, out: Tensor, rows: Rows | None = None, residual: Tensor | None = None
) -> Tensor | None:
    """Y of a group, plus `residual`, into `out`; XA `[T, R]`. rows: x quantised already, where products are in fp8."""
    return call.products.project(p.group, x, out, p.bias, call.mask, rows, residual)


def quantised(call: Call, p: Projection, like: Tensor | None) -> Rows | None:
    """Where the kernel in front of a group writes its input in e4m3 too; None where products are not in fp8."""
    assert like is not None
    return call.products.rows(p.group, like.shape[0])


def scale_of(s: Structure) -> float:
    """The factor of q kᵀ."""
    return s.scaling if s.scaling is not None else float(s.head_size) ** -0.5


def _outliving(xa: Tensor | None, stays: bool) -> Tensor | None:
    """XA where it stands if its buffer stays, else a copy that outlives it."""
    return xa if stays or xa is None else xa.clone()


def through(
    n: Norm | None, x: Tensor, delta: Tensor | None, out: Tensor, rows: Rows | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """residual = x + delta, out = norm(residual), quantised too with `rows`; a copy where there is no norm. Returns residual,
    rstd, mean."""
    if n is not None:
        return fp8.add_norm(x, delta, n.spec, n.weight, n.bias, out, rows)
    residual = x if delta is None else x + delta
    out.copy_(residual)
    return residual, None, None


def normed(call: Call, a: Activations, rows: Rows | None = None) -> Tensor:
    """The attention's input `[T, H + R]`, computed if it is not there."""
    if a.normed is None:
        p = call.parts
        assert a.x is not None
        a.normed = buffer(p.qkv, a.x, p.qkv.width)
        _, a.rstd, a.mean = through(p.before_attention, a.x, None, a.normed[:, : p.qkv.width], rows)
    return a.normed


def projected(call: Call, a: Activations) -> None:
    """q, k and v, normed and rotated."""
    p, s = call.parts, call.parts.structure
    rows = None if a.normed is not None or p.before_attention is None else quantised(call, p.qkv, a.x)
    source = normed(call, a, rows)
    a.qkv = buffer(p.qkv, source, p.qkv.rows)
    a.xa_qkv = project(call, p.qkv, source, a.qkv[:, : p.qkv.rows], rows)
    q, k, _ = split(call.parts.structure, a.qkv)
    if s.qk_norm == "none":
        rotary.rotate(q, k, call.cos, call.sin, s.rotation)
        return
    assert p.q_norm is not None and p.k_norm is not None and p.q_norm.weight is not None and p.k_norm.weight is not None
    if s.qk_norm == "head":
        found = rotary.norm_rotate(q, k, p.q_norm.weight, p.k_norm.weight, p.q_norm.spec, call.cos, call.sin, s.rotation)
        a.q, a.k, a.q_rstd, a.k_rstd = found
        return
    a.q, a.k = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
    _, a.q_rstd, _ = through(p.q_norm, q.flatten(1), None, a.q.flatten(1))
    _, a.k_rstd, _ = through(p.k_norm, k.flatten(1), None, a.k.flatten(1))
    rotary.rotate(a.q, a.k, call.cos, call.sin, s.rotation)


def split(s: Structure, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views `[T, heads, d]` of q, k and v in a buffer `[T, N + R]`."""
    at = s.heads * s.head_size
    width = s.kv_heads * s.head_size
    q, k, v = qkv[:, :at], qkv[:, at : at + width], qkv[:, at + width : at + 2 * width]
    return q.unflatten(1, (-1, s.head_size)), k.unflatten(1, (-1, s.head_size)), v.unflatten(1, (-1, s.head_size))  # type: ignore[no-untyped-call]


def heads(call: Call, a: Activations) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as attention reads them."""
    assert a.qkv is not None
    q, k, v = split(call.parts.structure, a.qkv)
    return q if a.q is None else a.q, k if a.k is None else a.k, v


def _mid(call: Call, a: Activations) -> None:
    """The residual between the branches (for parallel branches: input plus attention), and the norm behind it in the same pass."""
    p, s = call.parts, call.parts.structure
    assert a.x is not None and a.attended is not None
    delta = torch.empty_like(a.x)
    # With nothing between the product and the sum, the product adds; or else the norm does.
    plain = p.after_attention is None and s.residual_multiplier == 1.0
    a.xa_out = project(call, p.out, a.attended, delta, residual=a.x if plain else None)
    if p.after_attention is not None:
        a.attended_raw = delta
        delta = torch.empty_like(a.x)
        _, a.attended_rstd, a.attended_mean = through(p.after_attention, a.attended_raw, None, delta)
    if s.residual_multiplier != 1.0:
        delta.mul_(s.residual_multiplier)
    if s.norms.parallel:
        a.mid = delta if plain else delta.add_(a.x)
        return
    x, more = (delta, None) if plain else (a.x, delta)
    a.normed_mlp = buffer(p.inputs, a.x, p.inputs.width)
    a.rows_mlp = quantised(call, p.inputs, a.x) if a.inputs is None and p.before_mlp is not None and not call.keep.tile else None
    a.mid, a.mid_rstd, a.mid_mean = through(p.before_mlp, x, more, a.normed_mlp[:, : p.inputs.width], a.rows_mlp)


def normed_mlp(call: Call, a: Activations) -> Tensor:
    """The MLP's input `[T, H + R]`, computed if it is not there.

    Where parallel branches share a norm it is a copy, since the room behind the attention's input is taken.
    """
    if a.normed_mlp is not None:
        return a.normed_mlp
    p = call.parts
    parallel = p.structure.norms.parallel
    shared = parallel and p.before_mlp is None
    source = normed(call, a)[:, : p.inputs.width] if shared else a.x if parallel else a.mid
    assert source is not None
    a.normed_mlp = buffer(p.inputs, source, p.inputs.width)
    _, a.mid_rstd, a.mid_mean = through(p.before_mlp, source, None, a.normed_mlp[:, : p.inputs.width])
    return a.normed_mlp


def mlp_inputs(call: Call, a: Activations) -> None:
    p = call.parts
    source = normed_mlp(call, a)
    a.inputs = buffer(p.inputs, source, p.inputs.rows)
    rows, a.rows_mlp = a.rows_mlp, None
    a.xa_inputs = project(call, p.inputs, source, a.inputs[:, : p.inputs.rows], rows)


def gate_up(call: Call, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
    """Views of gate and up `[T, F]`; up is None in an MLP without a gate."""
    f = call.parts.down.width
    return inputs[:, :f], inputs[:, f : 2 * f] if call.parts.structure.gated else None


def down(call: Call, a: Activations) -> Tensor:
    """The layer's output `[T, H]`."""
    p, s = call.parts, call.parts.structure
    assert a.inputs is not None and a.mid is not None
    h = buffer(p.down, a.inputs, p.down.width)
    gate, up = gate_up(call, a.inputs)
    rows = quantised(call, p.down, h)
    fp8.glu(gate, up, p.activation, h[:, : p.down.width], rows)
    delta = torch.empty_like(a.mid)
    # With nothing between the product and the sum, the product adds.
    plain = p.after_mlp is None and s.residual_multiplier == 1.0
    a.xa_down = _outliving(project(call, p.down, h, delta, rows, a.mid if plain else None), stays=False)
    if plain:
        return delta
    if p.after_mlp is not None:
        a.mlp_raw = delta
        delta = torch.empty_like(a.mid)
        _, a.mlp_rstd, a.mlp_mean = through(p.after_mlp, a.mlp_raw, None, delta)
    if s.residual_multiplier != 1.0:
        delta.mul_(s.residual_multiplier)
    return delta.add_(a.mid)


def tiles(call: Call, a: Activations) -> Iterator[tuple[Call, Activations, slice]]:
    """The MLP for `keep.tile` tokens at a time: what it is called with, views of what it reads, and which tokens those are.

    Nothing in an MLP looks at another token, so a tile gives the same numbers; dA and dB are summed tile by tile.
    """
    assert a.x is not None
    for start in range(0, a.x.shape[0], call.keep.tile):
        at = slice(start, start + call.keep.tile)
        part = Activations()
        for name in _OF_MLP:
            whole: Tensor | None = getattr(a, name)
            setattr(part, name, None if whole is None else whole[at])
        yield call if call.mask is None else replace(call, mask=replace(call.mask, start=start)), part, at


_OF_MLP = ("x", "mid", "normed_mlp", "mid_rstd", "mid_mean", "xa_down")
"""What an MLP reads of the rest of its layer."""


def _down_in_tiles(call: Call, a: Activations) -> Tensor:
    """`down`, with gate and up of a tile at a time."""
    normed_mlp(call, a)
    assert a.x is not None
    out, xa = torch.empty_like(a.x), []
    for part_call, part, at in tiles(call, a):
        mlp_inputs(part_call, part)
        out[at] = down(part_call, part)
        xa += [] if part.xa_down is None else [part.xa_down]
    a.xa_down = torch.cat(xa) if xa else None
    return out
