"""A trained Evo-LeViT from its checkpoint alone, for what looks at it or takes it elsewhere."""
from typing import List, NamedTuple, Optional

from torch import nn

from .checkpoint import load_checkpoint, load_weights, model_state, saved_settings
from .errors import UserError
from .models import apply_token_schedule, build_model, check_model_name, default_input_size, fold_like

PUBLISHED_STAGE_WISE_EPOCH = 200


class Restored(NamedTuple):
    """A model in eval mode, and what its checkpoint says about it."""
    model: nn.Module
    name: str
    input_size: int  # side of the images in pixels
    classes: List[str]
    data_set: str  # main.py's name of the data set that it was trained on
    data_path: Optional[str]
    inat_category: str
    mode: str  # execution mode, that of its last epoch


def add_checkpoint_flags(add):
    """The flags of every tool that reads a trained model; `add` is a parser's add_argument."""
    add("--resume", default="save/best_checkpoint.pth", metavar="FILE",
        help="checkpoint of main.py, published checkpoint, safetensors file or URL")
    add("--model", default=None, metavar="MODEL", help="its model, where the file does not say")
    add("--input-size", type=int, default=None, metavar="PIXELS", help="side of its images, where the file does not say")


def restore_model(path, name=None, input_size=None, flag="--resume"):
    """The Evo-LeViT whose weights are in `path`: a checkpoint of this project, a published one, or safetensors.

    name, input_size: needed where the checkpoint does not say. A checkpoint without an epoch runs as built, stage-wise.
    Raises UserError where the file is missing, damaged, or holds another model.
    """
    checkpoint = load_checkpoint(path, flag)
    saved = saved_settings(checkpoint, path, flag)
    state = model_state(checkpoint, path, flag)
    name = name or saved.get("model")
    if name is None:
        raise UserError("{}: {} does not say which model it holds; add --model NAME".format(flag, path))
    check_model_name(name)
    head = state.get("head.l.weight", state.get("head.weight"))
    if not name.startswith("EvoLeViT") or "cls_token" not in state or head is None or head.dim() != 2:
        raise UserError("{}: {} holds {}, and this is for trained Evo-LeViT models".format(
            flag, path, "another model" if name.startswith("EvoLeViT") else "the model " + name))
    input_size = input_size or saved.get("input_size") or default_input_size(name)
    model = build_model(name, head.shape[0], input_size, distillation=any(key.startswith("head_dist.") for key in state))
    load_weights(fold_like(state, model), state, name, path, flag)
    epoch, mode = saved.get("epoch"), "stage-wise"
    if epoch is not None:
        mode = apply_token_schedule(model, max(epoch, 0), saved.get("prune_warmup_epoch", 0),
                                    saved.get("stage_wise_epoch", PUBLISHED_STAGE_WISE_EPOCH))
    classes = checkpoint.get("classes")
    if not isinstance(classes, list) or len(classes) != head.shape[0]:
        classes = ["class {}".format(number) for number in range(head.shape[0])]
    return Restored(model.eval(), name, input_size, [str(c) for c in classes], saved.get("data_set", "IMNET"),
                    saved.get("data_path"), saved.get("inat_category", "name"), mode)
