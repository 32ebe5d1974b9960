"""Closing table of one or more finished runs: python -m runtime.keeping.table NAME=OUTPUT_DIR ..."""
import json
import os
import sys

from .output import median_speed


def summarize(folder):
    """(best top-1 in percent, median training images/s, minutes) from folder/log.txt."""
    with open(os.path.join(folder, "log.txt")) as f:
        epochs = [json.loads(line) for line in f]
    return (max(epoch["test_acc1"] for epoch in epochs), median_speed(epoch["train_images_per_s"] for epoch in epochs),
            sum(epoch["seconds"] for epoch in epochs) / 60)


def main(arguments):
    print("{:10} {:>8} {:>12} {:>8}  {}".format("run", "top-1 %", "images/s", "minutes", "files"))
    for argument in arguments:
        name, folder = argument.split("=", 1)
        print("{:10} {:8.2f} {:12.1f} {:8.1f}  {}".format(name, *(summarize(folder) + (
            os.path.join(folder, "best_checkpoint.pth") + ", log.txt",))))


if __name__ == "__main__":
    main(sys.argv[1:])
