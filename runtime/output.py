"""The output folder of a run: checkpoint.pth, best_checkpoint.pth, log.txt, args.json and summary.json."""
import json
import os
import shutil
import statistics

from .checkpoint import BEST, NEWEST, OLDER, write_whole
from .errors import UserError

FILES = (NEWEST, OLDER, BEST, "log.txt", "args.json", "summary.json", "tensorboard")


def prepare_output_dir(path, fresh, checkpoint_size, say):
    """Makes the folder. A `fresh` run moves what an earlier one left there into a new folder previous-N inside it.

    Raises UserError where the folder cannot be written, or its disk has no room for the four files of `checkpoint_size`
    bytes that a run keeps at a time.
    """
    try:
        os.makedirs(path, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "no permission to write")
        left = [name for name in FILES if os.path.exists(os.path.join(path, name))] if fresh else []
        if left:
            number = 1
            while os.path.exists(os.path.join(path, "previous-{}".format(number))):
                number += 1
            aside = os.path.join(path, "previous-{}".format(number))
            os.mkdir(aside)
            for name in left:
                os.replace(os.path.join(path, name), os.path.join(aside, name))
            say("The files of an earlier run in {} now lie in {}".format(path, aside))
        probe = os.path.join(path, ".probe")
        with open(probe, "w"):
            pass
        os.remove(probe)
        free = shutil.disk_usage(path).free
        if free < 4 * checkpoint_size:
            raise UserError("--output_dir: the disk of {} has {:,} MiB left and a run needs {:,}, four checkpoints' worth"
                            .format(path, free >> 20, 4 * checkpoint_size >> 20))
    except OSError as error:
        raise UserError("--output_dir: {} cannot be written ({})".format(path, error.strerror or error))


def median_speed(speeds):
    """Median of the epochs' images/s without those that made no update; 0.0 where none did (all had been made when the
    run was resumed)."""
    return statistics.median([speed for speed in speeds if speed > 0] or [0.0])


def summarize(log, global_batch):
    """What `log` (one dict per epoch) comes down to: the median of the speeds, and what the last epoch reached."""
    speed = median_speed(entry["train_images_per_s"] for entry in log)
    return {"global_batch": global_batch, "epochs": len(log), "images_per_s": speed,
            "step_ms": 1000 * global_batch / speed if speed else 0.0, "train_loss": log[-1]["train_loss"],
            "test_acc1": log[-1]["test_acc1"]}


def write_args(path, args):
    """Writes args.json: the run's flags and what was derived from them. Raises SaveFailed."""
    text = json.dumps(vars(args), indent=1, sort_keys=True) + "\n"
    write_whole(os.path.join(path, "args.json"), lambda f: f.write(text.encode()))


def write_summary(path, values):
    """Writes summary.json: what a finished run reached, and how fast. Raises SaveFailed."""
    text = json.dumps(values, indent=1) + "\n"
    write_whole(os.path.join(path, "summary.json"), lambda f: f.write(text.encode()))


def write_report(path, error):
    """Writes what a runtime.control.NonFiniteLoss reports to nonfinite-RANK.json; returns the file's path."""
    file = os.path.join(path, "nonfinite-{}.json".format(os.environ.get("RANK", "0")))
    with open(file, "w") as f:
        json.dump(dict(error.report, reason=str(error)), f, indent=1)
    return file
