"""Evo-DeiT: slow-fast token evolution (Evo-ViT, AAAI 2022, https://arxiv.org/abs/2108.01390) on the DeiT backbone
(https://arxiv.org/abs/2012.12877).

Every block scores the patch tokens by the attention that the class token pays them. From the second stage on the best
of them are updated by attention and MLP (slowly); the others wait unchanged and come back at the end of the stage.
Other than in Evo-LeViT no representative token stands for them: the authors found that in a network of one width,
keeping their places is enough. The mean patch token is classified, so what waited counts as well.

Parameter names are those of the reference implementation, so that its checkpoints load with strict=True: the parts of
a block lie in five lists (`norms`, `qks`, `vs`, `projs`, `blocks`). `weights.from_deit` renames a plain DeiT's.
"""
import torch
from torch import nn

from .compat import trunc_normal_
from .layers import Linear
from .model import EvoModel
from .ops import attention, drop_path, lerp
from .registry import PATCH_SIZE, register
from .tokens import TokenState, put_back, take_slow

STAGE_LENGTH = 4  # blocks; tokens are ranked anew in each stage
TRADEOFF = 0.5  # by which a block's class attention enters the global one, behind the full blocks
LAYER_NORM_EPS = 1e-6


# --------------------------------------------------------------------------------------------- the parts of a block

