"""The method `cudnn`: cuDNN's fused attention over documents of one length, `[D, heads, n, d]` as strided views.

Why: on Hopper it is far ahead of FlashAttention 2, which is what torch has built in. GQA runs in the kernel, and q, k and v may
be views of one packed buffer. Cost: kept for backward, the log-sum-exp in fp32. Its backward is not deterministic in torch.
Ragged documents are left out on purpose: torch builds cuDNN's graph anew at every such call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.kernels.attention import heads
from halfbyte.kernels.attention.documents import Documents

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


@dataclass(frozen=True)
class Cudnn:
    """Keeps for backward: log-sum-exp `[D, H, n]` and the (unused) state of the random numbers."""

    name: str = "cudnn"

    @property
    def holds_operands(self) -> bool:
        """No: the log-sum-exp is its own."""
        return False

    def obstacle(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None, cap: float | None) -> str | None:
        """Why it cannot run, or None."""
        tokens, _, size = q.shape
        if q.device.type != "cuda":
            return f"it needs CUDA, not {q.device.type}"
        if q.dtype not in (torch.bfloat16, torch.float16):
            return f"it needs 16 bits, not {q.dtype}"
        if torch.cuda.get_device_capability(q.device) < (8, 0):
            return "it needs compute capability 8.0"
        if documents.equal is None:
            return "documents of several lengths"
        if tokens == documents.equal:
            return "documents of one token"
        if deterministic():
            return "its backward is not deterministic"
        if documents.window(window) is not None:
            return "it has no sliding window here"
        if cap is not None:
            return "it has no soft cap here"
        if size % 8 or size > 128:
            return f"head size {size} is not a multiple of 8 up to 128"
        return heads.overflow(q, k, v)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None, cap: float | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """out `[T, H, d]` contiguous, and the residuals."""
        count = documents.equal
        assert count is not None
        found = _forward(*(_batched(x, count) for x in (q, k, v)), None, True, 0.0, True, False, scale=scale)
        return found[0].transpose(1, 2).contiguous().view(q.shape), (found[1], found[6], found[7])

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        residuals: tuple[Tensor, ...],
        documents: Documents,
        scale: float,
        window: int | None,
        cap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq `[T, H, d]`, dk, dv `[T, G, d]`."""
        count = documents.equal
        assert count is not None
        n = q.shape[0] // count
        lse, seed, offset = residuals

        def run(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, part: heads.Part) -> tuple[Tensor, Tensor, Tensor]:
            # torch finds cuDNN's graph by the strides of q, k and v alone: those of dout must be the same at every call.
            grads = _backward(
                *(_batched(x, count) for x in (dout.contiguous(), q, k, v, out)),
                *(lse[:, part.first : part.last].contiguous(), seed, offset, None, None, None, n, n, 0.0, True),
                scale=scale,
            )
            dq, dk, dv = (g.transpose(1, 2).flatten(0, 1) for g in grads)
            return dq, dk, dv

        return heads.in_parts(run, dout, q, k, v, out)


def _batched(x: Tensor, count: int) -> Tensor:
    """`[T, h, d]` -> `[D, h, n, d]`, a view."""
    return x.unflatten(0, (count, -1)).transpose(1, 2)  # type: ignore[no-untyped-call, no-any-return]


def deterministic() -> bool:
    """Whether torch's flag asks for bit-equal runs."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
