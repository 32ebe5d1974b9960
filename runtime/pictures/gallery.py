"""Pictures to look at: files and folders that a user names, or some that are always at hand."""
import os
import sys
from typing import NamedTuple

import torch
from PIL import Image

from ..errors import DamagedImage, UserError
from ..machine.images import normalize
from .batches import collate
from .folders import visible_folders
from .reading import is_picture_name, load_picture


class Picture(NamedTuple):
    name: str
    image: Image.Image  # RGB


def find_pictures(paths):
    """The files among `paths` and the pictures in the folders among them, sorted; raises UserError where there are
    none."""
    found = []
    for path in paths:
        if os.path.isdir(path):
            found += sorted(os.path.join(folder, name) for folder, names in visible_folders(path) for name in names
                            if is_picture_name(name))
        elif os.path.exists(path):
            found.append(path)
        else:
            raise UserError("there is no file or folder {}".format(path))
    if not found:
        raise UserError("there is no picture in {}".format(", ".join(paths)))
    return found


def name_unreadable(error):
    """Says of a DamagedImage, on standard error, that it is left out."""
    print("Left out, no picture that can be read: {}".format(error), file=sys.stderr, flush=True)


def read_pictures(paths):
    """Yields a Picture for each file that can be decoded; the others are named on standard error. Raises UserError at
    the end where there was none."""
    good = 0
    for path in paths:
        try:
            image = load_picture(path)
        except DamagedImage as error:
            name_unreadable(error)
            continue
        good += 1
        yield Picture(path, image)
    if not good:
        raise UserError("none of the {} files is a picture that can be read".format(len(paths)))


def photographs(count, size=500):
    """`count` different square parts of scikit-learn's two photographs, for where no picture is named."""
    from sklearn.datasets import load_sample_images
    bunch = load_sample_images()
    for number in range(count):
        which = number % 2
        image = Image.fromarray(bunch.images[which])
        side = min(image.size) * (4 + number % 5) // 8
        left, top = (image.width - side) * number // count, (image.height - side) * (number * 7 % count) // count
        name = "{} {}".format(os.path.basename(bunch.filenames[which]), number)
        yield Picture(name, image.crop((left, top, left + side, top + side)).resize((size, size), Image.BICUBIC))


def to_batch(pictures, transform):
    """The Pictures as main.py's evaluation shows them to the model: (B, 3, H, H), normalised, on the CPU.

    transform: of datasets.build_transform.
    """
    items = [(transform(picture.image), 0, 0, []) for picture in pictures]
    return normalize(collate(items)[0], torch.device("cpu"))


def batches(iterable, size):
    """Lists of `size` successive items, the last one of what is left."""
    batch = []
    for item in iterable:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
