"""python test/unit/ink.py CHECKPOINT: whether an Evo-LeViT that was trained on DIGITS (test/quickstart.sh:
save/best_checkpoint.pth) keeps the tokens that the strokes lie on. For each stage and mode, over all validation
pictures: the share of ink in the pixels of the kept tokens and in all pixels; and the share of tokens on ink, those
with ink on a quarter of their pixels, among the kept and among all."""
import sys

import numpy as np

from datasets import build_transform, validation_pictures
from runtime import command  # noqa: F401  (first: it makes torchvision importable on a CPU-only PyTorch)
from runtime.keeping.restore import restore_evo
from runtime.learning.models import set_mode
from runtime.pictures.gallery import batches, to_batch
from visualize import MODES, stage_maps

INK = 128  # grey value from which a pixel is ink
ON_INK = 0.25


def tokens_on_ink(ink, cell):
    """(H, H) bool -> (H, H) bool: whether the token that stands for a pixel has ink on a quarter of its pixels."""
    result = np.zeros_like(ink)
    for top in range(0, len(ink), cell):
        for left in range(0, len(ink), cell):
            part = (slice(top, top + cell), slice(left, left + cell))
            result[part] = ink[part].mean() >= ON_INK
    return result


def measure(restored, count):
    """{(mode, stage): array of sums (kept ink, kept pixels, ink, pixels, kept tokens on ink, kept, on ink, tokens)}."""
    transform = build_transform(False, restored.data_set, restored.input_size)
    sums = {}
    for batch in batches(validation_pictures(restored.data_set, None, "name", count), 32):
        images = to_batch(batch, transform)
        pixels = [transform(picture.image)[0].numpy().mean(axis=2) for picture in batch]
        for mode in MODES:
            set_mode(restored.model, mode)
            for grey, maps in zip(pixels, stage_maps(restored.model, images)[0]):
                ink = grey >= INK
                for number, (stage, info) in enumerate(zip(maps, restored.model.feature_info), 1):
                    corner = (slice(None, None, info["reduction"]),) * 2  # one pixel of each token
                    on, kept = tokens_on_ink(ink, info["reduction"])[corner], stage.kept[corner]
                    sums[mode, number] = sums.get((mode, number), 0) + np.array([
                        ink[stage.kept].sum(), stage.kept.sum(), ink.sum(), ink.size,
                        (on & kept).sum(), kept.sum(), on.sum(), on.size])
    return sums


def main(checkpoint, count=10 ** 6):
    print("mode        stage  tokens kept  ink in kept  ink in all  kept on ink  all on ink")
    for (mode, stage), s in sorted(measure(restore_evo(checkpoint), int(count)).items(), reverse=True):
        print("{:10}  {:5}  {:11.1%}  {:11.1%}  {:10.1%}  {:11.1%}  {:10.1%}".format(
            mode, stage, s[5] / s[7], s[0] / max(s[1], 1), s[2] / s[3], s[4] / max(s[5], 1), s[6] / s[7]))


if __name__ == "__main__":
    main(*sys.argv[1:])
