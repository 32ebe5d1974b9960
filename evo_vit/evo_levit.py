"""Evo-LeViT: slow-fast token evolution (Evo-ViT, AAAI 2022, https://arxiv.org/abs/2108.01390) on the LeViT backbone
(https://arxiv.org/abs/2104.01136).

Every block scores the patch tokens by the attention that the class token pays them. The best of them are updated by
attention and MLP (slowly); the others are averaged into one representative token, updated with the slow ones, whose
residuals are then added to each of them (fast). Scores travel through `forward` as values (`TokenState`), so models
never share state.

Parameter names are those of the reference implementation, so that its checkpoints load with strict=True.
"""
from typing import NamedTuple

import torch
from torch import nn

from .compat import Hardswish, trunc_normal_
from .layers import BN_Linear, Conv2d_BN, Linear_BN, fuse_batch_norms
from .model import EvoModel
from .ops import attention, drop_path, lerp
from .registry import PATCH_SIZE, register
from .tokens import TokenState, put_back, take_slow


class Mode(NamedTuple):
    """How the blocks run: plain switches, the same for all of them."""
    select: bool  # evolving blocks select tokens (off: all tokens go the slow way)
    learned: bool  # blend scores by sigmoid(learn_tradeoff) instead of 0.5


# --------------------------------------------------------------------------------------------- token selection

def _evolve(residuals, x, state, num_slow, learned):
    """Slow-fast updating (paper, section 3.3): runs `residuals` on the class token, the `num_slow` best patch tokens
    and the representative token; every other token receives the representative's residuals.

    x is (B, 1 + N, C) and its tokens stay in their places: only the slow ones are read out and written back.
    """
    taken = take_slow(x, state.score, num_slow)
    weight = state.score.scatter(1, taken.slow, 0.0)
    weight = weight / weight.sum(dim=1, keepdim=True)
    representative = weight.unsqueeze(1).to(x.dtype) @ x[:, 1:]  # (B, 1, C)

    tokens, score = torch.cat((taken.tokens, representative), dim=1), taken.score  # (B, 1 + K + 1, C), (B, K)
    for residual in residuals:
        tokens, score = residual(tokens, score, learned)
    updated, evolved = tokens.split([1 + num_slow, 1], dim=1)
    return put_back(x + (evolved - representative), state.score, taken, updated, score)


def _count_slow(x, keep_ratio):
    """How many patch tokens of x (B, 1 + N, C) are slow: at least one, if another is left for the representative."""
    num_patches = x.shape[1] - 1
    return min(max(int(num_patches * keep_ratio), 1), num_patches - 1)


def _update_all(residuals, x, state, mode):
    """Runs `residuals` on every token: no selection."""
    score = state.score
    for residual in residuals:
        x, score = residual(x, score, mode.learned)
    return x, TokenState(score, state.slow)


# --------------------------------------------------------------------------------------------- attention

class _ClassAttention(nn.Module):
    """What both attentions share: the trade-off by which a block's class attention enters the global one."""

    def __init__(self, key_dim, num_heads, attn_ratio):
        super().__init__()
        self.learn_tradeoff = nn.Parameter(torch.zeros(1))
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.value_dim = int(attn_ratio * key_dim)
        self.scale = key_dim ** -0.5

    def blend(self, score, class_attn, learned):
        """g <- (1 - t) g + t a, both (B, n)."""
        return lerp(score, class_attn, torch.sigmoid(self.learn_tradeoff).to(score.dtype) if learned else 0.5)

    def attention_macs(self, queries, keys):
        """Multiply-adds of the two attention products for one image, which no layer inside shows."""
        return self.num_heads * queries * keys * (self.key_dim + self.value_dim)


class Attention(_ClassAttention):
    """LeViT's multi-head self-attention, without attention bias, that also updates the global class attention."""

    def __init__(self, dim, key_dim, num_heads, attn_ratio=2):
        super().__init__(key_dim, num_heads, attn_ratio)
        self.qkv = Linear_BN(dim, num_heads * (2 * key_dim + self.value_dim))
        self.proj = nn.Sequential(Hardswish(), Linear_BN(num_heads * self.value_dim, dim, bn_weight_init=0))

    def macs(self, x, *_):
        return self.attention_macs(x.shape[1], x.shape[1])

    def forward(self, x, score, learned):
        """x (B, T, C): class token, patch tokens, and possibly the representative, which has no score.

        score: (B, n) of the n patch tokens, or None for the first attention. Returns the attended tokens (B, T, C) and
        the updated scores.
        """
        B, T, _ = x.shape
        # (B, heads, T, 2 key + value); copied once here, or the products would copy each part
        qkv = self.qkv(x).view(B, T, self.num_heads, 2 * self.key_dim + self.value_dim).transpose(1, 2).contiguous()
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.value_dim], dim=3)
        n = T - 1 if score is None else score.shape[1]
        x, class_attn = attention(q, k, v, self.scale, n)  # (B, heads, T, value), (B, heads, n)

        class_attn = class_attn.mean(dim=1)
        score = class_attn if score is None else self.blend(score, class_attn, learned)
        return self.proj(x.transpose(1, 2).flatten(2)), score


