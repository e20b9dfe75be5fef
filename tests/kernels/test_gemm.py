"""`gemm`: the way by torch here, layouts and calls of cuBLASLt on a stand-in that multiplies, the rule of choice, and its file."""

from __future__ import annotations

import ctypes as c
import itertools
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte.kernels.augmented import Group
from halfbyte.kernels.gemm import choice, reference, report
from halfbyte.kernels.gemm.choice import Memory, fastest
from halfbyte.kernels.gemm.cublaslt import Algorithm, Library, Plan, Problem, Refused, Stored, stored
from halfbyte.kernels.lora_linear.members import LowRank, Member
from halfbyte.kernels.products import Augmented
from kernels import checks_gemm as checks

TESTS = Path(__file__).parents[1]
DTYPES = {0: torch.float32, 2: torch.float16, 14: torch.bfloat16, 28: torch.float8_e4m3fn}


class Stand:
    """What cuBLASLt documents of the calls that we make, column-major, on a CPU."""

    def __init__(self, algorithms: int = 3) -> None:
        self.objects: dict[int, Any] = {}
        self.made = 0
        self.algorithms = algorithms

    def _new(self, place: Any, what: Any) -> int:
        self.made += 1
        place._obj.value = self.made
        self.objects[place._obj.value] = what
        return 0

    def cublasLtGetVersion(self) -> int:
        return 130100

    def cublasLtCreate(self, handle: Any) -> int:
        return self._new(handle, "handle")

    def cublasLtMatmulDescCreate(self, description: Any, compute: int, scale: int) -> int:
        assert (compute, scale) == (68, 0)
        return self._new(description, {})

    def cublasLtMatmulDescSetAttribute(self, description: Any, attribute: int, value: Any, size: Any) -> int:
        assert size.value == c.sizeof(value._obj)
        self.objects[description.value][attribute] = value._obj.value
        return 0

    def cublasLtMatrixLayoutCreate(self, layout: Any, dtype: int, rows: Any, columns: Any, ld: Any) -> int:
        assert ld.value >= rows.value, "the leading dimension is shorter than a column"
        return self._new(layout, (DTYPES[dtype], rows.value, columns.value, ld.value))

    def cublasLtMatrixLayoutDestroy(self, layout: Any) -> int:
        del self.objects[layout.value]
        return 0

    cublasLtMatmulDescDestroy = cublasLtMatmulPreferenceDestroy = cublasLtMatrixLayoutDestroy

    def cublasLtMatmulPreferenceCreate(self, preference: Any) -> int:
        return self._new(preference, {})

    cublasLtMatmulPreferenceSetAttribute = cublasLtMatmulDescSetAttribute

    def cublasLtMatmulAlgoGetHeuristic(self, handle: Any, description: Any, *rest: Any) -> int:
        *_, preference, wanted, found, count = rest
        wishes = self.objects[preference.value]
        assert wishes[3] == 2 and wishes[5] == wishes[8], "reductions in fp32, alignments"
        for i in range(min(wanted, self.algorithms)):
            found[i].algo[0], found[i].state = i, 0
        count._obj.value = min(wanted, self.algorithms)
        return 0

    def cublasLtMatmulAlgoCheck(self, *rest: Any) -> int:
        return 0 if rest[-2]._obj[0] < self.algorithms else 15

    def _matrix(self, address: Any, layout: Any) -> torch.Tensor:
        dtype, rows, columns, ld = self.objects[layout.value]
        size = ((columns - 1) * ld + rows) * torch.empty(0, dtype=dtype).element_size()
        return torch.frombuffer((c.c_char * size).from_address(address), dtype=dtype).as_strided((rows, columns), (1, ld))

    def _vector(self, address: int, length: int, dtype: torch.dtype) -> torch.Tensor:
        room = (c.c_char * (length * dtype.itemsize)).from_address(address)
        return torch.frombuffer(room, dtype=dtype).double()

    def cublasLtMatmul(self, handle: Any, description: Any, alpha: Any, *rest: Any) -> int:
        a, for_a, b, for_b, beta, source, for_c, out, for_out, *_ = rest
        d = self.objects[description.value]
        left, right = (self._matrix(*pair) for pair in ((a, for_a), (b, for_b)))
        left, right = left.T if d[3] else left, right.T if d[4] else right
        y = alpha._obj.value * (left.double() @ right.double())
        if d.get(31) == 3:
            assert d[25] == 1 and d[32] == 3 and d[3] and not d[4], "Hopper multiplies e4m3 along contiguous dimensions only"
            y *= self._vector(d[17], y.shape[0], torch.float32)[:, None] * self._vector(d[18], y.shape[1], torch.float32)
        if beta._obj.value:
            y += beta._obj.value * self._matrix(source, for_c).double()
        target = self._matrix(out, for_out)
        if d.get(7) == 4:
            assert DTYPES[d[26]] == target.dtype
            y += self._vector(d[8], y.shape[0], target.dtype)[:, None]
        target.copy_(y)
        return 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True])
