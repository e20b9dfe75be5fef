"""Attention where memory is short: a measurement that finds none settles nothing, and long rows run a few heads at a time."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from halfbyte.kernels.attention import Documents, choice, flash, heads, method
from halfbyte.kernels.attention.sdpa import Sdpa
from halfbyte.kernels.gemm import vendor
from kernels.checks_attention import Row, heads_apart, run

CPU = torch.device("cpu")


class Hungry:
    """`Sdpa` under a name; finds no memory for more than `room` tokens. tried: how many it was given."""

    def __init__(self, name: str, room: int = 1 << 30) -> None:
        self.name, self.room = name, room
        self.tried: list[int] = []

    def obstacle(self, *arguments: object) -> str | None:
        return None

    def forward(self, q: Tensor, *arguments: object) -> tuple[Tensor, tuple[Tensor, ...]]:
        self.tried.append(q.shape[0])
        if q.shape[0] > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return Sdpa().forward(q, *arguments)  # type: ignore[arg-type]

    def backward(self, *arguments: object) -> tuple[Tensor, Tensor, Tensor]:
        return Sdpa().backward(*arguments)  # type: ignore[arg-type]


TIMES = {"cudnn": 2.0, "flash": 1.0}


def _measured(one: Hungry, *arguments: object) -> float:
    one.forward(*arguments)  # type: ignore[arg-type]
    return TIMES[one.name]


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> list[Hungry]:
    found = [Hungry("cudnn"), Hungry("flash")]
    monkeypatch.setattr(choice, "_chosen", {})
    monkeypatch.setattr(choice, "_waiting", {})
    monkeypatch.setattr(choice, "methods", lambda: [*found, Sdpa()])
    monkeypatch.setattr(choice, "milliseconds", _measured)
    monkeypatch.setattr(choice, "agrees", lambda one, *_: True)
    return found


def _row(*lengths: int) -> tuple[Tensor, Tensor, Tensor, Documents]:
    row = Row(lengths)
    return *row.inputs("cpu", torch.float32)[:3], row.documents("cpu")


@pytest.mark.parametrize("lengths", [(1000,) * 4, (4000,), (900, 1500, 1600)], ids=str)
def test_one_without_memory_for_all_tokens_is_measured_on_fewer(able: list[Hungry], lengths: tuple[int, ...]) -> None:
    able[1].room = 2000
    assert method(*_row(*lengths), 0.3, None, None).name == "flash"
    assert able[1].tried == [4000, 2000] and able[0].tried == [4000, 2000]


def test_no_memory_at_all_settles_nothing(able: list[Hungry], caplog: pytest.LogCaptureFixture) -> None:
    able[0].room = able[1].room = 0
    row = _row(1000, 1000)
    with caplog.at_level(logging.INFO, "halfbyte"):
        assert method(*row, 0.3, None, None).name == "cudnn"
        assert "for now, since there is no memory to measure with" in caplog.text
        able[0].room = able[1].room = 1 << 30
        names = [method(*row, 0.3, None, None).name for _ in range(choice.AGAIN + 3)]
    assert names == ["cudnn"] * (choice.AGAIN - 1) + ["flash"] * 4
    assert len(caplog.records) == 2 and "measured 1.00 ms" in caplog.text


def test_what_must_be_compiled_is_not_dropped_for_want_of_memory(able: list[Hungry], monkeypatch: pytest.MonkeyPatch) -> None:
    one = Hungry("flex", room=0)
    monkeypatch.setattr(choice, "methods", lambda: [one, Sdpa()])
    found = choice.choose(*_row(1500, 500), 0.3, None, None)
    assert found.method is one and not found.settled and "no memory to try flex" in found.reason


def test_of_a_very_long_row_a_piece_is_measured(able: list[Hungry], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "MEASURED", 2500)
    for lengths, ends in (((1000,) * 4, (0, 1000, 2000)), ((4000,), (0, 2500)), ((900, 1500, 1600), (0, 900, 2400, 2500))):
        documents = Row(lengths).documents("cpu")
        part = choice.piece(documents, 2500, CPU)
        assert part.boundaries == ends and bool(part.equal) == bool(documents.equal)
        assert choice.piece(documents, 4000, CPU) is documents
        able[0].tried.clear()
        method(*_row(*lengths), 0.3, None, None)
        assert able[0].tried == [ends[-1]]


def test_a_product_without_memory_to_be_measured_in_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        name, m = "a product", 100
        device, problem, entries = 0, None, {}  # type: ignore[var-annotated]

        def algorithms(self, count: int) -> list[str]:
            return ["first", "second"][:count]

        def keep(self, *arguments: object) -> None:
            pytest.fail("kept")

    stand = Nothing()
    stand.problem = stand  # type: ignore[assignment]
    monkeypatch.setattr(vendor, "_memory", lambda device: stand)
    monkeypatch.setattr(vendor, "replace", lambda problem, m: "family")
    monkeypatch.setattr(vendor, "_measured", {})
    monkeypatch.setattr(vendor, "_measure", lambda *_: None)
    assert vendor._chosen(stand, lambda _: None, ()) == "first"  # type: ignore[arg-type, comparison-overlap, return-value]
    assert vendor._measured == {(0, "family"): []}


@pytest.mark.parametrize(("count", "kv_heads"), [(32, 8), (4, 2), (6, 2), (5, 5), (32, 1), (7, 7), (3, 3)])
def test_heads_are_parted_so_that_every_one_runs_once_with_its_own_keys(count: int, kv_heads: int) -> None:
    assert heads.parts(heads.LONG - 1, count, kv_heads) == [heads.Part(0, count, 0, kv_heads)]
    share = count // kv_heads
    for tokens, fewest in ((heads.LONG, 8), (8 * heads.LONG, 4)):
        found = heads.parts(tokens, count, kv_heads)
        assert [h for part in found for h in range(part.first, part.last)] == list(range(count))
        for part in found:
            assert {h // share for h in range(part.first, part.last)} == set(range(part.kv_first, part.kv_last))
            assert part is found[-1] or fewest <= part.last - part.first < fewest + share
        assert len(found) == 1 or count > fewest


class InParts:
    """`Sdpa` whose backward runs as that of the libraries for GPUs does in a long row."""

    name = "in parts"

    def __init__(self) -> None:
        self.widths: list[int] = []

    def obstacle(self, *arguments: object) -> str | None:
        return None

    def forward(self, *arguments: object) -> tuple[Tensor, tuple[Tensor, ...]]:
        return Sdpa().forward(*arguments)  # type: ignore[arg-type]

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, residuals: tuple[Tensor, ...], *more: object
    ) -> tuple[Tensor, Tensor, Tensor]:
        def one(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, part: heads.Part) -> tuple[Tensor, Tensor, Tensor]:
            assert all(x.is_contiguous() for x in (dout, q, k, v, out))
            self.widths.append(q.shape[1])
            return Sdpa().backward(dout, q, k, v, out, (residuals[0][part.first : part.last],), *more)  # type: ignore[arg-type]

        return heads.in_parts(one, dout, q, k, v, out)


@pytest.mark.parametrize("row", [Row((5, 9, 1, 17), heads=16, kv_heads=4), Row((20,), heads=6, kv_heads=6, window=3)], ids=str)
def test_in_parts_gradients_are_the_same_bits(row: Row) -> None:
    inputs, one = row.inputs("cpu", torch.float32), InParts()
    with heads_apart():
        found = run(one, row, *inputs)
    assert len(one.widths) > 1 and sum(one.widths) == row.heads
    assert all(torch.equal(a, b) for a, b in zip(found, run(Sdpa(), row, *inputs), strict=True))


def test_a_longer_row_is_counted_where_fewer_heads_run_together() -> None:
    tokens = 600_000
    assert flash.overflows(tokens, 1, 32, 128)
    assert not flash.overflows(tokens, 1, heads.query_heads(tokens, 32, 8), 128) and heads.query_heads(1000, 32, 8) == 32
