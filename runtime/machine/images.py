"""A batch of images on its way to the device: bytes, normalised there."""
import functools
from typing import NamedTuple

import evo_vit  # noqa: F401  (before timm and torchvision)

# isort: split
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


class Images(NamedTuple):
    """A batch on its way: bytes, and what random erasing puts over them once they are normalised."""
    pixels: torch.Tensor  # (B, H, W, 3) uint8
    erased: torch.Tensor  # (P, 5) int64: image, top, left, height, width of each erased area
    fill: torch.Tensor  # the areas' values one after another, each (3, height, width), float32


@functools.lru_cache(maxsize=None)
def _statistics(device):
    """ImageNet's mean and deviation, (1, 3, 1, 1) each; brought to the device once, since the host waits for such a
    copy."""
    return [torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN,
         IMAGENET_DEFAULT_STD)]


def normalize(images, device, channels_last=False):
    """The Images `images` on `device`, normalised by ImageNet's statistics and erased: (B, 3, H, W), bit for bit what
    torchvision's ToTensor and Normalize and timm's RandomErasing make of each."""
    x = images.pixels.to(device, non_blocking=True).permute(0, 3, 1, 2).float()
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    mean, std = _statistics(device)
    x = x.div_(255).sub_(mean).div_(std)
    areas, fill = images.erased.tolist(), images.fill.to(device, non_blocking=True)
    for (i, top, left, h, w), values in zip(areas, fill.split([3 * h * w for _, _, _, h, w in areas])):
        x[i, :, top:top + h, left:left + w] = values.view(3, h, w)
    return x
