"""Picture files, read safely."""
import io
import os
import random
import warnings
from contextlib import contextmanager
from typing import NamedTuple, Union

import numpy as np
from PIL import Image, PngImagePlugin

from ..errors import DamagedImage, Ending
from . import remote

# torchvision's, and others that users have, where this Pillow reads them
_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
             ".jfif", ".jpe", ".gif", ".avif", ".jp2", ".pbm", ".pnm", ".tga")
Image.init()  # all formats, also where older Pillow has found some already
_FORMATS = Image.registered_extensions()
IMAGE_EXTENSIONS = tuple(suffix for suffix in _SUFFIXES if _FORMATS.get(suffix) in Image.OPEN)

# sound files carry colour profiles and texts above Pillow's limits of 1 and 64 MiB, which are made for the web
PngImagePlugin.MAX_TEXT_CHUNK = 2 ** 26
PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 28


def is_picture_name(name: str) -> bool:
    """Whether a file of this name counts as a picture: by its suffix, and unless it begins with a dot, as the shadows
    do that macOS leaves on other systems' disks (._x.jpg)."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not os.path.basename(name).startswith(".")


class Member(NamedTuple):
    """A file inside an archive, where a loader takes a path."""
    archive: str
    offset: int  # bytes
    size: int  # bytes
    path: str  # what messages call it


def load_picture(path: Union[str, Member]) -> Image.Image:
    """The file's picture as RGB; of an animation the first. EXIF rotation is left alone, as in the published recipe.

    Any mode is converted; greys of more than 8 bits by their range (see _to_bytes). Raises DamagedImage, also for a
    picture of more pixels than Pillow's limit against decompression bombs allows (2 * PIL.Image.MAX_IMAGE_PIXELS, 179
    million).
    """
    with damage_named(path):
        return _decode(_open(path))


@contextmanager
def damage_named(path):
    """Whatever goes wrong inside is a DamagedImage of `path`, but for what ends the run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large pictures, broken EXIF, palettes with transparency: all are read
            yield
    except Ending:
        raise
    except Exception as error:  # a damaged file can raise anything in a decoder
        reason = str(error).split("\n")[0].split(" <")[0]  # without Pillow's name for the open file
        raise DamagedImage(getattr(path, "path", path), "{}: {}".format(type(error).__name__, reason[:120]))


def read_bytes(path: Union[str, Member]) -> bytes:
    """The whole file. Raises OSError, and RunFailed for one on a server that does not answer."""
    if isinstance(path, Member):
        if remote.is_url(path.archive):
            return remote.read_member(path.archive, path.offset, path.size, path.path)
        with open(path.archive, "rb", buffering=0) as f:
            return os.pread(f.fileno(), path.size, path.offset)
    with open(path, "rb") as f:
        return f.read()


def _open(path):
    return Image.open(io.BytesIO(read_bytes(path)))


def decode_picture(data: bytes) -> Image.Image:
    """The picture in the bytes of a file, as load_picture reads it; call it where damage is named."""
    return _decode(Image.open(io.BytesIO(data)))


def _decode(picture):
    picture.load()
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = Image.fromarray(_to_bytes(np.asarray(picture)))
    return picture.convert("RGB")


def _to_bytes(grey):
    """Greys (H, W) of integers or floats as bytes. What is 255 says the range that the values lie in: the smallest of 0
    to 1 (floats), 255, 4095 and 65535 that holds them; values beyond all of these, and negative ones, are stretched
    from the least to the largest. What is not finite is black."""
    values = np.where(np.isfinite(grey), grey, 0).astype(np.float64)
    low, high = values.min(), values.max()
    tops = ([1.0] if grey.dtype.kind == "f" else []) + [255.0, 4095.0, 65535.0]
    top = next((top for top in tops if low >= 0 and high <= top), None)
    if top is None:
        scaled = (values - low) * (255.0 / (high - low)) if high > low else np.zeros_like(values)
    elif top == 65535.0:
        scaled = values // 256  # the upper byte
    else:
        scaled = values * (255.0 / top)
    return np.clip(scaled + (0.5 if top in (1.0, 4095.0) else 0.0), 0, 255).astype(np.uint8)


class LastPicture:
    """load_picture, or another `load`, that keeps the last picture: with repeated augmentation one process asks for it
    three times in a row."""

    def __init__(self, load=None):
        self._load = load
        self._path = self._picture = None

    def __call__(self, path):
        if self._path != path:
            self._picture = load_picture(path) if self._load is None else self._load(path)
            self._path = path
        return self._picture


def draw_crop(crop, picture):
    """((top, left, height, width), the interpolation) that `crop`, timm's RandomResizedCropAndInterpolation, draws for
    `picture`. Of one of one or two pixels, nothing may be left; timm makes black of that."""
    box = crop.get_params(picture, crop.scale, crop.ratio)
    several = isinstance(crop.interpolation, (tuple, list))
    return box, random.choice(crop.interpolation) if several else crop.interpolation


class DraftCrop:
    """A random resized crop that has only as many of a JPEG's pixels decoded as it needs: its input is a path.

    The crops are those that `crop`, timm's RandomResizedCropAndInterpolation, draws. Where one is at least four times
    as large as the result, the JPEG decoder's averages over 2, 4 or 8 pixels take the place of a part of the
    interpolation, of which a factor of two at least is left (Pillow's "reducing gap", for pictures that look the same).
    """

    def __init__(self, crop):
        self.crop = crop

    def __call__(self, path):
        crop, (height, width) = self.crop, self.crop.size
        with damage_named(path):
            picture = _open(path)
            full = picture.size
            (top, left, h, w), interpolation = draw_crop(crop, picture)
            reduce = min(h // (2 * height), w // (2 * width))
            if reduce >= 2:
                picture.draft("RGB", (full[0] // reduce, full[1] // reduce))
            picture = _decode(picture)
        down, across = picture.size[1] / full[1], picture.size[0] / full[0]
        if not isinstance(interpolation, int):  # torchvision's enumeration; the older one has Pillow's numbers
            interpolation = getattr(Image, interpolation.value.upper())
        if not h or not w:
            return Image.new("RGB", (width, height))
        box = (left * across, top * down, (left + w) * across, (top + h) * down)  # parts of pixels count
        return picture.resize((width, height), interpolation, box=box)


def leave_path(path):
    """The loader of a data set whose transform starts with DraftCrop."""
    return path
