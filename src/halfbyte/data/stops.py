"""Which tokens stop an answer: those that ended the answers that were learned.

Why not all ends that a template writes: some close a part of an answer only (gpt-oss's `<|end|>` closes the thought before the
words), and whoever stopped there would cut it off. Such a token is followed by more to learn. Cost: nothing where a template has
one end; else one pass over the tokens.
"""

from __future__ import annotations

import numpy as np

from halfbyte.data.tokens import Tokens

CHUNK = 1 << 22  # tokens looked at at once


def stops(source: Tokens) -> set[int]:
    """Ids of the tokens that end an answer of this source, and never stand inside one; all of its ends where none is such."""
    ends = set(source.end)
    if len(ends) < 2:
        return ends
    starts = source.offsets[1:-1]
    inside: set[int] = set()
    for at in range(0, len(source.ids), CHUNK):
        ids, learned = np.asarray(source.ids[at : at + CHUNK + 1]), np.asarray(source.trained[at : at + CHUNK + 1])
        goes_on = np.logical_and(learned[:-1], learned[1:])
        # The first token of the next example follows nothing.
        first = starts[(starts > at) & (starts < at + len(ids))]
        goes_on[first - at - 1] = False
        inside.update(np.unique(ids[:-1][goes_on & np.isin(ids[:-1], source.end)]).tolist())
    return ends - inside or ends
