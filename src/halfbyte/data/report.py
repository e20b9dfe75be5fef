"""What was read, kept, dropped and chosen: told to the user before the first step, and stored with the run."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SourceReport:
    """Counts of one source."""

    name: str
    shape: str
    examples: int
    tokens: int
    trained: int
    longest: int
    dropped: int = 0
    dropped_trained: int = 0
    truncated: int = 0
    split: int = 0
    held_out: int = 0


@dataclass
class Report:
    """Counts over all sources, and every choice that was made, in words."""

    template: str
    template_reason: str
    tokens: int
    sources: list[SourceReport] = field(default_factory=list)
    rows: int = 0
    efficiency: float = 0.0
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report as a person reads it."""
        lines = [f"chat template: {self.template} ({self.template_reason})"]
        for s in self.sources:
            share = s.trained / max(1, s.tokens)
            kept = f"{s.examples:,} examples as {s.shape}, {s.tokens:,} tokens, {share:.0%} learned, longest {s.longest:,}"
            extras = [f"{n:,} {word}" for n, word in self._extras(s) if n]
            lines.append(f"{s.name}: {kept}{''.join(f'; {e}' for e in extras)}")
        lines.append(f"{self.rows:,} rows of {self.tokens:,} tokens, {self.efficiency:.1%} full")
        return lines + self.notes

    @staticmethod
    def _extras(s: SourceReport) -> list[tuple[int, str]]:
        lost = f"dropped as too long ({s.dropped_trained / max(1, s.trained):.1%} of what is learned)"
        return [(s.dropped, lost), (s.truncated, "truncated"), (s.split, "split"), (s.held_out, "held out")]
