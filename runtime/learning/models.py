"""Models by name, their modes, and their weights; with a helpful word for a name, a size or a tensor that does not
fit."""
import copy
import difflib
import re
from typing import Callable, Dict, List, Optional

import timm
import torch

from evo_vit import EvoLeViT
from evo_vit.compat import create_model, get_pretrained_cfg_value
from evo_vit.model import EvoModel

from ..errors import UserError

STAGE_WISE, LAYER_WISE, PLAIN = "stage-wise", "layer-wise", "plain"
NO_SELECTION = ", no token selection"
PUBLISHED_STAGE_WISE_EPOCH = 200
EVO_DEIT = "evo_deit"  # how the names of that family begin
_EVO_NAMES = ("EvoLeViT", EVO_DEIT)


def is_evo_name(name: str) -> bool:
    """Whether `name` is that of a model of evo_vit/."""
    return name.startswith(_EVO_NAMES)


def is_evo(model: torch.nn.Module) -> bool:
    """Whether `model` is one of evo_vit/, with its modes."""
    return isinstance(model, EvoModel)


def check_model_name(name: str, flag: str = "--model"):
    """Raises UserError, naming the nearest models, unless timm knows `name`."""
    if timm.models.is_model(name):
        return
    known = {known.lower(): known for known in timm.list_models()}
    near = [known[match] for match in difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0.5)]
    raise UserError("{} {}: there is no such model{}; timm.list_models() lists them all".format(
        flag, name, ", did you mean {}?".format(" or ".join(near)) if near else ""))


def default_input_size(name: str) -> int:
    """The side in pixels of the images that the model `name` was designed for."""
    return get_pretrained_cfg_value(name, "input_size")[-1]


def build_model(
    name: str,
    num_classes: int,
    img_size: int,
    distillation: bool = False,
    drop_path_rate: Optional[float] = None,
     keep_ratio: Optional[float] = None) -> torch.nn.Module:
    """The model `name` for `num_classes` classes and square images of `img_size` pixels.

    `distillation`: with the further heads that training takes, which only the models of evo_vit/ have.
    `drop_path_rate`, `keep_ratio` None: the model's own. Raises UserError for an unknown name, an unsupported size, or
    distillation or a keep ratio of a model that has none.
    """
    check_model_name(name)
    kwargs = dict(num_classes=num_classes, drop_path_rate=drop_path_rate)
    if keep_ratio is not None:
        if not is_evo_name(name):
            raise UserError("--keep-ratio: {} keeps all its tokens; leave the flag out".format(name))
        kwargs.update(keep_ratio=keep_ratio)
    evo = is_evo_name(name)
    if evo:
        kwargs.update(distillation=distillation, img_size=img_size)
    elif distillation:
        raise UserError("--model {} has no distillation heads; use --distillation-type none".format(name))
    elif get_pretrained_cfg_value(name, "fixed_input_size") and img_size != default_input_size(name):
        kwargs.update(img_size=img_size)
    try:
        model = create_model(name, pretrained=False, **kwargs)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise UserError("--drop-path: {} takes none; leave the flag out".format(name))
    except (ValueError, AssertionError) as error:
        raise UserError("{}: {}".format("--keep-ratio" if "keep ratio" in str(error)
                        else "--input-size {}".format(img_size), error))
    if evo:
        model.set_distilled_training(distillation)
    return model


# --------------------------------------------------------------------------------------------- modes

def keep_ratios(model: torch.nn.Module) -> List[float]:
    """The `keep_ratios()` of a model of evo_vit/; other models keep all tokens in their one stage."""
    return model.keep_ratios() if is_evo(model) else [1]


def set_mode(model: torch.nn.Module, mode: str) -> str:
    """Puts `model` into `mode`, one of those that scheduled_mode gives, and returns it: stage-wise with the learned
    trade-off, or layer-wise with 0.5; either without token selection. Models without modes are "plain" whatever is
    asked for."""
    if not is_evo(model):
        return PLAIN
    stage_wise = mode.startswith(STAGE_WISE)
    model.set_stage_wise(stage_wise)
    model.set_learn_tradeoff(stage_wise)
    model.set_token_selection(not mode.endswith(NO_SELECTION))
    return mode


