"""The optimiser: timm's by name, except that AdamW on an NPU is Ascend's fused one."""
import torch
from timm.optim import create_optimizer, create_optimizer_v2, optimizer_kwargs

from evo_vit import compat
from fix_timm.optim_factory import add_weight_decay, npu_fused_adamw


def build_optimizer(args, model, device, amp_backend="none"):
    """The optimiser of `args` (timm's names: opt, lr, weight_decay, opt_eps, opt_betas, momentum) for `model` on `device`.

    apex fuses gradients only for its own optimisers and torch_npu only for its own, so on an NPU AdamW comes from
    where `amp_backend` does.
    """
    if args.opt != "adamw":
        return create_optimizer(args, model)
    if device.type != "npu":
        return create_optimizer_v2(model, **dict(optimizer_kwargs(cfg=args), **compat.fused_adamw(device.type)))
    sources = ("apex.optimizers",) if amp_backend == "apex" else ("torch_npu.optim", "apex.optimizers")
    groups = add_weight_decay(model, args.weight_decay, model.no_weight_decay() if hasattr(model, "no_weight_decay") else ())
    options = dict(lr=args.lr, eps=args.opt_eps, weight_decay=0.0)
    if args.opt_betas:
        options["betas"] = tuple(args.opt_betas)
    return npu_fused_adamw(sources)(groups, **options)


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


def load_optimizer_state(optimizer, state):
    """optimizer.load_state_dict, except that how an update is computed (`fused`, `foreach`) stays this optimiser's own:
    another device or another PyTorch may have written `state`. So may a run with another memory format, and a fused update
    walks through parameter and moments side by side, so moments get the parameter's."""
    groups = state["param_groups"]
    if len(groups) == len(optimizer.param_groups):
        groups = [dict(saved, **{name: own[name] for name in ("fused", "foreach") if name in own})
                  for saved, own in zip(groups, optimizer.param_groups)]
    optimizer.load_state_dict(dict(state, param_groups=groups))
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
