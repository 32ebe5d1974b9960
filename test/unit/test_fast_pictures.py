"""--image-backend fast: the same crops, the same decoded pixels, and resized ones within 2 of Pillow's."""
import io
import json
import os
import random
import sys

import commands
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, rand_augment_transform

from datasets import Augmentation, build_dataset, build_transform
from runtime.errors import DamagedImage
from runtime.machine.versions import RESIZES_BYTES
from runtime.pictures import fast
from runtime.pictures.batches import TrainingView, collate
from runtime.pictures.reading import DraftCrop, load_picture
from runtime.pictures.sliding import slide, slide_rows

FAST = ["--device", "cpu", "--num_workers", "0", "--input-size", "64", "--model", "EvoLeViT_128S", "--batch-size", "4",
        "--distillation-type", "none", "--no-repeated-aug", "--max-steps", "2", "--epochs", "2"]
needs_bytes = pytest.mark.skipif(not RESIZES_BYTES, reason="this PyTorch does not resize bytes: see the refusal below")
LARGEST, MEAN = 2, 0.05  # of 255: how far from Pillow's a resized pixel is at most, and all of them on average


def saved(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """scikit-learn's two photographs in several sizes and kinds of JPEG, in ImageNet's layout."""
    root = tmp_path_factory.mktemp("photos")
    for folder, image in commands.photos_in(root):
        small, large = image.resize((301, 203), Image.BICUBIC), image.resize((1280, 854), Image.BICUBIC)
        (folder / "a.jpg").write_bytes(saved(image, quality=95))
        (folder / "b.jpg").write_bytes(saved(large, quality=75, progressive=True))
        (folder / "c.jpg").write_bytes(saved(small, quality=90, subsampling=0))
        (folder / "d.jpg").write_bytes(saved(small.convert("L"), quality=90))
        (folder / "e.jpg").write_bytes(saved(small.convert("CMYK"), quality=90))
        (folder / "f.jpg").write_bytes(saved(small, quality=60, subsampling=1, optimize=True))
        small.save(str(folder / "g.png"))
        small.convert("P").save(str(folder / "h.gif"))
    return str(root)


def views(photos, size=96, **changes):
    for backend in ("pillow", "fast"):
        transform = build_transform(True, "IMNET", size, Augmentation(image_backend=backend, **changes))
        yield TrainingView(build_dataset(True, "IMNET", photos, transform, image_backend=backend),
                           keep_generators=backend == "pillow")


@pytest.mark.parametrize("decoder", [True, False])
def test_decoded_pixels_are_pillows_bit_for_bit(photos, decoder, monkeypatch):
    monkeypatch.setattr(fast, "HAS_DECODER", decoder and fast.HAS_DECODER)
    if decoder and sys.version_info >= (3, 10):
        assert fast.HAS_DECODER, "simplejpeg is in test/unit/requirements.txt"
    dataset, quick = build_dataset(True, "IMNET", photos, None), 0
    for index in range(len(dataset)):
        path = dataset.path(index)
        with open(path, "rb") as f:
            quick += fast._decode_jpeg(f.read()) is not None
        assert np.array_equal(fast.load_pixels(path), np.asarray(load_picture(path))), path
    assert quick == (10 if fast.HAS_DECODER else 0)  # all but CMYK, PNG and GIF


def test_damaged_files_are_damaged_for_both(photos, tmp_path):
    with open(os.path.join(photos, "train", "class0", "a.jpg"), "rb") as f:
        good = f.read()
    draw, damaged = random.Random(0), 0
    for number in range(60):
        content = bytearray(good[:draw.randrange(len(good))] if number % 2 else good)
        for _ in range(3):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path = str(tmp_path / "x.jpg")
        with open(path, "wb") as f:
            f.write(bytes(content))
        try:
            expected = np.asarray(load_picture(path))
        except DamagedImage as error:
            damaged += 1
            with pytest.raises(DamagedImage) as other:
                fast.load_pixels(path)
            assert str(other.value) == str(error)
        else:
            assert np.array_equal(fast.load_pixels(path), expected)
    assert damaged > 20
    with pytest.raises(DamagedImage):
        fast.load_pixels(str(tmp_path / "none.jpg"))


@needs_bytes
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_crops_are_pillows_within_the_bound(photos, interpolation):
    crop = create_transform(input_size=96, is_training=True, auto_augment=None, hflip=0.0, color_jitter=None,
                            interpolation=interpolation).transforms[0]
    dataset, furthest, mean = build_dataset(True, "IMNET", photos, None), 0, 0.0
    for index in range(len(dataset)):
        picture = load_picture(dataset.path(index))
        for seed in range(8):
            random.seed(seed)
            expected = np.asarray(crop(picture), dtype=int)
            state = random.getstate()
            random.seed(seed)
            found = np.asarray(fast.FastCrop(crop)(np.array(picture)), dtype=int)
            assert random.getstate() == state and found.shape == expected.shape
            difference = np.abs(found - expected)
            furthest, mean = max(furthest, difference.max()), mean + difference.mean() / 8 / len(dataset)
            assert difference.mean() <= MEAN, (index, seed)
    print("{}: {} at most, {:.4f} on average".format(interpolation, furthest, mean))
    assert furthest <= LARGEST


def noise_and_photo(draw, photos, height, width):
    noise = Image.fromarray(draw.randint(0, 256, (height, width, 3)).astype(np.uint8))
    photo = Image.open(os.path.join(photos, "train", "class0", "a.jpg")).resize((width, height))
    flat = Image.new("RGB", (width, height), tuple(draw.randint(0, 256, 3).tolist()))
    return noise, photo, flat


@pytest.mark.parametrize("height, width", [(64, 64), (37, 80), (5, 3), (1, 1)])
def test_slid_pixels_are_pillows_within_one(photos, height, width):
    draw, fill, off = np.random.RandomState(0), (124, 116, 104), 0
    shifts = [(0, 0.0), (0, 0.5), (0, -0.5), (0, -3.0), (0, width), (0, -width + 0.25), (0, 9 * width), (1, 0)]
    shifts += [(a, 0) for a in draw.uniform(-0.5, 0.5, 8)] + [(0, b) for b in draw.uniform(-width, width, 8)]
    for image in noise_and_photo(draw, photos, height, width):
        for a, b in shifts:
            expected = image.transform(image.size, Image.AFFINE, (1, a, b, 0, 1, 0), Image.BICUBIC, fillcolor=fill)
            found = slide_rows(np.asarray(image), a * (np.arange(height) + 0.5) + b, fill)
            difference = np.abs(found.astype(int) - np.asarray(expected, dtype=int))
            assert difference.max() <= 1, (a, b)
            off += (difference > 0).mean() / len(shifts) / 3
    print("{:.4%} of the values differ".format(off))
    assert off < 0.01


@needs_bytes
@pytest.mark.parametrize("resample", [Image.BICUBIC, Image.BILINEAR])
@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel",
                                  "Rotate", "Posterize"])
