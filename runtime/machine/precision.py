"""In which number format a step computes: float32, PyTorch's own mixed precision, or apex. One contract for all three.

`native` keeps to what apex's O1 does: matrix products and convolutions in fp16 (bf16 on a CPU), softmax, losses and
batch-norm statistics in float32; and so the global class attention, which is a mean of softmaxes.
"""
import inspect
from contextlib import contextmanager

import torch

from ..errors import UserError
from . import versions

DEFAULT_NPU_LOSS_SCALE = 128.0  # published Ascend setting


def complete_gradients(optimizer):
    """Gives a zero gradient to each parameter that has none, for an optimiser that fuses gradients.

    Ascend's fused optimisers take in once, at the first step, the parameters that have a gradient by then, and never
    update any other; the learned trade-offs get theirs only when stage-wise training starts. A zero gradient changes
    no such parameter, since none of them decays.
    """
    if not (getattr(optimizer, "is_fused_optimizer", False) or getattr(optimizer, "is_npu_fused_optimizer", False)):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


class Precision:
    """float32, and the contract: backward() for every micro-batch, then one step()."""

    name = "float32"
    backend = "none"
    loss_scale = None  # a number where the loss is scaled
    dtype = None  # what autocast computes matrix products in; a frozen model may be cast to it

    def prepare(self, model, optimizer=None, teacher=None):
        """Called once, with the models on their device; returns (model, optimizer) to go on with."""
        return model, optimizer

    @contextmanager
    def autocast(self):
        """Forward passes and losses run inside this."""
        yield

    def backward(self, loss, optimizer, last=True):
        """Adds the gradients of `loss`; `last`: no further backward comes before the step."""
        loss.backward()
        complete_gradients(optimizer)

    def step(self, model, optimizer, clip=None):
        """Updates the weights, unless gradients have overflowed; `clip(parameters)` sees gradients of the true loss."""
        if clip is not None:
            clip(model.parameters())
        optimizer.step()

    def skip(self, optimizer):
        """Called in place of step() where the update is left out."""

    def state_dict(self):
        """What a checkpoint keeps, {} for nothing."""
        return {}

    def load_state_dict(self, state):
        """Takes what state_dict() gave."""


class NativePrecision(Precision):
    """torch.autocast in `dtype`, with a gradient scaler for fp16. loss_scale: "dynamic", a number, or None for bf16."""

    backend = "native"

    def __init__(self, device_type, dtype, loss_scale):
        self._device_type = device_type
        self.dtype = dtype
        fixed = None if loss_scale == "dynamic" else loss_scale
        self._scaler = versions.grad_scaler(device_type, fixed) if dtype is torch.float16 else None
        # torch_npu's scaler can keep its scale by itself; PyTorch's is set back to it after each update
        self._reset_to = [fixed] if fixed is not None and device_type != "npu" else []
        self.name = "fp16 mixed (native O1, loss scale {})".format(
            loss_scale) if self._scaler else "bf16 mixed (native O1)"

    @property
    def loss_scale(self):
        return self._scaler.get_scale() if self._scaler else None

    @contextmanager
    def autocast(self):
        with versions.autocast(self._device_type, self.dtype):
            yield

    def backward(self, loss, optimizer, last=True):
        (self._scaler.scale(loss) if self._scaler else loss).backward()
        complete_gradients(optimizer)

    def step(self, model, optimizer, clip=None):
        if self._scaler is None:
            super().step(model, optimizer, clip)
            return
        if clip is not None:
            self._scaler.unscale_(optimizer)
            clip(model.parameters())
        self._scaler.step(optimizer)
        self._scaler.update(*self._reset_to)

    def state_dict(self):
        return self._scaler.state_dict() if self._scaler else {}

    def load_state_dict(self, state):
        if self._scaler:
            self._scaler.load_state_dict(state)


