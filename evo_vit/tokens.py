"""Slow and fast tokens (Evo-ViT, section 3.3, https://arxiv.org/abs/2108.01390): which patch tokens are updated, and
how they leave their places and come back.

Tokens are (B, 1 + N, C): the class token, then the N patch tokens, which keep their places, row by row in the grid.
"""
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F

from .ops import top


class TokenState(NamedTuple):
    """What travels beside the tokens from block to block. Patch tokens keep their places, row by row in the grid.
    Without a default, which torch 2.1's compiler cannot fill in."""
    score: Optional[torch.Tensor]  # (B, N) global class attention; None before the first attention
    slow: Optional[torch.Tensor]  # (B, K) int64 places of those this stage selected last, best first; else None


class SlowTokens(NamedTuple):
    """The tokens that a selection lets through, out of their places."""
    tokens: torch.Tensor  # (B, 1 + K, C) the class token and the K best patch tokens, best first
    score: torch.Tensor  # (B, K) the global class attention of the K
    slow: torch.Tensor  # (B, K) int64 where they stand among the N patch tokens
    places: torch.Tensor  # (B, 1 + K, C) int64 where `tokens` stand among all tokens, as gather and scatter take it


def take_slow(x, score, count):
    """SlowTokens of the `count` patch tokens of x (B, 1 + N, C) with the highest score (B, N). Of equal scores the
    first in the grid is taken (where PyTorch has a stable sort, 1.9 on)."""
    best, slow = top(score, count)
    places = F.pad(slow + 1, (1, 0)).unsqueeze(-1).expand(-1, -1, x.shape[-1])  # the class token's place is 0
    return SlowTokens(x.gather(1, places), best, slow, places)


def put_back(x, score, taken, tokens, slow_score):
    """x (B, 1 + N, C) and score (B, N) with what the SlowTokens `taken` have become, `tokens` (B, 1 + K, C) and
    `slow_score` (B, K), in their places; as new tensors, the second in a TokenState."""
    return x.scatter(1, taken.places, tokens), TokenState(score.scatter(1, taken.slow, slow_score), taken.slow)
