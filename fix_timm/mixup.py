"""Mixup (https://arxiv.org/abs/1710.09412) and CutMix (https://arxiv.org/abs/1905.04899) on any device.

The public names, arguments and random draws are those of timm 0.4.12's `timm/data/mixup.py`, which this file can
replace; but targets are built on the device of the labels, where timm's assume CUDA.
"""
import numpy as np
import torch


def one_hot(x, num_classes, on_value=1.0, off_value=0.0, device=None):
    """Class numbers (B,) -> (B, num_classes) with `on_value` at the class; on the labels' device unless told."""
    x = x.long().view(-1, 1)
    if device is not None:
        x = x.to(device)
    return torch.full((x.shape[0], num_classes), off_value, device=x.device).scatter_(1, x, on_value)


def mixup_target(target, num_classes, lam=1.0, smoothing=0.0, device=None):
    """Smoothed labels of the batch mixed with those of the reversed batch, (B, num_classes).

    `lam`: the share of an image's own label, a number or (B, 1).
    """
    off_value = smoothing / num_classes
    own = one_hot(target, num_classes, 1.0 - smoothing + off_value, off_value, device)
    return own * lam + own.flip(0) * (1.0 - lam)


def rand_bbox(img_shape, lam, margin=0.0, count=None):
    """CutMix's box: (y0, y1, x0, x1) of area 1 - lam about a random centre, clipped at the image's border.

    `margin`: share of the box by which its centre keeps away from the border; `count`: number of boxes, as arrays.
    """
    height, width = img_shape[-2:]
    ratio = np.sqrt(1 - lam)
    box_h, box_w = int(height * ratio), int(width * ratio)
    margin_y, margin_x = int(margin * box_h), int(margin * box_w)
    y = np.random.randint(margin_y, height - margin_y, size=count)
    x = np.random.randint(margin_x, width - margin_x, size=count)
    return (np.clip(y - box_h // 2, 0, height), np.clip(y + box_h // 2, 0, height),
            np.clip(x - box_w // 2, 0, width), np.clip(x + box_w // 2, 0, width))


def rand_bbox_minmax(img_shape, minmax, count=None):
    """A box (y0, y1, x0, x1) inside the image, whose sides are between minmax[0] and minmax[1] of the image's."""
    assert len(minmax) == 2, "minmax is a pair: the smallest and the largest share of the image's side"
    height, width = img_shape[-2:]
    box_h = np.random.randint(int(height * minmax[0]), int(height * minmax[1]), size=count)
    box_w = np.random.randint(int(width * minmax[0]), int(width * minmax[1]), size=count)
    y = np.random.randint(0, height - box_h, size=count)
    x = np.random.randint(0, width - box_w, size=count)
    return y, y + box_h, x, x + box_w


def cutmix_bbox_and_lam(img_shape, lam, ratio_minmax=None, correct_lam=True, count=None):
    """A box and the share of the image outside it: exact where `correct_lam` or the box comes from `ratio_minmax`."""
    if ratio_minmax is not None:
        box = rand_bbox_minmax(img_shape, ratio_minmax, count=count)
    else:
        box = rand_bbox(img_shape, lam, count=count)
    if correct_lam or ratio_minmax is not None:
        y0, y1, x0, x1 = box
        lam = 1.0 - (y1 - y0) * (x1 - x0) / float(img_shape[-2] * img_shape[-1])
    return box, lam


class Mixup:
    """Mixes each image of a batch with its mirror image in the batch order, by Mixup or CutMix.

    Args:
        mixup_alpha, cutmix_alpha: parameters of the Beta distributions; 0 turns that kind off.
        cutmix_minmax: pair of shares of the image's side; CutMix then draws its boxes by it.
        prob: probability of mixing at all, for each draw.
        switch_prob: probability of CutMix where both kinds are on.
        mode: one draw for the whole "batch", for each "pair" or for each "elem".
        correct_lam: count CutMix boxes by what lies inside the image.
        label_smoothing, num_classes: of the targets.
    """

    def __init__(self, mixup_alpha=1.0, cutmix_alpha=0.0, cutmix_minmax=None, prob=1.0, switch_prob=0.5,
                 mode="batch", correct_lam=True, label_smoothing=0.1, num_classes=1000):
        assert cutmix_minmax is None or len(cutmix_minmax) == 2, "cutmix_minmax is a pair"
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha if cutmix_minmax is None else 1.0
        self.cutmix_minmax = cutmix_minmax
        self.mix_prob = prob
        self.switch_prob = switch_prob
        self.label_smoothing = label_smoothing
        self.num_classes = num_classes
        self.mode = mode
        self.correct_lam = correct_lam
        self.mixup_enabled = True  # a training loop may turn mixing off for its last epochs

    def _check_alphas(self):
        assert self.mixup_alpha > 0 or self.cutmix_alpha > 0, \
            "one of mixup_alpha > 0, cutmix_alpha > 0, cutmix_minmax is needed"

    def _params_per_elem(self, batch_size):
        """(lam float32, use_cutmix bool), each (batch_size,)."""
        lam = np.ones(batch_size, dtype=np.float32)
        use_cutmix = np.zeros(batch_size, dtype=bool)
        if not self.mixup_enabled:
            return lam, use_cutmix
        self._check_alphas()
        if self.mixup_alpha > 0 and self.cutmix_alpha > 0:
            use_cutmix = np.random.rand(batch_size) < self.switch_prob
            by_cutmix = np.random.beta(self.cutmix_alpha, self.cutmix_alpha, size=batch_size)
            by_mixup = np.random.beta(self.mixup_alpha, self.mixup_alpha, size=batch_size)
            drawn = np.where(use_cutmix, by_cutmix, by_mixup)
        else:
            use_cutmix = np.full(batch_size, self.cutmix_alpha > 0)
            alpha = max(self.cutmix_alpha, self.mixup_alpha)
            drawn = np.random.beta(alpha, alpha, size=batch_size)
        lam = np.where(np.random.rand(batch_size) < self.mix_prob, drawn.astype(np.float32), lam)
        return lam, use_cutmix

    def _params_per_batch(self):
        """(lam, use_cutmix)."""
        if not self.mixup_enabled or not np.random.rand() < self.mix_prob:
            return 1.0, False
        self._check_alphas()
        if self.mixup_alpha > 0 and self.cutmix_alpha > 0:
            use_cutmix = np.random.rand() < self.switch_prob
        else:
            use_cutmix = self.cutmix_alpha > 0
        alpha = self.cutmix_alpha if use_cutmix else self.mixup_alpha
        return float(np.random.beta(alpha, alpha)), use_cutmix

    def _box(self, shape, lam):
        (y0, y1, x0, x1), lam = cutmix_bbox_and_lam(shape, lam, self.cutmix_minmax, self.correct_lam)
        return np.s_[..., y0:y1, x0:x1], lam

    def _mix_each(self, x, count, both):
        """Mixes images 0 to count - 1 of x, in place, with their mirror images; with `both`, those in turn too."""
        lam_batch, use_cutmix = self._params_per_elem(count)
        original = x.clone()
        for i in range(count):
            j, lam = len(x) - i - 1, lam_batch[i]
            if lam == 1:
                continue
            if use_cutmix[i]:
                box, lam_batch[i] = self._box(x.shape, lam)
                x[i][box] = original[j][box]
                if both:
                    x[j][box] = original[i][box]
            else:
                x[i] = original[i] * lam + original[j] * (1 - lam)
                if both:
                    x[j] = original[j] * lam + original[i] * (1 - lam)
        if both:
            lam_batch = np.concatenate((lam_batch, lam_batch[::-1]))
        return torch.tensor(lam_batch, device=x.device, dtype=x.dtype).unsqueeze(1)

    def _mix_batch(self, x):
        lam, use_cutmix = self._params_per_batch()
        if lam == 1:
            return 1.0
        if use_cutmix:
            box, lam = self._box(x.shape, lam)
            x[box] = x.flip(0)[box]
        else:
            mirror = x.flip(0).mul_(1.0 - lam)
            x.mul_(lam).add_(mirror)
        return lam

    def __call__(self, x, target):
        """Images (B, C, H, W), mixed in place, and labels (B,) -> images, soft targets (B, num_classes)."""
        assert len(x) % 2 == 0, "mixup needs a batch of even size"
        if self.mode == "elem":
            lam = self._mix_each(x, len(x), both=False)
        elif self.mode == "pair":
            lam = self._mix_each(x, len(x) // 2, both=True)
        else:
            lam = self._mix_batch(x)
        return x, mixup_target(target, self.num_classes, lam, self.label_smoothing)


class FastCollateMixup(Mixup):
    """Mixup as a data loader's collate function: [(uint8 array (C, H, W), class)] -> uint8 images, soft targets.

    A further mode, "half", mixes the first half of the batch with the second and returns the first.
    """

    @staticmethod
    def _blend(a, b, lam):
        return np.rint(a.astype(np.float32) * lam + b.astype(np.float32) * (1 - lam)).astype(np.uint8)

    def _mixed(self, image, other, lam, box):
        if lam == 1:
            return image
        if box is None:
            return self._blend(image, other, lam)
        image = image.copy()
        image[box] = other[box]
        return image

    def __call__(self, batch, _=None):
        assert len(batch) % 2 == 0, "mixup needs a batch of even size"
        images = [sample[0] for sample in batch]
        size, shape = len(batch), images[0].shape
        kept = size // 2 if self.mode == "half" else size
        if self.mode in ("elem", "half", "pair"):
            drawn = size // 2 if self.mode in ("half", "pair") else size
            lam, use_cutmix = self._params_per_elem(drawn)
            boxes = [None] * drawn
            for i in range(drawn):
                if use_cutmix[i] and lam[i] != 1:
                    boxes[i], lam[i] = self._box(shape, lam[i])
            if self.mode == "pair":  # the mirror image shares its partner's draw
                lam, boxes = np.concatenate((lam, lam[::-1])), boxes + boxes[::-1]
            each = lam
            weight = np.concatenate((lam, np.ones(size - len(lam), dtype=lam.dtype)))
            weight = torch.tensor(weight).unsqueeze(1)
        else:
            weight, use_cutmix = self._params_per_batch()
            box = None
            if use_cutmix and weight != 1:
                box, weight = self._box(shape, weight)
            each, boxes = [weight] * size, [box] * size
        output = np.stack([self._mixed(images[i], images[size - i - 1], each[i], boxes[i]) for i in range(kept)])
        target = torch.tensor([sample[1] for sample in batch], dtype=torch.int64)
        target = mixup_target(target, self.num_classes, weight, self.label_smoothing)
        return torch.from_numpy(output), target[:kept]
