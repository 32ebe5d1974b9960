"""A teacher that computes in another number format than its student, held to what it says in float32."""
import torch
from torch.utils.data import Dataset

from ..errors import UserError
from ..machine import versions
from ..machine.machine import Machine
from ..pictures.batches import collate
from .teacher import Teacher

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
CROPS = 256  # by which a format is judged
_BATCH = 32


def need_precision(name: str, machine: Machine):
    """Raises UserError where a teacher cannot compute in `name`, one of DTYPES, beside the student."""
    if machine.precision.backend == "apex":
        raise UserError("--teacher-precision {}: apex decides how every model computes; use --amp-backend native, or "
                        "leave it out".format(name))
    if name == "bf16" and not versions.has_bf16(machine.device.type):
        raise UserError("--teacher-precision bf16: this {} does not compute in bf16; use float32".format(
            machine.device.type))


@torch.no_grad()
def _first_choices(teacher, batches, machine):
    """(n,) the teacher's first choices for all pictures of `batches`, bytes as machine.images takes them."""
    return torch.cat([teacher(machine.images(pixels)).argmax(dim=1) for pixels in batches])


def set_precision(teacher: Teacher, name: str, view: Dataset, machine: Machine, needed: float) -> float:
    """From now on `teacher`, a float32 one, computes in `name`, one of DTYPES, whatever its student computes in.

    Measures on CROPS training crops of `view` (a TrainingView), evenly spread over its pictures and the processes, for
    what share its first choice stays that of float32, prints and returns it. Raises UserError where that is less than
    `needed`.
    """
    if name == "float32":
        return 1.0
    count = min(max(CROPS, machine.world.size), len(view))  # at least one for each process
    draws = [(number * len(view) // count, number) for number in range(machine.world.rank, count, machine.world.size)]
    batches = [collate([view[draw] for draw in draws[start:start + _BATCH]])[0]
               for start in range(0, len(draws), _BATCH)]
    exact = _first_choices(teacher, batches, machine)
    teacher.compute_in(DTYPES[name])
    same, total = machine.sum((_first_choices(teacher, batches, machine) == exact).sum().item(), len(draws))
    share = same / total
    if share < needed:
        raise UserError("--teacher-precision {}: the teacher's first choice is that of float32 for {:.1%} of {} "
                        "training crops only; use float32, or a smaller --teacher-agreement than {:g}".format(
                            name, share, int(total), needed))
    machine.say("Teacher in {}: its first choice is that of float32 for {:.1%} of {} training crops".format(
        name, share, int(total)))
    return share