class PatchEmbed(nn.Module):
    """Patches of 16 x 16 pixels to tokens, (B, 3, H, W) -> (B, N, C), row by row."""

    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH_SIZE, PATCH_SIZE)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class QueryKey(nn.Module):
    """Queries and keys of all heads, (B, T, C) -> two of (B, heads, T, C / heads)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.qk = Linear(dim, 2 * dim)
        self.num_heads = num_heads

    def forward(self, x):
        B, T, C = x.shape
        return self.qk(x).view(B, T, 2, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)


class Value(nn.Module):
    """Values of all heads, (B, T, C) -> (B, heads, T, C / heads)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.v = Linear(dim, dim)
        self.num_heads = num_heads

    def forward(self, x):
        B, T, C = x.shape
        return self.v(x).view(B, T, self.num_heads, C // self.num_heads).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention that also tells what the class token pays each patch token. It has no parameters."""

    def macs(self, q, k, v):
        """Multiply-adds of the two attention products for one image, which no layer inside shows."""
        return q.shape[1] * q.shape[2] * k.shape[2] * (q.shape[3] + v.shape[3])

    def forward(self, q, k, v):
        """q, k, v (B, heads, T, d) -> attended tokens (B, T, heads * d), and the class attention of the patch tokens,
        summed over the heads (B, T - 1)."""
        x, class_attn = attention(q, k, v, int(q.shape[-1]) ** -0.5, q.shape[2] - 1)
        return x.transpose(1, 2).flatten(2), class_attn.sum(dim=1)  # in one piece, as gather takes it


class Mlp(nn.Module):
    """Two linear maps with GELU between them, (B, T, C) -> (B, T, C)."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """What of a block stands in the list of that name: its MLP with the norm before it, and its drop path rate."""

    def __init__(self, dim, mlp_ratio, drop):
        super().__init__()
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop = drop

    def residual(self, x, branch):
        """x + branch, both (B, T, C); in training the branch is dropped for a share `drop` of the images."""
        return x + (drop_path(branch, self.drop) if self.training else branch)

    def forward(self, x):
        return self.residual(x, self.mlp(self.norm2(x)))


# --------------------------------------------------------------------------------------------- the model

class EvoDeiT(EvoModel):
    """Evo-DeiT classifier.

    The blocks come in stages of four. Two execution modes share the weights: stage-wise (tokens selected once per
    stage) and layer-wise (in every block). The logits (B, num_classes) are the head's of the mean patch token. With
    `set_distilled_training(True)` the output in training is the pair that the recipe's loss takes: (patch, class), the
    second from the class token.

    Args:
        embed_dim: width C of the tokens.
        num_heads: of the attention, each C / num_heads wide.
        depth: number of blocks.
        mlp_ratio: width of an MLP inside, in units of C.
        drop_path_rate: share of images for which the last block's residual branches are dropped in training; it grows
            linearly over the blocks, from 0 in the first.
        num_classes: 0 for no classifier (the output is then the normed mean patch token).
        distillation: build the class token's head, which serves training alone.
        img_size: side of the square input in pixels, or a pair of the same, as timm's scripts give it: a multiple
            of 16, at least 32.
        full_blocks: number of leading blocks that keep every token, at least 1. Tokens are ranked by the last of them;
            behind it each block's class attention counts for half.
        keep_ratio: share of patch tokens that go the slow way in every later block; set_keep_ratio changes it.

    Raises:
        ValueError: unsupported `img_size`, `full_blocks`, `keep_ratio`, `drop_path_rate`, `depth` or `num_heads`.
    """

    family = "Evo-DeiT"
    min_size = 2 * PATCH_SIZE  # of a single patch nothing can be selected

    def __init__(self, embed_dim, num_heads, depth=12, mlp_ratio=4, drop_path_rate=0.1, num_classes=1000,
                 distillation=True, img_size=224, full_blocks=4, keep_ratio=0.5):
        super().__init__(img_size, embed_dim, distillation, full_blocks, keep_ratio, drop_path_rate)
        if depth < 1 or embed_dim % num_heads:
            raise ValueError("depth {}, embed_dim {}, num_heads {}: there is at least one block, and all heads are of "
                             "one width".format(depth, embed_dim, num_heads))
        self.full_blocks = full_blocks
        self.stages = [range(first, min(first + STAGE_LENGTH, depth)) for first in range(0, depth, STAGE_LENGTH)]
        self.feature_info = [dict(num_chs=embed_dim, reduction=PATCH_SIZE, module="blocks.{}".format(stage[-1]))
                             for stage in self.stages]
        self.num_patches = (self.img_size // PATCH_SIZE) ** 2

        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_patches + 1, embed_dim))
        self.patch_embed = PatchEmbed(embed_dim)
        drops = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, mlp_ratio, drop) for drop in drops)
        self.qks = nn.ModuleList(QueryKey(embed_dim, num_heads) for _ in drops)
        self.vs = nn.ModuleList(Value(embed_dim, num_heads) for _ in drops)
        self.attention = Attention()
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS) for _ in drops)
        self.projs = nn.ModuleList(Linear(embed_dim, embed_dim) for _ in drops)
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            _initialise(module)
        self.reset_classifier(num_classes)
        if distillation:
            self.norm_cls = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)

    def set_learn_tradeoff(self, enabled):
        """Changes nothing: this family's trade-offs are constants. Evo-LeViT's schedule of training calls it."""

    def keep_ratios(self):
        """For each stage the share of patch tokens that go the slow way, averaged over its blocks, as now set."""
        ratio = self.keep_ratio if self.token_selection else 1
        return [sum(1 if i < self.full_blocks else ratio for i in stage) / len(stage) for stage in self.stages]

    # timm's model interface.

    @torch.jit.ignore
    def no_weight_decay(self):
        """Names of the parameters that weight decay leaves alone beyond the 1-D ones."""
        return {"pos_embed", "cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse=False):
        """Which parameters lie how deep, for timm's layer decay: a block's lie in five lists."""
        return dict(stem=r"^cls_token|^pos_embed|^patch_embed",
                    blocks=[(r"^(?:blocks|qks|vs|norms|projs)\.(\d+)", None), (r"^norm", (99999,))])

    def get_classifier(self):
        """The head of the mean patch token."""
        return self.head

    def reset_classifier(self, num_classes, global_pool=None):
        """New heads for `num_classes` classes; 0 removes them. `global_pool` is fixed: the mean of the patch tokens."""
        self.num_classes = num_classes
        like = self.cls_token
        for name in ["head"] + (["head_cls"] if self.distillation else []):
            head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
            _initialise(head)
            setattr(self, name, head.to(device=like.device, dtype=like.dtype))

    # The blocks, on any number of tokens.

    def _block(self, i, x, score):
        """Block `i` on x (B, 1 + n, C) and the score (B, n) of its patch tokens, None before the first; both updated.

        The full blocks' class attention replaces the score (trade-off 1), the later ones' is blended into it.
        """
        y = self.norms[i](x)
        q, k = self.qks[i](y)
        y, class_attn = self.attention(q, k, self.vs[i](y))
        x = self.blocks[i](self.blocks[i].residual(x, self.projs[i](y)))
        if i >= self.full_blocks:
            class_attn = lerp(score, class_attn, TRADEOFF)
        return x, class_attn

    def _update_all(self, blocks, x, score):
        """Runs `blocks` on every token of x (B, 1 + N, C), with score (B, N)."""
        for i in blocks:
            x, score = self._block(i, x, score)
        return x, TokenState(score, None)

    def _evolve(self, blocks, x, score):
        """Runs `blocks` on the tokens of x (B, 1 + N, C) with the best score (B, N); the others wait in place."""
        taken = take_slow(x, score, max(int(self.num_patches * self.keep_ratio), 1))
        tokens, state = self._update_all(blocks, taken.tokens, taken.score)
        return put_back(x, score, taken, tokens, state.score)

    def forward_stages(self, x):
        """Images (B, 3, H, H) -> for each stage its result: [(class token and patch tokens (B, 1 + N, C), TokenState)].

        The patch tokens lie row by row in a square grid and stand for 16 pixels a side. In the TokenState, `score` is
        the global class attention of each, summed over the heads, and `slow` says which were selected last (None: the
        stage selects none).
        """
        self.check_images(x)
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        state, stages = TokenState(None, None), []
        num_full = self.full_blocks if self.token_selection and self.keep_ratio < 1 else len(self.blocks)
        for stage in self.stages:
            full, evolving = [i for i in stage if i < num_full], [i for i in stage if i >= num_full]
            x, state = self._update_all(full, x, state.score)
            for blocks in ([evolving] if self.stage_wise and evolving else [[i] for i in evolving]):
                x, state = self._evolve(blocks, x, state.score)
            stages.append((x, state))
        return stages

    def forward_head(self, x, pre_logits=False):
        """Tokens (B, 1 + N, C) -> logits, as described at the class; `pre_logits`: normed mean patch token (B, C)."""
        patch = self.norm(x[:, 1:].mean(dim=1))
        if pre_logits:
            return patch
        if self.distillation and self.training and self.distilled_training:
            return self.head(patch), self.head_cls(self.norm_cls(x[:, 0]))
        return self.head(patch)

    def fuse(self):
        """Returns the model as it is: unlike Evo-LeViT it has no batch norm to fold for deployment."""
        return self


def _initialise(module):
    """Linear maps as DeiT's; norms and the patch convolution as PyTorch's own."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


# --------------------------------------------------------------------------------------------- registration

def _register(name, variant, default_size):
    """Registers `variant` with timm under `name`."""
    register(EvoDeiT, name, variant, default_size, crop_pct=0.9, first_conv="patch_embed.proj", classifier="head")


_TINY = dict(embed_dim=192, num_heads=3, drop_path_rate=0.0)
_SMALL = dict(embed_dim=384, num_heads=6)
_BASE = dict(embed_dim=768, num_heads=12)

_register("evo_deit_tiny_patch16_224", _TINY, 224)
_register("evo_deit_small_patch16_224", _SMALL, 224)
_register("evo_deit_base_patch16_224", _BASE, 224)
_register("evo_deit_small_patch16_384", _SMALL, 384)
_register("evo_deit_base_patch16_384", _BASE, 384)
