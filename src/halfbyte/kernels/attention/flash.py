"""The method `flash`: FlashAttention over boundaries, `[T, heads, d]` without padding, GQA and windows in the kernel.

Why torch's own operators: version 2 is built in, so there is no wheel to install; versions 3 and 4 take its place through
torch's public switch where they are installed. Cost: kept for backward, the log-sum-exp in fp32, 4 bytes a token and head;
backward of version 2 takes (T + 128 D) · H · d fp32 numbers while it runs, more splits of it when it must be deterministic, and
writes dk and dv once for every query head before it sums them; of very long rows for a few heads at a time (`heads`).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.kernels.attention import heads as by_heads
from halfbyte.kernels.attention.documents import Documents

_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward

_MODULES = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute"}


def overflows(tokens: int, documents: int, heads: int, head_size: int) -> bool:
    """Whether backward of version 2 counts beyond 2^31 for the heads that run together: its fp32 dq has 128 rows more a document,
    heads rounded up."""
    rounded = -(-head_size // 32) * 32 if head_size <= 128 else -(-head_size // 64) * 64
    return (tokens + 128 * documents) * heads * rounded >= 2**31


def installed() -> list[Flash]:
    """FlashAttention 3 and 4, where torch knows them and their package is there."""
    try:
        from torch.nn.attention import list_flash_attention_impls
    except ImportError:
        return []
    known = list_flash_attention_impls()
    return [Flash(f"flash-{impl[-1]}", impl) for impl, module in _MODULES.items() if impl in known and _exists(module)]


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def current() -> str | None:
    """What runs behind torch's operators: None for version 2, which is built in."""
    try:
        from torch.nn.attention import current_flash_attention_impl
    except ImportError:
        return None
    return current_flash_attention_impl()


def activate(version: str | None) -> None:
    """Puts a version behind torch's operators, for the whole process; None brings version 2 back."""
    if current() == version:
        return
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    if version is None:
        restore_flash_attention_impl()
    else:
        activate_flash_attention_impl(version)


@dataclass(frozen=True)
class Flash:
    """Keeps for backward: log-sum-exp `[H, T]` and the (unused) state of the random numbers."""

    name: str = "flash"
    version: str | None = None

    @property
    def holds_operands(self) -> bool:
        """No: the log-sum-exp is its own."""
        return False

    def obstacle(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None, cap: float | None) -> str | None:
        """Why it cannot run, or None."""
        tokens, heads, size = q.shape
        if q.device.type != "cuda":
            return f"it needs CUDA, not {q.device.type}"
        if q.dtype not in (torch.bfloat16, torch.float16):
            return f"it needs 16 bits, not {q.dtype}"
        if torch.cuda.get_device_capability(q.device) < (8, 0):
            return "it needs compute capability 8.0"
        if size % 8 or size > 256:
            return f"head size {size} is not a multiple of 8 up to 256"
        if cap is not None:
            return "it has no soft cap"
        if overflows(tokens, documents.cu_seqlens.shape[0] - 1, by_heads.query_heads(tokens, heads, k.shape[1]), size):
            return f"{tokens} tokens of {heads} heads overflow its 32-bit offsets"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None, cap: float | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """out `[T, H, d]` contiguous, and the residuals."""
        activate(self.version)
        bounds, longest, left = _ranges(documents, window)
        out, lse, state, unused, _ = _forward(
            q, k, v, bounds, bounds, longest, longest, 0.0, True, False, scale=scale, window_size_left=left, window_size_right=0
        )
        return out.contiguous(), (lse, state, unused)

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
        """dq `[T, H, d]`, dk, dv `[T, G, d]`; deterministic when torch's flag asks for it."""
        activate(self.version)
        bounds, longest, left = _ranges(documents, window)
        lse, state, unused = residuals

        def run(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, part: by_heads.Part) -> tuple[Tensor, Tensor, Tensor]:
            dq, dk, dv = _backward(
                *(dout, q, k, v, out, lse[part.first : part.last], bounds, bounds, longest, longest, 0.0, True, state, unused),
                scale=scale,
                window_size_left=left,
                window_size_right=0,
            )
            return dq, dk, dv

        return by_heads.in_parts(run, dout, q, k, v, out)


def _ranges(documents: Documents, window: int | None) -> tuple[Tensor, int, int]:
    """Boundaries, longest document, keys to the left of a query (-1: all)."""
    window = documents.window(window)
    # With a longest document of one token the forward folds query heads together, and its log-sum-exp has another layout.
    return documents.cu_seqlens, max(documents.longest, 2), -1 if window is None else window - 1
