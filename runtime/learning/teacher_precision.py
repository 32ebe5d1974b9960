"""A teacher that computes in another number format than its student, held to what it says in float32."""
import importlib
import os
import time
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from evo_vit.compat import TORCH

from ..errors import SaveFailed, UserError
from ..keeping.files import write_whole
from ..machine import versions
from ..machine.agreement import Agreement
from ..machine.devices import synchronize
from ..machine.machine import Machine
from ..machine.onnx_bytes import OLDEST_TORCH
from ..pictures.batches import collate
from .quantized import Quantized, adds_exactly, fingerprint, quantize
from .teacher import Teacher

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
INT8 = "int8"
CROPS = 256  # by which a format is judged
CALIBRATION = 64  # other crops, from which int8 takes its ranges
_BATCH = 32


def need_precision(name: str, machine: Machine):
    """Raises UserError where a teacher cannot compute in `name`, one of DTYPES or INT8, beside the student."""
    if machine.precision.backend == "apex":
        raise UserError("--teacher-precision {}: apex decides how every model computes; use --amp-backend native, or "
                        "--teacher-precision same".format(name))
    if name == "bf16" and not versions.has_bf16(machine.device.type):
        raise UserError("--teacher-precision bf16: this {} does not compute in bf16; use float32".format(
            machine.device.type))
    if name != INT8:
        return
    if machine.device.type != "cpu":
        raise UserError("--teacher-precision int8 is for a CPU; on {} use bf16".format(machine.device.type))
    if TORCH < OLDEST_TORCH:
        raise UserError("--teacher-precision int8 needs PyTorch {}.{} or newer; use float32".format(*OLDEST_TORCH))
    try:
        for package in ("onnx", "onnxruntime.quantization"):
            importlib.import_module(package)
    except ImportError as error:
        raise UserError("--teacher-precision int8 needs onnx and onnxruntime ({}); pip install onnx onnxruntime".format(
            error))


def _crops(view, draws):
    """Batches of the training crops `draws`, bytes as machine.images takes them."""
    return [collate([view[draw] for draw in draws[start:start + _BATCH]])[0]
            for start in range(0, len(draws), _BATCH)]


def _spread(count, view, first=0):
    """`count` draws, evenly spread over the pictures; `first`: the number of the first draw."""
    return [(number * len(view) // count, first + number) for number in range(count)]


@torch.no_grad()
def _first_choices(teacher, batches, machine):
    """((n,) the teacher's first choices for all pictures of `batches`, the seconds that they take)."""
    teacher(machine.images(batches[0]))  # what is done once is not in its time
    synchronize(machine.device)
    start = time.perf_counter()
    choices = torch.cat([teacher(machine.images(pixels)).argmax(dim=1) for pixels in batches])
    synchronize(machine.device)
    return choices, time.perf_counter() - start


def _kept(path, say):
    """The int8 network in the file `path`, None where there is none that can be read."""
    if not os.path.isfile(path):
        return None
    try:
        with open(path, "rb") as f:
            content = f.read()
        Quantized(content, 0)
    except Exception as error:  # a damaged file can raise anything in what reads it
        say("Note: {} cannot be used and is made anew ({})".format(path, " ".join(str(error).split())[:80]))
        return None
    say("Teacher in int8: {}".format(path))
    return content


def _quantized(teacher, view, machine, teacher_path, exact_sums):
    """The int8 network of the teacher's: the file beside `teacher_path`, or else what is made and kept there.
    exact_sums: what `quantize` has to know."""
    crops = _crops(view, _spread(min(CALIBRATION, len(view)), view, CROPS))
    images = [teacher.prepare(machine.images(pixels)) for pixels in crops]
    path = "{}.int8-{}.onnx".format(teacher_path, fingerprint(teacher.model, images, exact_sums))
    content = _kept(path, machine.say)
    if content is None:
        machine.say("Teacher in int8: calibrating it on {} training crops (once)".format(sum(map(len, images))))
        content = quantize(teacher.model, images, exact_sums)
        own = "{}.{}".format(path, os.getpid())  # another run may write here at the same time
        try:
            write_whole(own, lambda f: f.write(content))
            os.replace(own, path)
        except (OSError, SaveFailed) as error:
            machine.say("Note: it is not kept for the next run ({})".format(error))
    return content


class Shelf(NamedTuple):
    """Where an int8 network is kept: beside the teacher's file `teacher_path`, by the first of the processes that
    `agreement` joins, from which the others have it."""
    teacher_path: str
    agreement: Agreement


def set_precision(teacher: Teacher, name: str, view: Dataset, machine: Machine, needed: float, shelf: Shelf):
    """From now on `teacher`, a float32 one, computes in `name`, one of DTYPES or INT8, whatever its student computes
    in.

    Measures on CROPS training crops of `view` (a TrainingView), evenly spread over its pictures and the processes, for
    what share its first choice stays that of float32, and how fast it is; prints both and returns the share. The int8
    network is kept on the `shelf`.
    Raises UserError where the share is less than `needed`, and, on every process, where there is no int8 network.
    """
    if name == "float32":
        return 1.0
    count = min(max(CROPS, machine.world.size), len(view))  # at least one for each process
    batches = _crops(view, _spread(count, view)[machine.world.rank::machine.world.size])
    exact, exact_seconds = _first_choices(teacher, batches, machine)
    if name == INT8:
        macs = teacher.image_macs(machine.images(batches[0]).shape[-1])
        exact_sums = shelf.agreement.total(int(not adds_exactly())) == [0]  # machines may have other processors
        content = shelf.agreement.all_done(lambda: _quantized(teacher, view, machine, shelf.teacher_path,
                                                              exact_sums)
                                           if machine.world.is_main else None)
        teacher.replace(Quantized(shelf.agreement.from_process(0, content), macs))
    else:
        teacher.compute_in(DTYPES[name])
    choices, seconds = _first_choices(teacher, batches, machine)
    same, total = machine.sum((choices == exact).sum().item(), len(exact))
    share = same / total
    if share < needed:
        raise UserError("--teacher-precision {}: the teacher's first choice is that of float32 for {:.1%} of {} "
                        "training crops only; use float32, or a smaller --teacher-agreement than {:g}".format(
                            name, share, int(total), needed))
    speed = exact_seconds / seconds
    machine.say("Teacher in {}: its first choice is that of float32 for {:.1%} of {} training crops; {:.2g} times as "
                "fast".format(name, share, int(total), speed))
    if speed < 1:
        machine.say("Note: --teacher-precision {} is slower than float32 on this machine".format(name))
    return share
