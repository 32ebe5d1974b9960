"""A trained model from its checkpoint alone, for `--eval` and for what looks at a model or takes it elsewhere."""
from typing import Callable, List, NamedTuple, Optional

from torch import nn

from ..learning.models import (
    build_model,
    check_model_name,
    classes_of,
    default_input_size,
    fold_like,
    has_more_heads,
    is_evo,
    is_evo_name,
    load_weights,
    set_mode,
)
from ..learning.normalization import Renormalize
from .checkpoint import Checkpoint, load_checkpoint, local_file
from .exported import read_program


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


def restore(checkpoint: Checkpoint, name: Optional[str] = None, input_size: Optional[int] = None,
            num_classes: Optional[int] = None, key: str = "model", keep_ratio: Optional[float] = None) -> Restored:
    """The model whose weights are under `key` in `checkpoint`, one of this project, a published one, or safetensors.

    name, input_size, num_classes, keep_ratio: needed where the checkpoint does not say. Raises UserError where it holds
    another model.
    """
    saved = checkpoint.settings()
    name = name or saved.get("model")
    if "program" in checkpoint.content:
        if keep_ratio not in (None, saved.get("keep_ratio")):
            checkpoint.refuse("is an exported program, whose keep ratio is built in; leave --keep-ratio out")
        return _program(checkpoint, name, input_size, key)
    state = checkpoint.weights(key)
    if name is None:
        checkpoint.refuse("does not say which model it holds; add --model NAME")
    check_model_name(name)
    classes = checkpoint.classes()
    count = (classes_of(state) if is_evo_name(name) else None) or (len(classes) if classes else num_classes)
    if count is None:
        checkpoint.refuse(
            "does not say how many classes {} has; evaluate it with main.py --eval on its data".format(name))
    input_size = input_size or saved.get("input_size") or default_input_size(name)
    more_heads = is_evo_name(name) and has_more_heads(state)
    keep_ratio = saved.get("keep_ratio") if keep_ratio is None else keep_ratio
    model = build_model(name, count, input_size, more_heads, keep_ratio=keep_ratio)
    load_weights(fold_like(state, model), state, name, checkpoint.refuse)
    mode = set_mode(model, checkpoint.mode())
    if classes is None or len(classes) != count:
        classes = ["class {}".format(number) for number in range(count)]
    return Restored(model.eval(), name, input_size, classes, saved.get("data_set", "IMNET"), saved.get("data_path"),
                    saved.get("inat_category", "name"), mode)


def need_classes(checkpoint: Checkpoint, restored: Restored, of_data: List[str]):
    """Raises UserError where `restored`, of `checkpoint`, has another number of classes than it says, or, where it
    does not say, than there are `of_data`, a data set's."""
    classes = checkpoint.classes() or of_data
    if len(restored.classes) != len(classes):
        checkpoint.refuse("was trained on {} classes but {} are needed here (the classes of the data set)".format(
            len(restored.classes), len(classes)))


def _program(checkpoint, name, input_size, key):
    """The Restored of an exported program, which has one size, one mode and one set of weights."""
    saved, classes = checkpoint.settings(), checkpoint.classes()
    if classes is None or "input_size" not in saved:
        checkpoint.refuse("does not say how to run it; export it again with export.py")
    if key != "model" or input_size not in (None, saved["input_size"]) or name not in (None, saved.get("model")):
        checkpoint.refuse(
            "is an exported program of {} at {} pixels; leave --eval-ema, --model and --input-size out".format(
            saved.get("model"), saved["input_size"]))
    return Restored(checkpoint.content["program"].eval(), name, saved["input_size"], classes, saved.get(
        "data_set", "IMNET"), saved.get("data_path"), saved.get("inat_category", "name"), checkpoint.mode())


def add_checkpoint_flags(parser, path: Callable, positive: Callable):
    """The flags of every tool that reads a trained model; path, positive: kinds of values (command.py)."""
    add = parser.add_argument_group("model").add_argument
    add("--resume", type=path, default="save/best_checkpoint.pth", metavar="FILE",
        help="checkpoint of main.py, published checkpoint, safetensors file or URL")
    add("--model", default=None, metavar="MODEL", help="its model; needed only where the file does not say")
    add("--input-size", type=positive, default=None, metavar="PIXELS",
        help="side of its images in pixels; needed only where the file does not say")
    add("--eval-ema", action="store_true", help="take the averaged weights (default: the weights as trained)")


def open_trained(path: str, flag: str) -> Checkpoint:
    """load_checkpoint, for evaluation: exported programs count, too."""
    path = local_file(path, flag)
    content = read_program(path, flag)
    return load_checkpoint(path, flag) if content is None else Checkpoint(content, path, flag)


def restore_evo(path: str, name: Optional[str] = None, input_size: Optional[int] = None, flag: str = "--resume",
                average: bool = False) -> Restored:
    """`restore` for the tools, which need a model of evo_vit/; `average`: its averaged weights. Raises UserError for
    others."""
    checkpoint = load_checkpoint(path, flag)
    key = "model_ema" if average else "model"
    claimed = name or checkpoint.settings().get("model")
    if claimed is not None:
        check_model_name(claimed)
        if not is_evo_name(claimed) or classes_of(checkpoint.weights(key)) is None:
            checkpoint.refuse("holds {}, and this is for trained Evo-LeViT and Evo-DeiT models".format(
                "another model" if is_evo_name(claimed) else "the model " + claimed))
    statistics = checkpoint.statistics()
    if statistics is not None and Renormalize(*statistics).needed:
        checkpoint.refuse("wants images normalised by mean {} and deviation {}, which main.py --eval does; the tools "
                          "normalise by ImageNet's".format(*statistics))
    restored = restore(checkpoint, name, input_size, key=key)
    assert is_evo(restored.model)
    return restored
