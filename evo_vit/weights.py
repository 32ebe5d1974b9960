"""Weights from elsewhere: DeiT's under Evo-DeiT's names, and position embeddings of another image size."""
import torch
import torch.nn.functional as F

# DeiT's parts of a block -> (where they stand in Evo-DeiT, before and after the number of the block)
_BLOCK_PARTS = {"norm1": ("norms", ""), "attn.proj": ("projs", ""), "norm2": ("blocks", ".norm2"),
                "mlp.fc1": ("blocks", ".mlp.fc1"), "mlp.fc2": ("blocks", ".mlp.fc2")}
_SAME = ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias",
         "head.weight", "head.bias")
_DISTILLED = ("dist_token", "head_dist.weight", "head_dist.bias")  # of a DeiT with a distillation token


def from_deit(state):
    """The state dict of a DeiT, as timm and the DeiT project name it, with Evo-DeiT's names: a start for fine-tuning.

    `blocks.i.attn.qkv` is split into `qks.i.qk` (queries and keys) and `vs.i.v`; a distilled DeiT's token, its row of
    the position embedding and its head are left out. `norm_cls` and `head_cls`, for which DeiT has nothing, are missing
    in the result: load it with strict=False.

    The blocks compute the same in both models. The ends do not: DeiT applies `norm` to all tokens and gives the class
    token to `head`; Evo-DeiT averages the patch tokens first and applies `norm` and `head` to their mean. So logits
    differ from the first, and `head` has to be trained.

    Raises ValueError, one sentence, for a name that a DeiT does not have.
    """
    renamed = {}
    for name, value in state.items():
        part, last = name.rpartition(".")[::2]
        if name in _SAME:
            renamed[name] = value
            if name == "pos_embed" and "dist_token" in state:
                renamed[name] = torch.cat((value[:, :1], value[:, 2:]), dim=1)
        elif name.startswith("blocks.") and name.count(".") > 2:
            number, part = part.split(".", 2)[1:]
            if part == "attn.qkv":
                width = value.shape[0] // 3
                renamed["qks.{}.qk.{}".format(number, last)] = value[:2 * width]
                renamed["vs.{}.v.{}".format(number, last)] = value[2 * width:]
            elif part in _BLOCK_PARTS:
                before, after = _BLOCK_PARTS[part]
                renamed["{}.{}{}.{}".format(before, number, after, last)] = value
            else:
                raise ValueError("{} is not a weight of a DeiT of the first version".format(name))
        elif name not in _DISTILLED:
            raise ValueError("{} is not a weight of a DeiT of the first version".format(name))
    return renamed


def resize_position_embedding(embedding, length):
    """(1, 1 + n * n, C) -> (1, length, C) with length 1 + m * m: the class token's row stays, the grid is interpolated
    bicubically, as DeiT's fine-tuning at another image size does."""
    old, new = int((embedding.shape[1] - 1) ** 0.5), int((length - 1) ** 0.5)
    if (old ** 2 + 1, new ** 2 + 1) != (embedding.shape[1], length):
        raise ValueError("a position embedding of {} rows cannot become one of {}: each has one row for the class "
                         "token and a square number for the patches".format(embedding.shape[1], length))
    grid = embedding[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat((embedding[:, :1], grid.permute(0, 2, 3, 1).reshape(1, new * new, -1)), dim=1)
