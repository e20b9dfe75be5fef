"""NF4: the 16 quantiles of a normal distribution, scaled to [-1, 1].

Why: trained weights are close to normal, so equally likely codes carry the most information (QLoRA, arXiv 2305.14314, section 3).
Cost: 4.5 bits a weight with fp32 scales in blocks of 64, 4.127 with nested scales; relative Frobenius error 0.092 on N(0, 1).
The thresholds are the fp32 midpoints of neighbouring levels.
"""

from __future__ import annotations

import torch

from halfbyte.formats.codebook import Codebook

LEVELS = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    dtype=torch.float32, device="cpu",
)  # fmt: skip
THRESHOLDS = torch.tensor(
    [
        -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
        -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
        0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
    ],
    dtype=torch.float32, device="cpu",
)  # fmt: skip
ZERO_CODE = 7
BOOK = Codebook(LEVELS, THRESHOLDS, tuple(range(16)), signed_magnitude=False, zero=ZERO_CODE)
