"""Picture files, read safely; their way to the device as bytes; and the two views of a data set that survive damaged
files."""
import functools
import io
import random
import warnings
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import Dataset
from torch.utils.data.dataloader import default_collate

from .randomness import drawing_from

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


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
    with _damage_named(path):
        return _decode(_open(path))


@contextmanager
def _damage_named(path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large pictures, broken EXIF, palettes with transparency: all are read
            yield
    except Exception as error:  # a damaged file can raise anything in a decoder
        reason = str(error).split("\n")[0].split(" <")[0]  # without Pillow's name for the open file
        raise DamagedImage(path, "{}: {}".format(type(error).__name__, reason[:120]))


def _open(path):
    with open(path, "rb") as f:
        return Image.open(io.BytesIO(f.read()))


def _decode(picture):
    picture.load()
    if picture.mode.startswith("I"):
        grey = np.clip(np.asarray(picture).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        picture = Image.fromarray(grey)
    return picture.convert("RGB")


class LastPicture:
    """load_picture that keeps the last picture: with repeated augmentation one process asks for it three times in a row."""

    def __init__(self):
        self._path = self._picture = None

    def __call__(self, path):
        if self._path != path:
            self._picture = load_picture(path)
            self._path = path
        return self._picture


class DraftCrop:
    """A random resized crop that has only as many of a JPEG's pixels decoded as it needs: its input is a path.

    The crops are those that `crop`, timm's RandomResizedCropAndInterpolation, draws. Where one is at least four times as
    large as the result, the JPEG decoder's averages over 2, 4 or 8 pixels take the place of a part of the interpolation, of
    which a factor of two at least is left (Pillow's "reducing gap", for pictures that look the same).
    """

    def __init__(self, crop):
        self.crop = crop

    def __call__(self, path):
        crop, (height, width) = self.crop, self.crop.size
        with _damage_named(path):
            picture = _open(path)
            full = picture.size
            top, left, h, w = crop.get_params(picture, crop.scale, crop.ratio)
            reduce = min(h // (2 * height), w // (2 * width))
            if reduce >= 2:
                picture.draft("RGB", (full[0] // reduce, full[1] // reduce))
            picture = _decode(picture)
        down, across = picture.size[1] / full[1], picture.size[0] / full[0]
        interpolation = crop.interpolation
        if isinstance(interpolation, (tuple, list)):
            interpolation = random.choice(interpolation)
        if not isinstance(interpolation, int):  # torchvision's enumeration; the older one has Pillow's numbers
            interpolation = getattr(Image, interpolation.value.upper())
        box = (left * across, top * down, (left + w) * across, (top + h) * down)  # parts of pixels count
        return picture.resize((width, height), interpolation, box=box)


def leave_path(path):
    """The loader of a data set whose transform starts with DraftCrop."""
    return path


# ------------------------------------------------------------------------------------- from the worker to the device

class Images(NamedTuple):
    """A batch on its way: bytes, and what random erasing puts over them once they are normalised."""
    pixels: torch.Tensor  # (B, H, W, 3) uint8
    erased: torch.Tensor  # (P, 5) int64: image, top, left, height, width of each erased area
    fill: torch.Tensor  # the areas' values one after another, each (3, height, width), float32


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


@functools.lru_cache(maxsize=None)
def _statistics(device):
    """ImageNet's mean and deviation, (1, 3, 1, 1) each; brought to the device once, since the host waits for such a copy."""
    return [torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]


def normalize(images, device, channels_last=False):
    """The Images `images` on `device`, normalised by ImageNet's statistics and erased: (B, 3, H, W), bit for bit what
    torchvision's ToTensor and Normalize and timm's RandomErasing make of each."""
    x = images.pixels.to(device, non_blocking=True).permute(0, 3, 1, 2).float()
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    mean, std = _statistics(device)
    x = x.div_(255).sub_(mean).div_(std)
    areas, fill = images.erased.tolist(), images.fill.to(device, non_blocking=True)
    for (i, top, left, h, w), values in zip(areas, fill.split([3 * h * w for _, _, _, h, w in areas])):
        x[i, :, top:top + h, left:left + w] = values.view(3, h, w)
    return x


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

    Items are (what the transform gave, label, index, [(index, path, class, reason) of each damaged file on the way]).
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
    """Items as TrainingView's, for a plain index; a damaged image comes black, `size` pixels wide and high, with the label
    -1, which no prediction hits."""

    def __init__(self, dataset, size):
        self.dataset = dataset
        self.size = size

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        try:
            image, label = self.dataset[index]
            return image, label, index, []
        except DamagedImage as error:
            return (torch.zeros(self.size, self.size, 3, dtype=torch.uint8), []), -1, index, [self._report(index, error)]


def collate(items):
    """(Images, labels (B,), indices (B,), list of damaged files) of items of either view."""
    pixels, labels, indices = default_collate([(item[0][0],) + tuple(item[1:3]) for item in items])
    areas = [(i, top, left, values) for i, item in enumerate(items) for top, left, values in item[0][1]]
    erased = torch.tensor([(i, top, left) + tuple(values.shape[1:]) for i, top, left, values in areas], dtype=torch.int64)
    fill = torch.cat([values.flatten() for _, _, _, values in areas] + [torch.zeros(0)])
    return Images(pixels, erased.view(-1, 5), fill), labels, indices, [entry for item in items for entry in item[3]]
