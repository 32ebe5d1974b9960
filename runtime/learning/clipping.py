"""Gradient clipping."""
import itertools

import torch
from timm.utils import dispatch_clip_grad

from ..machine import versions


@torch.no_grad()
def clip_gradients(parameters, limit: float, mode: str = "agc"):
    """Clips the gradients in place: `norm` by their common norm, `value` by size, `agc` adaptively (Brock et al., arXiv
    2102.06171): each row's norm to at most `limit` times that of the row of weights."""
    parameters = [p for p in parameters if p.grad is not None]
    if mode == "agc" and versions.HAS_FOREACH:
        _clip_adaptively(parameters, limit)
    else:
        dispatch_clip_grad(parameters, limit, mode=mode)


def _clip_adaptively(parameters, limit, eps=1e-3):
    """What timm's adaptive_clip_grad does, on a CPU bit for bit, in one pass over the gradients after their norms are
    known."""
    parameters = sorted(parameters, key=_width)
    gradients = [p.grad for p in parameters]
    norms, bounds = (_row_norms(tensors) for tensors in (gradients, parameters))
    bounds = bounds.clamp_(min=eps).mul_(limit)
    factors = torch.where(norms < bounds, torch.ones_like(norms), bounds / norms.clamp(min=1e-6))
    rows = [p.shape[0] if p.dim() > 1 else 1 for p in parameters]
    factors = [f.view([-1] + [1] * (p.dim() - 1)) if p.dim() > 1 else f for f,
                      p in zip(factors.split(rows), parameters)]
    torch._foreach_mul_(gradients, factors)


def _width(x):
    """Numbers in a row of x, that is in x[i]; 0 for a vector or a number, which is one row."""
    return x[0].numel() if x.dim() > 1 else 0


def _row_norms(tensors):
    """The norms (R,) of all rows of `tensors`, which stand by their widths. On a device whose operators are launched
    one by one those of a width are taken together."""
    norms = []
    for width, same in itertools.groupby(tensors, _width):
        same = list(same)
        if same[0].device.type == "cpu":
            norms += [torch.linalg.vector_norm(t, dim=tuple(range(1, t.dim())) if width else None) for t in same]
        elif width:
            norms.append(torch.linalg.vector_norm(torch.cat([t.reshape(-1, width) for t in same]), dim=1))
        else:
            norms += torch._foreach_norm(same)
    return torch.cat([norm.flatten() for norm in norms])
