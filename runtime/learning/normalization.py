"""Images that were normalised by ImageNet's statistics, for networks that were trained with others."""
from typing import Sequence

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn


class Renormalize(nn.Module):
    """Images (B, 3, H, W), normalised by ImageNet's mean and deviation, as they are by `mean` and `std`."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.needed = any(abs(own - usual) > 1e-6 for own, usual in zip(
            (*mean, *std), IMAGENET_DEFAULT_MEAN + IMAGENET_DEFAULT_STD))  # not for what float32 makes of the same
        theirs_mean, theirs_std, mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (
            IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, mean, std))
        self.register_buffer("scale", theirs_std / std)
        self.register_buffer("shift", (theirs_mean - mean) / std)

    def forward(self, images):
        return images * self.scale + self.shift if self.needed else images


def timm_statistics(model: nn.Module):
    """(mean, deviation) with which timm trained `model`."""
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    return tuple(cfg.get("mean", IMAGENET_DEFAULT_MEAN)), tuple(cfg.get("std", IMAGENET_DEFAULT_STD))
