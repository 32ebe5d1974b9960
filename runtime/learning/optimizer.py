"""The optimiser: timm's by name, except that AdamW on an NPU is Ascend's fused one."""
import argparse

import torch
from timm.optim import create_optimizer, create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler

from fix_timm.optim_factory import add_weight_decay, npu_fused_adamw

from ..errors import UserError
from ..machine import versions


def build_optimizer(args, model: torch.nn.Module, device: torch.device,
                    amp_backend: str = "none") -> torch.optim.Optimizer:
    """The optimiser of `args` (timm's names: opt, lr, weight_decay, opt_eps, opt_betas, momentum) for `model` on
    `device`.

    apex fuses gradients only for its own optimisers and torch_npu only for its own, so on an NPU AdamW comes from
    where `amp_backend` does. Raises UserError for an optimiser that timm does not have or that this recipe cannot step.
    """
    if args.opt == "adamw" and device.type == "npu":
        return _npu_adamw(args, model, amp_backend)
    # without decay timm would make one group of all, and a resumed run could not change it
    grouped = argparse.Namespace(**dict(vars(args), weight_decay=args.weight_decay or 1.0))
    try:
        if args.opt == "adamw":
            optimizer = create_optimizer_v2(model, **dict(optimizer_kwargs(cfg=grouped),
                                            **versions.fused_adamw(device.type)))
        else:
            optimizer = create_optimizer(grouped, model)
    except Exception as error:  # timm and the optimisers themselves raise whatever they like for a wrong name or value
        raise UserError("--opt {}: timm builds no such optimiser from these flags ({})".format(
            args.opt, " ".join(str(error).split())[:160] or type(error).__name__))
    if not args.weight_decay:
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
    if getattr(optimizer, "is_second_order", False) or "adahessian" in args.opt.lower():
        raise UserError("--opt {} needs second derivatives, which this training step does not compute; use adamw, sgd, "
            "lamb or another first-order optimiser".format(args.opt))
    return optimizer


def build_schedule(args, optimizer: torch.optim.Optimizer):
    """timm's schedule of learning rates by the flags `args`; its step(epoch, top-1) is called after every epoch."""
    if args.sched == "plateau" and not args.warmup_epochs:
        # timm takes epoch 0 for warm-up all the same, and would stay at its rate
        args = argparse.Namespace(**dict(vars(args), warmup_lr=args.lr))
    return create_scheduler(args, optimizer)[0]


def _npu_adamw(args, model, amp_backend):
    sources = ("apex.optimizers",) if amp_backend == "apex" else ("torch_npu.optim", "apex.optimizers")
    groups = add_weight_decay(model, args.weight_decay, model.no_weight_decay()
                              if hasattr(model, "no_weight_decay") else ())
    options = dict(lr=args.lr, eps=args.opt_eps, weight_decay=0.0)
    if args.opt_betas:
        options["betas"] = tuple(args.opt_betas)
    return npu_fused_adamw(sources)(groups, **options)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict, model: torch.nn.Module):
    """optimizer.load_state_dict, of the optimiser of `model`, for the moments alone: rates, decay and whatever else the
    flags say stay this optimiser's own, and so does how an update is computed (`fused`, `foreach`), since another
    device or PyTorch may have written `state`.

    So may a run with another memory format, and a fused update walks through parameter and moments side by side, so
    moments get the parameter's.
    """
    if len(state["param_groups"]) == 1 < len(optimizer.param_groups):
        state = _grouped(state, optimizer, model)
    groups = state["param_groups"]
    if len(groups) == len(optimizer.param_groups):
        kept = ("params", "lookahead_step")  # of which the second counts updates
        groups = [dict(saved, **{name: value for name, value in own.items() if name not in kept or name not in saved})
                  for saved, own in zip(groups, optimizer.param_groups)]
    optimizer.load_state_dict(dict(state, param_groups=groups))
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value,
                    torch.Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _grouped(state, optimizer, model):
    """The `state` of an optimiser with one group, in the order of the model's parameters, in the groups of this one: so
    versions up to 2.0 wrote it where nothing decays."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = dict(zip(trained, state["param_groups"][0]["params"]))  # PyTorch 1.5 numbers them by their addresses
    groups, moments, here = [], {}, 0
    for group in optimizer.param_groups:
        for i, parameter in enumerate(group["params"], here):
            if before[parameter] in state["state"]:
                moments[i] = state["state"][before[parameter]]
        places = list(range(here, here + len(group["params"])))
        groups.append(dict(state["param_groups"][0], params=places))
        here += len(places)
    return dict(state, state=moments, param_groups=groups)
