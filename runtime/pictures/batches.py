"""From pictures to batches: bytes in place of floats, and the two views of a data set that survive damaged files."""
from typing import List, Optional

import numpy as np
import torch
from torch.utils.data import Dataset
from torch.utils.data.dataloader import default_collate

from ..errors import DamagedImage, RunFailed
from ..machine.images import Images
from ..machine.randomness import draw_from, drawing_from


class ToBytes:
    """PIL image -> (pixels (H, W, 3) uint8, [(top, left, values (3, h, w)) of each area that `erasing` draws]).

    erasing: timm's RandomErasing, or None. It draws what it would draw on the normalised image.
    """

    def __init__(self, erasing=None):
        self.erasing = erasing

    def __call__(self, image):
        pixels = torch.from_numpy(np.array(image))
        canvas = _Canvas(pixels.shape[:2])
        if self.erasing is not None:
            self.erasing(canvas)
        return pixels, canvas.areas


class _Canvas:
    """Looks like an image to RandomErasing and keeps what is written to it."""

    dtype = torch.float32

    def __init__(self, size):
        self._size = (3,) + tuple(size)
        self.areas = []

    def size(self):
        return self._size

    def __setitem__(self, where, values):
        _, rows, columns = where
        shape = (3, rows.stop - rows.start, columns.stop - columns.start)
        self.areas.append((rows.start, columns.start, values.expand(shape)))


class _Named:
    """Which file, and which class, an index stands for."""

    def name(self, index: int) -> str:
        names = getattr(self.dataset, "names", None)
        return "image {}".format(index) if names is None else self.dataset.path(index)

    def _report(self, index, damaged):
        label = int(self.dataset.labels[index])
        return (index, damaged.path, str(self.dataset.classes[label]), damaged.reason)


class TrainingView(Dataset, _Named):
    """Takes (index, seed): the image is augmented from `seed`. In a damaged image's place comes the next good one.

    Items are (what the transform gave, label, index, [(index, path, class, reason) of each damaged file on the way]).
    keep_generators: the process's generators go on after a picture as if nothing was, which takes 0.3 ms; what draws
    after it in training (samplers.Feed.on) seeds them itself.
    """

    def __init__(self, dataset, keep_generators: bool = True):
        self.dataset = dataset
        self.keep_generators = keep_generators

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, draw):
        index, seed = draw
        damaged = []
        for step in range(len(self.dataset)):
            number = (index + step) % len(self.dataset)
            try:
                if self.keep_generators:
                    with drawing_from(seed):
                        image, label = self.dataset[number]
                else:
                    draw_from(seed)
                    image, label = self.dataset[number]
                return image, label, number, damaged
            except DamagedImage as error:
                damaged.append(self._report(number, error))
        raise DamagedImage(damaged[0][1], "and no other picture of the data set can be read either")


class EvaluationView(Dataset, _Named):
    """Items as TrainingView's, for a plain index; a damaged image comes black, `size` pixels wide and high, with the
    label -1, which no prediction hits. places: the number that each of the data set's labels has for the model; None:
    the same."""

    def __init__(self, dataset, size: int, places: Optional[List[int]] = None):
        self.dataset = dataset
        self.size = size
        self.places = places

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        try:
            image, label = self.dataset[index]
            return image, label if self.places is None else self.places[label], index, []
        except DamagedImage as error:
            return (torch.zeros(self.size, self.size, 3, dtype=torch.uint8), []), - \
                    1, index, [self._report(index, error)]


def collate(items):
    """(Images, labels (B,), indices (B,), list of damaged files) of items of either view."""
    pixels, labels, indices = default_collate([(item[0][0],) + tuple(item[1:3]) for item in items])
    areas = [(i, top, left, values) for i, item in enumerate(items) for top, left, values in item[0][1]]
    erased = torch.tensor([(i, top, left) + tuple(values.shape[1:])
                          for i, top, left, values in areas], dtype=torch.int64)
    fill = torch.cat([values.flatten() for _, _, _, values in areas] + [torch.zeros(0)])
    return Images(pixels, erased.view(-1, 5), fill), labels, indices, [entry for item in items for entry in item[3]]


_REMEDIES = (  # what a data loader's failure says, what is wrong, and what helps
    (("Bus error", "shared memory", "shm"), "the shared memory in /dev/shm is too small for the data-loading processes",
     "enlarge it (docker run --shm-size=16g, or mount -o remount,size=16g /dev/shm), or use fewer with --num_workers"),
    (("Too many open files", "ancdata", "Errno 24"),
     "the system lets a process open too few files for the data-loading processes",
     "raise the limit with ulimit -n 65536, or use fewer with --num_workers"),
    (("Cannot allocate memory", "Errno 12"), "there is not enough memory for the data-loading processes",
     "use fewer with --num_workers"),
    (("killed by signal: Killed",), "the system ended a data-loading process, as it does where memory runs out",
     "use fewer with --num_workers, or a smaller --batch-size"))


def loaded(loader):
    """The batches of a DataLoader; raises RunFailed, with the remedy, where its processes meet a limit of the
    system."""
    try:
        yield from loader
    except (OSError, RuntimeError) as error:
        text = str(error)
        for signs, wrong, remedy in _REMEDIES:
            if any(sign in text for sign in signs):
                raise RunFailed("{}; {}".format(wrong, remedy))
        raise
