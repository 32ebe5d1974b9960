"""How much arithmetic one image costs, and how fast a device multiplies matrices, which its speed is compared with."""
import time

import torch
from torch import nn

from evo_vit.ops import linear
from evo_vit.race import choose_linear

from .devices import synchronize


@torch.no_grad()
def count_macs(model: nn.Module, img_size: int) -> int:
    """Multiply-adds of one eval-mode forward of a (1, 3, img_size, img_size) image: convolutions, linear maps, and the
    attention products of modules that report theirs (`macs`). Papers on such models call this number FLOPs."""
    total = []

    def add(module, inputs, output):
        if isinstance(module, nn.Conv2d):
            total.append(output.numel() * module.weight[0].numel())
        elif isinstance(module, nn.Linear):
            total.append(output.numel() * module.in_features)
        else:
            total.append(module.macs(*inputs))

    counted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) or hasattr(m, "macs")]
    hooks = [m.register_forward_hook(add) for m in counted]
    training = model.training
    parameter = next(model.parameters(), torch.zeros(()))  # an int8 network shows none
    try:
        model.eval()(torch.zeros(1, 3, img_size, img_size, dtype=parameter.dtype, device=parameter.device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return sum(total)


@torch.no_grad()
def measure_matmul_rate(device: torch.device, dtype=None, size: int = 2048, seconds: float = 0.3) -> float:
    """FLOP/s (an addition and a multiplication count as two) of products of two square matrices on `device`, by the way
    that the models take, the best of what fits into `seconds` after a first one. dtype: None for float32."""
    a = torch.randn(size, size).to(device=device, dtype=dtype or torch.float32)
    best, start = float("inf"), None
    by_convolution = choose_linear().way == "convolution"
    while start is None or time.perf_counter() - start < seconds:
        synchronize(device)
        begin = time.perf_counter()
        linear(a, a, by_convolution=by_convolution)
        synchronize(device)
        taken = time.perf_counter() - begin
        if start is None:
            start = time.perf_counter()
        else:
            best = min(best, taken)
    return 2 * size ** 3 / best
