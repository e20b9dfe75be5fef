"""`augmented` by its reference here, by the Triton kernel interpreted in a process of its own. The proofs: checks_augmented.py."""

from __future__ import annotations

import pytest
import torch

from halfbyte.kernels.augmented import LEAST, Group
from halfbyte.kernels.lora_linear.members import LowRank, Member
from kernels import checks_augmented, runner
from kernels.checks_augmented import CHECKS


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str) -> None:
    CHECKS[name]("cpu")


def test_the_layout() -> None:
    def member(rows: int, rank: int) -> Member:
        lora = LowRank(torch.ones(rank, 8), torch.ones(rows, rank), 1.0) if rank else None
        return Member(torch.ones(rows, 8), None, lora)

    members = [member(6, 3), member(2, 0), member(4, 16)]
    group = Group(members)
    assert (group.rows, group.width, group.rank) == (12, 8, 64) and Group(members, LEAST).rank == 32
    assert group.row_slices == [slice(0, 6), slice(6, 8), slice(8, 12)]
    assert group.rank_slices == [slice(0, 3), None, slice(3, 19)]
    assert Group([member(6, 0)]).rank == 0


def test_members_of_different_widths_are_refused() -> None:
    with pytest.raises(AssertionError, match="width"):
        Group([Member(torch.ones(2, 8), None, None), Member(torch.ones(2, 4), None, None)])


@pytest.mark.slow
def test_interpreted() -> None:
    runner.prove_forced(checks_augmented, "fused")


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_on_cuda(name: str) -> None:
    CHECKS[name]("cuda")
