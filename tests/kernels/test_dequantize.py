"""What `dequantize` promises besides its bits (those are in checks.py): schema, fakes, dispatch."""

from __future__ import annotations

import pytest
import torch

from halfbyte.errors import RecipeError
from halfbyte.formats.packed import Format
from halfbyte.formats.quantize import dequantize as meaning
from halfbyte.kernels.dequantize import cpu, dequantize, dequantize_op, dequantize_out_op
from halfbyte.kernels.dispatch import VARIABLE, twin
from kernels.checks import random_packed

NESTED = Format("nf4", 64, nested=True)


def test_opcheck() -> None:
    packed = random_packed((63, 60), NESTED, "cpu")
    tensors = list(packed.tensors())
    torch.library.opcheck(dequantize_op, (tensors, packed.spec, torch.bfloat16))
    torch.library.opcheck(dequantize_out_op, (tensors, packed.spec, torch.empty(63, 60)))


def test_the_default_dtype_is_the_source_dtype() -> None:
    packed = random_packed((8, 64), NESTED, "cpu")
    assert dequantize(packed).dtype == packed.dtype == torch.float32


def test_a_buffer_that_does_not_fit_is_refused() -> None:
    packed = random_packed((8, 64), NESTED, "cpu")
    for buffer in (torch.empty(64, 8), torch.empty(8, 128)[:, ::2]):
        with pytest.raises(AssertionError, match="does not fit"):
            dequantize(packed, out=buffer)


def test_chunks_of_the_cpu_twin_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CHUNK", 128)
    for fmt in (NESTED, Format("fp4", 32), Format("int4", 32, zero="float"), Format("int4", 64)):
        packed = random_packed((63, 431), fmt, "cpu")
        assert torch.equal(dequantize(packed, torch.bfloat16), meaning(packed, torch.bfloat16)), fmt


def test_a_twin_can_be_forced_and_a_misspelt_one_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert twin(torch.device("cpu")) == "cpu"
    monkeypatch.setenv(VARIABLE, "reference")
    assert twin(torch.device("cpu")) == twin(torch.device("cuda")) == "reference"
    monkeypatch.setenv(VARIABLE, "refrence")
    with pytest.raises(RecipeError, match="refrence"):
        twin(torch.device("cpu"))
