"""stub"""

from typing import Literal

Method = Literal["auto", "chunked", "exact"]


def fused_method(method, task):
    from halfbyte.kernels.cross_entropy import fused

    return fused.cross_entropy(task, exact=method == "exact")