class Subsample(nn.Module):
    """Every second row and column of the grid, (B, N, C) -> (B, N', C) with N = resolution squared."""

    def __init__(self, resolution, stride=2):
        super().__init__()
        self.resolution = resolution
        self.stride = stride

    def forward(self, x):
        grid = x.reshape(x.shape[0], self.resolution, self.resolution, x.shape[2])
        return grid[:, ::self.stride, ::self.stride].flatten(1, 2)


class AttentionSubsample(_ClassAttention):
    """The attention between two stages: queries from every second row and column, keys and values from all."""

    def __init__(self, in_dim, out_dim, key_dim, num_heads, resolution, attn_ratio=4):
        super().__init__(key_dim, num_heads, attn_ratio)
        self.kv = Linear_BN(in_dim, num_heads * (key_dim + self.value_dim))
        self.q = nn.Sequential(Subsample(resolution), Linear_BN(in_dim, num_heads * key_dim))
        self.proj = nn.Sequential(Hardswish(), Linear_BN(num_heads * self.value_dim, out_dim))
        self.poss = nn.Parameter(torch.zeros(1, resolution ** 2 + 1, in_dim))
        trunc_normal_(self.poss, std=0.02)
        self.num_queries = ((resolution - 1) // 2 + 1) ** 2 + 1

    def macs(self, x, *_):
        return self.attention_macs(self.num_queries, x.shape[1])

    def forward(self, x, state, mode):
        """x (B, 1 + N, C_in) -> (B, 1 + N', C_out), with scores of unchanged sum."""
        x = x + self.poss
        B, T, _ = x.shape
        subsample, project_q = self.q[0], self.q[1]  # which torch 2.1's compiler cannot unpack
        kv = self.kv(x).view(B, T, self.num_heads, self.key_dim + self.value_dim).transpose(1, 2).contiguous()
        k, v = kv.split([self.key_dim, self.value_dim], dim=3)  # (B, heads, T, key), (B, heads, T, value)
        q = project_q(torch.cat((x[:, :1], subsample(x[:, 1:])), dim=1))
        q = q.view(B, q.shape[1], self.num_heads, self.key_dim).transpose(1, 2)  # (B, heads, 1 + N', key)
        x, class_attn = attention(q, k, v, self.scale, T - 1)

        score, class_attn = subsample(torch.stack((state.score, class_attn.mean(dim=1)), dim=-1)).unbind(-1)
        score = self.blend(score, class_attn, mode.learned)
        score = score * (state.score.sum(dim=1, keepdim=True) / score.sum(dim=1, keepdim=True))
        return self.proj(x.transpose(1, 2).flatten(2)), TokenState(score, None)


# --------------------------------------------------------------------------------------------- blocks

class Residual(nn.Module):
    """x + m(x), where m maps tokens to tokens; in training `m` is dropped for a share `drop` of the images."""

    def __init__(self, m, drop):
        super().__init__()
        self.m = m
        self.drop = drop

    def branch(self, x, score, learned):
        return self.m(x), score

    def forward(self, x, score, learned):
        """x (B, T, C) and the scores (B, n) of its patch tokens, both updated."""
        out, score = self.branch(x, score, learned)
        if self.training:
            out = drop_path(out, self.drop)
        return x + out, score


class AttentionResidual(Residual):
    """The residual branch of an Attention, which reads and updates the scores."""

    def branch(self, x, score, learned):
        return self.m(x, score, learned)


class EvoBlock(nn.Module):
    """One block of layer-wise execution: attention and MLP, on tokens selected anew where keep_ratio < 1."""

    def __init__(self, m1, m2, full, keep_ratio):
        super().__init__()
        self.m1 = m1
        self.m2 = m2
        self.full = full  # keeps every token, whatever the model's keep ratio
        self.keep_ratio = 1 if full else keep_ratio

    def forward(self, x, state, mode):
        residuals = (self.m1, self.m2)
        if self.keep_ratio == 1 or not mode.select:
            return _update_all(residuals, x, state, mode)
        return _evolve(residuals, x, state, _count_slow(x, self.keep_ratio), mode.learned)


class EvoStage(nn.Module):
    """All evolving blocks of one stage in stage-wise execution: tokens are selected once, before the first of them."""

    def __init__(self, m, keep_ratio):
        super().__init__()
        self.m = nn.ModuleList(m)
        self.keep_ratio = keep_ratio

    def forward(self, x, state, mode):
        if self.keep_ratio == 1 or not mode.select:
            return _update_all(self.m, x, state, mode)
        return _evolve(self.m, x, state, _count_slow(x, self.keep_ratio), mode.learned)


# --------------------------------------------------------------------------------------------- the model

def _stem(dim):
    """Four stride-2 3x3 convolutions, (B, 3, H, W) -> (B, dim, H / 16, W / 16)."""
    return nn.Sequential(
        Conv2d_BN(3, dim // 8, 3, 2, 1), Hardswish(),
        Conv2d_BN(dim // 8, dim // 4, 3, 2, 1), Hardswish(),
        Conv2d_BN(dim // 4, dim // 2, 3, 2, 1), Hardswish(),
        Conv2d_BN(dim // 2, dim, 3, 2, 1))


def _mlp(dim, drop, ratio=2):
    return Residual(nn.Sequential(
        Linear_BN(dim, dim * ratio), Hardswish(), Linear_BN(dim * ratio, dim, bn_weight_init=0)), drop)


class EvoLeViT(EvoModel):
    """Evo-LeViT classifier.

    Two execution modes share the weights: stage-wise (tokens selected once per stage) and layer-wise (in every
    block). The logits (B, num_classes) are the mean of the two patch heads, or the patch head's without distillation.
    With `set_distilled_training(True)` the output in training is the tuple that the recipe's loss takes: (patch, patch
    distillation, class, class distillation).

    Args:
        embed_dim, num_heads, depth: one value per stage.
        key_dim: width of a head's keys.
        drop_path_rate: share of images for which a residual branch is dropped in training.
        num_classes: 0 for no classifier (the output is then the mean patch token).
        distillation: build the distillation heads and the class-token heads.
        img_size: side of the square input in pixels, or a pair of the same, as timm's scripts give it: a multiple
            of 16, at least 64.
        full_blocks: number of leading blocks that keep every token, at least 1.
        keep_ratio: share of patch tokens that go the slow way in every later block; set_keep_ratio changes it.

    Raises:
        ValueError: unsupported `img_size`, `full_blocks`, `keep_ratio` or `drop_path_rate`.
    """

    family = "Evo-LeViT"
    min_size = 64  # below this the last stage has no token left

    def __init__(self, embed_dim, key_dim, num_heads, depth, drop_path_rate=0.0, num_classes=1000,
                 distillation=True, img_size=224, full_blocks=2, keep_ratio=0.5):
        super().__init__(img_size, embed_dim[-1], distillation, full_blocks, keep_ratio, drop_path_rate)
        self.learn_tradeoff = True
        self.feature_info = []
        resolution = self.img_size // PATCH_SIZE
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim[0]))
        self.poss = nn.Parameter(torch.zeros(1, resolution ** 2 + 1, embed_dim[0]))
        trunc_normal_(self.poss, std=0.02)
        self.patch_embed = _stem(embed_dim[0])

        blocks, stage_blocks = [], []  # the same modules, arranged for either mode
        for stage, dim in enumerate(embed_dim):
            evolving = []
            for i in range(depth[stage]):
                m1 = AttentionResidual(Attention(dim, key_dim, num_heads[stage]), drop_path_rate)
                m2 = _mlp(dim, drop_path_rate)
                full = sum(depth[:stage]) + i < full_blocks
                blocks.append(EvoBlock(m1, m2, full, keep_ratio))
                (stage_blocks if full else evolving).extend((m1, m2))
            if evolving:
                stage_blocks.append(EvoStage(evolving, keep_ratio))
            last = "stage_blocks.{}".format(len(stage_blocks) - 1) if evolving else "blocks.{}.m2".format(
                len(blocks) - 1)  # by the name that named_modules gives what lies in both lists
            self.feature_info.append(dict(num_chs=dim, reduction=PATCH_SIZE << stage, module=last))
            if stage + 1 < len(embed_dim):
                out_dim = embed_dim[stage + 1]
                down = [AttentionSubsample(dim, out_dim, key_dim, dim // key_dim, resolution),
                        _mlp(out_dim, drop_path_rate)]
                blocks.extend(down)
                stage_blocks.extend(down)
                resolution = (resolution - 1) // 2 + 1
        self.blocks = nn.ModuleList(blocks)
        self.stage_blocks = nn.ModuleList(stage_blocks)
        self.reset_classifier(num_classes)

    # Switches.

    def set_learn_tradeoff(self, enabled):
        """Blend scores by each block's learned trade-off (True, as built) or by 0.5 (False)."""
        self.learn_tradeoff = bool(enabled)

    def set_keep_ratio(self, ratio):
        super().set_keep_ratio(ratio)
        for block in self.modules():
            if isinstance(block, EvoStage) or isinstance(block, EvoBlock) and not block.full:
                block.keep_ratio = ratio

    def keep_ratios(self):
        """For each stage the share of patch tokens that go the slow way, averaged over its blocks, as now set."""
        ratios = [[]]
        for block in self.blocks:
            if isinstance(block, AttentionSubsample):
                ratios.append([])
            elif isinstance(block, EvoBlock):
                ratios[-1].append(block.keep_ratio if self.token_selection else 1)
        return [sum(stage) / len(stage) for stage in ratios]

    # timm's model interface.

    @torch.jit.ignore
    def no_weight_decay(self):
        """Names of the parameters that weight decay leaves alone beyond the 1-D ones: the position embeddings."""
        return {name for name in self.state_dict() if name.split(".")[-1] == "poss"}

    @torch.jit.ignore
    def group_matcher(self, coarse=False):
        """Which parameters lie how deep, for timm's layer decay."""
        return dict(stem=r"^cls_token|^poss|^patch_embed", blocks=[(r"^blocks\.(\d+)", None)])

    def get_classifier(self):
        """The patch head, or (patch head, patch distillation head)."""
        return (self.head, self.head_dist) if self.distillation else self.head

    def reset_classifier(self, num_classes, global_pool=None):
        """New heads for `num_classes` classes; 0 removes them. `global_pool` is fixed: the mean of the patch tokens."""
        self.num_classes = num_classes
        names = ["head"] + (["head_dist", "head_cls", "head_cls_dist"] if self.distillation else [])
        like = self.cls_token
        for name in names:
            head = BN_Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
            setattr(self, name, head.to(device=like.device, dtype=like.dtype).train(self.training))

    def forward_stages(self, x):
        """Images (B, 3, H, H) -> for each stage its result: [(class token and patch tokens (B, 1 + N, C), TokenState)].

        A stage's patch tokens lie row by row in a square grid and stand for 16, 32 or 64 pixels a side (feature_info's
        `reduction`), at the bottom and the right edge for those that are left. In the TokenState, `score` is the global
        class attention of each and `slow` says which were selected last (None: the stage selects none).
        """
        self.check_images(x)
        mode = Mode(self.token_selection, self.learn_tradeoff)
        x = self.patch_embed(x).flatten(2).transpose(1, 2)  # (B, N, C)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.poss
        state, stages = TokenState(None, None), []
        for block in (self.stage_blocks if self.stage_wise else self.blocks):
            if isinstance(block, AttentionSubsample):
                stages.append((x, state))
            if isinstance(block, Residual):
                x, state = _update_all((block,), x, state, mode)
            else:
                x, state = block(x, state, mode)
        return stages + [(x, state)]

    def forward_head(self, x, pre_logits=False):
        """Tokens (B, 1 + N, C) -> logits, as described at the class; `pre_logits`: the mean patch token (B, C)."""
        patch = x[:, 1:].mean(dim=1)
        if pre_logits:
            return patch
        if not self.distillation:
            return self.head(patch)
        if self.training and self.distilled_training:
            cls = x[:, 0]
            return self.head(patch), self.head_dist(patch), self.head_cls(cls), self.head_cls_dist(cls)
        return (self.head(patch) + self.head_dist(patch)) / 2

    def fuse(self):
        """Folds every batch norm into its neighbour, in place, for deployment in eval mode; returns the model."""
        fuse_batch_norms(self)
        return self


# --------------------------------------------------------------------------------------------- registration

# embed_dim (C), key_dim (D), num_heads (N), depth (X), drop_path_rate; heads of the subsampling attentions: C_in / D
_VARIANTS = {
    "EvoLeViT_128S": dict(embed_dim=(128, 256, 384), key_dim=16, num_heads=(4, 6, 8), depth=(2, 3, 4)),
    "EvoLeViT_128": dict(embed_dim=(128, 256, 384), key_dim=16, num_heads=(4, 8, 12), depth=(4, 4, 4)),
    "EvoLeViT_192": dict(embed_dim=(192, 288, 384), key_dim=32, num_heads=(3, 5, 6), depth=(4, 4, 4)),
    "EvoLeViT_256": dict(embed_dim=(256, 384, 512), key_dim=32, num_heads=(4, 6, 8), depth=(4, 4, 4)),
    "EvoLeViT_384": dict(embed_dim=(384, 512, 768), key_dim=32, num_heads=(6, 9, 12), depth=(4, 4, 4),
                         drop_path_rate=0.1),
}


def _register(name, variant, default_size):
    """Registers `variant` with timm under `name`."""
    register(EvoLeViT, name, variant, default_size, crop_pct=224 / 256, first_conv="patch_embed.0.c",
             classifier=("head.l", "head_dist.l"))


for _name, _variant in _VARIANTS.items():
    _register(_name, _variant, 224)
    _register(_name + "_384", _variant, 384)