def test_layouts_of_the_library(dtype: torch.dtype, wide: bool) -> None:
    stand = Stand()
    out_dtype = torch.float32 if wide else dtype
    for m, n, k in ((5, 7, 3), (1, 4, 6), (4, 1, 6), (4, 6, 1), (1, 1, 1)):
        for left, right, addend, biased in itertools.product((False, True), (False, True), ("none", "own", "other"), (False, True)):
            a, b = checks.matrix(m, k, dtype, "cpu", left, 1), checks.matrix(k, n, dtype, "cpu", right, 2)
            out, other = (checks.matrix(m, n, out_dtype, "cpu", False, i, behind=i) for i in (3, 4))
            source = other if addend == "other" else out
            bias = checks.matrix(1, n, out_dtype, "cpu", False, 5)[0] if biased else None
            alpha, beta = 0.5, 0.0 if addend == "none" else 2.0
            truth = alpha * a.double() @ b.double() + (beta * source.double() if beta else 0.0)
            truth = truth if bias is None else truth + bias.double()
            problem = Problem.of(a, b, out, bias, source, beta, 256)
            plan = Plan(Library(stand), 0, problem, 0 if bias is None else bias.data_ptr())
            call = plan.bound(plan.algorithms(16)[0], alpha, beta, 0, 0)
            assert call(a.data_ptr(), b.data_ptr(), source.data_ptr(), out.data_ptr()) == 0
            torch.testing.assert_close(out, truth.to(out_dtype), rtol=1e-2 if not wide else 1e-6, atol=0.0)
            assert problem.in_place == (addend != "other")
    del plan, call
    assert all(one == "handle" for one in stand.objects.values()), "descriptors are left"


def test_scaled_products_of_the_library() -> None:
    """e4m3 with a scale a row and a column, which lie elsewhere in every call."""
    e4m3, (m, n, k) = torch.float8_e4m3fn, (5, 7, 32)
    a, w = (checks.matrix(rows, k, torch.float32, "cpu", False, i).to(e4m3) for i, rows in enumerate((m, n)))
    out, other = (checks.matrix(m, n, torch.bfloat16, "cpu", False, i) for i in (3, 4))
    bias = checks.matrix(1, n, torch.bfloat16, "cpu", False, 5)[0]
    for source, with_bias in itertools.product((out, other), (False, True)):
        beta = 0.0 if source is out else 1.0
        problem = Problem.of(a, w.T, out, bias if with_bias else None, source, beta, 256)
        assert problem.name.startswith("5x7x32 float8_e4m3fn>bfloat16 NT")
        plan = Plan(Library(Stand()), 0, problem, bias.data_ptr() if with_bias else 0, (1, 2))
        call = plan.bound(plan.algorithms(16)[0], 1.0, beta, 0, 0)
        for seed in (6, 7):
            by_row, by_column = (
                checks.matrix(m, 1, torch.float32, "cpu", True, seed),
                checks.matrix(1, n, torch.float32, "cpu", False, 8),
            )
            addresses = [t.data_ptr() for t in (a, w, source, out, by_row, by_column)]
            assert call(*addresses) == 0
            truth = (a.double() @ w.T.double()) * by_row.double() * by_column.double() + beta * other.double()
            truth = truth + bias.double() if with_bias else truth
            torch.testing.assert_close(out, truth.bfloat16(), rtol=1e-2, atol=0.0)
    with pytest.raises(Refused):
        Problem.of(a, w.T, out.to(e4m3), None, out.to(e4m3), 0.0, 256)


