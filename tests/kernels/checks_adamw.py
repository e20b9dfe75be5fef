"""Proofs of `adamw`'s twins, without pytest: `tests/kernels/test_adamw.py` runs them here, `bench/optimizer_gpu.py` on a GPU.

    TRITON_INTERPRET=1 HALFBYTE_KERNELS=fused python tests/kernels/checks_adamw.py cpu

Given the same scalars the Triton twin gives the reference's bits: both round every product, sum, quotient and root by itself.
(On a CPU torch's own square root is up to an ulp off, so there the weights, and they alone, are compared to rounding.)
"""

from __future__ import annotations

import math
import os
import sys

import torch
from torch import Tensor

from halfbyte.formats.dynamic8 import dynamic_map
from halfbyte.kernels import adamw
from halfbyte.kernels.adamw import Moments, Part, Rule, Scratch, reference
from kernels.checks import as_wrong_as_honest, poisoned
from kernels.runner import main, named

RULE = Rule(0.9, 0.999, 1e-8, (Part(3, 1.0, 0.1), Part(5, 4.0, 0.1), Part(9, 1.0, 0.0)))
N = 9 * 256


def gradient(step: int, device: str, n: int = N) -> Tensor:
    """Seven decades of magnitudes, one block of zeros, some elements of zero."""
    generator = torch.Generator().manual_seed(step)
    g = torch.randn(n, generator=generator) * 10 ** (-7 * torch.rand(n, generator=generator))
    g[256:512] = 0
    g[::7] = 0
    return g.to(device)


def start(device: str, bits: int, rule: Rule = RULE, n: int = N) -> tuple[Tensor, Moments, Scratch]:
    """Random values, moments of zero, no steps done."""
    values = torch.randn(n, generator=torch.Generator().manual_seed(9)).to(device)
    return values, adamw.moments(values, bits), adamw.scratch(rule, values.device)


def one(x: float, device: str) -> Tensor:
    return torch.tensor(x, device=device)


def check_bits_of_the_reference(device: str) -> None:
    """Six steps, the reference fed with the twin's own scalars: every tensor bit for bit (torch's CPU twin: to rounding)."""
    torchs = device == "cpu" and os.environ.get("HALFBYTE_KERNELS") != "fused"
    for bits in (32, 8):
        values, state, kept = start(device, bits)
        truth, states, same = start(device, bits)
        for i in range(6):
            grads, copy = gradient(i, device), gradient(i, device)
            adamw.measure(grads, one(1.5, device), one(2.0, device), 1.0, kept)
            same.scalars.copy_(kept.scalars)
            adamw.step(values, grads, state, 1e-2, RULE, kept)
            reference.step(truth, copy, states, 1e-2, RULE, same)
            assert not grads.any()
            assert float(kept.count) == float(same.count) == i + 1
        if device == "cpu":
            torch.testing.assert_close(values, truth, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(values, truth), f"{bits} bits, values: {(values - truth).abs().max()}"
        for got, expected in zip(state.fields(), states.fields(), strict=True):
            if bits == 32 and torchs:
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)
            else:
                assert torch.equal(got, expected), f"{bits} bits: {(got.float() - expected.float()).abs().max()}"


def check_norm_and_clip(device: str) -> None:
    """The norm against float64, as wrong as torch's; the factor and the corrections; nothing moves but the scalars."""
    for n in (256, N, 256 * 67):
        grads = gradient(n, device, n)
        for largest, scale in ((0.0, 1.0), (1e-3, 4.0), (1e9, 0.5)):
            _, _, kept = start(device, 32)
            before = grads.clone()
            with poisoned():
                loss, norm, found_inf, at = adamw.measure(grads, one(2.5, device), one(scale, device), largest, kept).unbind()
            truth = torch.linalg.vector_norm(grads.double()) / scale
            as_wrong_as_honest("norm", norm, torch.linalg.vector_norm(grads) / scale, truth)
            assert (float(loss), float(found_inf), float(at)) == (2.5, 0.0, scale)
            factor = (min(1.0, largest / (float(truth) + 1e-6)) if largest else 1.0) / scale
            expected = [factor, 0.0, 1 / (1 - 0.9), 1 / math.sqrt(1 - 0.999), 1.0]
            torch.testing.assert_close(kept.scalars.cpu(), torch.tensor(expected), rtol=2e-6, atol=0)
            assert torch.equal(grads, before) and float(kept.count) == 0