def test_timms_operations_slide_as_pillow_moves_them(photos, name, resample):
    draw = np.random.RandomState(0)
    moved = 0
    for image in noise_and_photo(draw, photos, 48, 72):
        for magnitude in range(0, 11):
            results, states = [], []
            for quick in (False, True):
                policy = rand_augment_transform("rand-m9-mstd0.5-inc1", {"translate_const": 20,
                                                                         "img_mean": (124, 116, 104)})
                policy.ops = [AugmentOp(name, 1.0, magnitude, dict(policy.ops[0].hparams, interpolation=resample,
                                                                   magnitude_std=0))]
                if quick:
                    slide(policy)
                random.seed(magnitude)
                results.append(np.asarray(policy.ops[0](image), dtype=int))
                states.append(random.getstate())
            assert states[0] == states[1]
            difference = np.abs(results[0] - results[1])
            exact = resample != Image.BICUBIC or name in ("Rotate", "Posterize")
            assert difference.max() <= (0 if exact else 1), magnitude
            moved += not np.array_equal(results[0], np.asarray(image))
    assert moved > 15


@needs_bytes
@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m3-w3", "original"])
def test_every_policy_with_shears_slides(policy):
    transform = build_transform(True, "IMNET", 96, Augmentation(image_backend="fast", aa=policy))
    ops = [op for part in transform.transforms for op in getattr(part, "ops", [])]
    ops += [op for part in transform.transforms for group in getattr(part, "policy", []) for op in group]
    slid = {op.name for op in ops if type(op.aug_fn).__name__ == "_Slider"}
    assert slid and slid == {op.name for op in ops if op.name.startswith(("Shear", "Translate"))}


@needs_bytes
@pytest.mark.parametrize("width, height", [(1, 1), (2, 1), (1, 2), (2, 2), (3, 200), (333, 1)])
def test_the_smallest_pictures_are_cropped_as_pillows_are(width, height, tmp_path):
    path = str(tmp_path / "small.png")
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint8)).save(path)
    crop = create_transform(input_size=32, is_training=True, auto_augment=None, hflip=0.0, color_jitter=None)
    crop, empty = crop.transforms[0], 0
    for seed in range(200):
        results = []
        for cropped, picture in ((crop, load_picture(path)), (fast.FastCrop(crop), fast.load_pixels(path)),
                                 (DraftCrop(crop), path)):
            random.seed(seed)
            results.append(np.asarray(cropped(picture), dtype=int))
        random.seed(seed)
        pillow, quick, draft = results
        assert np.abs(quick - pillow).max() <= LARGEST and draft.shape == pillow.shape
        if 0 in crop.get_params(load_picture(path), crop.scale, crop.ratio)[2:]:  # nothing is left of the picture
            empty += 1
            assert np.array_equal(quick, pillow) and np.array_equal(draft, pillow)
    assert (empty > 0) == (width * height <= 2)


