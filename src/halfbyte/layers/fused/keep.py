"""What a fused layer keeps between forward and backward; the rest is computed again.

Bytes a token (8B Llama 3, bf16): normed 16 KB, qkv 12 KB, attended 8 KB, mid 8 KB, inputs 56 KB; the layer's input, 8 KB, always.
The output of `down` is needed by nobody and never computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Keep:
    """normed: inputs of q/k/v and of gate/up. qkv: after rotation. attended: attention's output. mid: the residual between
    attention and MLP. inputs: outputs of gate and up. offload: the layer's input and all that is kept wait in host memory."""

    normed: bool = True
    qkv: bool = True
    attended: bool = True
    mid: bool = True
    inputs: bool = True
    offload: bool = False


EVERYTHING = Keep()
INPUTS = Keep(normed=False, qkv=False, attended=False, mid=False, inputs=False)
OFFLOADED = Keep(normed=False, inputs=False, offload=True)
"""Gate, up and the norms are computed again, the rest crosses the bus: on the GPU a layer keeps nothing."""
