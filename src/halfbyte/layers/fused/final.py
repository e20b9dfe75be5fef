"""The norm behind the last layer, as one node of autograd: found by what the model returns, and run by `kernels.norm`.

Why: transformers' norm keeps its input in fp32 and makes four tensors of that size on the way back, where nothing else of a step is
as large any more: it was the peak of a step that keeps everything. Here it keeps its input, which the last layer made anyway.
Its parameters stay in their place under their names; only what is frozen and proven equal (`parts.read_norm`) is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfbyte.kernels import norm
from halfbyte.layers import probe
from halfbyte.layers.fused.forward import Room
from halfbyte.layers.fused.parts import Norm, read_norm
from halfbyte.layers.structure import NotUnderstood
from halfbyte.layers.swap import replace


class FinalNorm(nn.Module):
    """Computes what `original` does. behind: makes the buffer `[T, H + R]` in which the last layer wants its gradient."""

    def __init__(self, original: nn.Module, n: Norm, room: Room, behind: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        for name, parameter in original.named_parameters():
            self.register_parameter(name, parameter)
        # Out of sight of `modules`: it is there for other dtypes, and to be put back.
        self.__dict__["original"] = original
        self.n, self.room, self.behind = n, room, behind

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., H]`."""
        if self.n.weight is None or x.dtype != self.n.weight.dtype:
            out: Tensor = self.__dict__["original"](x)
            return out
        flat = x.reshape(-1, x.shape[-1])
        found: Tensor = _Node.apply(flat, self.n, self.room, self.behind)  # type: ignore[no-untyped-call]
        return found.view(x.shape)

    def extra_repr(self) -> str:
        return f"{self.n.spec.kind}, eps={self.n.spec.eps:g}, run by halfbyte.layers.fused.final"


class _Node(torch.autograd.Function):
    """(x `[T, H]`, norm, where its gradient goes) -> norm(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: Norm, room: Room, behind: Callable[[Tensor], Tensor]) -> Tensor:
        out = torch.empty_like(x)
        _, rstd, mean = norm.add_norm(x, None, n.spec, n.weight, n.bias, out)
        ctx.save_for_backward(x, rstd, mean)
        ctx.n, ctx.room, ctx.behind = n, room, behind
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        x, rstd, mean = ctx.saved_tensors
        grad = grads[0] if grads[0].stride(1) == 1 else grads[0].contiguous()
        dx = ctx.room.leave(ctx.behind(x), x.shape[1])
        norm.norm_backward(grad, x, rstd, mean, ctx.n.spec, ctx.n.weight, None, dx)
        return dx, None, None, None


def fuse(model: PreTrainedModel, dtype: torch.dtype, room: Room, behind: Callable[[Tensor], Tensor]) -> str:
    """Puts `FinalNorm` in the place of the model's last norm; "" if it did, else the reason."""
    remove(model)
    path = _path(model)
    if path is None:
        return "no norm makes the last hidden state"
    module = model.get_submodule(path)
    if any(p.requires_grad for p in module.parameters()):
        return "it learns beside the adapter"
    try:
        found = read_norm(module)
    except NotUnderstood as reason:
        return str(reason)
    if found.weight is None or found.weight.dtype != dtype:
        return "its weight has another dtype than the activations"
    replace(model, path, FinalNorm(module, found, room, behind))
    return ""


def remove(model: PreTrainedModel) -> None:
    """The norm that was there before."""
    for path, module in list(model.named_modules()):
        if isinstance(module, FinalNorm):
            replace(model, path, module.__dict__["original"])


@torch.no_grad()
def _path(model: PreTrainedModel) -> str | None:
    """The norm (a module without hooks whose weight is a vector) whose output the base model returns as its last hidden state."""
    # The outputs are kept, so that no two have one address.
    made: dict[str, Tensor] = {}

    def watch(path: str) -> Callable[..., None]:
        return lambda module, args, out: made.update({path: out}) if isinstance(out, Tensor) else None

    handles = [
        m.register_forward_hook(watch(path))
        for path, m in model.named_modules()
        if getattr(m._parameters.get("weight"), "ndim", 0) == 1 and not m._forward_hooks and not m._forward_pre_hooks
    ]
    device = next(model.parameters()).device
    try:
        out = model.base_model(input_ids=torch.arange(probe.TOKENS, device=device)[None] + 1, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    last = out.last_hidden_state
    return next((path for path, t in made.items() if t.data_ptr() == last.data_ptr() and t.numel() == last.numel()), None)
