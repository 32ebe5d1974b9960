"""Evo-LeViT and its training step written down plainly, equation by equation: what the project's own, faster ones are
compared with (test_plain.py: the same numbers; benchmark.py: the time).

Every block sorts all tokens and gathers them anew, the class token is cut off and put back, clipping, the optimiser and
the average loop over the parameters, the teacher is as timm builds it and sees the images after the student.
"""
import copy

import torch
from timm.utils.agc import adaptive_clip_grad
from torch import nn

from runtime.machine.processes import is_distributed


class PlainEvoLeViT(nn.Module):
    """The layers of `model`, an EvoLeViT, run in its mode as the paper describes it."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.__class__ = nn.Linear  # by PyTorch's own matrix product

    def forward(self, images):
        model = self.model
        x = model.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat((model.cls_token.expand(len(x), -1, -1), x), dim=1) + model.poss
        index = torch.arange(x.shape[1] - 1, device=x.device).expand(len(x), -1)
        score = None
        for block in (model.stage_blocks if model.stage_wise else model.blocks):
            x, score, index = self.block(block, x, score, index)
        return model.forward_head(x)

    def block(self, block, x, score, index):
        kind = type(block).__name__
        if kind in ("EvoBlock", "EvoStage"):
            residuals = (block.m1, block.m2) if kind == "EvoBlock" else block.m
            if block.keep_ratio < 1 and self.model.token_selection:
                return self.evolve(residuals, block.keep_ratio, x, score, index)
            for residual in residuals:
                x, score = self.residual(residual, x, score)
            return x, score, index
        if kind == "AttentionSubsample":
            return self.subsample(block, x, score, index)
        x, score = self.residual(block, x, score)
        return x, score, index

    def residual(self, residual, x, score):
        delta, score = self.delta(residual, x, score)
        return x + delta, score

    def delta(self, residual, x, score):
        """What is added to x, and the scores, of which the first ones are blended."""
        if type(residual).__name__ == "Residual":
            out = residual.m(x)
        else:
            out, score = self.attention(residual.m, x, score)
        if residual.training and residual.drop > 0:
            out = out * (torch.rand(len(x), 1, 1, device=x.device) >= residual.drop).to(out.dtype) / (1 - residual.drop)
        return out, score

    def attention(self, m, x, score):
        B, T, _ = x.shape
        q, k, v = m.qkv(x).view(B, T, m.num_heads, -1).split([m.key_dim, m.key_dim, m.value_dim], dim=3)
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 1, 3), v.permute(0, 2, 1, 3)
        attention = (q @ k.transpose(-2, -1) * m.scale).softmax(dim=-1)
        if score is None:
            score = attention[:, :, 0, 1:].mean(dim=1)
        else:  # the representative, behind the scored tokens, has no score
            count = min(self.slow or T - 1, T - 1)
            blended = self.blend(m, score[:, :count], attention[:, :, 0, 1:1 + count].mean(dim=1))
            score = torch.cat((blended, score[:, count:]), dim=1)
        return m.proj((attention @ v).transpose(1, 2).reshape(B, T, -1)), score

    slow = None  # how many tokens of the present block are scored; None: all

    def blend(self, m, score, class_attention):
        t = torch.sigmoid(m.learn_tradeoff) if self.model.learn_tradeoff else 0.5
        return (1 - t) * score + t * class_attention

    def evolve(self, residuals, keep_ratio, x, score, index):
        count = int(score.shape[1] * keep_ratio)
        x, score, index = self.sort(x, score, index, score.argsort(dim=1, descending=True))
        slow, fast = x[:, :1 + count], x[:, 1 + count:]
        weight = score[:, count:] / score[:, count:].sum(dim=1, keepdim=True)
        representative = (weight.unsqueeze(-1) * fast).sum(dim=1, keepdim=True)
        slow = torch.cat((slow, representative), dim=1)
        self.slow = count
        for residual in residuals:
            delta, score = self.delta(residual, slow, score)
            slow = slow + delta
            fast = fast + delta[:, -1:]
        self.slow = None
        return torch.cat((slow[:, :-1], fast), dim=1), score, index

    def sort(self, x, score, index, order):
        patches = x[:, 1:].gather(1, order.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return torch.cat((x[:, :1], patches), dim=1), score.gather(1, order), index.gather(1, order)

    def subsample(self, m, x, score, index):
        total = score.sum(dim=1, keepdim=True)
        x, score, index = self.sort(x, score, index, index.argsort(dim=1))
        x = x + m.poss
        B, T, _ = x.shape
        grid = m.q[0]
        k, v = m.kv(x).view(B, T, m.num_heads, -1).split([m.key_dim, m.value_dim], dim=3)
        k, v = k.permute(0, 2, 1, 3), v.permute(0, 2, 1, 3)
        q = m.q[1](torch.cat((x[:, :1], grid(x[:, 1:])), dim=1)).view(B, -1, m.num_heads, m.key_dim).permute(0, 2, 1, 3)
        attention = (q @ k.transpose(-2, -1) * m.scale).softmax(dim=-1)
        class_attention = attention[:, :, 0, 1:].mean(dim=1)
        pick = lambda values: grid(values.unsqueeze(-1)).squeeze(-1)  # noqa: E731
        score = self.blend(m, pick(score), pick(class_attention))
        score = score * total / score.sum(dim=1, keepdim=True)
        return m.proj((attention @ v).transpose(1, 2).reshape(B, q.shape[2], -1)), score, pick(index)


def parallel(model):
    """`model` as the published code shares it among processes, looking in every step for parameters without a gradient;
    itself where there is one process."""
    if not is_distributed():
        return model
    device = next(model.parameters()).device
    return nn.parallel.DistributedDataParallel(
        model, device_ids=None if device.type == "cpu" else [device.index], find_unused_parameters=True)


class PlainTraining:
    """The recipe's update on an EvoLeViT; `step` makes one.

    criterion: a losses.DistillationLoss. groups: an optimiser's parameter groups.
    """

    def __init__(self, model, criterion, groups, clip_grad=0.01, decay=0.99996):
        self.model = PlainEvoLeViT(model)
        self.parallel = parallel(self.model)
        self.criterion = criterion
        self.optimizer = torch.optim.AdamW(groups, **({"foreach": False} if "foreach" in _adamw_options() else {}))
        self.average = copy.deepcopy(model)
        self.clip_grad = clip_grad
        self.decay = decay

    def step(self, images, labels):
        """The loss, a float."""
        self.optimizer.zero_grad()
        outputs = self.parallel(images)
        loss = self.criterion(images, outputs, labels)
        value = loss.item()
        loss.backward()
        adaptive_clip_grad(self.model.parameters(), self.clip_grad)
        self.optimizer.step()
        with torch.no_grad():
            for average, p in zip(self.average.parameters(), self.model.model.parameters()):
                average.mul_(self.decay).add_(p, alpha=1 - self.decay)
            for average, b in zip(self.average.buffers(), self.model.model.buffers()):
                if b.is_floating_point():
                    average.mul_(self.decay).add_(b, alpha=1 - self.decay)
        return value


def _adamw_options():
    return torch.optim.AdamW.__init__.__code__.co_varnames
