"""The distillation teacher: built by name, loaded from a checked file, frozen, and arranged for speed."""
import torch
import torch.nn.functional as F
from torch import nn

from evo_vit import compat
from evo_vit.compat import create_model
from evo_vit.layers import bn_scale_shift

from .checkpoint import load_checkpoint, load_weights, model_state
from .models import check_model_name

CPU_CHUNK = 8  # images at a time on a CPU: a larger batch's activations fall out of the caches


class Teacher(nn.Module):
    """Images (B, 3, H, W) -> logits (B, classes) in float32, of `model` in eval mode, without gradients.

    Args:
        model: the trained network. Batch norms that follow a convolution are folded into it, in place.
        input_size: side in pixels to which the images are resized first (bilinear); None: as they come.
        dtype: number format of weights and activations; None: float32, or what autocast makes of it.
        channels_last: memory format of the images and weights.
    """

    def __init__(self, model, input_size=None, dtype=None, channels_last=False):
        super().__init__()
        fold_batch_norms(model.eval().requires_grad_(False))
        self.model = model.to(dtype=dtype) if dtype is not None else model
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.input_size = input_size
        self.dtype = dtype
        self.channels_last = channels_last
        self.eval()

    def train(self, mode=True):
        """A teacher stays in eval mode."""
        return super().train(False)

    def forward(self, images):
        with compat.inference_mode(), compat.frozen_weights(images.device.type):
            if self.input_size is not None and images.shape[-1] != self.input_size:
                images = F.interpolate(images, size=(self.input_size, self.input_size), mode="bilinear",
                                       align_corners=False)
            if self.dtype is not None:
                images = images.to(self.dtype)
            if self.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            chunk = CPU_CHUNK if images.device.type == "cpu" else images.shape[0]
            logits = torch.cat([self.model(part) for part in images.split(chunk)]).float()
        return logits.clone()  # out of inference mode, so that a loss may keep it for its backward pass


@torch.no_grad()
def fold_batch_norms(model):
    """Folds, in place, each batch norm of an eval-mode timm `model` that stands beside the convolution before it (as
    `conv` and `bn`, timm's names in its convolutional networks); other modules stay as they are."""
    for module in model.modules():
        conv, bn = getattr(module, "conv", None), getattr(module, "bn", None)
        if type(conv) is not nn.Conv2d or not isinstance(bn, nn.BatchNorm2d) or bn.running_var is None:
            continue
        scale, bias = bn_scale_shift(bn)
        if conv.bias is not None:
            bias = bias + conv.bias * scale
        conv.weight.mul_(scale.view(-1, 1, 1, 1))
        conv.bias = nn.Parameter(bias, requires_grad=False)
        # timm's batch norm may hold the activation that follows it
        module.bn = bn.act if hasattr(bn, "act") else nn.Identity()


def build_teacher(args, num_classes, device, dtype=None, channels_last=False):
    """The Teacher that `args` (teacher_model, teacher_path, teacher_input_size) name, on `device`.

    Raises UserError for an unknown name and for a file that is missing, damaged, of another architecture or trained
    on another number of classes.
    """
    name, path = args.teacher_model, args.teacher_path
    check_model_name(name, "--teacher-model")
    teacher = create_model(name, pretrained=False, num_classes=num_classes, global_pool="avg")
    state = model_state(load_checkpoint(path, "--teacher-path"), path, "--teacher-path")
    load_weights(teacher, state, name, path, "--teacher-path")
    return Teacher(teacher, args.teacher_input_size, dtype, channels_last).to(device)