def test_how_a_matrix_is_stored() -> None:
    x = torch.empty(6, 10)
    assert stored(x) == Stored(False, 10) and stored(x.T) == Stored(True, 10)
    assert stored(x[:, :4]) == Stored(False, 10) and stored(x[:, :4].T) == Stored(True, 10)
    assert stored(x[:, ::2]) is None and stored(x[:1].expand(6, 10)) is None
    assert stored(x[:1]) == Stored(False, 10) and stored(x[:, :1]) == Stored(False, 10)


def test_what_is_refused() -> None:
    a, b, out = (torch.zeros(4, 4, dtype=torch.bfloat16) for _ in range(3))
    for wrong in ((a[:, ::2], b[:2], out), (a, b, out.T), (a, b.half(), out), (a, b, out.half())):
        with pytest.raises(Refused):
            Problem.of(*wrong, None, wrong[2], 0.0, 256)
    with pytest.raises(Refused, match="bias"):
        Problem.of(a, b, out, torch.zeros(4), out, 0.0, 256)
    with pytest.raises(Refused, match="no algorithm"):
        Plan(Library(Stand(0)), 0, Problem.of(a, b, out, None, out, 0.0, 256), 0).algorithms(16)


def test_a_name_says_what_the_choice_depends_on() -> None:
    a, b = torch.zeros(4, 6, dtype=torch.bfloat16), torch.zeros(8, 6, dtype=torch.bfloat16).T
    out = torch.zeros(4, 8)
    name = Problem.of(a, b, out, None, out, 1.0, 16).name
    assert name == "4x8x6 bfloat16>float32 NT 6,6,8,8 aligned 16 +C in place"
    assert Problem.of(a, b, out, None, torch.zeros(4, 9)[:, :8], 1.0, 256).name.endswith("6,6,9,8 aligned 256 +C")


def test_an_algorithm_is_kept_as_text() -> None:
    one = Algorithm()
    one.algo[0], one.algo[7] = 12, 2**64 - 1
    assert bytes(Algorithm.of(one.text()).algo) == bytes(one.algo)
    for wrong in ("zz", "00"):
        with pytest.raises(ValueError):
            Algorithm.of(wrong)


class Clock:
    """A stopwatch that knows the truth; the first round is `cold`."""

    def __init__(self, ms: Sequence[float], cold: Sequence[float] | None = None) -> None:
        self.ms, self.cold, self.rounds = ms, cold, 0

    def __call__(self, runs: Sequence[Any]) -> list[float]:
        self.rounds += 1
        table = self.cold if self.cold is not None and self.rounds == 1 else self.ms
        return [table[run()] for run in runs]


def numbers(n: int) -> list[Any]:
    return [lambda i=i: i for i in range(n)]


def test_the_fastest_is_taken_and_the_first_among_equals() -> None:
    assert fastest(numbers(3), Clock([1.0, 0.9, 0.95]))[0] == 1
    assert fastest(numbers(3), Clock([1.0, 0.99, 1.2]))[0] == 0, "too small a gain"
    assert fastest(numbers(1), Clock([1.0]))[0] == 0
    assert fastest(numbers(2), Clock([1.0, float("inf")]))[0] == 0
    assert fastest(numbers(2), Clock([float("inf"), 1.0]))[0] == 1, "the first fails"


def test_one_odd_round_decides_nothing() -> None:
    assert fastest(numbers(3), Clock([1.0, 1.02, 0.9], cold=[1.0, 0.88, 0.91]))[0] == 2


def test_a_measurement_ends() -> None:
    clock = Clock([1.0, 0.99, 1.01])
    fastest(numbers(3), clock)
    assert clock.rounds == 1 + choice.ROUNDS
    clock = Clock([1.0, 0.99, 1.01])
    fastest(numbers(3), clock, budget=0.0)
    assert clock.rounds == 1
    clock = Clock([1.0, 0.5, 1.01])
    fastest(numbers(3), clock, budget=10.0)
    assert clock.rounds == 1 + choice.ROUNDS, "the first is measured against the best to the end"