@needs_bytes
def test_batches_have_the_same_draws_and_nearly_the_same_pixels(photos):
    draws = [(index % 16, 100 + index) for index in range(48)]
    pillow, quick = [collate([view[draw] for draw in draws]) for view in views(photos, aa="none", reprob=0.9)]
    assert torch.equal(pillow[0].erased, quick[0].erased) and torch.equal(pillow[0].fill, quick[0].fill)
    assert torch.equal(pillow[1], quick[1]) and torch.equal(pillow[2], quick[2])
    assert len(pillow[0].erased) > 30 and not torch.equal(pillow[0].pixels, quick[0].pixels)
    # colour jitter may raise the contrast of a difference
    assert (pillow[0].pixels.float() - quick[0].pixels.float()).abs().mean() < 4 * MEAN
    again = collate([list(views(photos, aa="none", reprob=0.9))[1][draw] for draw in draws])
    assert torch.equal(again[0].pixels, quick[0].pixels)


@needs_bytes
def test_the_default_leaves_the_generators_alone_and_fast_seeds_them(photos):
    pillow, quick = views(photos)
    random.seed(7)
    expected = random.random()
    random.seed(7)
    pillow[0, 5]
    assert random.random() == expected
    quick[0, 5]
    after = [random.random(), np.random.rand(), torch.rand(1).item()]
    quick[0, 5]
    assert after == [random.random(), np.random.rand(), torch.rand(1).item()]


def log_of(out):
    with open(os.path.join(str(out), "log.txt")) as f:
        return [json.loads(line) for line in f]


@needs_bytes
@pytest.mark.once
def test_a_run_trains_with_it_and_a_resumed_one_says_so(photos, tmp_path):
    flags = FAST + ["--data-path", photos, "--output_dir", tmp_path / "a"]
    commands.succeed(*flags + ["--image-backend", "fast"], small=[])
    commands.succeed(*FAST + ["--data-path", photos, "--output_dir", tmp_path / "b"], small=[])
    quick, pillow = log_of(tmp_path / "a"), log_of(tmp_path / "b")
    assert quick[0]["train_loss"] != pillow[0]["train_loss"]
    assert quick[0]["train_loss"] == pytest.approx(pillow[0]["train_loss"], abs=0.05)
    more = [word if word != "2" else "9" for word in FAST] + ["--data-path", photos, "--resume", "auto"]
    printed = commands.succeed(*more + ["--output_dir", tmp_path / "a"], small=[])
    assert "From the checkpoint: " in printed and "--image-backend fast" in printed
    printed = commands.succeed(*more + ["--output_dir", tmp_path / "b", "--image-backend", "fast"], small=[])
    assert "Going on with other settings than the checkpoint's: " in printed
    assert "--image-backend fast (was pillow)" in printed
    checkpoint = tmp_path / "b" / "checkpoint.pth"  # as one of before the flag
    content = torch.load(str(checkpoint), map_location="cpu")
    del content["args"]["image_backend"]
    torch.save(content, str(tmp_path / "old.pth"))
    printed = commands.succeed(*more + ["--output_dir", tmp_path / "c", "--image-backend", "fast", "--resume",
                                        tmp_path / "old.pth", "--epochs", 12], small=[])
    assert "--image-backend fast (was pillow)" in printed


@pytest.mark.parametrize("flags, sentence", [
    (["--data-set", "DIGITS"], "is for data sets of large picture files"),
    (["--jpeg-draft", "--data-path", "."], "leave --jpeg-draft out"),
] if RESIZES_BYTES else [(["--data-path", "."], "--image-backend fast needs PyTorch 2.1 or newer")])
def test_what_it_does_not_go_with_is_refused(flags, sentence):
    code, _, err = commands.run([sys.executable, commands.MAIN, "--device", "cpu", "--image-backend", "fast"] + flags)
    assert code == 2 and err.count("\n") == 1 and sentence in err, err


def test_stored_labels_of_the_other_backend_are_refused():
    from runtime.errors import UserError
    from runtime.keeping.teacher_labels import _compare
    _compare({"seed": 0}, {"seed": 0, "image_backend": "pillow"}, "folder", "--teacher-labels")  # of before the flag
    for stored in ({"seed": 0}, {"seed": 0, "image_backend": "pillow"}):
        with pytest.raises(UserError, match="--image-backend pillow and this run has fast"):
            _compare(stored, {"seed": 0, "image_backend": "fast"}, "folder", "--teacher-labels")
