"""The distillation teacher: any timm classifier by name, loaded from a checked file, frozen, shown the images as it was
trained to see them, and arranged for speed."""
from contextlib import nullcontext
from typing import List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from evo_vit.compat import create_model, get_pretrained_cfg_value
from evo_vit.layers import bn_scale_shift

from ..errors import UserError
from ..machine import versions
from ..machine.compiling import compile_module, frozen_weights
from ..machine.cost import count_macs
from ..machine.machine import Machine
from .models import (
    check_model_name,
    default_input_size,
    fold_like,
    has_more_heads,
    is_evo_name,
    load_weights,
    set_mode,
)
from .normalization import Renormalize, timm_statistics

CPU_CHUNK = 8  # images at a time on a CPU: a larger batch's activations fall out of the caches


class View(NamedTuple):
    """How a teacher wants to see images that were normalised by ImageNet's statistics, and which of its answers
    count."""
    input_size: Optional[int] = None  # side in pixels to which they are resized first (bilinear); None: as they come
    mean: Tuple[float, ...] = IMAGENET_DEFAULT_MEAN  # the statistics that it was trained with
    std: Tuple[float, ...] = IMAGENET_DEFAULT_STD
    columns: Optional[List[int]] = None  # its number for each of the student's classes; None: the same numbers


class Teacher(nn.Module):
    """Images (B, 3, H, W) -> logits (B, classes) in float32, of `model` in eval mode, without gradients.

    Args:
        model: the trained network.
        view: how it sees the images.
        dtype: number format of weights and activations; None: float32, or what autocast makes of it.
        channels_last: memory format of the images and weights.
        own_format: `dtype` also holds where the student computes in another one.
    """

    def __init__(self, model: nn.Module, view: View = View(), dtype: Optional[torch.dtype] = None,
            channels_last: bool = False, own_format: bool = False):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.own_format = own_format
        self.compiled = False
        self.compute_in(dtype)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.input_size = view.input_size
        self.channels_last = channels_last
        self.renormalize = Renormalize(view.mean, view.std)
        self.register_buffer("columns", None if view.columns is None else torch.tensor(view.columns))
        self.eval()

    def compute_in(self, dtype: Optional[torch.dtype]):
        """Takes another number format, as at the class; what was rounded stays so."""
        self.dtype = dtype
        if dtype is not None:
            self.model.to(dtype=dtype)

    def replace(self, network: nn.Module):
        """Takes another network for float32 images on a CPU, which `compile_network` leaves alone."""
        self.model, self.dtype, self.channels_last, self.compiled = network, None, False, True

    def compile_network(self, device_type: str):
        """Lets the network be compiled when it is first called; raises UserError as compile_module does."""
        if not self.compiled:
            compile_module(self.model, device_type, fullgraph=False, frozen=True)
            self.compiled = True

    def image_macs(self, size: int) -> int:
        """Multiply-adds for an image that comes with `size` pixels."""
        return count_macs(self.model, self.input_size or size)

    def train(self, mode=True):
        """A teacher stays in eval mode."""
        return super().train(False)

    def prepare(self, images):
        """Images as the student sees them -> as this network does."""
        images = self.renormalize(images)
        if self.input_size is not None and images.shape[-1] != self.input_size:
            images = F.interpolate(images, size=(self.input_size, self.input_size), mode="bilinear",
                                   align_corners=False)
        return images

    def forward(self, images):
        autocast = versions.without_autocast(images.device.type) if self.own_format else nullcontext()
        with versions.inference_mode(), frozen_weights(images.device.type), autocast:
            images = self.prepare(images)
            if self.dtype is not None:
                images = images.to(self.dtype)
            if self.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            chunk = CPU_CHUNK if images.device.type == "cpu" else images.shape[0]
            logits = torch.cat([self.model(part) for part in images.split(chunk)]).float()
            if self.columns is not None:
                logits = logits.index_select(1, self.columns)
        return logits.clone()  # out of inference mode, so that a loss may keep it for its backward pass


