"""By how much two models differ on a text: what a merge or a conversion did to the answers, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

PROBE = (
    "The Rhine rises in the Swiss Alps, crosses Lake Constance and reaches the North Sea after 1,230 kilometres. "
    "def mean(values):\n    return sum(values) / len(values)\n\n"
    "Question: what is 17 + 25? Answer: 42. Il pleut à verse, mais nous sortirons quand même."
)
"""Prose, code, arithmetic and another language: the text on which merged and unmerged models are compared."""


@dataclass(frozen=True)
class Moved:
    """Differences of logits `[T, V]` over the T tokens of a probe text.

    max_abs, mean_abs: of the logits. rms: of the reference logits, for scale. kl: mean over tokens of KL(reference || other),
    in nats. top1: share of tokens on which both predict the same next token.
    """

    tokens: int
    max_abs: float
    mean_abs: float
    rms: float
    kl: float
    top1: float

    def __str__(self) -> str:
        return (
            f"logits move by {self.max_abs:.2g} at most, {self.mean_abs:.2g} on average (their rms is {self.rms:.2g}); "
            f"KL {self.kl:.2g} nats; same next token on {self.top1:.1%} of {self.tokens} tokens"
        )


def moved(reference: Tensor, other: Tensor) -> Moved:
    """Compares logits `[T, V]`, in float64."""
    a, b = reference.double().cpu(), other.double().cpu()
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    gap = (a - b).abs()
    return Moved(
        tokens=a.shape[0],
        max_abs=gap.max().item(),
        mean_abs=gap.mean().item(),
        rms=a.square().mean().sqrt().item(),
        kl=max((log_a.exp() * (log_a - log_b)).sum(-1).mean().item(), 0.0),
        top1=(a.argmax(-1) == b.argmax(-1)).double().mean().item(),
    )
