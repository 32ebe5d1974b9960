"""apex.amp: O1 casts functions by its lists everywhere, O2 keeps half models and float32 master weights.

`calls` records what was asked for. O1 switches torch's own autocast on for good, which casts by the same lists.
"""
from contextlib import contextmanager

import torch

calls = []
_state = {}


class _Scaler:
    def __init__(self, loss_scale):
        self.dynamic = loss_scale == "dynamic"
        self.scale = 2.0 ** 16 if self.dynamic else float(loss_scale)
        self.unskipped = 0


def _half(model):
    model.half()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.float()
    forward = model.forward

    def cast_forward(*inputs):
        outputs = forward(*[x.half() if x.is_floating_point() else x for x in inputs])
        return tuple(x.float() for x in outputs) if isinstance(outputs, tuple) else outputs.float()

    model.forward = cast_forward


def initialize(models, optimizers=None, enabled=True, opt_level="O1", loss_scale=None, verbosity=1, combine_grad=None):
    calls.append(("initialize", dict(opt_level=opt_level, loss_scale=loss_scale, combine_grad=combine_grad)))
    if opt_level not in ("O0", "O1", "O2", "O3"):
        raise RuntimeError("Unexpected optimization level {}".format(opt_level))
    if combine_grad and optimizers is not None and not getattr(optimizers, "is_npu_fused_optimizer", False):
        raise RuntimeError("combine_grad needs one of apex.optimizers.NpuFused*")
    _state["scaler"] = _Scaler("dynamic" if loss_scale is None else loss_scale)
    if opt_level == "O1":
        torch.set_autocast_cache_enabled(False)
        if hasattr(torch, "set_autocast_dtype"):
            torch.set_autocast_dtype("npu", torch.float16)
            torch.set_autocast_enabled("npu", True)
        else:  # torch 2.1
            torch.npu.set_autocast_dtype(torch.float16)
            torch.npu.set_autocast_enabled(True)
    elif opt_level == "O2":
        masters = {}
        for model in models if isinstance(models, list) else [models]:
            before = {name: p.detach().float().clone() for name, p in model.named_parameters()}
            _half(model)
            for name, p in model.named_parameters():
                if p.dtype == torch.float16 and p.requires_grad:
                    masters[p] = before[name].requires_grad_(True)
        if optimizers is not None:
            for group in optimizers.param_groups:
                group["params"] = [masters.get(p, p) for p in group["params"]]
            step = optimizers.step

            def step_and_copy(*args, **kwargs):
                step(*args, **kwargs)
                with torch.no_grad():
                    for p, master in masters.items():
                        p.copy_(master)

            optimizers.step = step_and_copy
            _state["masters"] = masters
    return models if optimizers is None else (models, optimizers)


def master_params(optimizer):
    calls.append(("master_params", {}))
    for group in optimizer.param_groups:
        yield from group["params"]


@contextmanager
def scale_loss(loss, optimizers, delay_unscale=False):
    calls.append(("scale_loss", dict(delay_unscale=delay_unscale)))
    scaler = _state["scaler"]
    yield loss.float() * scaler.scale
    if delay_unscale:
        return
    for p, master in _state.get("masters", {}).items():
        if p.grad is not None:
            master.grad = p.grad.float()
            p.grad = None
    grads = None
    if getattr(optimizers, "is_npu_fused_optimizer", False):
        optimizers._maybe_init_combined_params_and_grads()
        grads = optimizers.get_combined_grads()
    grads = grads or [p.grad for group in optimizers.param_groups for p in group["params"] if p.grad is not None]
    for grad in grads:
        grad.mul_(1.0 / scaler.scale)
    if not scaler.dynamic:
        return
    scaler.unskipped += 1
    if not all(bool(torch.isfinite(grad).all()) for grad in grads):
        calls.append(("overflow", {}))
        scaler.scale, scaler.unskipped = scaler.scale / 2, 0
        step = optimizers.step

        def skip(*args, **kwargs):
            optimizers.step = step

        optimizers.step = skip
    elif scaler.unskipped == 2000:
        scaler.scale, scaler.unskipped = scaler.scale * 2, 0


def state_dict():
    return {"loss_scaler0": {"loss_scale": _state["scaler"].scale, "unskipped": _state["scaler"].unskipped}}


def load_state_dict(state):
    _state["scaler"].scale = state["loss_scaler0"]["loss_scale"]
    _state["scaler"].unskipped = state["loss_scaler0"]["unskipped"]
