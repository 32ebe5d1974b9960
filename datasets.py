"""Data sets, their transforms, and the samplers that share them out among processes."""
import json
import math
import os
from itertools import islice

import torch
from evo_vit import compat  # before torchvision
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch.utils.data import Dataset, Sampler
from torchvision import datasets, transforms

from runtime.errors import UserError
from runtime.gallery import Picture, name_unreadable
from runtime.pictures import IMAGE_EXTENSIONS, DamagedImage, DraftCrop, LastPicture, ToBytes, leave_path, load_picture
from runtime.randomness import derive_seed

DATA_SETS = ("IMNET", "CIFAR", "INAT", "INAT19", "DIGITS")
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")


# ----------------------------------------------------------------------------------------------------- data sets

class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits (8 x 8 pixels, 10 classes), read from the installed package.

    Every fifth image of each class, in the package's order, is for validation: 1,433 for training, 364 to validate.
    """

    classes = [str(digit) for digit in range(10)]

    def __init__(self, is_train, transform=None):
        from sklearn.datasets import load_digits
        images, labels = load_digits(return_X_y=True)
        seen = [0] * 10
        self.samples = []
        for image, label in zip(images, labels.tolist()):
            if (seen[label] % 5 != 0) == is_train:
                pixels = (image.reshape(8, 8) * (255 / 16)).astype("uint8")
                self.samples.append((Image.fromarray(pixels, "L").convert("RGB"), label))
            seen[label] += 1
        self.transform = transform

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        image, label = self.samples[index]
        return (image if self.transform is None else self.transform(image)), label


class INatDataset(Dataset):
    """iNaturalist 2018 or 2019 with the classes of one level of its taxonomy, in DeiT's layout: `train<year>.json`,
    `val<year>.json` and `categories.json` beside the pictures."""

    def __init__(self, root, is_train, year, category="name", transform=None, loader=load_picture):
        annotations = _read_json(root, "{}{}.json".format("train" if is_train else "val", year))
        train = annotations if is_train else _read_json(root, "train{}.json".format(year))
        level = {int(c["id"]): c[category] for c in _read_json(root, "categories.json")}
        # classes are numbered in the order in which the training annotations first name them
        numbers = {}
        for entry in train["annotations"]:
            numbers.setdefault(level[int(entry["category_id"])], len(numbers))
        category_of = {entry["image_id"]: int(entry["category_id"]) for entry in annotations["annotations"]}
        self.classes = sorted(numbers, key=numbers.get)
        self.samples = [(os.path.join(root, image["file_name"]), numbers[level[category_of[image["id"]]]])
                        for image in annotations["images"]]
        self.transform = transform
        self.loader = loader

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        image = self.loader(path)
        return (image if self.transform is None else self.transform(image)), label


def _read_json(root, name):
    path = os.path.join(root, name)
    try:
        with open(path) as f:
            return json.load(f)
    except (OSError, ValueError) as error:
        raise UserError("--data-path: {} cannot be read ({})".format(path, error))


def _has_image(folder):
    return any(name.lower().endswith(IMAGE_EXTENSIONS) for _, _, names in os.walk(folder) for name in names)


def _class_folders(root, part):
    """The class folders of root/part, each checked to hold a picture."""
    folder = os.path.join(root, part)
    if not os.path.isdir(folder):
        raise UserError("--data-path: {} has no folder '{}'; the layout is train/CLASS/PICTURE and val/CLASS/PICTURE"
                        .format(root, part))
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not classes:
        raise UserError("--data-path: {} has no class folders; the layout is {}/CLASS/PICTURE".format(folder, part))
    for name in classes:
        if not _has_image(os.path.join(folder, name)):
            raise UserError("--data-path: the class folder {} holds no picture; fill it or remove it from train and val"
                            .format(os.path.join(folder, name)))
    return classes


def _image_folder(root, is_train, transform, loader):
    val = _class_folders(root, "val")
    train = _class_folders(root, "train") if is_train else val  # --eval needs no training pictures
    if train != val:
        one = sorted(set(train) ^ set(val))[0]
        raise UserError("--data-path: the class folders of train and val differ, '{}' is only in {}".format(
            one, "train" if one in train else "val"))
    return datasets.ImageFolder(os.path.join(root, "train" if is_train else "val"), transform=transform,
                                loader=loader)


def build_dataset(is_train, name, root, transform, inat_category="name", jpeg_draft=False):
    """The training or validation part of the data set `name`. `jpeg_draft`: as `transform` was built.

    IMNET reads any ImageFolder layout; DIGITS needs no `root`. Raises UserError where `root` is not what it should be.
    """
    if name == "DIGITS":
        return Digits(is_train, transform)
    if not root:
        raise UserError("--data-path is missing: say where the data set {} lies".format(name))
    if not os.path.isdir(root):
        raise UserError("--data-path: there is no folder {}".format(root))
    loader = leave_path if jpeg_draft else LastPicture()
    if name == "IMNET":
        return _image_folder(root, is_train, transform, loader)
    if name == "CIFAR":
        try:
            return datasets.CIFAR100(root, train=is_train, transform=transform)
        except RuntimeError:
            raise UserError("--data-path: {} does not hold CIFAR-100 (the folder cifar-100-python)".format(root))
    return INatDataset(root, is_train, {"INAT": 2018, "INAT19": 2019}[name], inat_category, transform, loader)


def validation_pictures(name, root, inat_category, count):
    """Yields `count` of the data set's validation images, spread over them, as runtime.gallery.Pictures that are named by
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

