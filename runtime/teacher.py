"""The distillation teacher: built by name, loaded from a checked file, frozen."""
from evo_vit.compat import create_model

from .checkpoint import load_checkpoint, load_weights, model_state
from .models import check_model_name


def build_teacher(name, path, num_classes, device):
    """The timm model `name` with the weights of `path`, in eval mode on `device`, without gradients.

    Raises UserError for an unknown name and for a file that is missing, damaged, of another architecture or trained
    on another number of classes.
    """
    check_model_name(name, "--teacher-model")
    teacher = create_model(name, pretrained=False, num_classes=num_classes, global_pool="avg")
    state = model_state(load_checkpoint(path, "--teacher-path"), path, "--teacher-path")
    load_weights(teacher, state, name, path, "--teacher-path")
    return teacher.requires_grad_(False).to(device).eval()
