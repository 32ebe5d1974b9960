"""Gradient clipping."""
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
    """What timm's adaptive_clip_grad does, bit for bit, in one pass over the gradients after their norms are known."""
    gradients = [p.grad for p in parameters]
    norms, bounds = (torch.cat([_row_norms(t).flatten() for t in tensors]) for tensors in (gradients, parameters))
    bounds = bounds.clamp_(min=eps).mul_(limit)
    factors = torch.where(norms < bounds, torch.ones_like(norms), bounds / norms.clamp(min=1e-6))
    rows = [p.shape[0] if p.dim() > 1 else 1 for p in parameters]
    factors = [f.view([-1] + [1] * (p.dim() - 1)) if p.dim() > 1 else f for f,
                      p in zip(factors.split(rows), parameters)]
    torch._foreach_mul_(gradients, factors)


def _row_norms(x):
    """Norm of x[i] for each i; of a vector or a number the norm of all of it."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())) if x.dim() > 1 else None)
