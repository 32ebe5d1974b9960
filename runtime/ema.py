"""Exponential moving average of a model's weights."""
import copy

import torch

from evo_vit import compat


class ModelEma:
    """Keeps `module`, a copy of the model whose every float tensor follows ema <- ema + (1 - decay) * (model - ema).

    timm's class walks state_dict(), where Evo-LeViT's blocks stand under two names; here each tensor is averaged once.
    """

    def __init__(self, model, decay):
        self.module = copy.deepcopy(model).eval()
        self.module.requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model):
        """Takes one step towards `model`, which has the structure of the copied one."""
        averages, values = [], []
        for ours, theirs in ((self.module.parameters(), model.parameters()), (self.module.buffers(), model.buffers())):
            for average, value in zip(ours, theirs):
                if average.is_floating_point():
                    averages.append(average)
                    values.append(value.detach().to(device=average.device, dtype=average.dtype))
                else:
                    average.copy_(value)
        compat.lerp_(averages, values, 1 - self.decay)
