"""Operators that the models run on, each by the fastest way that the device and this PyTorch have."""
from typing import Tuple, Union

import torch
from torch import nn

from . import race
from .compat import TORCH, is_exported, is_traced

ATTENTION_CHUNK = 2 ** 21  # elements: attention matrices of 8 MB at a time stay in a CPU's caches
_HALF = (torch.float16, torch.bfloat16)

# --- torch before 1.9 cannot be asked for a stable sort, by which equal values fall the same way on every device.
_SORT_OPTIONS = {"stable": True} if TORCH >= (1, 9) else {}

# --- torch before 2.1 has no fused attention with a scale of one's own.
_fused_attention = nn.functional.scaled_dot_product_attention if TORCH >= (2, 1) else None


def top(x: torch.Tensor, k: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """The k largest values of each row of x (B, N), largest first, and their places, (B, k) each; of equal values the
    first comes first where PyTorch can do that, and in ONNX, whose TopK does so."""
    if torch.onnx.is_in_onnx_export():
        return x.topk(k, dim=1)
    values, places = torch.sort(x, dim=1, descending=True, **_SORT_OPTIONS)
    return values[:, :k], places[:, :k]


def drop_path(branch: torch.Tensor, rate: float) -> torch.Tensor:
    """A residual branch (B, ...) as it enters in training: left out for a share `rate` of the images, and scaled for
    the others so that its mean stays (stochastic depth, https://arxiv.org/abs/1603.09382)."""
    if rate == 0:
        return branch
    kept = torch.rand((branch.shape[0],) + (1,) * (branch.dim() - 1), device=branch.device) >= rate
    return branch * (kept.to(branch.dtype) / (1 - rate))


def lerp(start: torch.Tensor, end: torch.Tensor, weight: Union[float, torch.Tensor]) -> torch.Tensor:
    """start + weight * (end - start), of a format that may be written down for other machines by any PyTorch."""
    if is_exported():
        return start + weight * (end - start)
    return torch.lerp(start, end, weight)


# --------------------------------------------------------------------------------------------- attention

def _numel(q, k):
    """Elements of the attention matrices."""
    return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]


def _softmax(x):
    """Softmax over the keys; of half precision in float32, since tokens are ranked by it and coarse steps make ties."""
    return x.softmax(dim=-1, dtype=torch.float32) if x.dtype in _HALF else x.softmax(dim=-1)


def _attention_in_chunks(q, k, v, patches):
    """`attention` with q scaled already, a few heads of a few images at a time."""
    B, heads = q.shape[:2]
    chunk = max(ATTENTION_CHUNK // (q.shape[2] * k.shape[2]), 1)
    x, class_attn = [], []
    for part_q, part_k, part_v in zip(*(t.flatten(0, 1).split(chunk) for t in (q, k.transpose(-2, -1), v))):
        attn = _softmax(torch.bmm(part_q, part_k))
        x.append(torch.bmm(attn.to(v.dtype), part_v))
        class_attn.append(attn[:, 0, 1:1 + patches])
    return torch.cat(x).view(B, heads, -1, v.shape[-1]), torch.cat(class_attn).view(B, heads, -1)


def _is_fused(q, v):
    """Whether the fused attention serves best. CUDA's takes values of any width. Elsewhere they are as wide as the keys
    (Evo-DeiT): on a CPU wider ones (Evo-LeViT) are slower, and an NPU's kernel does not take them, nor goes into a
    graph (op-plugin's documentation of npu_fusion_attention)."""
    if _fused_attention is None:
        return False
    if q.device.type == "cuda":
        return True
    return q.shape[-1] == v.shape[-1] and not (is_exported() if q.device.type == "cpu" else is_traced())


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, patches: int):
    """Scaled dot-product attention, and what the class token, at place 0, pays the `patches` tokens behind it.

    q (B, heads, Q, key), k (B, heads, T, key), v (B, heads, T, value) -> (B, heads, Q, value), (B, heads, patches).
    """
    if not _is_fused(q, v):
        if q.device.type == "cpu" and not is_traced() and _numel(q, k) > 2 * ATTENTION_CHUNK:
            return _attention_in_chunks(q * scale, k, v, patches)
        attn = _softmax(q * scale @ k.transpose(-2, -1))  # (B, heads, Q, T)
        return attn.to(v.dtype) @ v, attn.flatten(2)[:, :, 1:1 + patches]
    row = q[:, :, :1] * scale  # of the attention matrix the first, which the fused kernel hides
    row = (row.float() if row.dtype in _HALF else row) * k  # no product of matrices, which would copy the keys
    return _fused_attention(q, k, v, scale=scale), row.sum(dim=-1).softmax(dim=-1)[:, :, 1:1 + patches]


# --------------------------------------------------------------------------------------------- linear maps

def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor = None,
           by_convolution: bool = False) -> torch.Tensor:
    """torch.nn.functional.linear, (..., C_in) -> (..., C_out); by_convolution: float32 on a CPU as a 1x1 convolution,
    which is never written down for other machines."""
    if by_convolution and x.device.type == "cpu" and x.dtype is torch.float32 and not (
            torch.is_autocast_enabled("cpu") or is_exported()):
        return race.convolution(x, weight, bias)
    return race.matmul(x, weight, bias)
