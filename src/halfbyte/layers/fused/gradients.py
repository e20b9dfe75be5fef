"""Where the gradients of A and B go: added to the run's flat fp32 buffers inside the product, or returned to autograd.

In place is for a training loop that owns the buffers (`optim.flat`): a microbatch then costs no addition and no memory. It bypasses
autograd's hooks on those parameters, so it is asked for, never guessed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.kernels.outer import Outer, outer


class Gradients:
    """The gradients of one backward call. waiting: products for B's, which are made together; their operands stay until then."""

    def __init__(self, in_place: bool) -> None:
        self.in_place = in_place
        self.found: dict[int, Tensor] = {}
        self.waiting: list[Outer] = []

    def settle(self) -> None:
        """Makes the products that wait."""
        if self.waiting:
            outer(self.waiting)
            self.waiting = []

    def total(self, parameter: Tensor) -> Tensor:
        """The fp32 tensor that collects the gradient of `parameter`."""
        if self.in_place:
            assert parameter.grad is not None, "gradients in place need the run's buffers (optim.flat.flatten)"
            return parameter.grad
        key = id(parameter)
        if key not in self.found:
            self.found[key] = torch.zeros_like(parameter)
        return self.found[key]

    def stacked(self, parameters: list[Tensor]) -> Tensor | None:
        """One tensor `[sum of r, K]` over the gradients of several A's where they lie one behind the other, else None."""
        if not self.in_place:
            return None
        totals = [self.total(p) for p in parameters]
        end = totals[0].data_ptr()
        for total in totals:
            if total.data_ptr() != end or not total.is_contiguous():
                return None
            end += total.numel() * total.element_size()
        width = totals[0].shape[1]
        return totals[0].as_strided((sum(t.shape[0] for t in totals), width), (width, 1))