class ApexPrecision(Precision):
    """apex.amp at O1 or O2: NVIDIA's, or Ascend's, which also fuses gradients (`combine_grad`)."""

    backend = "apex"

    def __init__(self, amp, opt_level, loss_scale):
        self._amp = amp
        self._opt_level = opt_level
        self._loss_scale = loss_scale
        self.name = "fp16 mixed (apex {}, loss scale {})".format(opt_level, loss_scale)

    @property
    def loss_scale(self):
        for state in self._amp.state_dict().values():
            return state["loss_scale"]

    def prepare(self, model, optimizer=None, teacher=None):
        options = dict(opt_level=self._opt_level, loss_scale=self._loss_scale, verbosity=0)
        if "combine_grad" in inspect.signature(self._amp.initialize).parameters:
            options["combine_grad"] = True
        models = [model] if teacher is None else [model, teacher]
        if optimizer is None:
            return self._amp.initialize(models, **options)[0], None
        models, optimizer = self._amp.initialize(models, optimizer, **options)
        return models[0], optimizer

    def backward(self, loss, optimizer, last=True):
        with self._amp.scale_loss(loss, optimizer, delay_unscale=not last) as scaled:
            scaled.backward()
            complete_gradients(optimizer)

    def step(self, model, optimizer, clip=None):
        if clip is not None:
            clip(self._amp.master_params(optimizer))
        optimizer.step()

    def skip(self, optimizer):
        if self._loss_scale == "dynamic":
            optimizer.step()  # which apex has replaced, for this one call, by one that does nothing

    def state_dict(self):
        return self._amp.state_dict()

    def load_state_dict(self, state):
        self._amp.load_state_dict(state)


def parse_loss_scale(text):
    """"dynamic", or a positive number as a float; raises ValueError for anything else."""
    if text == "dynamic":
        return text
    scale = float(text)
    if not 0 < scale < float("inf"):
        raise ValueError(text)
    return scale


def _import_apex():
    try:
        from apex import amp
    except ImportError:
        return None
    return amp


def build_precision(device, amp_backend="auto", opt_level=None, loss_scale=None, amp_dtype=None):
    """The Precision of a run on `device`.

    amp_backend: auto (on an NPU apex if it is installed, else native; on CUDA native), apex, native or none.
    opt_level: O0 (float32), O1 or O2; None for O1 on an accelerator and O0 on a CPU.
    loss_scale: see parse_loss_scale; None for 128 on an NPU, else dynamic.
    amp_dtype: fp16 or bf16, of PyTorch's own mixed precision; None for bf16 on a CPU, else fp16.
    Raises UserError for what does not go together or is not installed.
    """
    on_cpu = device.type == "cpu"
    if opt_level is None:
        opt_level = "O0" if amp_backend == "none" or on_cpu and amp_backend == "auto" else "O1"
    if amp_backend == "none" and opt_level != "O0":
        raise UserError("--amp-backend none computes in float32 and --opt-level {} does not; leave one of them out"
                        .format(opt_level))
    if on_cpu and (opt_level == "O2" or amp_backend == "apex"):
        raise UserError("{} needs an NPU or a CUDA device; on a CPU use --opt-level O1 (bf16) or O0 (float32)".format(
            "--opt-level O2" if opt_level == "O2" else "--amp-backend apex"))
    if on_cpu and amp_dtype == "fp16":
        raise UserError("--amp-dtype fp16 needs an NPU or a CUDA device; a CPU's mixed precision is bf16")
    bf16 = on_cpu or amp_dtype == "bf16"
    if loss_scale is not None and (bf16 or opt_level == "O0"):
        raise UserError("--loss-scale has no use in {}; leave it out".format("bf16" if opt_level == "O1"
            else "float32"))
    if amp_dtype is not None and (opt_level != "O1" or amp_backend == "apex"):
        raise UserError("--amp-dtype {} is for PyTorch's own mixed precision (--amp-backend native, --opt-level O1)"
                        .format(amp_dtype))
    if amp_dtype == "bf16" and not versions.has_bf16(device.type):
        raise UserError("--amp-dtype bf16: this {} does not compute in bf16; use fp16".format(device.type))
    if opt_level == "O0":
        return Precision()

    if loss_scale is None and not bf16:
        loss_scale = DEFAULT_NPU_LOSS_SCALE if device.type == "npu" else "dynamic"
    amp = None
    if amp_backend == "apex" or amp_backend == "auto" and device.type == "npu" and amp_dtype is None:
        amp = _import_apex()
        if amp is None and amp_backend == "apex":
            raise UserError("--amp-backend apex: apex is not installed here; install {} or use --amp-backend native"
                            .format("Ascend's apex" if device.type == "npu" else "NVIDIA's apex"))
    if amp is not None:
        return ApexPrecision(amp, opt_level, loss_scale)
    if opt_level == "O2":
        raise UserError("--opt-level O2 is apex's; use --opt-level O1, or install apex and add --amp-backend apex")
    if not versions.has_autocast(device.type):
        raise UserError(
            "this PyTorch has no mixed precision of its own on the {}; {} use --opt-level O0 (float32)".format(
            device.type, "install apex, or" if not on_cpu else "a newer one has, or"))
    return NativePrecision(device.type, torch.bfloat16 if bf16 else torch.float16, loss_scale)