@torch.no_grad()
def fold_batch_norms(model: nn.Module, images: torch.Tensor):
    """Folds, in place, each batch norm of an eval-mode timm `model` into the convolution before it, where a forward
    pass of `images` shows that it is given just that convolution's output (as modules named `conv` and `bn`, timm's
    names in its convolutional networks; in some networks the norm of that name stands before the convolution). Others
    stay."""
    pairs, outputs, fitting, hooks = {}, {}, set(), []
    for module in model.modules():
        conv, bn = getattr(module, "conv", None), getattr(module, "bn", None)
        if type(conv) is nn.Conv2d and isinstance(bn, nn.BatchNorm2d) and bn.affine and bn.track_running_stats:
            pairs[conv] = (module, bn)

    def after_conv(conv, _, output):
        outputs[conv] = output

    for conv, (_, bn) in pairs.items():
        hooks.append(conv.register_forward_hook(after_conv))
        hooks.append(bn.register_forward_pre_hook(lambda _, inputs, conv=conv: fitting.add(conv)
            if inputs[0] is outputs.pop(conv, None) else fitting.discard(conv)))
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    for conv in fitting:
        module, bn = pairs[conv]
        scale, bias = bn_scale_shift(bn)
        if conv.bias is not None:
            bias = bias + conv.bias * scale
        conv.weight.mul_(scale.view(-1, 1, 1, 1))
        conv.bias = nn.Parameter(bias, requires_grad=False)
        # timm's batch norm may hold the activation that follows it
        module.bn = bn.act if hasattr(bn, "act") else nn.Identity()


def build_teacher(name: str, checkpoint, classes: List[str], machine: Machine, student_size: int,
                  input_size: Optional[int] = None, own_format: bool = False) -> Teacher:
    """The Teacher `name` with the weights in `checkpoint` (a Checkpoint), on the machine, for a student that sees
    images of `student_size` pixels of these `classes`.

    input_size: what the user asks the teacher to be shown; if None the student's images as they are, or resized to the
    teacher's own size where it takes no other. own_format: it computes in float32, whatever the student computes in.
    Its normalisation is that of its checkpoint, if that says so, else timm's; so are the mode and the keep ratio of a
    model of evo_vit/. Raises UserError for an unknown name and for a file that is of another architecture or trained on
    other classes.
    """
    check_model_name(name, "--teacher-model")
    own_classes = checkpoint.classes()
    own_size = checkpoint.settings().get("input_size") or default_input_size(name)
    options = dict(pretrained=False, num_classes=len(own_classes or classes))
    fixed = bool(get_pretrained_cfg_value(name, "fixed_input_size"))
    if fixed and own_size != default_input_size(name):
        options["img_size"] = own_size
    state = checkpoint.weights()
    if is_evo_name(name):
        options["distillation"] = has_more_heads(state)
        if checkpoint.settings().get("keep_ratio") is not None:
            options["keep_ratio"] = checkpoint.settings()["keep_ratio"]
    try:
        model = create_model(name, **options)
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        raise UserError("--teacher-model {}: {}".format(name, " ".join(str(error).split())[:200]))
    load_weights(fold_like(state, model), state, name, checkpoint.refuse)
    set_mode(model, checkpoint.mode())
    columns = checkpoint.places_of(classes) if own_classes not in (None, classes) else None
    model.eval().requires_grad_(False)
    size = input_size or (own_size if fixed else student_size)
    size = _fold_at(model, size, own_size, "" if input_size is None else name)
    mean, std = checkpoint.statistics() or timm_statistics(model)
    view = View(None if size == student_size else size, mean, std, columns)
    dtype = torch.float32 if own_format else machine.precision.dtype
    return Teacher(model, view, dtype, machine.channels_last, own_format).to(machine.device)


def _fold_at(model, size, own_size, name):
    """Folds what can be folded, by a forward pass at `size`, or at `own_size` where the model takes no other; returns
    the size. With a `name` the user has asked for `size`, and it is refused in place of changed."""
    try:
        fold_batch_norms(model, torch.zeros(1, 3, size, size))
    except Exception as error:  # whatever a network raises for images that do not fit it
        if name or size == own_size:
            raise UserError("--teacher-input-size {}: {} cannot be shown images of that size ({}); leave the flag out "
                "for its own size".format(size, name or "the teacher", " ".join(str(error).split())[:160]))
        fold_batch_norms(model, torch.zeros(1, 3, own_size, own_size))
        size = own_size
    return size
