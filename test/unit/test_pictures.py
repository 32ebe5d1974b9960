"""The way of a picture from its file to the device gives what torchvision's and timm's own pipeline gives."""
import os
import random

import commands
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms

from datasets import Augmentation, build_dataset, build_transform
from runtime.machine.images import normalize
from runtime.machine.randomness import drawing_from
from runtime.machine.versions import interpolation
from runtime.pictures import reading
from runtime.pictures.batches import EvaluationView, ToBytes, TrainingView, collate
from runtime.pictures.reading import DraftCrop
from samplers import build_train_sampler


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """scikit-learn's two photographs as JPEGs of 640 x 427 and 1280 x 854 pixels, in ImageNet's layout."""
    root = tmp_path_factory.mktemp("photos")
    for folder, image in commands.photos_in(root):
        image.save(str(folder / "small.jpg"), quality=95)
        image.resize((1280, 854), Image.BICUBIC).save(str(folder / "large.jpg"), quality=95)
    return str(root)


def timms(is_train, size):
    """What DeiT's build_transform makes: PIL image -> normalised and perhaps erased tensor (3, size, size)."""
    normalization = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    if not is_train:
        return transforms.Compose([transforms.Resize(int(256 / 224 * size), interpolation("bicubic")),
                                   transforms.CenterCrop(size), transforms.ToTensor(), normalization])
    transform = create_transform(input_size=size, is_training=True, color_jitter=0.4,
                                 auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic", re_prob=0.9,
                                 re_mode="pixel", re_count=2)
    # timm 0.4.12 gives Normalize tensors, which torchvision 0.2 copies with a warning for every image
    transform.transforms = [normalization if isinstance(t, transforms.Normalize) else t for t in transform.transforms]
    return transform


@pytest.mark.parametrize("channels_last", [False, True])
def test_training_batches_equal_timms_bit_for_bit(photos, channels_last):
    ours = build_transform(True, "IMNET", 96, Augmentation(reprob=0.9, recount=2))
    view = TrainingView(build_dataset(True, "IMNET", photos, ours))
    draws = [(index % 4, 100 + index) for index in range(12)]
    batch = collate([view[draw] for draw in draws])
    assert batch[0].pixels.dtype == torch.uint8 and len(batch[0].erased) > 5
    images = normalize(batch[0], torch.device("cpu"), channels_last)
    plain = build_dataset(True, "IMNET", photos, timms(True, 96))
    for image, label, (index, seed) in zip(images, batch[1], draws):
        with drawing_from(seed):
            expected, expected_label = plain[index]
        assert torch.equal(image, expected) and label == expected_label


def test_evaluation_batches_equal_torchvisions_bit_for_bit(photos):
    view = EvaluationView(build_dataset(False, "IMNET", photos, build_transform(False, "IMNET", 96)), 96)
    images = normalize(collate([view[i] for i in range(4)])[0], torch.device("cpu"))
    plain = build_dataset(False, "IMNET", photos, timms(False, 96))
    for i in range(4):
        assert torch.equal(images[i], plain[i][0])


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erased_areas_equal_timms_in_every_mode(mode):
    from timm.data.random_erasing import RandomErasing
    erasing = RandomErasing(1.0, mode=mode, max_count=3, device="cpu")
    pixels = np.random.RandomState(0).randint(0, 256, (40, 40, 3)).astype(np.uint8)
    for seed in range(8):
        with drawing_from(seed):
            item = ToBytes(erasing)(Image.fromarray(pixels))
        with drawing_from(seed):
            expected = erasing(normalize(collate([((torch.from_numpy(pixels), []), 0, 0, [])])[
                               0], torch.device("cpu"))[0])
        assert torch.equal(normalize(collate([(item, 0, 0, [])])[0], torch.device("cpu"))[0], expected)


def test_draft_decoding_takes_the_same_crops_from_nearly_the_same_picture(photos):
    path = os.path.join(photos, "train", "class0", "large.jpg")
    crop = create_transform(input_size=48, is_training=True, auto_augment=None, hflip=0.0, color_jitter=None,
                            interpolation="bicubic").transforms[0]
    picture, smaller = reading.load_picture(path), 0
    decode = reading._decode

    def counted(lazy):
        nonlocal smaller
        smaller += lazy.size != picture.size
        return decode(lazy)

    reading._decode = counted
    try:
        for seed in range(20):
            random.seed(seed)
            full = np.asarray(crop(picture), dtype=float)
            random.seed(seed)
            draft = np.asarray(DraftCrop(crop)(path), dtype=float)
            assert full.shape == draft.shape == (48, 48, 3)
            # the same place: the next crop of this photograph differs by ten times as much
            assert np.abs(full - draft).mean() < 4, seed
    finally:
        reading._decode = decode
    assert smaller > 10


def test_a_picture_is_decoded_once_for_its_repeated_augmentations(photos, monkeypatch):
    opened = []
    load = reading.load_picture
    monkeypatch.setattr(reading, "load_picture", lambda path: opened.append(path) or load(path))
    dataset = build_dataset(True, "IMNET", photos, build_transform(True, "IMNET", 64))
    sampler = build_train_sampler(dataset, 4, 0, 1)
    view = TrainingView(dataset)
    draws = [draw for batch in sampler for draw in batch]
    for draw in draws:
        view[draw]
    assert len(draws) == 4 and len(opened) == len({index for index, _ in draws}) == 2
