"""The data sets of the recipe: how each opens, and how its pictures are resized, cropped and mirrored."""
import json
import os
import re
from collections import Counter
from typing import Callable, List, NamedTuple, Optional, Sequence

import evo_vit  # noqa: F401  (before timm and torchvision)

# isort: split
import numpy as np
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch.utils.data import Dataset
from torchvision import datasets, transforms

from runtime.errors import DamagedImage, UserError
from runtime.machine.randomness import drawing_from
from runtime.machine.versions import interpolation
from runtime.pictures import remote
from runtime.pictures.archives import UNFINISHED, archive_names, compressed_names, member, read_archives
from runtime.pictures.batches import ToBytes
from runtime.pictures.fast import FastCrop, load_pixels
from runtime.pictures.folders import class_names, count_outside, walk
from runtime.pictures.found import Names, Places
from runtime.pictures.gallery import Picture, name_unreadable
from runtime.pictures.index import Index
from runtime.pictures.reading import DraftCrop, LastPicture, leave_path, load_picture
from runtime.pictures.sliding import slide

INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")


# ----------------------------------------------------------------------------------------------------- data sets Each
# has `classes` (names), `labels` (a number for each picture), and gives (picture, label); one of files has `names`,
# too.

class PictureFiles(Dataset):
    """Picture files with labels: `names` lie in the folder `root`, and with `places` in the archives there."""

    def __init__(self, root: str, names: Sequence[str], labels: np.ndarray, classes: List[str], transform=None,
                 loader: Callable = load_picture, left_out: Counter = Counter(), places: Optional[Places] = None):
        self.root = root
        self.names = names
        self.labels = labels
        self.classes = classes
        self.transform = transform
        self.loader = loader
        self.left_out = left_out  # as in a Found
        self.places = places

    def __len__(self):
        return len(self.names)

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    def source(self, index: int):
        """What the loader takes: a path, or a Member of an archive."""
        return self.path(index) if self.places is None else member(self.places, self.root, index, self.path(index))

    def __getitem__(self, index):
        image = self.loader(self.source(index))
        return (image if self.transform is None else self.transform(image)), int(self.labels[index])


def _open_folders(root, is_train, transform, loader, category, index):
    """ImageNet's layout: train/CLASS/PICTURE and val/CLASS/PICTURE, or archives in train/ and val/."""
    found = _find(root, "val", index)
    if is_train:  # --eval needs no training pictures
        found = _find(root, "train", index, found.classes)
    return PictureFiles(found.root, found.paths(), found.labels, found.classes, transform, loader, found.left_out,
                        found.places)


def _find(root, part, index, needed=None):
    """The Found of the folder `part`; needed: the classes that it has to have."""
    if remote.is_url(root):
        found = index.of_server("{}/{}".format(root.rstrip("/"), part))
        _need_same(found.classes, needed)
        return found
    folder = os.path.join(root, part)
    if not os.path.isdir(folder):
        raise UserError("--data-path: {} has no folder '{}'; the layout is train/CLASS/PICTURE and val/CLASS/PICTURE"
                        .format(root, part))
    classes, archives = class_names(folder), archive_names(folder)
    if classes and archives:
        raise UserError("--data-path: {} holds class folders ('{}') and archives ('{}'); leave one of the two kinds"
                        .format(folder, classes[0], archives[0]))
    compressed = [] if classes else compressed_names(folder)
    if compressed:
        raise UserError("--data-path: {} is compressed, and only plain .tar archives are read; unpack it".format(
            os.path.join(folder, compressed[0])))
    if os.path.exists(os.path.join(folder, UNFINISHED)):
        raise UserError("--data-path: the shards in {} are unfinished; run `python -m runtime.pictures.shards` again, "
                        "which goes on where it was interrupted".format(folder))
    if archives:
        found = index.of(folder, archives, lambda shown: read_archives(folder, archives, shown))
        _need_same(found.classes, needed)
        return found._replace(left_out=found.left_out + count_outside(folder, "the archives"))
    if not classes:
        raise UserError("--data-path: {} has no class folders; the layout is {}/CLASS/PICTURE".format(folder, part))
    _need_same(classes, needed)
    found = index.of(folder, classes, lambda shown: walk(folder, classes, shown))
    return found._replace(left_out=found.left_out + count_outside(folder, "the class folders"))


def _need_same(train, val):
    if val is None or train == val:
        return
    different = sorted(set(train) ^ set(val))
    if not different:
        raise UserError("--data-path: the classes of train and val stand in different orders")
    raise UserError("--data-path: the class folders of train and val differ, '{}' is only in {}".format(
        different[0], "train" if different[0] in train else "val"))


