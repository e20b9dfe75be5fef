"""Conformance with bitsandbytes on a CPU, a test-only oracle.

What must be equal: decoded weights, bit for bit. What may differ, and why: a code whose normalised value is within 2 ulp of
a threshold (bitsandbytes multiplies by a reciprocal where we divide); denormal blocks (it flushes some); nested codes (its
CPU quantises them through a coarse table). Its traps on a CPU (0.50): `Linear4bit` repacks weights in place, so only
`functional` is used; its decoder starts a new block at every row when K is no multiple of the block (errors as large as the
weights; its encoder, its Python path and its CUDA kernels do not), so it is given the flat tensor; it flushes bf16 denormals.
"""

from __future__ import annotations

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from torch import Tensor

from formats import oracle
from halfbyte.formats import dynamic8, fp4, nf4
from halfbyte.formats.packed import BLOCKS, Format, Packed
from halfbyte.formats.packing import unpack_nibbles
from halfbyte.formats.quantize import dequantize, quantize, scales_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(64, 64), (5, 48), (3, 4, 22), (2, 4098), (1, 2)]
EMPTY = torch.empty(0, dtype=torch.uint8)


def theirs(weight: Tensor, kind: str, block: int, nested: bool = False) -> tuple[Tensor, bnb.QuantState]:
    return bnb.quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=nested)


def decoded_there(data: Tensor, state: bnb.QuantState) -> Tensor:
    """Their decoder, on the flat tensor."""
    shape, state.shape = state.shape, torch.Size((1, state.shape.numel()))
    flat = bnb.dequantize_4bit(data.view(-1, 1), state)
    state.shape = shape
    return flat.view(shape)


def as_packed(data: Tensor, state: bnb.QuantState) -> Packed:
    """Their tensors as ours: what a checkpoint reader does."""
    fmt = Format(state.quant_type, state.blocksize, nested=state.nested)
    outer, offset = (state.state2.absmax, state.offset.reshape(1)) if state.nested else (EMPTY, EMPTY)
    tensors = (data, state.absmax, outer, offset, EMPTY)
    return Packed(fmt, tuple(state.shape), state.dtype, *(t.contiguous().view(-1).view(torch.uint8) for t in tensors))


def near_a_threshold(x: np.ndarray, block: int, thresholds: np.ndarray) -> np.ndarray:
    """Where the normalised value is within 2 ulp of a threshold."""
    v = oracle.normalised(x, block)
    near = np.zeros(v.shape, dtype=bool)
    for t in thresholds:
        near |= np.abs(v - t) <= 2 * np.spacing(np.abs(t))
    return near


def test_the_tables_are_theirs() -> None:
    assert torch.equal(nf4.LEVELS, bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(fp4.LEVELS, bnb.get_4bit_type("fp4", device="cpu"))
    for signed in (True, False):
        assert torch.equal(dynamic8.dynamic_map(signed), bnb.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
def test_what_they_wrote_decodes_bit_for_bit(kind: str, block: int, dtype: torch.dtype, nested: bool) -> None:
    for shape in SHAPES:
        data, state = theirs(torch.randn(shape).to(dtype), kind, block, nested)
        truth = decoded_there(data, state)
        ours = dequantize(as_packed(data, state))
        assert ours.dtype == dtype
        assert torch.equal(ours, truth), (shape, (ours != truth).sum())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(300, 400), (7, 431), (4999,)])
def test_nf4_codes_are_theirs(block: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape).to(dtype)
    data, state = theirs(weight, "nf4", block)
    ours, n = quantize(weight, Format("nf4", block)), weight.numel()
    assert torch.equal(scales_of(ours), state.absmax)
    differ = (unpack_nibbles(ours.codes, n) != unpack_nibbles(data.view(-1), n)).numpy()
    allowed = near_a_threshold(weight.float().numpy().reshape(-1), block, nf4.THRESHOLDS.numpy())
    assert not (differ & ~allowed).any()
    assert differ.mean() < 1e-3
    if n % 2:
        assert int(ours.codes[-1]) & 15 == int(data.view(-1)[-1]) & 15 == nf4.ZERO_CODE


