"""The layer backwards: the mirror of `forward`. Each gradient is written over its activation as soon as that is done with.

Letters as in `forward`. A gradient travels in a buffer with room behind it, so that [dY | s dY B] is one operand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.kernels import fp8, norm, rotary
from halfbyte.kernels.fp8 import Rows
from halfbyte.layers.fused import forward as stages
from halfbyte.layers.fused.forward import Activations, Call, buffer
from halfbyte.layers.fused.gradients import Gradients
from halfbyte.layers.fused.parts import Norm
from halfbyte.layers.fused.projection import Projection, adapter_gradients


def backward(call: Call, a: Activations, grad: Tensor, gradients: Gradients, want_x: bool) -> Tensor | None:
    """Gradient of the layer's input `[T, H]` (None if unwanted) from that of its output; A's and B's go to `gradients`.

    Consumes `a`: nothing in it is what its name says afterwards.
    """
    p, norms = call.parts, call.parts.structure.norms
    stages.fill(call, a)
    if call.keep.tile and a.normed is not None and not call.keep.normed and not norms.parallel:
        # In rows so long that the MLP runs in tiles a norm costs nothing, and what it made is a tenth of what is there.
        stages.part_with_normed(a)
    own = call.room.buffer_of(grad, p.out)
    d_source = _mlp_in_tiles(call, a, grad, gradients) if call.keep.tile else _mlp(call, a, grad, gradients)
    if norms.parallel:
        d_out, rows = _branch(call, grad, p.after_attention, a.attended_raw, a.attended_rstd, a.attended_mean, p.out)
        d_normed = _attention(call, a, d_out, gradients, want_x, rows)
        return _parallel_input(call, a, grad, d_source, d_normed) if want_x and d_normed is not None else None
    # The gradient of the residual in the middle is written over that of the output, where its buffer is one of ours.
    d_mid = buffer(p.out, grad, p.out.rows) if own is None else own
    # With nothing between the sum and the branch, its gradient is the branch's, and quantised where it is made.
    plain = p.after_attention is None and p.structure.residual_multiplier == 1.0
    rows = _quantised(call, p.before_mlp, p.out, grad) if plain else None
    _through_norm(p.before_mlp, d_source, a.mid, a.mid_rstd, a.mid_mean, grad, d_mid[:, : p.out.rows], rows)
    a.mid = a.normed_mlp = None
    del d_source
    d_out = d_mid
    if not plain:
        d_above = d_mid[:, : p.out.rows]
        d_out, rows = _branch(call, d_above, p.after_attention, a.attended_raw, a.attended_rstd, a.attended_mean, p.out)
        a.attended_raw = None
    d_normed = _attention(call, a, d_out, gradients, want_x, rows)
    if not want_x or d_normed is None:
        return None
    below = buffer(p.down, d_normed, p.qkv.width)
    # The layer below is like this one, or it will not take what was left for it.
    down_below = plain and p.after_mlp is None
    rows = _quantised(call, p.before_attention, p.down, d_normed) if down_below else None
    dx = call.room.leave(below, p.qkv.width, rows)
    _through_norm(p.before_attention, d_normed, a.x, a.rstd, a.mean, d_mid[:, : p.out.rows], dx, rows)
    return dx


def _quantised(call: Call, n: Norm | None, p: Projection, like: Tensor) -> Rows | None:
    """Where the norm in front of the backward of `p` writes its gradient in e4m3 too; None where nobody wants it."""
    return None if n is None else call.products.rows(p.group, like.shape[0], back=True)


def _parallel_input(call: Call, a: Activations, grad: Tensor, d_source: Tensor, d_normed: Tensor) -> Tensor:
    """Both branches start at the layer's input: with a norm each, or with one for both."""
    p = call.parts
    dx = torch.empty_like(d_normed)
    if p.before_mlp is None:
        _through_norm(p.before_attention, d_normed.add_(d_source), a.x, a.rstd, a.mean, grad, dx)
        return dx
    between = torch.empty_like(dx)
    _through_norm(p.before_mlp, d_source, a.x, a.mid_rstd, a.mid_mean, grad, between)
    _through_norm(p.before_attention, d_normed, a.x, a.rstd, a.mean, between, dx)
    return dx


def _through_norm(
    n: Norm | None,
    d_out: Tensor,
    x: Tensor | None,
    rstd: Tensor | None,
    mean: Tensor | None,
    add: Tensor | None,
    out: Tensor,
    rows: Rows | None = None,
) -> None:
    """out = dnormᵀ d_out + add, quantised too with `rows`; without a norm, d_out + add."""
    if n is not None:
        assert x is not None and rstd is not None
        fp8.norm_backward(d_out, x, rstd, mean, n.spec, n.weight, add, out, rows)
    elif add is None:
        out.copy_(d_out)
    else:
        torch.add(d_out, add, out=out)


def _branch(
    call: Call, grad: Tensor, after: Norm | None, raw: Tensor | None, rstd: Tensor | None, mean: Tensor | None, p: Projection
) -> tuple[Tensor, Rows | None]:
    """The gradient of a branch's last product in a buffer with room behind it: through the multiplier and the norm behind it.

    And the same in e4m3, if it is there.
    """
    multiplier = call.parts.structure.residual_multiplier
    if after is None and multiplier == 1.0:
        return call.room.take(grad, p)
    out = buffer(p, grad, p.rows)
    d = out[:, : p.rows]
    if multiplier != 1.0:
        torch.mul(grad, multiplier, out=d)
        grad = d
    if after is not None:
        _through_norm(after, grad, raw, rstd, mean, None, d)
    return out, None


