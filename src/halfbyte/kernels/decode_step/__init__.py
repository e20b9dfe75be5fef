"""What stands between the products of one token step: norm, rotation into the cache, attention over it. Few rows, small launches.

Why apart from training's kernels: a step of one token is bound by how fast its launches follow each other, so here the rotation
also norms heads and writes the cache, attention cuts the cache into pieces so that every multiprocessor has one, and on sm_90 each
launch starts while the one before it ends. Positions are read on the device: a step is the same launches for every token, in one
CUDA graph.

Letters: M rows, P places of the cache, S pieces, H query heads, G key/value heads, d head size, r elements of a head that turn.
"""

from __future__ import annotations

from torch import Tensor

from halfbyte.kernels.decode_step import reference
from halfbyte.kernels.decode_step.reference import Heads
from halfbyte.kernels.dispatch import twin
from halfbyte.kernels.norm import NormSpec
from halfbyte.kernels.packed_gemv.product import Pieces

__all__ = ["Heads", "attend", "normalise", "place"]


def normalise(x: Tensor, spec: NormSpec, weight: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    """out = norm(x), both `[M, width]` with strided rows; out may be x."""
    if twin(x.device) != "fused":
        reference.normalise(x, spec, weight, bias, out)
        return
    from halfbyte.kernels.decode_step import fused

    fused.normalise(x, spec, weight, bias, out)


def place(
    qkv: Tensor, position: Tensor, heads: Heads, cos: Tensor | None, sin: Tensor | None, q: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Norms and turns the heads of qkv `[M, (H + 2 G) d]`: queries into q `[M, H d]`, keys and values into the cache at `position`.

    position: int64 `[M]`. cos, sin: `[P, r]`. keys, values: `[M, P, G, d]`, of one layer.
    """
    if twin(qkv.device) != "fused":
        reference.place(qkv, position, heads, cos, sin, q, keys, values)
        return
    from halfbyte.kernels.decode_step import fused

    fused.place(qkv, position, heads, cos, sin, q, keys, values)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, position: Tensor, heads: Heads, partial: Tensor, out: Tensor,
    feeds: Pieces | None = None,
) -> None:  # fmt: skip
    """out `[M, H d]` = attention of q over places 0..position of the cache (the window's last ones).

    partial: fp32 `[M, H, S, d + 2]`, scratch; S, its pieces, a power of two. feeds: A x of the group that reads `out`, a head each.
    """
    if twin(q.device) != "fused":
        reference.attend(q, keys, values, position, heads, out)
        return
    from halfbyte.kernels.decode_step import fused

    fused.attend(q, keys, values, position, heads, partial, out, feeds)
