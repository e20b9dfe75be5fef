"""Attention over documents: every method that runs on a CPU against float64, and how a method is chosen."""

from __future__ import annotations

import logging
import warnings
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from halfbyte.config import Attention
from halfbyte.errors import RecipeError
from halfbyte.kernels.attention import Documents, Method, Wanted, attend, choice, flash, flex, method
from halfbyte.kernels.attention.cudnn import Cudnn
from halfbyte.kernels.attention.flash import Flash
from halfbyte.kernels.attention.flex import Flex
from halfbyte.kernels.attention.sdpa import Sdpa
from kernels.checks_attention import (
    RAGGED,
    ROWS,
    Row,
    bounded,
    check,
    check_no_leak,
    dense,
    expected,
    expected_apart,
    flex_by_definition,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_sdpa_equals_the_formula(row: Row, dtype: torch.dtype) -> None:
    check(Sdpa(), row, "cpu", dtype)


def test_the_two_forms_of_the_formula_agree() -> None:
    row = Row(RAGGED, window=3, cap=2.0)
    inputs = row.inputs("cpu", torch.float64)
    for a, b in zip(expected(row, *inputs), expected_apart(row, *inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's advice to compile it
@pytest.mark.parametrize("row", [*ROWS, Row((100, 250, 1, 0, 33), window=90, cap=3.0)], ids=str)
def test_flex_uncompiled_equals_the_formula(row: Row) -> None:
    """Forward only: torch has no backward of it on a CPU."""
    q, k, v, _ = row.inputs("cpu", torch.float32)
    out, _ = Flex(compiled=False).forward(q, k, v, row.documents("cpu"), row.scale, row.window, row.cap)
    truth = dense(*(x.double() for x in (q, k, v)), row)
    bounded(str(row), out, dense(q, k, v, row), truth, 0.0)


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_flex_keeps_its_graph_or_makes_it_again(monkeypatch: pytest.MonkeyPatch, row: Row, lost: bool) -> None:
    monkeypatch.setattr(flex, "_function", lambda compiled: flex_by_definition)
    check(Forgetful() if lost else Flex(), row, "cpu", torch.float32)


class Forgetful:
    """Loses autograd's graph between forward and backward, as offloading does."""

    name = "flex"

    def forward(self, *arguments: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        out, residuals = Flex().forward(*arguments)
        return out, tuple(x.detach() for x in residuals)

    def backward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return Flex().backward(*arguments)

    def obstacle(self, *arguments: Any) -> str | None:
        return None


@pytest.mark.parametrize("row", [Row((5, 9, 1, 0, 17)[::-1]), Row((6, 6, 6)), Row((5, 9, 4), cap=2.0, window=3)], ids=str)
def test_a_document_does_not_see_its_neighbours(row: Row) -> None:
    if row.lengths[len(row.lengths) // 2] == 0:
        pytest.fail("the document in the middle is empty")
    check_no_leak(Sdpa(), "cpu", torch.float32, row)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_attend_is_differentiable_and_keeps_out_of_the_way_of_no_grad(cap: float | None) -> None:
    row = Row(RAGGED, window=4, cap=cap)
    q, k, v, dout = row.inputs("cpu", torch.float64)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(leaves[0], leaves[1], leaves[2], row.documents("cpu"), row.scale, row.window, row.cap)
    again = [x.clone().requires_grad_() for x in (q, k, v)]
    want = dense(again[0], again[1], again[2], row)
    torch.testing.assert_close(out, want)
    for a, b in zip(torch.autograd.grad(out, leaves, dout), torch.autograd.grad(want, again, dout), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert attend(leaves[0], leaves[1], leaves[2], row.documents("cpu"), row.scale, row.window, row.cap).grad_fn is None


def test_attend_under_autocast_casts_as_torch_does() -> None:
    """A norm may hand over q and k in fp32 beside v in 16 bits."""
    row = Row(RAGGED, cap=2.0)
    q, k, v, dout = row.inputs("cpu", torch.float32)
    q, k, v = q.clone().requires_grad_(), k.clone().requires_grad_(), v.bfloat16().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, k, v, row.documents("cpu"), row.scale, None, row.cap)
    want, _ = Sdpa().forward(*(x.detach().bfloat16() for x in (q, k, v)), row.documents("cpu"), row.scale, None, row.cap)
    assert out.dtype == torch.bfloat16 and torch.equal(out, want)
    grads = torch.autograd.grad(out, (q, k, v), dout.bfloat16())
    assert [g.dtype for g in grads] == [torch.float32, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("window", [None, 1, 60, 200])
@pytest.mark.parametrize("lengths", [(300,), (128, 128), (1, 500, 3), (64, 64, 200, 0, 7), (1,)])
def test_the_block_mask_is_the_dense_mask(lengths: tuple[int, ...], window: int | None) -> None:
    row = Row(lengths)
    tokens, documents = row.bounds[-1], row.documents("cpu")
    first = flex.first_keys(documents.cu_seqlens, tokens, window)
    position = torch.arange(tokens)
    allowed = (position[None, :] <= position[:, None]) & (position[None, :] >= first[:, None])
    score = torch.zeros(1, 1, 8)
    uniform = dense(
        score.expand(tokens, 4, 8),
        score.expand(tokens, 2, 8),
        torch.eye(tokens)[:, None].expand(-1, 2, -1),
        Row(lengths, window=window),
    )
    assert torch.equal(allowed, uniform[:, 0] > 0)
    partly, full = flex.blocks(first)
    count = -(-tokens // flex.BLOCK)
    for i in range(count):
        for j in range(count):
            block = allowed[i * flex.BLOCK : (i + 1) * flex.BLOCK, j * flex.BLOCK : (j + 1) * flex.BLOCK]
            assert bool(full[i, j]) <= bool(block.all()), (i, j)
            assert bool(partly[i, j] | full[i, j]) >= bool(block.any()), (i, j)
            assert not (partly[i, j] and full[i, j])


def test_the_recipe_knows_the_methods() -> None:
    assert get_args(Attention) == get_args(Wanted)
    assert {one.name for one in choice.methods()} | {"auto"} == set(get_args(Wanted))


def test_documents() -> None:
    padded = torch.tensor([0, 4, 4, 7, 7, 7], dtype=torch.int32)
    documents = Documents.of(padded, CPU, 7)
    assert documents.boundaries == (0, 4, 7) and documents.cu_seqlens.tolist() == [0, 4, 7]
    assert documents.lengths == (4, 3) and documents.longest == 4 and documents.equal is None
    assert documents.window(3) == 3 and documents.window(4) is None and documents.window(None) is None
    assert Documents.of(torch.tensor([0, 4, 8, 8], dtype=torch.int32), CPU, 8).equal == 2
    unread = Documents(padded, None, 7)
    assert unread.lengths is None and unread.equal is None and unread.read_lengths() == (4, 3)
    built = [documents.keep("x", lambda: object()) for _ in range(2)]
    assert built[0] is built[1]


def test_flash_overflows_by_its_own_padding() -> None:
    assert not flash.overflows(8192, 100, 32, 128)
    assert flash.overflows(2**31 // (32 * 128) - 128, 1, 32, 128)
    assert not flash.overflows(2**31 // (32 * 128) - 129, 1, 32, 128)
    assert flash.overflows(300_000, 2000, 32, 128) and not flash.overflows(300_000, 1, 32, 128)
    assert flash.overflows(300_000, 1, 32, 200)  # heads are padded to 256


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_chosen", {})


def _inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(tokens, heads, 8) for heads in (4, 2, 2))  # type: ignore[return-value]


@pytest.mark.usefixtures("fresh")
def test_the_cpu_has_one_method_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    documents = Documents.of(torch.tensor([0, 1000, 2000], dtype=torch.int32), CPU, 2000)
    with caplog.at_level(logging.INFO, "halfbyte"):
        for _ in range(3):
            assert method(*_inputs(2000), documents, 0.3, None, None).name == "sdpa"
    assert [r.message for r in caplog.records] == [
        "attention: sdpa (auto: cudnn, flash, flex: it needs CUDA, not cpu; 2000 tokens, 2 equal documents)"
    ]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("wanted", ["cudnn", "flash", "flex"])
def test_what_is_asked_for_and_cannot_run_is_an_error(wanted: str) -> None:
    documents = Documents.of(torch.tensor([0, 4, 9], dtype=torch.int32), CPU, 9, wanted)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=f"`attention: {wanted}` cannot run here: it needs CUDA") as caught:
        method(*_inputs(9), documents, 0.3, None, None)
    assert "sdpa" in caught.value.hint


class Pretender:
    """A method by name that is `Sdpa` inside, wrong by a factor, or broken."""

    def __init__(self, name: str, factor: float = 1.0, broken: bool = False, obstacle: str | None = None) -> None:
        self.name, self.factor, self.broken, self._obstacle = name, factor, broken, obstacle

    def obstacle(self, *arguments: object) -> str | None:
        return self._obstacle

    def forward(self, *arguments: object) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.broken:
            raise RuntimeError("no engine\nsecond line")
        out, residuals = Sdpa().forward(*arguments)  # type: ignore[arg-type]
        return out * self.factor, residuals

    def backward(self, *arguments: object) -> tuple[Tensor, Tensor, Tensor]:
        return Sdpa().backward(*arguments)  # type: ignore[arg-type]


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("equal", [True, False])
def test_the_fastest_of_those_that_agree_wins(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, equal: bool
) -> None:
    times = {"cudnn": 1.2, "flash": 2.1, "flash-3": 0.1, "flash-4": 0.2}
    able = [Pretender("cudnn"), Pretender("flash-4", factor=1.1), Pretender("flash-3", broken=True), Pretender("flash"), Sdpa()]
    monkeypatch.setattr(choice, "methods", lambda: able)
    monkeypatch.setattr(choice, "milliseconds", lambda one, *_: times[one.name])
    bounds = [0, 1000, 2000] if equal else [0, 1500, 2000]
    documents = Documents.of(torch.tensor(bounds, dtype=torch.int32), CPU, 2000)
    with caplog.at_level(logging.INFO, "halfbyte"):
        assert method(*_inputs(2000), documents, 0.3, 1200, None).name == "cudnn"
    text = "\n".join(r.message for r in caplog.records)
    assert "flash-4 is left out: it disagrees" in text and "flash-3 is left out: no engine" in text
    assert "attention: cudnn (auto: measured 1.20 ms, flash 2.10 ms; 2000 tokens" in text


@pytest.mark.cpu
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("broken", [False, True])
def test_what_must_be_compiled_runs_only_where_nothing_else_can(monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    """And not for short rows, and not where compiling it fails."""
    able = [Pretender("flash", obstacle="it has no soft cap"), Pretender("flex", broken=broken), Sdpa()]
    monkeypatch.setattr(choice, "methods", lambda: able)
    for tokens, name in ((2000, "sdpa" if broken else "flex"), (20, "sdpa")):
        documents = Documents.of(torch.tensor([0, 5, tokens], dtype=torch.int32), CPU, tokens)
        found = choice.choose(*_inputs(tokens), documents, 0.3, None, 50.0)
        assert found.method.name == name and "flash: it has no soft cap" in found.reason
        assert ("flex: no engine" in found.reason) == (broken and tokens == 2000)


@pytest.mark.usefixtures("fresh")
def test_bit_equal_runs_do_not_choose_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        choice, "methods", lambda: [Pretender("cudnn", obstacle="no"), Pretender("flash-3"), Pretender("flash"), Sdpa()]
    )
    monkeypatch.setattr(choice, "measured", lambda *_: pytest.fail("measured"))
    documents = Documents.of(torch.tensor([0, 1500, 2000], dtype=torch.int32), CPU, 2000)
    torch.use_deterministic_algorithms(True)
    try:
        assert method(*_inputs(2000), documents, 0.3, None, None).name == "flash-3"
        assert "deterministic" in str(_obstacle(Cudnn(), Row((8, 8)))) and _obstacle(Flash(), Row((8, 8))) is None
    finally:
        torch.use_deterministic_algorithms(False)
    assert _obstacle(Cudnn(), Row((8, 8))) is None


class Elsewhere(torch.Tensor):
    """On a GPU, where no tensor has to be."""

    device = torch.device("cuda", 0)


def _obstacle(one: Method, row: Row, dtype: torch.dtype = torch.bfloat16, v_step: int | None = None) -> str | None:
    """As on a Hopper GPU. v_step: from a token of v to the next, where v is a view of something wider."""
    tokens, (heads, size) = row.bounds[-1], (row.heads, row.size)
    q = torch.empty(tokens, heads, size, dtype=dtype, device="meta").as_subclass(Elsewhere)
    v = q if v_step is None else q.as_strided((tokens, heads, size), (v_step, size, 1)).as_subclass(Elsewhere)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        return one.obstacle(q, q, v, row.documents("cpu"), row.window, row.cap)


def test_obstacles() -> None:
    ragged, equal = Row(RAGGED, size=64), Row((8, 8), size=64)
    assert _obstacle(Flash(), ragged) is None and _obstacle(Cudnn(), equal) is None and _obstacle(Flex(), ragged) is None
    assert _obstacle(Cudnn(), ragged) == "documents of several lengths"
    assert "32" in str(_obstacle(Flash(), ragged, torch.float32)) and "32" in str(_obstacle(Cudnn(), equal, torch.float32))
    assert "window" in str(_obstacle(Cudnn(), Row((8, 8), size=64, window=4)))
    assert _obstacle(Cudnn(), Row((8, 8), size=64, window=8)) is None
    assert "soft cap" in str(_obstacle(Flash(), Row((8, 8), size=64, cap=30.0)))
    assert "soft cap" in str(_obstacle(Cudnn(), Row((8, 8), size=64, cap=30.0)))
    assert _obstacle(Flex(), Row((8, 8), size=64, cap=30.0)) is None
    assert "head size" in str(_obstacle(Flash(), Row((8, 8), size=60))) and "head size" in str(
        _obstacle(Flex(), Row((8, 8), size=96))
    )


@pytest.mark.parametrize("one", [Cudnn(), Flex()], ids=lambda one: one.name)
def test_every_operand_is_within_32_bit_offsets(one: Method) -> None:
    """A norm of each head makes q and k anew; v stays where it was: with 32 heads and 8 of k and v, ranks 48 behind them."""
    row = Row((400_000,), heads=8, kv_heads=8, size=128)
    assert _obstacle(one, row) is None
    assert _obstacle(one, row, v_step=6192) == "400000 tokens of 6192 numbers overflow 32-bit offsets"
    assert _obstacle(one, Row((340_000,), heads=8, kv_heads=8, size=128), v_step=6192) is None