def build_transform(is_train, name, input_size, color_jitter=0.4, aa="rand-m9-mstd0.5-inc1",
                    train_interpolation="bicubic", reprob=0.25, remode="pixel", recount=1, jpeg_draft=False):
    """PIL image -> what runtime.pictures.ToBytes makes of the picture that DeiT's transform would normalise.

    `jpeg_draft`: the input is a path, see runtime.pictures.DraftCrop.
    Pictures of at most 32 pixels are not cropped out of: CIFAR shifts by up to 4 pixels at its own size. Digits are
    enlarged, shifted by up to an eighth, and never mirrored, since a mirrored digit is no digit.
    """
    bicubic = compat.interpolation("bicubic")
    if is_train:
        transform = create_transform(
            input_size=input_size, is_training=True, color_jitter=color_jitter or None,
            auto_augment=None if aa in ("", "none") else aa, interpolation=train_interpolation,
            hflip=0.0 if name == "DIGITS" else 0.5, re_prob=reprob, re_mode=remode, re_count=recount)
        erasing = [t for t in transform.transforms if isinstance(t, RandomErasing)]
        on_tensors = ("ToTensor", "MaybeToTensor", "Normalize", "RandomErasing")
        transform.transforms = [t for t in transform.transforms if type(t).__name__ not in on_tensors]
        transform.transforms.append(ToBytes(*erasing))
        if name == "DIGITS":
            transform.transforms[0] = transforms.Compose([
                transforms.Resize((input_size, input_size), bicubic),
                transforms.RandomCrop(input_size, padding=input_size // 8)])
        elif input_size <= 32:
            transform.transforms[0] = transforms.RandomCrop(input_size, padding=4)
        elif jpeg_draft:
            transform.transforms[0] = DraftCrop(transform.transforms[0])
        return transform
    if name == "DIGITS":
        resize = [transforms.Resize((input_size, input_size), bicubic)]
    elif input_size <= 32:
        resize = []
    else:
        resize = [transforms.Resize(int(256 / 224 * input_size), bicubic), transforms.CenterCrop(input_size)]
    return transforms.Compose(resize + [ToBytes()])


# ----------------------------------------------------------------------------------------------------- samplers

class RASampler(Sampler):
    """Repeated augmentation (Hoffer et al., arXiv 1901.09335), as DeiT samples it: each image comes `repeats` times
    in a row before the list is dealt out to the processes, so that its copies, augmented differently, meet in one
    global batch. An epoch is as long as without repetition, rounded down to a multiple of 256 images, which a data
    set smaller than that is not."""

    def __init__(self, dataset, num_replicas=1, rank=0, shuffle=True, repeats=3):
        self.length = len(dataset)
        self.num_replicas = num_replicas
        self.rank = rank
        self.shuffle = shuffle
        self.repeats = repeats
        self.epoch = 0
        rounded = self.length // 256 * 256 if self.length >= 256 else self.length
        self.num_selected = rounded // num_replicas

    def __len__(self):
        return self.num_selected

    def __iter__(self):
        generator = torch.Generator()
        generator.manual_seed(self.epoch)
        order = torch.randperm(self.length, generator=generator) if self.shuffle else torch.arange(self.length)
        indices = [index for index in order.tolist() for _ in range(self.repeats)]
        total = math.ceil(len(indices) / self.num_replicas) * self.num_replicas
        indices += indices[:total - len(indices)]
        return iter(indices[self.rank:total:self.num_replicas][:self.num_selected])

    def set_epoch(self, epoch):
        self.epoch = epoch


class TrainingBatchSampler(Sampler):
    """The training batches of one process that stands for as many as there are `samplers`: each of them is asked for a
    batch in turn, so len(samplers) successive batches, an update's, hold what as many processes would have had.

    Items are (index, seed): how an image is augmented depends on `seed` (the run's), the epoch, and the image's place in
    the epoch alone, so an epoch can be entered in its middle (`set_epoch`).
    """

    def __init__(self, samplers, batch_size, seed=0, replicas=1, first_replica=0):
        self.samplers = samplers
        self.batch_size = batch_size
        self.seed = seed
        self.replicas = replicas
        self.first_replica = first_replica
        self.updates = min(len(sampler) for sampler in samplers) // batch_size
        self.epoch = self.done = 0

    def __len__(self):
        return (self.updates - self.done) * len(self.samplers)

    def __iter__(self):
        iterators = [iter(sampler) for sampler in self.samplers]
        for iterator in iterators:  # what is done already
            for _ in islice(iterator, self.done * self.batch_size):
                pass
        for update in range(self.done, self.updates):
            for number, iterator in enumerate(iterators):
                batch = []
                for i, index in enumerate(islice(iterator, self.batch_size)):
                    place = (update * self.batch_size + i) * self.replicas + self.first_replica + number
                    batch.append((index, derive_seed(self.seed, self.epoch, place)))
                yield batch

    def set_epoch(self, epoch, done=0):
        """The next iteration is `epoch`, from its update `done` on."""
        self.epoch, self.done = epoch, done
        for sampler in self.samplers:
            sampler.set_epoch(epoch)


def build_train_sampler(dataset, batch_size, rank, world_size, accum_steps=1, repeated_aug=True, seed=0):
    """The training batches of process `rank`; raises UserError where the data set is too small for one update."""
    kind = RASampler if repeated_aug else torch.utils.data.DistributedSampler
    replicas = world_size * accum_steps
    first = rank * accum_steps
    sampler = TrainingBatchSampler(
        [kind(dataset, num_replicas=replicas, rank=first + i, shuffle=True) for i in range(accum_steps)],
        batch_size, seed, replicas, first)
    if not sampler.updates:
        raise UserError("{} training images do not fill one global batch of {} x {}; lower --batch-size".format(
            len(dataset), batch_size, replicas))
    return sampler


class ShardSampler(Sampler):
    """Every `world_size`-th index from `rank` on: over all processes each image exactly once, none repeated."""

    def __init__(self, dataset, rank, world_size):
        self.indices = range(rank, len(dataset), world_size)

    def __len__(self):
        return len(self.indices)

    def __iter__(self):
        return iter(self.indices)
