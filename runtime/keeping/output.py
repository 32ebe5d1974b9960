"""The output folder of a run: checkpoint.pth, best_checkpoint.pth, log.txt, args.json and summary.json."""
import fcntl
import os
import re
import shutil
import statistics
import time
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING, Callable, List, Optional

from ..errors import NonFiniteLoss, SaveFailed, UserError
from ..machine.agreement import Agreement
from ..machine.processes import barrier
from .checkpoint import BEST, NEWEST, OLDER
from .files import write_json
from .scalars import Scalars

if TYPE_CHECKING:
    from .state import TrainingState

SUMMARY = "summary.json"
FILES = (NEWEST, OLDER, BEST, "log.txt", "args.json", SUMMARY, "tensorboard", "profile")
_REPORT = re.compile(r"nonfinite-\d+\.json")


def _unwritable(path, error):
    return UserError("--output_dir: {} cannot be written ({})".format(path, error.strerror or error))


class Lock:
    """Keeps other runs out of the folder `path`, which is made, while it is entered; None for no folder. Raises
    UserError where another run is in it, or it cannot be made. Does nothing where the file system has no such
    locks."""

    PATIENCE = 15.0  # seconds: so long a killed run's data-loading processes may outlive it

    def __init__(self, path: Optional[str]):
        self.path = path
        self._folder = None

    def __enter__(self):
        if self.path is None:
            return self
        try:
            os.makedirs(self.path, exist_ok=True)
            self._folder = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise _unwritable(self.path, error)
        end = time.monotonic() + self.PATIENCE
        while not self._take():
            if time.monotonic() > end:
                self.__exit__()
                raise UserError(
                    "--output_dir: another run is writing to {}; name another folder, or end that run".format(
                    self.path))
            time.sleep(0.2)
        return self

    def __exit__(self, *_):
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None

    def _take(self):
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError:  # no locks here
            return True


def _writes(path, world, agreement):
    """Whether this process writes the run's files: the first one does, and the first of every machine that does not see
    that one's folder, so that each machine can go on without the others."""
    if world.size == world.local_size:
        return world.is_main
    token = os.path.join(path, ".shared-" + agreement.texts(uuid.uuid4().hex)[0])
    if world.is_main:
        try:
            os.makedirs(path, exist_ok=True)
            with open(token, "w"):
                pass
        except OSError as error:
            raise _unwritable(path, error)
    agreement.total(0)  # it is there
    own = world.is_main or world.local_rank == 0 and not os.path.exists(token)
    agreement.total(0)  # all have looked
    if world.is_main:
        os.remove(token)
    return own


@contextmanager
def opened(state: "TrainingState", fresh: bool, agreement: Agreement, say: Callable):
    """The run's output folder, prepared for its `state` and kept from other runs while it is entered; yields what
    writes for TensorBoard, or None. Each machine has a folder of its own where it does not see the first process's.
    Raises UserError, see Lock and prepare_output_dir."""
    path, scalars = state.settings["output_dir"], None
    state.writes = _writes(path, state.learner.machine.world, agreement)
    with Lock(path if state.writes else None):
        if state.writes:
            prepare_output_dir(path, fresh, state.size_on_disk(), say)
            write_args(path, state.settings)
            state.write_log()
            scalars = Scalars(path, state.log) if state.settings["tensorboard"] else None
        barrier()
        yield scalars


def prepare_output_dir(path: str, fresh: bool, checkpoint_size: int, say: Callable):
    """Makes the folder. A `fresh` run moves what an earlier one left there into a new folder previous-N inside it; one
    that goes on takes the summary away, which is that of a finished run.

    Raises UserError where the folder cannot be written, or its disk has no room for the four files of `checkpoint_size`
    bytes that a run keeps at a time.
    """
    try:
        os.makedirs(path, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "no permission to write")
        left = [name for name in sorted(os.listdir(path)) if name in FILES or _REPORT.fullmatch(name)] if fresh else []
        if left:
            number = 1
            while os.path.exists(os.path.join(path, "previous-{}".format(number))):
                number += 1
            aside = os.path.join(path, "previous-{}".format(number))
            os.mkdir(aside)
            for name in left:
                os.replace(os.path.join(path, name), os.path.join(aside, name))
            say("The files of an earlier run in {} now lie in {}".format(path, aside))
        elif os.path.exists(os.path.join(path, SUMMARY)):
            os.remove(os.path.join(path, SUMMARY))
        probe = os.path.join(path, ".probe")
        with open(probe, "w"):
            pass
        os.remove(probe)
        files = [os.path.join(path, name) for name in (NEWEST, OLDER, BEST)]  # a resumed run replaces its own
        free = shutil.disk_usage(path).free + sum(os.path.getsize(file) for file in files if os.path.exists(file))
        if free < 4 * checkpoint_size:
            raise UserError("--output_dir: the disk of {} has {:,} MiB for the run's checkpoints, those that are there "
                            "counted, and it needs {:,}, for four".format(path, free >> 20, 4 * checkpoint_size >> 20))
    except OSError as error:
        raise _unwritable(path, error)


def median_speed(speeds) -> float:
    """Median of the epochs' images/s without those that made no update; 0.0 where none did (all had been made when the
    run was resumed)."""
    return statistics.median([speed for speed in speeds if speed > 0] or [0.0])


def summarize(log: List[dict], global_batch: int) -> dict:
    """What `log` (one dict per epoch) comes down to: the median of the speeds, and what the last epoch reached."""
    speed = median_speed(entry["train_images_per_s"] for entry in log)
    return {"global_batch": global_batch, "epochs": len(log), "images_per_s": speed,
            "step_ms": 1000 * global_batch / speed if speed else 0.0, "train_loss": log[-1]["train_loss"],
            "test_acc1": log[-1]["test_acc1"]}


def write_args(path: str, settings: dict):
    """Writes args.json: the run's flags and what was derived from them. Raises SaveFailed."""
    write_json(os.path.join(path, "args.json"), settings, sort_keys=True)


def write_summary(path: str, values: dict):
    """Writes summary.json: what a finished run reached, and how fast. Raises SaveFailed."""
    write_json(os.path.join(path, SUMMARY), values)


def write_report(path: str, rank: int, report: dict) -> str:
    """Writes what is known of an update without finite loss to nonfinite-RANK.json; returns the file's path. Raises
    SaveFailed."""
    file = os.path.join(path, "nonfinite-{}.json".format(rank))
    write_json(file, report)
    return file


def explained(error: NonFiniteLoss, path: str, rank: int) -> NonFiniteLoss:
    """The error with where it happened and the file in the folder `path` that says more, which is written."""
    where = "{} in epoch {epoch}, update {update}, at learning rate {lr:.3g}, loss scale {loss_scale}".format(
        error, **error.report)
    try:
        file = write_report(path, rank, dict(error.report, reason=str(error)))
        return NonFiniteLoss("{}; {} names the files of the batch".format(where, file))
    except SaveFailed as failure:
        return NonFiniteLoss("{}; the files of the batch are not told: {}".format(where, failure))
