"""The loss of supervised fine-tuning against plain PyTorch: value, gradient, microbatches, scale and cap of the head."""

from __future__ import annotations

import pytest
import torch

from halfbyte.kernels.cross_entropy import Head
from halfbyte.objectives import sft
from halfbyte.objectives.config import LossConfig

S, H, V = 40, 16, 50


def case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, S, H, generator=generator, requires_grad=True)
    labels = torch.randint(0, V, (1, S), generator=generator)
    labels[0, ::3] = -100
    return hidden, labels, torch.randn(V, H, generator=generator, requires_grad=True), torch.randn(V, generator=generator)


@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.25, 0.0), (1.0, 3.0), (0.5, 4.0)])
def test_it_is_the_mean_over_trained_tokens(scale: float, cap: float) -> None:
    hidden, labels, weight, bias = case()
    head = Head(weight, bias, scale, cap)
    total = int((labels != -100).sum())
    found = sft.loss(hidden, labels, head, total)
    gradients = torch.autograd.grad(found, (hidden, weight))
    expected = torch.nn.functional.cross_entropy(head.logits(hidden)[0], labels[0], ignore_index=-100)
    torch.testing.assert_close(found, expected)
    for mine, truth in zip(gradients, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(mine, truth)


def test_shares_of_unequal_microbatches_add_up_to_the_mean() -> None:
    hidden, labels, weight, bias = case()
    labels[0, :20] = -100
    labels[0, 3] = 5
    head, total = Head(weight, bias), int((labels != -100).sum())
    whole = sft.loss(hidden, labels, head, total)
    shares = [sft.loss(hidden[:, at : at + 10], labels[:, at : at + 10], head, total) for at in range(0, S, 10)]
    torch.testing.assert_close(torch.stack(shares).sum(), whole)


def test_smoothing_and_z_are_means_over_the_whole_batch_too() -> None:
    hidden, labels, weight, bias = case()
    labels[0, :20] = -100
    labels[0, 3] = 5
    config = LossConfig(label_smoothing=0.1, z_loss=0.01)
    head, total = Head(weight, bias), int((labels != -100).sum())
    whole = sft.loss(hidden, labels, head, total, config)
    shares = [sft.loss(hidden[:, at : at + 10], labels[:, at : at + 10], head, total, config) for at in range(0, S, 10)]
    torch.testing.assert_close(torch.stack(shares).sum(), whole)
    z, kept = head.logits(hidden)[0], labels[0] != -100
    plain = torch.nn.functional.cross_entropy(z, labels[0], ignore_index=-100, label_smoothing=0.1)
    torch.testing.assert_close(whole, plain + 0.01 * torch.logsumexp(z[kept], 1).square().mean())


def test_correct_tokens_are_counted() -> None:
    hidden, labels, weight, bias = case()
    best = Head(weight, bias).logits(hidden).argmax(-1)
    labels[0, 1:11] = best[0, 1:11]
    kept = labels != -100
    assert int(sft.sums(hidden, labels, Head(weight, bias))[1]) == int(((best == labels) & kept).sum())


def test_a_batch_without_labels_gives_zero() -> None:
    hidden, labels, weight, bias = case()
    labels.fill_(-100)
    assert float(sft.loss(hidden, labels, Head(weight, bias), 0).detach()) == 0.0
