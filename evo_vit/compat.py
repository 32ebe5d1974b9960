"""The one place that knows how the supported versions of PyTorch, torchvision and timm differ.

It lives here because the models, the lowest layer of the project, already need it: a CPU-only PyTorch cannot
import torchvision (and so timm) before the first entry below has run. Each entry says which line needs it.
"""
import sys

import torch
from torch import nn


# --- current line, CPU-only PyTorch: the published torchvision wheel registers shape functions for two of its own
# operators, which its compiled half, built for CUDA, could not define. Their schemas let the import go through.
def _import_torchvision():
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
        return library  # the schemas live as long as this object
    return None


_torchvision_schemas = _import_torchvision()

# --- timm 0.4.12 (lines 1.5 and 1.8) keeps its layers and registry elsewhere than timm 1.x.
try:
    from timm.layers import trunc_normal_
    from timm.models import get_pretrained_cfg_value, register_model
except ImportError:
    from timm.models.layers import trunc_normal_  # noqa: F401
    from timm.models.registry import get_model_default_value as get_pretrained_cfg_value
    from timm.models.registry import register_model  # noqa: F401

# --- torch 1.5 has no Hardswish module.
if hasattr(nn, "Hardswish"):
    Hardswish = nn.Hardswish
else:
    class Hardswish(nn.Module):
        """x * relu6(x + 3) / 6 (MobileNetV3), elementwise."""

        def forward(self, x):
            return x * nn.functional.relu6(x + 3) / 6
