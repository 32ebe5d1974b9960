"""How much arithmetic one image costs."""
import torch
from torch import nn


@torch.no_grad()
def count_macs(model, img_size):
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
    parameter = next(model.parameters())
    try:
        model.eval()(torch.zeros(1, 3, img_size, img_size, dtype=parameter.dtype, device=parameter.device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return sum(total)
