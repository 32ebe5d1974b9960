"""Weights of another size or class count as the start of a training."""
import re
import sys
from functools import partial
from typing import Callable, Dict, List, NamedTuple

import torch

from evo_vit import EvoDeiT
from evo_vit.weights import from_deit, resize_position_embedding

_HEADS = re.compile(r"(^|\.)(head\w*|norm_cls|classifier\w*|last_linear|fc)(\.|$)")
LEAST_SHARE = 0.5  # of a model's parameters that have to come from the file


class Start(NamedTuple):
    """What a model starts from."""
    state: Dict[str, torch.Tensor]
    left_out: List[str]  # tensors of the file that the model has no use for
    new: List[str]  # tensors of the model that the file lacks


def start_from(state: Dict[str, torch.Tensor], model: torch.nn.Module,
               name: str, same_classes: bool, refuse: Callable) -> Start:
    """What `model`, of that name, starts from, given the weights `state` of another size or class count.

    Classifiers of another class count, or of other classes (not `same_classes`), are left out; position embeddings of
    another grid are resized, Evo-LeViT's bicubically as DeiT does, those and bias tables of timm's models as timm does.
    What else does not fit, and a file that holds less than half of the model, goes to `refuse` (Checkpoint.refuse) as
    one sentence.
    """
    own, adapted, left_out, misfits = model.state_dict(), {}, [], []
    parameters = {key for key, _ in model.named_parameters()}
    for key, value in _as_timm_does(state, model, name, refuse).items():
        if key not in own:
            left_out.append(key)
        elif _is_classifier(key, own[key], model) and (value.shape != own[key].shape or not same_classes):
            left_out.append(key)
        elif value.shape == own[key].shape:
            adapted[key] = value
        elif key.split(".")[-1] in ("poss", "pos_embed") and value.dim() == 3 and value.shape[-1] == own[key].shape[-1]:
            adapted[key] = _said(partial(resize_position_embedding, value, own[key].shape[1]), name, refuse)
        elif key in parameters or own[key].is_floating_point():
            misfits.append(key)
        else:
            left_out.append(key)  # an index that the model has worked out for its own size
    covered = {own[key].data_ptr() for key in adapted}  # a tensor may stand under two names
    new = [key for key in own if key not in adapted and own[key].data_ptr() not in covered]
    if not adapted:
        refuse("cannot be fine-tuned: no tensor of it fits {}".format(name))
    if misfits:
        first = misfits[0]
        refuse("cannot be fine-tuned as {} at this size: its {} is {} and {} is needed, which is not resampled".format(
            name, first, tuple(state[first].shape) if first in state else "other", tuple(own[first].shape)))
    total = sum(parameter.numel() for parameter in model.parameters())
    share = sum(parameter.numel() for key, parameter in model.named_parameters()
                if key in adapted or parameter.data_ptr() in covered) / max(total, 1)
    if share < LEAST_SHARE and any(not _HEADS.search(key) for key in new):
        refuse(
            "holds {:.0%} of the weights of {}, {} not among them; is --model the one that it was trained as?".format(
            share, name, [key for key in new if not _HEADS.search(key)][0]))
    return Start(adapted, left_out, new)


def _is_classifier(key, own, model):
    return bool(_HEADS.search(key)) and own.dim() > 0 and own.shape[0] == getattr(model, "num_classes", None)


def _said(function, name, refuse):
    """What function() gives; the sentence of its ValueError goes to `refuse`."""
    try:
        return function()
    except ValueError as error:
        refuse("cannot be fine-tuned as {}: {}".format(name, error))


def _as_timm_does(state, model, name, refuse):
    """`state` by the model file's own filter for weights of another size, where timm has one for it; a plain DeiT's
    under the names of Evo-DeiT."""
    if isinstance(model, EvoDeiT) and "blocks.0.attn.qkv.weight" in state:
        return _said(partial(from_deit, state), name, refuse)
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt is None or type(model).__module__.startswith("evo_vit"):
        return state
    try:
        return adapt(dict(state), model)
    except Exception:  # a filter that expects another file; what does not fit is found by shape
        return state
