"""Weights that live inside the matrices of their groups (`kernels.augmented`), so that a product finds them beside the adapter.

    16 bits      the parameter becomes its view of the matrix: nothing is stored twice, and a product copies nothing
    a format     decoded once and kept beside the codes, where memory allows: a product decodes nothing

Either way a step only writes A and s*B afresh, and the numbers are the same bits. Cost: (N + K + R) R numbers a group for weights
in 16 bits, all of the matrix for the others; in fp8 two layouts of one byte a weight instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.formats.packed import Packed
from halfbyte.kernels import fp8
from halfbyte.layers.fused.projection import Projection


def hold(projections: Iterable[Projection], dtype: torch.dtype, *, packed: bool) -> None:
    """Holds what can be held in `dtype`; packed: also what is decoded. Groups without an adapter need no matrix in 16 bits."""
    for group in (p.group for p in projections):
        weights = [m.weight for m in group.members]
        if all(isinstance(w, Packed) for w in weights):
            if packed:
                group.hold(dtype)
            continue
        owners = [_owner(w, dtype) for w in weights if isinstance(w, Tensor)]
        if group.rank == 0 or group.held or len(owners) != len(weights) or any(o is None for o in owners):
            continue
        group.hold(dtype)
        for owner, view in zip(owners, group.views(), strict=True):
            assert owner is not None
            parameter, turned = owner
            parameter.data = view.T if turned else view


def hold_float8(projections: Iterable[Projection]) -> None:
    """Weights in a format are decoded to e4m3 once a direction (`kernels.fp8`), from the next product on."""
    for group in (p.group for p in projections):
        group.float8_held = True


def as_if_alone(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A hook of `state_dict`: views become tensors of their own, as what saves models expects (parameters themselves stay)."""
    for name, value in state.items():
        if name.startswith(prefix) and isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            state[name] = value.contiguous()


def decoded_bytes(projections: Iterable[Projection], dtype: torch.dtype) -> int:
    """Bytes of what `hold` and, once products have run, `hold_float8` have decoded, adapters included."""
    groups = [p.group for p in projections]
    wide = sum(g.hold(dtype).nbytes for g in groups if g.held and all(isinstance(m.weight, Packed) for m in g.members))
    return wide + sum(fp8.held_bytes(g) for g in groups)


def drop_decoded(projections: Iterable[Projection]) -> None:
    """Forgets decoded weights."""
    for group in (p.group for p in projections):
        if all(isinstance(m.weight, Packed) for m in group.members):
            group.release()


def give_back(weights: Iterable[Packed | Tensor]) -> None:
    """Parameters that are views of a matrix get memory of their own again."""
    for weight in weights:
        parameter = None if isinstance(weight, Packed) else _parameter(weight)
        if parameter is not None and not _whole(parameter[0]):
            parameter[0].data = parameter[0].detach().clone(memory_format=torch.contiguous_format)


def _owner(weight: Tensor, dtype: torch.dtype) -> tuple[nn.Parameter, bool] | None:
    """The frozen parameter of `dtype` that a member's weight `[N, K]` is, and whether it is stored turned.

    It must own its memory.
    """
    found = _parameter(weight)
    if found is None or found[0].dtype != dtype or found[0].requires_grad or not _whole(found[0]):
        return None
    return found


def _parameter(weight: Tensor) -> tuple[nn.Parameter, bool] | None:
    base = weight if isinstance(weight, nn.Parameter) else weight._base
    if not isinstance(base, nn.Parameter) or base.data_ptr() != weight.data_ptr():
        return None
    turned = base is not weight
    return (base, turned) if base.shape == (weight.shape[::-1] if turned else weight.shape) else None


def _whole(parameter: Tensor) -> bool:
    """Nobody else's numbers lie in its memory."""
    return parameter.untyped_storage().nbytes() == parameter.nbytes