def test_choices_are_remembered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "gemm" / "a GPU.json"
    memory, other = Memory(file), Memory(file)
    memory.keep("a", "00")
    other.keep("b", "")
    assert Memory(file).entries == {"a": "00", "b": ""}, "what another process has written stays"
    assert [one.name for one in file.parent.iterdir()] == ["a GPU.json"]
    for broken in ("{", '["a"]', '{"a": 1}'):
        file.write_text(broken)
        with caplog.at_level(logging.WARNING, "halfbyte.kernels"):
            assert Memory(file).entries == {}
        assert "cannot be read" in caplog.text
        caplog.clear()
    Memory(file).keep("c", "")
    assert json.loads(file.read_text()) == {"c": ""}


def test_a_full_disk_is_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    memory = Memory(tmp_path / "file" / "below.json")
    memory.keep("a", "00")
    assert memory.entries == {"a": "00"} and "not kept" in caplog.text


def test_a_residual_is_added_inside_the_product() -> None:
    torch.manual_seed(0)
    for rank in (0, 4):
        lora = LowRank(torch.randn(rank, 24), torch.randn(32, rank), 0.5) if rank else None
        group = Group([Member(torch.randn(32, 24), None, lora)])
        x, residual, bias = torch.randn(7, 24 + group.rank), torch.randn(7, 32), torch.randn(32)
        for columns in {24, 24 + group.rank}:
            got, without = torch.empty(7, 32), torch.empty(7, 32)
            Augmented().project(group, x[:, :columns].clone(), got, bias, None, residual=residual)
            Augmented().project(group, x[:, :columns].clone(), without, bias, None)
            torch.testing.assert_close(got, without + residual)


def test_nothing_is_reported_where_nothing_was_measured(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "halfbyte.kernels"):
        report()
    assert not caplog.records


@pytest.mark.parametrize("name", checks.CHECKS)
def test_by_torch(name: str) -> None:
    checks.CHECKS[name]("cpu")


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    environment = os.environ | {"HALFBYTE_CACHE": str(tmp_path)}
    command = [sys.executable, str(TESTS / "kernels" / "checks_gemm.py"), "cuda"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("capability", "right"), [((8, 9), True), ((9, 0), False)])
def test_a_product_of_torch_that_knows_no_strides_gets_packed_rows(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], right: bool
) -> None:
    """As torch's kernel for sm_89 does: it takes K and N for the strides. That of sm_90 would be right with them."""

    def blind(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *_: object, use_fast_accum: bool, out: Tensor) -> None:
        left, turned, target = (t.as_strided(t.shape, (t.shape[1], 1), t.storage_offset()) for t in (a, b.t(), out))
        target.copy_((left.float() @ turned.float().T) * scale_a * scale_b)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(reference, "_scaled_mm", blind)
    reference.strides_count.cache_clear()
    m, n, k = 5, 7, 16
    a, b = (torch.randn(rows, k + 16).to(torch.float8_e4m3fn)[:, :k] for rows in (m, n))
    scale_a, scale_b, c = torch.rand(m, 1) + 0.5, torch.rand(1, n) + 0.5, torch.randn(m, n, dtype=torch.bfloat16)
    room = torch.full((m, n + 9), torch.nan, dtype=torch.bfloat16)
    reference.scaled(a, b.t(), scale_a, scale_b, room[:, :n], None, c)
    expected = ((a.float() @ b.float().T) * scale_a * scale_b).bfloat16() + c
    assert torch.equal(room[:, :n], expected) is right and bool(room[:, n:].isnan().all()) is right
    reference.strides_count.cache_clear()


def test_packed_rows_are_not_copied() -> None:
    a, b, out = torch.randn(5, 16), torch.randn(7, 16), torch.empty(5, 7)
    found = reference.packed(a, b.t(), out)
    assert [t.data_ptr() for t in found] == [t.data_ptr() for t in (a, b, out)] and found[2] is out
