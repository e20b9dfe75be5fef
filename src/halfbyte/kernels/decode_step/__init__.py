"""What stands between the products of one token step: norm, attention with rotation and cache, the likeliest token. Few rows.

Why apart from training's kernels: a step of one token is bound by how fast its launches follow each other. So attention also norms
and turns its heads and writes the cache, cuts the cache into pieces so that every multiprocessor has one, and joins them, in one
launch; on sm_90 each launch starts, and reads the cache, while the one before it ends. Positions are read on the device: a step is
the same launches for every token, in one CUDA graph.

Letters: M rows, P places of the cache, S pieces, H query heads, G key/value heads, d head size, r elements of a head that turn.
"""

from __future__ import annotations

from torch import Tensor

from halfbyte.kernels.decode_step import reference
from halfbyte.kernels.decode_step.reference import Heads, Scratch, Tops
from halfbyte.kernels.dispatch import twin
from halfbyte.kernels.norm import NormSpec

__all__ = ["Heads", "Scratch", "Tops", "attend", "likeliest", "normalise"]


def normalise(x: Tensor, spec: NormSpec, weight: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    """out = norm(x), both `[M, width]` with strided rows; out may be x."""
    if twin(x.device) != "fused":
        reference.normalise(x, spec, weight, bias, out)
        return
    from halfbyte.kernels.decode_step import fused

    fused.normalise(x, spec, weight, bias, out)


def attend(
    qkv: Tensor, position: Tensor, heads: Heads, cos: Tensor | None, sin: Tensor | None, keys: Tensor, values: Tensor,
    scratch: Scratch, out: Tensor, feed: Tensor | None = None, fed: Tensor | None = None,
) -> None:  # fmt: skip
    """out `[M, H d]` = attention of qkv `[M, (H + 2 G) d]`, heads normed and turned, over places 0..position (the window).

    Keys and values of qkv are written into the cache at `position`. position: int64 `[M]`. cos, sin: `[P, r]`. keys, values:
    `[M, P, G, d]`, of one layer. On a GPU an early launch reads `position` and the older places: what wrote them must have ended
    before the launch in front of this one began. feed `[R, H d]`, fed fp32 `[H, >= M, R]`: where given, what each head of `out`
    makes of its columns of `feed` is left in `fed`; the sum over heads is `out feed^T`.
    """
    if twin(qkv.device) != "fused":
        reference.attend(qkv, position, heads, cos, sin, keys, values, out, feed, fed)
        return
    from halfbyte.kernels.decode_step import fused

    fused.attend(qkv, position, heads, cos, sin, keys, values, scratch, out, feed, fed)


def likeliest(scores: Tensor, tops: Tops, out: Tensor) -> None:
    """out, int64 `[M]` = the first column of the largest of each row of scores `[M, V]`. tops: scratch."""
    if twin(scores.device) != "fused":
        reference.likeliest(scores, out)
        return
    from halfbyte.kernels.decode_step import fused

    fused.likeliest(scores, tops, out)
