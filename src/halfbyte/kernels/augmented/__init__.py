"""`augmented`: the weights that share an input, with their adapters beside them, as ONE matrix of one launch.

    S = [ W  s*B ]      W [N, K]: the members' weights on top of each other; s*B [N, R]: block structured (a member's rows meet
        [ A   -  ]      only its own columns, zeros elsewhere); A [R, K]: the members' A, padding rows zero; "-" is not written

    forward     X' = [X | X Aᵀ]          Y  = X'  [W | s*B]ᵀ      = X Wᵀ + s X Aᵀ Bᵀ
    backward    dY' = [dY | dY s*B]      dX = dY' [W ; A]         = dY W + s dY B A

Why: the adapter costs no GEMM of its own on the big operands, and q, k, v (gate, up) cost one GEMM instead of three (two).
Exact: W has the bits of `formats.dequantize`, A and s*B are one fp32 product of the masters and one rounding.
Cost: (N + R) (K + R) scratch; on CUDA a launch that reads 0.516 and writes 2 bytes a weight (nf4 nested to bf16).

Letters: N = rows of all members, K = width, r = a member's rank, R = Σ r rounded up to a multiple of `PADDED_TO`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from halfbyte.formats.packed import Packed
from halfbyte.kernels.augmented import reference
from halfbyte.kernels.dispatch import twin
from halfbyte.kernels.lora_linear.members import Member

__all__ = ["Group"]

LEAST = 16
"""Kernels count ranks by as many."""
PADDED_TO = 64
"""R is a multiple of this, unless a group is told otherwise (another multiple of `LEAST`): rows of S, and of what S is multiplied
with, begin with a cache line, or every load of a tile's row would touch two (an 8B's step is 1.8 % faster than with 16)."""


class Group:
    """The members, and where each stands in S. Built once a layer, used every step.

    members: weights `[N_i, K]` of one width K. padded_to: what R is a multiple of. rows: N. width: K. rank: R, 0 when nobody has
    an adapter.
    row_slices: a member's rows in S. rank_slices: a member's columns right of K and rows below N; None without an adapter.
    plan: what the Triton twin keeps between calls.
    The members' tensors may be written in place (an optimizer's update); when one moves to other memory, that is noticed.
    """

    __slots__ = ("_held", "float8", "float8_held", "members", "plan", "rank", "rank_slices", "row_slices", "rows", "width")

    def __init__(self, members: Sequence[Member], padded_to: int = PADDED_TO) -> None:
        assert padded_to % LEAST == 0, f"kernels count ranks by {LEAST}"
        self.members = tuple(members)
        self.width: int = self.members[0].weight.shape[1]
        assert all(len(m.weight.shape) == 2 and m.weight.shape[1] == self.width for m in self.members), "members differ in width"
        self.row_slices: list[slice] = []
        self.rank_slices: list[slice | None] = []
        rows = rank = 0
        for m in self.members:
            self.row_slices.append(slice(rows, rows := rows + m.weight.shape[0]))
            self.rank_slices.append(None if m.lora is None else slice(rank, rank := rank + m.lora.a.shape[0]))
        self.rows: int = rows
        self.rank: int = -(-rank // padded_to) * padded_to
        self._held: Tensor | None = None
        self.plan: object = None
        self.float8: object = None  # the plan of `kernels.fp8`
        self.float8_held = False  # whether `kernels.fp8` keeps the decoded weights of a call for the next

    @property
    def device(self) -> torch.device:
        """Where the members are."""
        weight = self.members[0].weight
        return weight.codes.device if isinstance(weight, Packed) else weight.device

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """S `[N + R, K + R]` in `dtype`: fresh, or the held one with s*B and A brought up to date; without adapters the members
        themselves (rows strided) where they lie behind each other in `dtype`."""
        if self.rank == 0 and self._held is None and (joined := self._joined(dtype)) is not None:
            return joined
        if self._held is not None:
            assert self._held.dtype == dtype, f"held in {self._held.dtype}, asked for {dtype}"
            self._write(self._held, weights=False)
            return self._held
        out = torch.empty(self.rows + self.rank, self.width + self.rank, dtype=dtype, device=self.device)
        self._write(out, weights=True)
        return out

    def _joined(self, dtype: torch.dtype) -> Tensor | None:
        """`[N, K]` over dense members of one storage that follow each other in `dtype`."""
        weights = [m.weight for m in self.members if isinstance(m.weight, Tensor)]
        if len(weights) < len(self.members) or any(w.dtype != dtype or w.stride(1) != 1 for w in weights):
            return None
        first = weights[0]
        stride, storage, end = first.stride(0), first.untyped_storage().data_ptr(), first.data_ptr()
        for w in weights:
            if w.stride(0) != stride or w.untyped_storage().data_ptr() != storage or w.data_ptr() != end:
                return None
            end += w.shape[0] * stride * w.element_size()
        return first.detach().as_strided((self.rows, self.width), (stride, 1))

    def _write(self, out: Tensor, weights: bool) -> None:
        if twin(out.device) == "fused":
            from halfbyte.kernels.augmented import fused

            fused.write(self, out, weights)
        else:
            reference.write(self, out, weights)

    @property
    def held(self) -> bool:
        """Whether `matrix` returns the same S at every call."""
        return self._held is not None

    def hold(self, dtype: torch.dtype) -> Tensor:
        """Allocates and fills S now; from here on `matrix(dtype)` returns this one and rewrites s*B and A only.

        For dense members it ends double storage: their weight becomes its view of S (`views`), which is what their module should
        hold instead of its own. Packed members keep their codes: S is then a cache, which `release` drops.
        """
        if self._held is None:
            held = self.matrix(dtype)
            self._held = held
            self.members = tuple(
                m if isinstance(m.weight, Packed) else replace(m, weight=view)
                for m, view in zip(self.members, self.views(), strict=True)
            )
            self.plan = None
        assert self._held.dtype == dtype, f"held in {self._held.dtype}, asked for {dtype}"
        return self._held

    def views(self) -> list[Tensor]:
        """The members' weights `[N_i, K]` inside the held S, strided."""
        assert self._held is not None, "nothing is held"
        return [self._held[rows, : self.width] for rows in self.row_slices]

    def release(self) -> None:
        """Forgets the held S, and what is held in e4m3; its memory is free once no dense member's view of it is left."""
        self._held = self.float8 = None
        self.float8_held = False