def check_the_formula(device: str) -> None:
    """Against float64, as wrong as the formula in plain fp32; three steps with clipping and all three parts."""
    rates = torch.tensor([1.0] * 3 + [4.0] * 2 + [1.0] * 4, device=device).repeat_interleave(256)
    decays = torch.tensor([0.1] * 5 + [0.0] * 4, device=device).repeat_interleave(256)

    def plain(dtype: torch.dtype) -> Tensor:
        x = start(device, 32)[0].to(dtype)
        m, v = torch.zeros_like(x), torch.zeros_like(x)
        for t in range(1, 4):
            g = gradient(t, device).to(dtype)
            g = g * torch.clamp(1.0 / (torch.linalg.vector_norm(g) + 1e-6), max=1.0)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            x = x - 1e-2 * rates.to(dtype) * decays.to(dtype) * x
            x = x - 1e-2 * rates.to(dtype) * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        return x

    values, state, kept = start(device, 32)
    for t in range(1, 4):
        grads = gradient(t, device)
        adamw.measure(grads, one(0.0, device), one(1.0, device), 1.0, kept)
        adamw.step(values, grads, state, 1e-2, RULE, kept)
    as_wrong_as_honest("adamw", values, plain(torch.float32), plain(torch.float64))


def check_nothing_moves_when_not_finite(device: str) -> None:
    """NaN or inf in gradient or loss, first step or later: values, moments and count stay, the gradient becomes 0."""
    for bits in (32, 8):
        values, state, kept = start(device, bits)
        for bad, loss in ((math.nan, 1.0), (math.inf, 1.0), (-math.inf, 1.0), (0.5, math.nan), (0.5, -math.inf)):
            before = [t.clone() for t in (values, *state.fields(), kept.count)]
            grads = gradient(1, device)
            grads[700] = bad
            report = adamw.measure(grads, one(loss, device), one(1.0, device), 1.0, kept)
            adamw.step(values, grads, state, 1e-2, RULE, kept)
            assert float(report[2]) == 1.0
            assert all(torch.equal(a, b) for a, b in zip(before, (values, *state.fields(), kept.count), strict=True))
            assert not grads.any()
            grads = gradient(2, device)
            assert float(adamw.measure(grads, one(1.0, device), one(1.0, device), 1.0, kept)[2]) == 0.0
            adamw.step(values, grads, state, 1e-2, RULE, kept)
            assert not torch.equal(values, before[0]) and float(kept.count) == float(before[-1]) + 1


def check_parts_are_the_whole(device: str) -> None:
    """Stepping part by part, parts of the rule cut anywhere: the bits of one step, count included."""
    for bits in (32, 8):
        whole, state, kept = start(device, bits)
        cut, states, same = start(device, bits)
        for i in range(3):
            grads, copy = gradient(i, device), gradient(i, device)
            for g, scratch in ((grads, kept), (copy, same)):
                if i == 1:
                    g[5] = math.inf
                adamw.measure(g, one(1.5, device), one(2.0, device), 1.0, scratch)
            adamw.step(whole, grads, state, 1e-2, RULE, kept)
            for span in (slice(0, 256), slice(256, 4 * 256), slice(4 * 256, N)):
                adamw.step(cut[span], copy[span], states.part(span), 1e-2, RULE.part(span), same)
            for a, b in zip([whole, grads, kept.count, *state.fields()], [cut, copy, same.count, *states.fields()], strict=True):
                assert torch.equal(a, b), f"{bits} bits, step {i}"


def check_every_threshold(device: str) -> None:
    """8-bit codes at, just below and just above every threshold of both maps, and everywhere between: the nearest level."""
    for signed in (True, False):
        levels = dynamic_map(signed)
        thresholds = (levels[1:] + levels[:-1]) * 0.5
        inf = torch.full_like(thresholds, math.inf)
        near = [thresholds, torch.nextafter(thresholds, inf), torch.nextafter(thresholds, -inf), levels]
        spread = 10 ** (-9 * torch.rand(4096, generator=torch.Generator().manual_seed(0)))
        decades = torch.tensor([x * 10.0**-i for i in range(9) for x in (1.0, 0.9999999, 1.0000001)])
        x = torch.cat([*near, spread, decades, torch.tensor([1e-30, 1e-45])]).clamp(max=1.0)
        x = torch.cat([x, -x]) if signed else x.abs()
        x = torch.nn.functional.pad(x, (0, -len(x) % 255)).view(-1, 255)
        x = torch.nn.functional.pad(x, (0, 1), value=1.0).flatten()  # each block's largest is 1: x is what is encoded
        rule = Rule(0.0, 0.0, 1e-8, (Part(len(x) // 256, 1.0, 0.0),))
        values, state, kept = start(device, 8, rule, len(x))
        grads = (x if signed else x.sqrt()).to(device)
        expected = (x if signed else (grads * grads).cpu()).double()
        kept.scalars.copy_(torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]))  # m = g, v = g * g
        adamw.step(values, grads, state, 1e-2, rule, kept)
        codes = (state.first if signed else state.second).cpu().int()
        nearest = torch.bucketize(expected, thresholds.double(), out_int32=True)
        if signed:
            nearest -= ((expected < 0) & (nearest == 127)).int()
        assert torch.equal(codes, nearest), f"signed={signed}: {(codes != nearest).sum()} codes differ"


CHECKS = named(globals())

if __name__ == "__main__":
    sys.exit(main(CHECKS))
