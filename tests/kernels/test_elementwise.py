"""Norm, rotary and GLU against float64: the reference here, Triton's kernels interpreted in another process, or on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from halfbyte.kernels import norm, rotary
from halfbyte.layers.decoder import rotate
from kernels import capabilities, runner
from kernels import checks_elementwise as checks

PROGRAM = """
import re
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from halfbyte.kernels.glu import fused as glu
from halfbyte.kernels.norm import fused as norm
from halfbyte.kernels.rotary import fused as rotary

def build(kernel, warps, narrow, **constants):
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names} | dict(INTERPRETED=False)
    types = {}
    for name in kernel.arg_names:
        strides = name.endswith(("stride", "_token", "_head")) or name in ("T", "stride")
        types[name] = "constexpr" if name in constants else "fp32" if name == "eps" else "i32" if strides else "*bf16"
        if name in ("rstd", "mean", "q_rstd", "k_rstd") and name not in constants:
            types[name] = "*fp32"
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if types[n] in ("i32", "*bf16") and n != "T"}
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    ptx = triton.compile(ASTSource(kernel, types, constants, aligned), target=target, options={"num_warps": warps}).asm["ptx"]
    # Numbers of 16 bits, in loads and stores of 2, 4 and 8 bytes: none where a program has enough for all of its threads.
    small = re.findall("(?:ld|st)[.]global(?:[.]v2[.]b16|[.]b16|[.]v2[.]b32)", ptx)
    assert narrow or not small, (kernel.__name__, constants, small)
    assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx, kernel.__name__

for mean, bias in ((None, None), ("there", "there")):
    absent = {name: value for name, value in dict(mean=mean, bias=bias).items() if value is None}
    for kernel in (norm._add_norm, norm._norm_backward):
        build(kernel, 4, False, OFFSET=1.0, H=4096, BLOCK=4096, ROWS=1, **absent)
for activation in ("silu", "gelu", "gelu_tanh", "relu", "relu2"):
    for kernel in (glu._glu, glu._glu_backward):
        build(kernel, 8, False, ACTIVATION=activation, K=1.0, C=1.0, F=14336, TILES=7, BLOCK=2048)
for style, inverse in (("half", False), ("interleaved", True), ("interleaved-halves", True)):
    for kernel in (rotary._rotate, rotary._gather, rotary._norm_rotate, rotary._norm_gather):
        build(kernel, 4, True, OFFSET=0.0, D=128, R=128, HALF=64, TAIL=1, WHOLE=128, STYLE=style, INVERSE=inverse,
              Q=32, QB=32, K=8, KB=8, ROWS=2)
print("compiled")
"""


@pytest.mark.parametrize("name", checks.CHECKS)
def test_reference(name: str) -> None:
    checks.CHECKS[name]("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", checks.CHECKS)
def test_cuda_twin(name: str) -> None:
    checks.CHECKS[name]("cuda")


@pytest.mark.slow
def test_interpreted() -> None:
    runner.prove_forced(checks, "fused")


@pytest.mark.parametrize("style", ["half", "interleaved", "interleaved-halves"])
def test_rotation_is_the_generic_layers(style: rotary.Rotation) -> None:
    """The layer that is not fused turns heads `[B, n, S, d]`; here they are `[T, n, d]`."""
    q, k = torch.randn(7, 3, 16, dtype=torch.float64), torch.randn(7, 1, 16, dtype=torch.float64)
    cos, sin = torch.randn(2, 7, 12, dtype=torch.float64)
    expected = [rotate(x.transpose(0, 1)[None], cos[None], sin[None], style)[0].transpose(0, 1) for x in (q, k)]
    rotary.rotate(q, k, cos, sin, style)
    torch.testing.assert_close([q, k], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_agree_with_transformers(dtype: torch.dtype) -> None:
    """Llama's (rounds before the weight), Gemma's (weight + 1) and Cohere's: an ulp or two of 16 bits apart, at most."""
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    cases = ((LlamaRMSNorm, norm.NormSpec("rms", 1e-5)), (Gemma2RMSNorm, norm.NormSpec("rms", 1e-5, 1.0)))
    for kind, spec in (*cases, (CohereLayerNorm, norm.NormSpec("layer", 1e-5))):
        module = kind(48, eps=1e-5)
        torch.nn.init.normal_(module.weight)
        module = module.to(dtype)
        x, out = torch.randn(9, 48, dtype=dtype), torch.empty(9, 48, dtype=dtype)
        norm.add_norm(x, None, spec, module.weight.detach(), None, out)
        expected = module(x).detach()
        error = float((out.double() - expected.double()).abs().max())
        assert error <= 2 * torch.finfo(dtype).eps * float(expected.abs().max()), kind.__name__


@pytest.mark.parametrize("capability", capabilities.ALL)
def test_kernels_compile_and_move_16_bytes(capability: int, tmp_path: Path) -> None:
    """For Ampere, Hopper and Blackwell, without a GPU."""
    runner.compile_for(capability, PROGRAM, tmp_path)
