"""Picture files, read safely, and the two views of a data set that survive damaged ones."""
import warnings

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torch.utils.data.dataloader import default_collate

from .randomness import drawing_from


class DamagedImage(Exception):
    """A picture file that cannot be decoded."""

    def __init__(self, path, reason=""):  # a data loader makes it anew from its worker's text alone
        super().__init__("{}: {}".format(path, reason) if reason else path)
        self.path = path
        self.reason = reason


def load_picture(path):
    """The file's picture as RGB. EXIF rotation is left alone, as in the published recipe.

    Any mode is converted, 16-bit greys by their upper byte. Raises DamagedImage, also for a picture of more pixels than
    Pillow's limit against decompression bombs allows (2 * PIL.Image.MAX_IMAGE_PIXELS, 179 million).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large pictures, broken EXIF, palettes with transparency: all are read
            with open(path, "rb") as f:
                picture = Image.open(f)
                picture.load()
                if picture.mode.startswith("I"):
                    grey = np.clip(np.asarray(picture).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
                    picture = Image.fromarray(grey)
                return picture.convert("RGB")
    except Exception as error:  # a damaged file can raise anything in a decoder
        reason = str(error).split("\n")[0].split(" <")[0]  # without Pillow's name for the open file
        raise DamagedImage(path, "{}: {}".format(type(error).__name__, reason[:120]))


class _Named:
    """Which file, and which class, an index stands for."""

    def name(self, index):
        samples = getattr(self.dataset, "samples", None)
        first = samples[index][0] if samples is not None else None
        return first if isinstance(first, str) else "image {}".format(index)

    def _report(self, index, damaged):
        label = self.dataset.samples[index][1]
        classes = getattr(self.dataset, "classes", None)
        return (index, damaged.path, str(classes[label] if classes else label), damaged.reason)


class TrainingView(Dataset, _Named):
    """Takes (index, seed): the image is augmented from `seed`. In a damaged image's place comes the next good one.

    Items are (image, label, index, [(index, path, class, reason) of each damaged file on the way]).
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, draw):
        index, seed = draw
        damaged = []
        for step in range(len(self.dataset)):
            number = (index + step) % len(self.dataset)
            try:
                with drawing_from(seed):
                    image, label = self.dataset[number]
                return image, label, number, damaged
            except DamagedImage as error:
                damaged.append(self._report(number, error))
        raise DamagedImage(damaged[0][1], "and no other picture of the data set can be read either")


class EvaluationView(Dataset, _Named):
    """Items as TrainingView's, for a plain index; a damaged image comes as zeros `shape` with the label -1, which no
    prediction hits."""

    def __init__(self, dataset, shape):
        self.dataset = dataset
        self.shape = shape

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        try:
            image, label = self.dataset[index]
            return image, label, index, []
        except DamagedImage as error:
            return torch.zeros(self.shape), -1, index, [self._report(index, error)]


def collate(items):
    """(images (B, 3, H, W), labels (B,), indices (B,), list of damaged files)."""
    images, labels, indices = default_collate([item[:3] for item in items])
    return images, labels, indices, [entry for item in items for entry in item[3]]
