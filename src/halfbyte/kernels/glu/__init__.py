"""`glu`: h = act(gate) * up, and its backward in place.

Why in place: gate and up are the largest tensors a layer keeps, and backward needs three of their size (h for the adapter of the
product that follows, d gate, d up). They take the places of dh, gate and up: nothing new is allocated.
Cost: forward reads two and writes one, backward reads three and writes three.

Letters: T tokens, F features. Tensors are `[T, F]` with stride 1 along F and any row stride.
"""

from __future__ import annotations

from torch import Tensor

from halfbyte.kernels.dispatch import twin
from halfbyte.kernels.glu import reference
from halfbyte.kernels.glu.reference import Activation

__all__ = ["Activation", "glu", "glu_backward"]


def glu(gate: Tensor, up: Tensor | None, activation: Activation, out: Tensor) -> None:
    """out = act(gate) * up; without `up`, act(gate). `out` may be the memory of `gate` or `up`."""
    if twin(gate.device) == "fused":
        from halfbyte.kernels.glu import fused

        fused.glu(gate, up, activation, out)
    else:
        reference.glu(gate, up, activation, out)


def glu_backward(dh: Tensor, gate: Tensor, up: Tensor | None, activation: Activation) -> None:
    """In place: dh becomes h = act(gate) * up, gate becomes d gate, up becomes d up."""
    if twin(dh.device) == "fused":
        from halfbyte.kernels.glu import fused

        fused.glu_backward(dh, gate, up, activation)
    else:
        reference.glu_backward(dh, gate, up, activation)