def test_nf4_codes_at_the_thresholds_are_theirs() -> None:
    # Scale 1: no rounding on either side, so ties and their neighbours must agree exactly.
    x = torch.zeros(15, 32)
    x[:, 0] = 1
    x[:, 1] = nf4.THRESHOLDS
    x[:, 2] = torch.from_numpy(np.nextafter(nf4.THRESHOLDS.numpy(), np.float32(2)))
    data, _ = theirs(x, "nf4", 32)
    assert torch.equal(quantize(x, Format("nf4", 32)).codes, data.view(-1))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fp4_values_are_theirs(block: int, dtype: torch.dtype) -> None:
    # Of 120,000 numbers in bf16 some 0.1 % stand on a threshold: the same ones in every run.
    weight = torch.randn(300, 400, generator=torch.Generator().manual_seed(0)).to(dtype)
    data, state = theirs(weight, "fp4", block)
    differ = dequantize(quantize(weight, Format("fp4", block))) != decoded_there(data, state)
    thresholds = fp4.THRESHOLDS.numpy()
    allowed = near_a_threshold(weight.float().numpy().reshape(-1), block, np.concatenate([thresholds, -thresholds]))
    assert not (differ.numpy().reshape(-1) & ~allowed).any()
    assert differ.float().mean() < 1e-3


def test_what_we_wrote_decodes_there() -> None:
    weight = torch.randn(300, 400).bfloat16()
    for kind in ("nf4", "fp4"):
        packed = quantize(weight, Format(kind, 64, nested=True))
        state2 = bnb.QuantState(
            absmax=packed.nested_scales.view(torch.float32), code=dynamic8.dynamic_map(True), blocksize=256, dtype=torch.float32
        )
        state = bnb.QuantState(
            absmax=packed.scales,
            shape=weight.shape,
            code=bnb.get_4bit_type(kind, device="cpu"),
            blocksize=64,
            quant_type=kind,
            dtype=torch.bfloat16,
            offset=packed.nested_offset.view(torch.float32)[0],
            state2=state2,
        )
        assert torch.equal(decoded_there(packed.codes, state), dequantize(packed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_and_special_scale_decodes_there_as_here(dtype: torch.dtype) -> None:
    # All 256 bytes against scales that are zero, negative (nesting can do that), denormal (fp32: see above), huge.
    data = torch.arange(256, dtype=torch.uint8).repeat(8)
    scales = torch.tensor(
        [0.0, -1e-4, 1e-40 if dtype == torch.float32 else 1e-4, 1e-30, 1.0, 3.14159, 60000.0, 3e38]
    ).repeat_interleave(8)
    for kind in ("nf4", "fp4"):
        state = bnb.QuantState(
            absmax=scales,
            shape=torch.Size((64, 64)),
            code=bnb.get_4bit_type(kind, device="cpu"),
            blocksize=64,
            quant_type=kind,
            dtype=dtype,
        )
        truth = decoded_there(data, state)
        assert torch.equal(dequantize(as_packed(data, state)), truth)


@pytest.mark.parametrize("nested", [False, True])
def test_zero_blocks_with_the_cuda_defect_decode_there_as_here(nested: bool) -> None:
    weight = torch.randn(400, 64) * 0.02
    weight[7] = 0
    data, state = theirs(weight, "nf4", 64, nested)
    data.view(-1)[7 * 32 : 8 * 32] = 0
    truth = decoded_there(data, state)
    assert torch.equal(dequantize(as_packed(data, state)), truth)
    assert nested == bool((truth[7] != 0).all())


def test_zero_blocks_are_encoded_as_on_their_cpu() -> None:
    weight = torch.zeros(4, 48)
    weight[0] = torch.randn(48)
    for kind in ("nf4", "fp4"):
        data, _ = theirs(weight, kind, 32)
        ours = quantize(weight, Format(kind, 32)).codes
        assert torch.equal(ours[24:], data.view(-1)[24:])


def test_nested_scales_are_theirs_but_for_their_coarse_table() -> None:
    weight = torch.randn(1024, 1024) * 0.02
    data, state = theirs(weight, "nf4", 64, nested=True)
    ours = quantize(weight, Format("nf4", 64, nested=True))
    assert ours.nested_offset.view(torch.float32).item() == pytest.approx(state.offset.item(), rel=1e-6)
    torch.testing.assert_close(ours.nested_scales.view(torch.float32), state.state2.absmax, rtol=1e-5, atol=0)
    # Measured by them and us: 0.2 % of the codes; the table's step is 3e-5 of a block's maximum.
    assert (ours.scales != state.absmax).float().mean() < 0.01
    assert data.numel() == ours.codes.numel()
