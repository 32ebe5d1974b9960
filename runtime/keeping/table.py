"""Closing table of one or more finished runs: python -m runtime.keeping.table NAME=OUTPUT_DIR ..."""
import json
import os
import sys

from ..command import run
from ..errors import UserError
from .output import median_speed


def summarize(folder):
    """(best top-1 in percent, median training images/s, minutes) from folder/log.txt. Raises UserError."""
    path = os.path.join(folder, "log.txt")
    try:
        with open(path) as f:
            epochs = [json.loads(line) for line in f]
        accuracies, speeds, seconds = ([epoch[name] for epoch in epochs]
                                       for name in ("test_acc1", "train_images_per_s", "seconds"))
    except OSError as error:
        raise UserError("{} cannot be read ({})".format(path, error.strerror))
    except (ValueError, KeyError, TypeError):
        raise UserError("{} is no log of this project".format(path))
    if not epochs:
        raise UserError("{} holds no finished epoch".format(path))
    return max(accuracies), median_speed(speeds), sum(seconds) / 60


def main(arguments):
    runs = []
    for argument in arguments:
        name, _, folder = argument.partition("=")
        if not name or not folder:
            raise UserError("'{}' is not NAME=OUTPUT_DIR".format(argument))
        runs.append((name, folder, summarize(folder)))
    if not runs:
        raise UserError("name finished runs, as NAME=OUTPUT_DIR")
    print("{:10} {:>8} {:>12} {:>8}  {}".format("run", "top-1 %", "images/s", "minutes", "files"))
    for name, folder, figures in runs:
        print("{:10} {:8.2f} {:12.1f} {:8.1f}  {}".format(name, *figures + (
            os.path.join(folder, "best_checkpoint.pth") + ", log.txt",)))


if __name__ == "__main__":
    run(main, sys.argv[1:])