def _mlp(call: Call, a: Activations, grad: Tensor, gradients: Gradients) -> Tensor:
    """The gradient `[T, H]` of the MLP's (normed) input."""
    p = call.parts
    assert a.inputs is not None
    if p.after_mlp is not None and a.mlp_raw is None:
        stages.down(call, a)
    d_down, rows = _branch(call, grad, p.after_mlp, a.mlp_raw, a.mlp_rstd, a.mlp_mean, p.down)
    a.mlp_raw = None
    dh = grad.new_empty(grad.shape[0], p.down.width)
    gate, up = stages.gate_up(call, a.inputs)
    call.products.project_back(p.down.group, d_down, dh, call.mask, rows)
    rows = call.products.rows(p.inputs.group, grad.shape[0], back=True)
    fp8.glu_backward(dh, gate, up, p.activation, rows)  # dh is h now, gate and up are their gradients
    adapter_gradients(p.down, d_down, dh, a.xa_down, gradients, call.mask)
    del dh, d_down
    d_source = grad.new_empty(grad.shape[0], p.inputs.width)
    call.products.project_back(p.inputs.group, a.inputs, d_source, call.mask, rows)
    if p.inputs.rank:
        adapter_gradients(p.inputs, a.inputs, stages.normed_mlp(call, a), a.xa_inputs, gradients, call.mask)
    gradients.settle()
    a.inputs = None
    return d_source


def _mlp_in_tiles(call: Call, a: Activations, grad: Tensor, gradients: Gradients) -> Tensor:
    """`_mlp`, with gate, up and their gradients of a tile at a time."""
    d_source = grad.new_empty(grad.shape[0], call.parts.inputs.width)
    for part_call, part, at in stages.tiles(call, a):
        stages.mlp_inputs(part_call, part)
        d_source[at] = _mlp(part_call, part, grad[at], gradients)
    return d_source


def _attention(call: Call, a: Activations, d_out: Tensor, gradients: Gradients, want_x: bool, rows: Rows | None) -> Tensor | None:
    """The gradient of the attention's (normed) input `[T, H]`, if wanted. d_out `[T, N + R]` of the output projection; rows: it in
    e4m3."""
    p, s = call.parts, call.parts.structure
    assert a.attended is not None and a.qkv is not None and a.method is not None
    d_attended = torch.empty_like(a.attended)
    call.products.project_back(p.out.group, d_out, d_attended, call.mask, rows)
    adapter_gradients(p.out, d_out, a.attended, a.xa_out, gradients, call.mask)
    q, k, v = stages.heads(call, a)
    shape = (-1, s.heads, s.head_size)
    dq, dk, dv = a.method.backward(
        d_attended.view(shape), q, k, v, a.attended.view(shape), a.residuals, call.documents, stages.scale_of(s), s.window, s.cap
    )
    a.attended, a.residuals = None, ()
    d_qkv = _gathered(call, a, dq, dk, dv)
    a.q = a.k = None
    del q, k, v, dq, dk, dv, d_attended
    d_normed = d_out.new_empty(d_out.shape[0], p.qkv.width) if want_x else None
    call.products.project_back(p.qkv.group, d_qkv, d_normed, call.mask)
    if p.qkv.rank:
        adapter_gradients(p.qkv, d_qkv, stages.normed(call, a), a.xa_qkv, gradients, call.mask)
    gradients.settle()
    a.qkv = None
    return d_normed


def _gathered(call: Call, a: Activations, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
    """Gradients of q, k and v behind each other with room for the adapter, over the activations where those are not needed."""
    p, s = call.parts, call.parts.structure
    assert a.qkv is not None
    if s.qk_norm == "none":
        rotary.gather_backward(dq, dk, dv, call.cos, call.sin, s.rotation, a.qkv[:, : p.qkv.rows])
        return a.qkv
    q, k, _ = stages.split(s, a.qkv)
    out = torch.empty_like(a.qkv)
    assert p.q_norm is not None and p.k_norm is not None and a.q_rstd is not None and a.k_rstd is not None
    if s.qk_norm == "head":
        assert p.q_norm.weight is not None and p.k_norm.weight is not None
        rotary.norm_gather_backward(
            dq, dk, dv, q, k, a.q_rstd, a.k_rstd, p.q_norm.weight, p.k_norm.weight, p.q_norm.spec,
            call.cos, call.sin, s.rotation, out[:, : p.qkv.rows],
        )  # fmt: skip
        return out
    rotary.gather_backward(dq, dk, dv, call.cos, call.sin, s.rotation, out[:, : p.qkv.rows])
    for n, x, rstd, d in zip((p.q_norm, p.k_norm), (q, k), (a.q_rstd, a.k_rstd), stages.split(s, out)[:2], strict=True):
        norm.norm_backward(d.flatten(1), x.flatten(1), rstd, None, n.spec, n.weight, None, d.flatten(1))
    return out
