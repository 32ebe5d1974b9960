"""Exponential moving average of a model's weights."""
import copy

import torch


class ModelEma:
    """Keeps `module`, a copy of the model whose every float tensor follows ema <- decay * ema + (1 - decay) * model.

    timm's class walks state_dict(), where Evo-LeViT's blocks stand under two names; here each tensor is averaged once.
    """

    def __init__(self, model, decay):
        self.module = copy.deepcopy(model).eval()
        self.module.requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model):
        """Takes one step towards `model`, which has the structure of the copied one."""
        for ours, theirs in ((self.module.parameters(), model.parameters()), (self.module.buffers(), model.buffers())):
            for average, value in zip(ours, theirs):
                value = value.to(average.device)
                if average.is_floating_point():
                    average.mul_(self.decay).add_(value, alpha=1 - self.decay)
                else:
                    average.copy_(value)
