"""The output folder of a run: checkpoint.pth, best_checkpoint.pth, log.txt and summary.json."""
import json
import os

from .errors import UserError

FILES = ("checkpoint.pth", "best_checkpoint.pth", "log.txt", "summary.json")


def prepare_output_dir(path, fresh, say):
    """Makes the folder. A `fresh` run moves what an earlier one left there into a new folder previous-N inside it.

    Raises UserError where the folder cannot be written.
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
    except OSError as error:
        raise UserError("--output_dir: {} cannot be written ({})".format(path, error.strerror or error))


def append_log(path, values):
    """Adds one line, a JSON object, to log.txt."""
    with open(os.path.join(path, "log.txt"), "a") as f:
        f.write(json.dumps(values) + "\n")


def write_summary(path, values):
    """Writes summary.json: what a finished run reached, and how fast."""
    with open(os.path.join(path, "summary.json"), "w") as f:
        json.dump(values, f, indent=1)
        f.write("\n")
