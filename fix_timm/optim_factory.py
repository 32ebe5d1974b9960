"""timm 0.4.12's optimiser factory (`timm/optim/optim_factory.py`, which this file can replace) for any device.

`adamw` is Ascend's NpuFusedAdamW where the parameters are on an NPU, and PyTorch's AdamW elsewhere. Every other name
gives what timm's own factory gives; the classes are imported when they are asked for.
"""
import importlib

import torch
import torch.nn as nn
import torch.optim as optim

_TIMM_CLASSES = {
    "Adafactor": "adafactor", "Adahessian": "adahessian", "AdamP": "adamp", "Lookahead": "lookahead", "Nadam": "nadam",
    "NovoGrad": "novograd", "NvNovoGrad": "nvnovograd", "RAdam": "radam", "RMSpropTF": "rmsprop_tf", "SGDP": "sgdp",
    "AdaBelief": "adabelief"}
_APEX_CLASSES = ("FusedNovoGrad", "FusedAdam", "FusedLAMB", "FusedSGD")

try:
    from apex import optimizers as _apex_optimizers
    has_apex = all(hasattr(_apex_optimizers, name) for name in _APEX_CLASSES)
except ImportError:
    has_apex = False

# name -> (class, its fixed arguments, whether it takes `momentum`, whether it takes `eps`)
_OPTIMIZERS = {
    "sgd": ("SGD", dict(nesterov=True), True, False),
    "nesterov": ("SGD", dict(nesterov=True), True, False),
    "momentum": ("SGD", dict(nesterov=False), True, False),
    "adam": ("Adam", {}, False, True),
    "adamw": ("AdamW", {}, False, True),
    "adabelief": ("AdaBelief", dict(rectify=False), False, True),
    "nadam": ("Nadam", {}, False, True),
    "radam": ("RAdam", {}, False, True),
    "adamp": ("AdamP", dict(wd_ratio=0.01, nesterov=True), False, True),
    "sgdp": ("SGDP", dict(nesterov=True), True, True),
    "adadelta": ("Adadelta", {}, False, True),
    "adafactor": ("Adafactor", {}, False, True),
    "adahessian": ("Adahessian", {}, False, True),
    "rmsprop": ("RMSprop", dict(alpha=0.9), True, True),
    "rmsproptf": ("RMSpropTF", dict(alpha=0.9), True, True),
    "novograd": ("NovoGrad", {}, False, True),
    "nvnovograd": ("NvNovoGrad", {}, False, True),
    "fusedsgd": ("FusedSGD", dict(nesterov=True), True, False),
    "fusedmomentum": ("FusedSGD", dict(nesterov=False), True, False),
    "fusedadam": ("FusedAdam", dict(adam_w_mode=False), False, True),
    "fusedadamw": ("FusedAdam", dict(adam_w_mode=True), False, True),
    "fusedlamb": ("FusedLAMB", {}, False, True),
    "fusednovograd": ("FusedNovoGrad", {}, False, True),
}


def __getattr__(name):
    """The optimiser classes that timm's file has at its top level."""
    if name in _TIMM_CLASSES:
        return getattr(importlib.import_module("timm.optim." + _TIMM_CLASSES[name]), name)
    if name in _APEX_CLASSES and has_apex:
        return getattr(_apex_optimizers, name)
    raise AttributeError("module {} has no attribute {}".format(__name__, name))


def npu_fused_adamw(sources=("apex.optimizers", "torch_npu.optim")):
    """Ascend's NpuFusedAdamW from the first of `sources` that has it, else PyTorch's AdamW."""
    for source in sources:
        try:
            return importlib.import_module(source).NpuFusedAdamW
        except (ImportError, AttributeError):
            continue
    return optim.AdamW


def add_weight_decay(model, weight_decay=1e-5, skip_list=()):
    """Two parameter groups: biases, other 1-D parameters and those named in `skip_list` without decay, the rest
    with."""
    groups = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            free = parameter.dim() == 1 or name.endswith(".bias") or name in skip_list
            groups[not free].append(parameter)
    return [{"params": groups[False], "weight_decay": 0.0}, {"params": groups[True], "weight_decay": weight_decay}]


def optimizer_kwargs(cfg):
    """create_optimizer_v2's keyword arguments from parsed command-line arguments, or an object like them."""
    kwargs = dict(optimizer_name=cfg.opt, learning_rate=cfg.lr, weight_decay=cfg.weight_decay, momentum=cfg.momentum)
    for name, option in (("eps", "opt_eps"), ("betas", "opt_betas")):
        if getattr(cfg, option, None) is not None:
            kwargs[name] = getattr(cfg, option)
    kwargs.update(getattr(cfg, "opt_args", None) or {})
    return kwargs


def create_optimizer(args, model, filter_bias_and_bn=True):
    """create_optimizer_v2 from parsed command-line arguments."""
    return create_optimizer_v2(model, filter_bias_and_bn=filter_bias_and_bn, **optimizer_kwargs(cfg=args))


def create_optimizer_v2(model: nn.Module, optimizer_name: str = "sgd", learning_rate=None, weight_decay: float = 0.0,
                        momentum: float = 0.9, filter_bias_and_bn: bool = True, **kwargs):
    """An optimiser over all parameters of `model`.

    Args:
        optimizer_name: a name of the table above, with "lookahead_" before it for Lookahead around it.
        filter_bias_and_bn: no weight decay for biases, other 1-D parameters and model.no_weight_decay().
        kwargs: further arguments of the optimiser's class.

    Raises:
        ValueError: unknown name.
    """
    *prefix, name = optimizer_name.lower().split("_")
    if name not in _OPTIMIZERS:
        raise ValueError("there is no optimizer {!r}; there are {}".format(name, ", ".join(sorted(_OPTIMIZERS))))
    class_name, fixed, takes_momentum, takes_eps = _OPTIMIZERS[name]
    if class_name in _APEX_CLASSES:
        assert has_apex and torch.cuda.is_available(), "APEX and CUDA required for fused optimizers"

    if weight_decay and filter_bias_and_bn:
        skip = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
        parameters = add_weight_decay(model, weight_decay, skip)
        weight_decay = 0.0
    else:
        parameters = model.parameters()

    options = dict(kwargs, lr=learning_rate, weight_decay=weight_decay, **fixed)
    if takes_momentum:
        options["momentum"] = momentum
    if not takes_eps:
        options.pop("eps", None)
    if name == "adafactor" and not learning_rate:
        options["lr"] = None
    if name == "fusednovograd":
        options.setdefault("betas", (0.95, 0.98))

    if name == "adamw" and next(model.parameters()).device.type == "npu":
        build = npu_fused_adamw()
    else:
        in_torch = class_name not in _TIMM_CLASSES and class_name not in _APEX_CLASSES
        build = getattr(optim, class_name) if in_torch else __getattr__(class_name)
    optimizer = build(parameters, **options)
    return __getattr__("Lookahead")(optimizer) if prefix == ["lookahead"] else optimizer
