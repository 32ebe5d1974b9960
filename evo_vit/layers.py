"""LeViT's building blocks: convolutions and linear maps with their batch norms, foldable for deployment."""
import torch
from torch import nn

from .compat import trunc_normal_
from .ops import linear
from .race import choose_linear


def bn_scale_shift(bn):
    """The affine map that `bn` applies in eval mode: y = scale * x + shift, each (channels,)."""
    scale = bn.weight / (bn.running_var + bn.eps) ** 0.5
    return scale, bn.bias - bn.running_mean * scale


def _filled(module, weight, bias):
    """`module` in the dtype and on the device of `weight`, holding `weight` and `bias`."""
    module = module.to(dtype=weight.dtype, device=weight.device)
    module.weight.copy_(weight)
    module.bias.copy_(bias)
    return module


class Conv2d_BN(nn.Sequential):
    """Bias-free 2-D convolution followed by batch norm, (B, C_in, H, W) -> (B, C_out, H', W')."""

    def __init__(self, in_channels, out_channels, kernel_size=1, stride=1, padding=0):
        super().__init__()
        self.add_module("c", nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False))
        self.add_module("bn", nn.BatchNorm2d(out_channels))

    @torch.no_grad()
    def fuse(self):
        """The single nn.Conv2d that equals this pair in eval mode, in the same dtype."""
        scale, shift = bn_scale_shift(self.bn)
        conv = nn.Conv2d(self.c.in_channels, self.c.out_channels, self.c.kernel_size, self.c.stride, self.c.padding)
        return _filled(conv, self.c.weight * scale[:, None, None, None], shift)


class Linear(nn.Linear):
    """nn.Linear by the way that is the fastest where it is built (race.py), (..., C_in) -> (..., C_out)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.by_convolution = choose_linear().way == "convolution"

    def forward(self, x):
        return linear(x, self.weight, self.bias, self.by_convolution)


class Linear_BN(nn.Sequential):
    """Bias-free linear map followed by batch norm over all tokens, (B, T, C_in) -> (B, T, C_out)."""

    def __init__(self, in_features, out_features, bn_weight_init=1.0):
        super().__init__()
        self.add_module("c", Linear(in_features, out_features, bias=False))
        self.add_module("bn", nn.BatchNorm1d(out_features))
        nn.init.constant_(self.bn.weight, bn_weight_init)

    def forward(self, x):
        x = self.c(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)

    @torch.no_grad()
    def fuse(self):
        """The single Linear that equals this pair in eval mode, in the same dtype."""
        scale, shift = bn_scale_shift(self.bn)
        return _filled(Linear(self.c.in_features, self.c.out_features), self.c.weight * scale[:, None], shift)


class BN_Linear(nn.Sequential):
    """Batch norm followed by a linear classifier, (B, C) -> (B, classes)."""

    def __init__(self, in_features, out_features, std=0.02):
        super().__init__()
        self.add_module("bn", nn.BatchNorm1d(in_features))
        self.add_module("l", nn.Linear(in_features, out_features))
        trunc_normal_(self.l.weight, std=std)
        nn.init.constant_(self.l.bias, 0)

    @torch.no_grad()
    def fuse(self):
        """The single nn.Linear that equals this pair in eval mode, in the same dtype."""
        scale, shift = bn_scale_shift(self.bn)
        return _filled(nn.Linear(self.l.in_features, self.l.out_features),
                       self.l.weight * scale[None, :], self.l.weight @ shift + self.l.bias)


def fuse_batch_norms(module):
    """Replaces, in place and everywhere below `module`, each pair above by its folded equivalent."""
    for name, child in module.named_children():
        if isinstance(child, (Conv2d_BN, Linear_BN, BN_Linear)):
            setattr(module, name, child.fuse())
        else:
            fuse_batch_norms(child)
