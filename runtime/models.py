"""Models by name, with a helpful word for a name or a size that does not exist."""
import difflib

import timm

from evo_vit import EvoLeViT
from evo_vit.compat import create_model, get_pretrained_cfg_value

from .errors import UserError


def check_model_name(name, flag="--model"):
    """Raises UserError, naming the nearest models, unless timm knows `name`."""
    if timm.models.is_model(name):
        return
    known = {known.lower(): known for known in timm.list_models()}
    near = [known[match] for match in difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0.5)]
    raise UserError("{} {}: there is no such model{}; timm.list_models() lists them all".format(
        flag, name, ", did you mean {}?".format(" or ".join(near)) if near else ""))


def default_input_size(name):
    """The side in pixels of the images that the model `name` was designed for."""
    return get_pretrained_cfg_value(name, "input_size")[-1]


def build_model(name, num_classes, img_size, distillation=False, drop_path_rate=None):
    """The model `name` for `num_classes` classes and square images of `img_size` pixels.

    `distillation`: with distillation heads, which only Evo-LeViT models have. `drop_path_rate` None: the model's own.
    Raises UserError for an unknown name, an unsupported size, or distillation of a model without its heads.
    """
    check_model_name(name)
    kwargs = dict(num_classes=num_classes, drop_path_rate=drop_path_rate)
    evo = name.startswith("EvoLeViT")
    if evo:
        kwargs.update(distillation=distillation, img_size=img_size)
    elif distillation:
        raise UserError("--model {} has no distillation heads; use --distillation-type none".format(name))
    elif get_pretrained_cfg_value(name, "fixed_input_size") and img_size != default_input_size(name):
        kwargs.update(img_size=img_size)
    try:
        model = create_model(name, pretrained=False, **kwargs)
    except (ValueError, AssertionError) as error:
        raise UserError("--input-size {}: {}".format(img_size, error))
    assert isinstance(model, EvoLeViT) == evo
    if evo:
        model.set_distilled_training(distillation)
    return model


def fold_like(state, model):
    """`model` with its batch norms folded where they are in the state dict `state` (export.py --format safetensors)."""
    return model.fuse() if isinstance(model, EvoLeViT) and "patch_embed.0.weight" in state else model


def keep_ratios(model):
    """EvoLeViT.keep_ratios() of an Evo-LeViT; other models keep all tokens in their one stage."""
    return model.keep_ratios() if isinstance(model, EvoLeViT) else [1]


def set_mode(model, stage_wise):
    """Puts an Evo-LeViT into one of the modes it is trained in: stage-wise with the learned trade-off, or layer-wise with 0.5."""
    model.set_stage_wise(stage_wise)
    model.set_learn_tradeoff(stage_wise)


def apply_token_schedule(model, epoch, prune_warmup_epoch, stage_wise_epoch):
    """Puts an Evo-LeViT into the mode of `epoch` and says which: no selection before `prune_warmup_epoch`, then
    layer-wise with trade-off 0.5, stage-wise with the learned trade-off from `stage_wise_epoch` on (paper, section
    4.1). Other models have no modes."""
    if not isinstance(model, EvoLeViT):
        return "plain"
    stage_wise = epoch >= stage_wise_epoch
    select = epoch >= prune_warmup_epoch
    set_mode(model, stage_wise)
    model.set_token_selection(select)
    return ("stage-wise" if stage_wise else "layer-wise") + ("" if select else ", no token selection")