def scheduled_mode(epoch: int, prune_warmup_epoch: int = 0, stage_wise_epoch: int = PUBLISHED_STAGE_WISE_EPOCH) -> str:
    """The mode of `epoch`: no selection before `prune_warmup_epoch`, layer-wise with trade-off 0.5 before
    `stage_wise_epoch`, stage-wise with the learned trade-off from it on (paper, section 4.1)."""
    mode = STAGE_WISE if epoch >= stage_wise_epoch else LAYER_WISE
    return mode if epoch >= prune_warmup_epoch else mode + NO_SELECTION


def apply_token_schedule(model: torch.nn.Module, epoch: int, prune_warmup_epoch: int, stage_wise_epoch: int) -> str:
    """Puts `model` into the mode of `epoch` (scheduled_mode) and says which."""
    return set_mode(model, scheduled_mode(epoch, prune_warmup_epoch, stage_wise_epoch))


def parameters_without_gradient(
    model: torch.nn.Module,
    criterion,
    images: torch.Tensor,
     labels: torch.Tensor) -> List[str]:
    """Names of the parameters that `criterion`, a losses.DistillationLoss, does not reach from `model` in its present
    mode; found on a copy, with `images` (B, 3, H, W) and their `labels`."""
    probe = copy.deepcopy(model).train()
    taught = criterion.placeholder(images, model.num_classes)
    criterion(images, probe(images), labels, taught).backward()
    return [name for name, parameter in probe.named_parameters() if parameter.grad is None]


# --------------------------------------------------------------------------------------------- weights

def fold_like(state: Dict[str, torch.Tensor], model: torch.nn.Module) -> torch.nn.Module:
    """`model` with its batch norms folded where they are in the state dict `state` (export.py --format safetensors)."""
    return model.fuse() if isinstance(model, EvoLeViT) and "patch_embed.0.weight" in state else model


def needs_batches(model: torch.nn.Module) -> bool:
    """Whether `model` normalises vectors by the statistics of a batch, which one image does not have."""
    return any(isinstance(module, torch.nn.BatchNorm1d) for module in model.modules())


def has_more_heads(state: Dict[str, torch.Tensor]) -> bool:
    """Whether the weights `state` of a model of evo_vit/ include the heads that serve training alone."""
    return any(name.startswith(("head_dist.", "head_cls.")) for name in state)


def classes_of(state: Dict[str, torch.Tensor]) -> Optional[int]:
    """Number of classes of a model of evo_vit/ with the weights `state`, None for weights of another kind."""
    head = state.get("head.l.weight", state.get("head.weight"))
    return head.shape[0] if "cls_token" in state and head is not None and head.dim() == 2 else None


def load_weights(model: torch.nn.Module, state: Dict[str, torch.Tensor], name: str, refuse: Callable):
    """model.load_state_dict(state, strict=True); what does not fit goes to `refuse` (Checkpoint.refuse) as one
    sentence.

    A tensor that the model has under two names may stand under one of them in `state`.
    """
    own = model.state_dict()
    by_tensor = {}
    for key, value in own.items():
        by_tensor.setdefault((value.data_ptr(), value.shape), []).append(key)
    for keys in by_tensor.values():
        present = [key for key in keys if key in state]
        if present and own[keys[0]].numel():
            state = dict({key: state[present[0]] for key in keys}, **state)
    missing = sorted(set(own) - set(state))
    unexpected = sorted(set(state) - set(own))
    start = "; to start from it, name it by main.py --finetune" if is_evo_name(name) else ""
    if missing or unexpected:
        refuse("is not a checkpoint of {} ({} of its tensors are missing, {} are unknown, {} for one){}".format(
            name, len(missing), len(unexpected), (missing + unexpected)[0], start))
    other = [key for key in own if own[key].shape != state[key].shape]
    classifier = [key for key in other if own[key].dim() and own[key].shape[1:] == state[key].shape[1:]
                  and re.search(r"head|classifier|fc\.", key)]
    if other and classifier == other:
        refuse("was trained on {} classes but {} are needed here (the classes of the data set)".format(
            state[other[0]].shape[0], own[other[0]].shape[0]))
    if other:
        refuse("does not fit {} at this size: {} is {} there and {} here{}".format(
            name, other[0], tuple(state[other[0]].shape), tuple(own[other[0]].shape), start))
    model.load_state_dict(state)
