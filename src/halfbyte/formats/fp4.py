"""FP4: a 4-bit float, sign and three bits, scaled to [-1, 1]: 0 and 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1 (bitsandbytes' table).

Why: the older of the two codebooks; checkpoints in it exist. NF4 is better on trained weights (relative Frobenius error 0.092
against 0.122 on N(0, 1), blocks of 64, at the same 4.5 or 4.127 bits a weight).
The thresholds are the fp32 midpoints of neighbouring magnitudes. Code 8 is a second zero: decoded, never written.
"""

from __future__ import annotations

import torch

from halfbyte.formats.codebook import Codebook

MAGNITUDES = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
"""By the low three bits of the code (not in order of value), exact in fp32."""
LEVELS = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)], dtype=torch.float32, device="cpu")
RANKED = (0, 1, 6, 7, 4, 5, 2, 3)
"""The codes of the magnitudes in ascending order."""
_ASCENDING = LEVELS[list(RANKED)]
THRESHOLDS = (_ASCENDING[1:] + _ASCENDING[:-1]) * 0.5
ZERO_CODE = 0
BOOK = Codebook(LEVELS, THRESHOLDS, RANKED, signed_magnitude=True, zero=ZERO_CODE)