def _open_inat(year):
    """iNaturalist with the classes of one level of its taxonomy, in DeiT's layout: `train<year>.json`, `val<year>.json`
    and `categories.json` beside the pictures."""
    def open_inat(root, is_train, transform, loader, category, index):
        annotations = _read_json(root, "{}{}.json".format("train" if is_train else "val", year))
        train = annotations if is_train else _read_json(root, "train{}.json".format(year))
        try:
            categories = _read_json(root, "categories.json")
            if categories and category not in categories[0]:
                raise UserError("--inat-category {}: {} has {}".format(category, os.path.join(root, "categories.json"),
                     ", ".join(name for name in INAT_CATEGORIES if name in categories[0])))
            level = {int(c["id"]): c[category] for c in categories}
            # classes are numbered in the order in which the training annotations first name them
            numbers = {}
            for entry in train["annotations"]:
                numbers.setdefault(level[int(entry["category_id"])], len(numbers))
            category_of = {entry["image_id"]: int(entry["category_id"]) for entry in annotations["annotations"]}
            labels = np.array([numbers[level[category_of[image["id"]]]]
                              for image in annotations["images"]], dtype=np.int64)
            names = Names([image["file_name"] for image in annotations["images"]])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError("--data-path: the annotations of {} in {} do not fit together ({} {})".format(
                year, root, type(error).__name__, error))
        return PictureFiles(root, names, labels, sorted(numbers, key=numbers.get), transform, loader)
    return open_inat


def _read_json(root, name):
    path = os.path.join(root, name)
    try:
        with open(path, encoding="utf-8-sig") as f:
            return json.load(f)
    except (OSError, ValueError) as error:
        raise UserError("--data-path: {} cannot be read ({})".format(path, error))


def _open_cifar(root, is_train, transform, loader, category, index):
    try:
        dataset = datasets.CIFAR100(root, train=is_train, transform=transform)
    except RuntimeError:
        raise UserError("--data-path: {} does not hold CIFAR-100 (the folder cifar-100-python)".format(root))
    dataset.labels = dataset.targets
    return dataset


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits (8 x 8 pixels, 10 classes), read from the installed package.

    Every fifth image of each class, in the package's order, is for validation: 1,433 for training, 364 to validate.
    """

    classes = [str(digit) for digit in range(10)]

    def __init__(self, is_train, transform=None):
        from sklearn.datasets import load_digits
        images, labels = load_digits(return_X_y=True)
        seen = [0] * 10
        self.samples, self.labels = [], []
        for image, label in zip(images, labels.tolist()):
            if (seen[label] % 5 != 0) == is_train:
                pixels = (image.reshape(8, 8) * (255 / 16)).astype("uint8")
                self.samples.append((Image.fromarray(pixels).convert("RGB"), label))
                self.labels.append(label)
            seen[label] += 1
        self.transform = transform

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        image, label = self.samples[index]
        return (image if self.transform is None else self.transform(image)), label


def _open_digits(root, is_train, transform, loader, category, index):
    return Digits(is_train, transform)


class DataSet(NamedTuple):
    """A row of the table: open(root, is_train, transform, loader, category, index) gives the data set."""
    open: Callable
    needs_root: bool = True
    files: bool = True  # of pictures, which may be large
    mirrored: bool = True  # a picture and its mirror image are of the same class
    cropped: bool = True  # a random part is enlarged; if not, all of it is, and shifted by up to an eighth
    own_size: int = 0  # at this size in pixels and below pictures are taken as they are, shifted by up to 4 pixels


TABLE = {
    "IMNET": DataSet(_open_folders),
    "CIFAR": DataSet(_open_cifar, files=False, own_size=32),
    "INAT": DataSet(_open_inat(2018)),
    "INAT19": DataSet(_open_inat(2019)),
    "DIGITS": DataSet(_open_digits, needs_root=False, files=False, mirrored=False, cropped=False),
}
DATA_SETS = tuple(TABLE)


def need_read(name: str, root: str):
    """Raises UserError where the data set `name` does not read the folder `root`, which the user names."""
    if not TABLE[name].needs_root:
        raise UserError("--data-path {} is not read: the data set here is {}, which comes without a folder; name the "
                        "folder's kind too, as --data-set IMNET, or leave --data-path out".format(root, name))


def build_dataset(is_train: bool, name: str, root: Optional[str], transform, inat_category: str = "name",
                  jpeg_draft: bool = False, index: Optional[Index] = None,
                  image_backend: str = "pillow") -> Dataset:
    """The training or validation part of the data set `name`. `jpeg_draft`, `image_backend`: as `transform` was built.
    index: the Index of the run, None for a new one of this process alone.

    IMNET reads any ImageFolder layout; DIGITS needs no `root`. Raises UserError where `root` is not what it should be.
    """
    row = TABLE[name]
    if root and remote.is_url(root):
        if name != "IMNET":
            raise UserError("--data-path: {} on a server; only IMNET's shards can be read there".format(name))
        remote.check_url(root)
    elif row.needs_root:
        if not root:
            raise UserError("--data-path is missing: say where the data set {} lies".format(name))
        if not os.path.isdir(root):
            raise UserError("--data-path: there is no folder {}".format(root))
    loader = leave_path if jpeg_draft else LastPicture(load_pixels if image_backend == "fast" else None)
    dataset = row.open(root, is_train, transform, loader, inat_category,
                       Index() if index is None else index)
    if not len(dataset):
        raise UserError("--data-path: {} has no picture {}".format(root, "to train on" if is_train else "to validate"))
    return dataset


def validation_pictures(name: str, root: Optional[str], inat_category: str, count: int):
    """Yields `count` of the data set's validation images, spread over them, as gallery.Pictures that are named by
    number and class. Damaged ones are named on standard error. Raises UserError as build_dataset does."""
    dataset = build_dataset(False, name, root, None, inat_category)
    count = min(count, len(dataset))
    for number in range(count):
        index = number * len(dataset) // count
        try:
            image, label = dataset[index]
        except DamagedImage as error:
            name_unreadable(error)
            continue
        yield Picture("{} (class {})".format(index, dataset.classes[label]), image)


# ----------------------------------------------------------------------------------------------------- transforms

class Augmentation(NamedTuple):
    """How training pictures are augmented; names and defaults as main.py's flags."""
    color_jitter: float = 0.4
    aa: str = "rand-m9-mstd0.5-inc1"
    train_interpolation: str = "bicubic"
    reprob: float = 0.25
    remode: str = "pixel"
    recount: int = 1
    jpeg_draft: bool = False  # the input is a path, see runtime.pictures.reading.DraftCrop
    image_backend: str = "pillow"  # fast: the input is bytes, see runtime.pictures.fast


