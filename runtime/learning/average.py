"""Exponential moving average of a model's weights."""
import copy

import torch

from ..machine import versions


class ModelEma:
    """Keeps `module`, a copy of the model whose every float tensor follows ema <- ema + (1 - decay) * (model - ema).

    warmup: after t updates the decay is (1 + t) / (10 + t) where that is less, so that the average of a short run
    leaves the first weights behind (as TensorFlow's ExponentialMovingAverage does with a number of updates). timm's
    class walks state_dict(), where Evo-LeViT's blocks stand under two names; here each tensor is averaged once.
    """

    def __init__(self, model: torch.nn.Module, decay: float, warmup: bool = False):
        self.module = copy.deepcopy(model).eval()
        self.module.requires_grad_(False)
        self.decay = decay
        self.warmup = warmup
        self.updates = 0

    @torch.no_grad()
    def update(self, model: torch.nn.Module):
        """Takes one step towards `model`, which has the structure of the copied one."""
        averages, values, counters, counts = [], [], [], []
        for ours, theirs in ((self.module.parameters(), model.parameters()), (self.module.buffers(), model.buffers())):
            for average, value in zip(ours, theirs):
                if average.is_floating_point():
                    averages.append(average)
                    values.append(value.detach().to(device=average.device, dtype=average.dtype))
                else:
                    counters.append(average)
                    counts.append(value)
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        versions.lerp_(averages, values, 1 - decay)
        versions.copy_(counters, counts)
