"""--image-backend fast: JPEGs decoded by simplejpeg, where it is installed, and crops resized as bytes by PyTorch."""
import numpy as np
import torch
from PIL import Image

from ..machine import versions
from .reading import damage_named, decode_picture, draw_crop, read_bytes

try:
    import simplejpeg
except ImportError:  # it only makes it faster
    simplejpeg = None

HAS_DECODER = simplejpeg is not None


def load_pixels(source) -> np.ndarray:
    """What reading.load_picture reads from `source` (a path or a Member), as bytes (H, W, 3); the same pixels.

    Raises DamagedImage for what load_picture raises it for.
    """
    with damage_named(source):
        data = read_bytes(source)
        pixels = _decode_jpeg(data)
        return np.array(decode_picture(data)) if pixels is None else pixels


def _decode_jpeg(data):
    """A JPEG's pixels; None for what is left to Pillow: other formats, CMYK, very large ones, and whatever is not as it
    should be."""
    if not HAS_DECODER or data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if space not in ("YCbCr", "Gray", "RGB") or height * width > Image.MAX_IMAGE_PIXELS:
            return None
        return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
    except Exception:  # Pillow says whether it is damaged
        return None


class FastCrop:
    """The crops that `crop`, timm's RandomResizedCropAndInterpolation, draws: bytes (H, W, 3) -> PIL image. They are
    cut out first, and resized as bytes: within 2 of Pillow's results, of 255."""

    def __init__(self, crop):
        self.crop = crop

    def __call__(self, pixels):
        crop = self.crop
        image = torch.from_numpy(pixels).permute(2, 0, 1)  # (3, H, W), from which timm takes the size
        (top, left, h, w), interpolation = draw_crop(crop, image)
        if not h or not w:
            return Image.new("RGB", (crop.size[1], crop.size[0]))
        # made a batch before its channels move to the front, it is channels-last to PyTorch, which copies nothing then
        part = torch.from_numpy(np.ascontiguousarray(pixels[top:top + h, left:left + w]))[None].permute(0, 3, 1, 2)
        resized = versions.resize_bytes(part, crop.size, interpolation.value)[0]
        return Image.fromarray(resized.permute(1, 2, 0).contiguous().numpy())
