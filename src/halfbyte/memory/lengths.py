"""How long the documents of a run are, as far as a plan cares: what attention costs, how many rows and steps there are.

A document of L tokens costs attention L² and no more, because nothing sees another document; so what counts is the sum of squares,
and a row of many short documents is far cheaper than a row of one. Bytes do not depend on it: rows are all of one length.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lengths:
    """Of the first epoch, as it is packed. documents: how many; shortest, median, longest: tokens of one. tokens: of all.

    document: what is left over in rows included, sum of squares over sum: how many tokens the document of a random token has.
    rows: of `row` tokens. efficiency: the share of their positions that hold data. steps: of the whole run.
    """

    documents: int
    tokens: int
    shortest: int
    median: int
    longest: int
    document: float
    row: int
    rows: int
    efficiency: float
    steps: int

    @property
    def attention(self) -> float:
        """What attention costs, against rows of one document each."""
        return self.document / self.row

    def __str__(self) -> str:
        spread = f"{self.shortest:,} to {self.longest:,} tokens (median {self.median:,})"
        rows = f"{self.rows:,} rows of {self.row:,} an epoch, {self.efficiency:.1%} full"
        return (
            f"{self.documents:,} documents of {spread}: {rows}, attention {self.attention:.1%} of full rows', {self.steps:,} steps"
        )


UNKNOWN = "lengths unknown (no prepared data: `halfbyte data check` makes it or tells what is wrong), rows taken as one document"
