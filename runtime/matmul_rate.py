"""How fast a device multiplies matrices: what the speed of training is compared with."""
import time

import torch

from evo_vit.compat import linear

from .device import synchronize


@torch.no_grad()
def measure_matmul_rate(device, dtype=None, size=2048, seconds=0.3):
    """FLOP/s (an addition and a multiplication count as two) of products of two square matrices on `device`, by the way that
    the models take, the best of what fits into `seconds` after a first one. dtype: None for float32."""
    a = torch.randn(size, size).to(device=device, dtype=dtype or torch.float32)
    best, start = float("inf"), None
    while start is None or time.perf_counter() - start < seconds:
        synchronize(device)
        begin = time.perf_counter()
        linear(a, a)
        synchronize(device)
        taken = time.perf_counter() - begin
        if start is None:
            start = time.perf_counter()
        else:
            best = min(best, taken)
    return 2 * size ** 3 / best
