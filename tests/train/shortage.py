"""Memory that runs short on a CPU: the n-th allocation of a piece of code fails, as a GPU's allocator would."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Short(TorchDispatchMode):
    """Inside it, the allocations whose numbers (from 1) are in `fails` raise. made: so many were asked for.

    An allocation is an operation that returns a tensor which is no view and no argument: what is written in place allocates
    nothing.
    """

    def __init__(self, fails: Container[int] = ()) -> None:
        super().__init__()
        self.fails, self.made = fails, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(out.alias_info is None and "Tensor" in str(out.type) for out in func._schema.returns):
            self.made += 1
            if self.made in self.fails:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 2.00 MiB. (allocation {self.made})")
        return func(*args, **(kwargs or {}))
