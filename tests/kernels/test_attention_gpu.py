"""Attention on a GPU: every method against float64 at odd and real shapes, leaks, bit-equal runs, CUDA graphs."""

from __future__ import annotations

import logging

import pytest
import torch

from halfbyte.kernels.attention import Method, choice
from halfbyte.kernels.attention.cudnn import Cudnn
from halfbyte.kernels.attention.flash import Flash, installed
from halfbyte.kernels.attention.flex import Flex
from halfbyte.kernels.attention.sdpa import Sdpa
from kernels.checks_attention import ROWS, Row, check, check_no_leak, graphed, heads_apart, run

pytestmark = pytest.mark.gpu

EQUAL = (
    Row((256, 256), 8, 2, 128),
    Row((500,), 4, 4, 64),
    Row((77, 77, 77), 8, 1, 128),
    Row((1, 1), 4, 2, 64),
    Row((130, 130), 4, 2, 96),
)
RAGGED = (
    Row((300, 1, 0, 77, 513), 8, 2, 128),
    Row((300, 1, 0, 77, 513), 4, 4, 64, window=100),
    Row((40, 64, 2), 6, 2, 96, window=1),
    Row((1, 1, 1, 2), 4, 1, 256),
    Row((129,), 4, 2, 40),
)
CAPPED = Row((300, 1, 0, 77, 134), 8, 2, 128, window=100, cap=2.0)
DTYPES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", [row for row in EQUAL if max(row.lengths) > 1], ids=str)
def test_cudnn(row: Row, dtype: torch.dtype) -> None:
    check(Cudnn(), row, "cuda", dtype)


def test_cudnn_leaves_documents_of_one_token_to_others() -> None:
    row = Row((1, 1), 4, 2, 64)
    q, k, v, *_ = row.inputs("cuda", torch.bfloat16)
    assert Cudnn().obstacle(q, k, v, row.documents("cuda"), None, None) == "documents of one token"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", EQUAL + RAGGED, ids=str)
@pytest.mark.parametrize("one", [Flash(), *installed()], ids=lambda one: one.name)
def test_flash(one: Method, row: Row, dtype: torch.dtype) -> None:
    check(one, row, "cuda", dtype)


PARTED = [(Cudnn(), EQUAL[0]), (Cudnn(), Row((1000,), 32, 8, 128)), (Flash(), RAGGED[0]), (Flash(), Row((700, 300), 8, 8, 64, 90))]


@pytest.mark.parametrize(("one", "row"), PARTED, ids=str)
def test_heads_in_parts_as_in_very_long_rows(one: Method, row: Row) -> None:
    with heads_apart():
        check(one, row, "cuda", torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize("row", [*ROWS, *EQUAL, *RAGGED, CAPPED], ids=str)
def test_sdpa(row: Row, dtype: torch.dtype) -> None:
    check(Sdpa(), row, "cuda", dtype)


@pytest.mark.filterwarnings("ignore")
def test_flex_with_a_soft_cap_and_a_window() -> None:
    check(Flex(), CAPPED, "cuda", torch.bfloat16)


@pytest.mark.parametrize(("one", "row"), [(Flash(), RAGGED[0]), (Cudnn(), EQUAL[2])], ids=["flash", "cudnn"])
def test_a_document_does_not_see_its_neighbours(one: Method, row: Row) -> None:
    """Bit for bit, so with the deterministic backward where there is one."""
    row = Row((300, 77, 513), 8, 2, 128) if one.name == "flash" else row
    torch.use_deterministic_algorithms(one.name == "flash")
    try:
        check_no_leak(one, "cuda", torch.bfloat16, row)
    finally:
        torch.use_deterministic_algorithms(False)


def test_flash_is_bit_equal_where_that_is_asked_for() -> None:
    row = Row((3000, 1, 0, 777, 1513), 32, 8, 128)
    inputs = row.inputs("cuda", torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        first = run(Flash(), row, *inputs)
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(first, run(Flash(), row, *inputs), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("one", "row"), [(Flash(), RAGGED[0]), (Cudnn(), EQUAL[0])], ids=["flash", "cudnn"])
def test_it_can_be_captured_in_a_graph(one: Method, row: Row) -> None:
    graphed(one, row)


def test_the_choice_is_measured_and_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(choice, "_chosen", {})
    row = Row((2048, 2048), 32, 8, 128)
    q, k, v, _ = row.inputs("cuda", torch.bfloat16)
    with caplog.at_level(logging.INFO, "halfbyte"):
        chosen = choice.method(q, k, v, row.documents("cuda"), row.scale, None, None)
    assert chosen.name in ("cudnn", "flash")
    assert "auto: measured" in caplog.text and caplog.text.count("left out") == 0