def build_transform(is_train: bool, name: str, input_size: int, augmentation: Augmentation = Augmentation()):
    """PIL image -> what runtime.pictures.batches.ToBytes makes of the picture that DeiT's transform would normalise.

    CIFAR's pictures are not cropped out of at their own size, but shifted by up to 4 pixels. Digits are
    enlarged, shifted by up to an eighth, and never mirrored, since a mirrored digit is no digit. Raises UserError for
    an augmentation policy that timm does not know.
    """
    row, bicubic = TABLE[name], interpolation("bicubic")
    if is_train:
        a = augmentation
        transform, erasing = _timm_transform(input_size, a, 0.5 if row.mirrored else 0.0)
        transform.transforms.append(ToBytes(*erasing))
        if not row.cropped:
            transform.transforms[0] = transforms.Compose([
                transforms.Resize((input_size, input_size), bicubic),
                transforms.RandomCrop(input_size, padding=input_size // 8)])
        elif input_size <= row.own_size:
            transform.transforms[0] = transforms.RandomCrop(input_size, padding=4)
        elif a.jpeg_draft:
            transform.transforms[0] = DraftCrop(transform.transforms[0])
        elif a.image_backend == "fast":
            transform.transforms[0] = FastCrop(transform.transforms[0])
            for part in transform.transforms:
                slide(part)
        return transform
    if not row.cropped:
        resize = [transforms.Resize((input_size, input_size), bicubic)]
    elif input_size <= row.own_size:
        resize = [transforms.Resize((input_size, input_size), bicubic)]  # those of the data set stay as they are
    else:
        resize = [transforms.Resize(int(256 / 224 * input_size), bicubic), transforms.CenterCrop(input_size)]
    return transforms.Compose(resize + [ToBytes()])


def crop_pct(name: str, input_size: int) -> float:
    """The share of the resized picture's side that an evaluation's crop has, timm's name for it; 1 where nothing is cut
    off."""
    return 224 / 256 if TABLE[name].cropped and input_size > TABLE[name].own_size else 1.0


# timm passes over a part of a policy that it does not know, and trains without it
_PARTS = {"rand": r"(mstd|mmax|m|n|w|p|inc)-?\d+(\.\d+)?|t\w*",
          "augmix": r"(mstd|m|w|d|a|b)-?\d+(\.\d+)?"}


_ON_TENSORS = ("ToTensor", "MaybeToTensor", "Normalize", "RandomErasing")


def _timm_transform(input_size, a, hflip):
    """(what timm does to training pictures before they are tensors, [the RandomErasing that it does to them then])."""
    policy = None if a.aa in ("", "none") else a.aa
    try:
        if policy is not None:
            kind, *parts = policy.split("-")
            wrong = [part for part in parts if kind in _PARTS and not re.fullmatch(_PARTS[kind], part)]
            if wrong:
                raise ValueError("'{}' is no part of a {} policy".format(wrong[0], kind))
        transform = create_transform(
            input_size=input_size, is_training=True, color_jitter=a.color_jitter or None, auto_augment=policy,
            interpolation=a.train_interpolation, hflip=hflip, re_prob=a.reprob, re_mode=a.remode, re_count=a.recount)
        erasing = [t for t in transform.transforms if isinstance(t, RandomErasing)]
        transform.transforms = [t for t in transform.transforms if type(t).__name__ not in _ON_TENSORS]
        if policy is not None:
            with drawing_from(0):  # some policies fail only when they are used
                transform(Image.new("RGB", (input_size, input_size)))
        return transform, erasing
    except (AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        raise UserError("--aa {}: timm knows no such augmentation policy ({}); use for example rand-m9-mstd0.5-inc1, "
                        "augmix-m3-w3, original, v0, or none".format(a.aa, " ".join(str(error).split())[:120] or
                                                                   type(error).__name__))
