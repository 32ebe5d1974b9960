"""--image-backend fast: shears and translations of timm's policies. Each moves whole rows (or columns) sideways, so the
pixels of a row have the same four weights; Pillow works them out anew for each pixel, and in two directions."""
import numpy as np
import torch
from PIL import Image

_MOVED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel")


def slide_rows(pixels: np.ndarray, shifts: np.ndarray, fill) -> np.ndarray:
    """Bytes (H, W, 3) whose row y shows at x what `pixels` have at x + shifts[y], in bicubic interpolation; `fill`, a
    colour, where that is outside. Within 1 of Image.transform's pixels, of 255."""
    height, width, channels = pixels.shape
    whole = np.floor(shifts)
    part = torch.from_numpy((shifts - whole).astype(np.float32))[:, None]
    starts, ends = (np.clip(np.ceil(edge - 0.5 - shifts), 0, width).astype(int) * channels for edge in (0, width))
    moves = (whole.astype(int) + 1) * channels
    # the places whole - 1 to whole + 2 of each pixel; beyond the edge its last pixel goes on
    padded = np.pad(pixels, ((0, 0), (2, 2), (0, 0)), "edge").reshape(height, -1)
    near = np.zeros((height, (width + 3) * channels), np.uint8)
    rows = list(zip(range(height), starts.tolist(), ends.tolist(), moves.tolist()))
    for y, start, end, move in rows:
        if start < end:
            near[y, start:end + 3 * channels] = padded[y, start + move:end + move + 3 * channels]
    values = torch.from_numpy(near).float()
    first, second, third, fourth = (values[:, k * channels:(k + width) * channels] for k in range(4))
    moved = first * (((2 - part) * part - 1) * part)  # Pillow's cubic, of a = -1
    moved.addcmul_(second, (part - 2) * part * part + 1)
    moved.addcmul_(third, ((1 - part) * part + 1) * part)
    moved.addcmul_(fourth, (part - 1) * part * part)
    # Pillow cuts fractions off; where the four are equal, rounding must not end below them
    moved = moved.add_(2 ** -10).clamp_(0, 255).to(torch.uint8).numpy()
    result = np.array(Image.new("RGB", (width, height), fill)).reshape(height, -1)
    for y, start, end, _ in rows:
        result[y, start:end] = moved[y, start:end]
    return result.reshape(pixels.shape)


class _Sliding:
    """An RGB image to timm's functions of shears and translations, which take its size and call transform."""

    def __init__(self, image):
        self.image = image
        self.size = image.size

    def transform(self, size, method, matrix, resample, fillcolor):
        """Image.transform."""
        a, b, c, d, e, f = matrix
        rows, columns = (d, e, f) == (0, 1, 0) and a == 1, (a, b, c) == (1, 0, 0) and e == 1
        if resample != Image.BICUBIC or not rows and not columns:
            return self.image.transform(size, method, matrix, resample=resample, fillcolor=fillcolor)
        pixels = np.asarray(self.image)
        if rows:
            return Image.fromarray(slide_rows(pixels, b * (np.arange(len(pixels)) + 0.5) + c, fillcolor))
        pixels = pixels.swapaxes(0, 1)
        moved = slide_rows(pixels, d * (np.arange(len(pixels)) + 0.5) + f, fillcolor)
        return Image.fromarray(np.ascontiguousarray(moved.swapaxes(0, 1)))


class _Slider:
    def __init__(self, function):
        self.function = function

    def __call__(self, image, *args, **kwargs):
        return self.function(_Sliding(image), *args, **kwargs)


def slide(policy) -> None:
    """Has the shears and translations of `policy`, one of timm's (other transforms have none), done by slide_rows."""
    parts = [getattr(policy, "ops", ())] + list(getattr(policy, "policy", ()))  # AutoAugment's are lists of operations
    for op in (op for part in parts for op in part if op.name in _MOVED):
        op.aug_fn = _Slider(op.aug_fn)
