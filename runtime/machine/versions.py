"""How the supported versions of PyTorch and torchvision differ for a run. Each entry says which line needs it; what the
models themselves need stands in evo_vit/compat.py."""
import inspect
import warnings
from contextlib import nullcontext

import torch
from torch import nn
from torch.utils.data import DataLoader

from evo_vit.compat import TORCH

# --- torch before 1.9 has no inference mode.
inference_mode = getattr(torch, "inference_mode", torch.no_grad)

# --- torch before 2.0 has no reliable operators on lists of tensors.
HAS_FOREACH = TORCH >= (2, 0)


def lerp_(starts, ends, weight: float):
    """starts += weight * (ends - starts), in place, for two lists of tensors."""
    if HAS_FOREACH:
        torch._foreach_lerp_(starts, ends, weight)
    else:
        for start, end in zip(starts, ends):
            start.lerp_(end, weight)


# --- torch before 2.1 copies tensor by tensor.
def copy_(targets, sources):
    """Copies each of `sources` to the one of `targets` at its place, for two lists of tensors."""
    if targets and hasattr(torch, "_foreach_copy_"):
        torch._foreach_copy_(targets, sources)
    else:
        for target, source in zip(targets, sources):
            target.copy_(source)


# --- torch before 1.7 has no persistent data-loader workers.
_KEEPS_WORKERS = "persistent_workers" in inspect.signature(DataLoader.__init__).parameters


def persistent_workers(num_workers: int) -> dict:
    """Keyword arguments for a DataLoader that keeps its `num_workers` workers from epoch to epoch."""
    return {"persistent_workers": True} if _KEEPS_WORKERS and num_workers > 0 else {}


# --- current line: DistributedDataParallel's `broadcast_buffers` has a new name, and warns under the old one. PyTorch
# before 2.0 cannot be told reliably which parameters to leave alone, and looks for those without a gradient in every
# step.
_DDP_FLAGS = inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
_NO_BUFFERS = {"forward_sync_buffers" if "forward_sync_buffers" in _DDP_FLAGS else "broadcast_buffers": False}


def data_parallel(model: nn.Module, unused, device_ids, gradient_views: bool) -> nn.Module:
    """`model` in a DistributedDataParallel that leaves its buffers alone, and the parameters named in `unused`, which
    have no gradient in any step. gradient_views: gradients lie in the buckets that are sent."""
    kind = nn.parallel.DistributedDataParallel
    if TORCH < (2, 0):
        return kind(model, device_ids=device_ids, find_unused_parameters=True, **_NO_BUFFERS)
    kind._set_params_and_buffers_to_ignore_for_model(model, unused)
    return kind(model, device_ids=device_ids, gradient_as_bucket_view=gradient_views, **_NO_BUFFERS)


# --- torch 1.5 has no autocast and no gradient scaler; torch before 1.10 has them for CUDA alone (and the vendor's NPU
# module its own); torch before 2.3 keeps the scaler in torch.cuda.amp.
def has_autocast(device_type: str) -> bool:
    """Whether this PyTorch has mixed precision of its own on that device: autocast and, but for CPUs, a scaler."""
    if device_type == "cpu":
        return hasattr(torch, "autocast")
    amp = getattr(getattr(torch, device_type), "amp", None)
    return hasattr(amp, "autocast") and hasattr(amp, "GradScaler")


def has_bf16(device_type: str) -> bool:
    """Whether the device computes in bf16, as far as its module can say; PyTorch before 1.10 does on none."""
    if not hasattr(torch, "autocast"):
        return False
    return device_type == "cpu" or getattr(getattr(torch, device_type), "is_bf16_supported", lambda: True)()


def autocast(device_type: str, dtype: torch.dtype):
    """Context of mixed precision in `dtype`; older PyTorch knows fp16 alone."""
    if device_type == "npu":
        return torch.npu.amp.autocast(**({} if dtype is torch.float16 else {"dtype": dtype}))
    if hasattr(torch, "autocast"):
        return torch.autocast(device_type, dtype=dtype)
    return torch.cuda.amp.autocast()


def without_autocast(device_type: str):
    """Context in which nothing is cast."""
    if device_type == "npu":
        return torch.npu.amp.autocast(enabled=False)
    if hasattr(torch, "autocast"):
        return torch.autocast(device_type, enabled=False)
    return torch.cuda.amp.autocast(enabled=False) if device_type == "cuda" and has_autocast("cuda") else nullcontext()


def grad_scaler(device_type: str, fixed_scale=None):
    """A gradient scaler that adapts its scale; with `fixed_scale` it starts there, and torch_npu's stays there."""
    options = {} if fixed_scale is None else {"init_scale": fixed_scale}
    if device_type == "npu":
        return torch.npu.amp.GradScaler(dynamic=fixed_scale is None, **options)
    if hasattr(torch, "amp") and hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(device_type, **options)
    return torch.cuda.amp.GradScaler(**options)


# --- torch before 2.4 has a fused AdamW for CUDA at most.
def fused_adamw(device_type: str) -> dict:
    """Keyword arguments for a torch.optim.AdamW that updates all parameters in one kernel, where there is such a
    one."""
    return {"fused": True} if device_type in ("cpu", "cuda") and TORCH >= (2, 4) else {}


# --- channels-last is slower before torch 2.0 on a CPU, and an NPU has a format of its own.
def prefers_channels_last(device_type: str) -> bool:
    """Whether convolutions are faster with images and weights in channels-last memory format."""
    return device_type in ("cpu", "cuda") and TORCH >= (2, 0)


# --- torch before 2.1 does not resize bytes, or not with the filters that Pillow has.
RESIZES_BYTES = TORCH >= (2, 1)


def resize_bytes(images: torch.Tensor, size, mode: str) -> torch.Tensor:
    """`images` (B, 3, H, W) uint8 at another `size` (height, width), by "bicubic" or "bilinear" interpolation."""
    return nn.functional.interpolate(images, size=size, mode=mode, antialias=True)


# --- line 1.8: timm 0.4.12 still hands torchvision an interpolation by its number, of which torchvision warns.
warnings.filterwarnings("ignore", message="Argument interpolation should be of type InterpolationMode")


# --- torchvision 0.9 on names interpolations by an enum, older ones by Pillow's number.
def interpolation(name: str):
    """torchvision's value for the interpolation `name` (bicubic, bilinear, nearest)."""
    import torchvision.transforms as transforms
    if hasattr(transforms, "InterpolationMode"):
        return transforms.InterpolationMode(name)
    from PIL import Image
    return getattr(Image, name.upper())
