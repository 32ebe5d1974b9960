"""What benchmark.py lets race: each contender is built from its name into functions to be called over and over."""
import os
import tempfile
from argparse import Namespace
from contextlib import contextmanager
from typing import Callable, NamedTuple, Optional

from evo_vit import EvoLeViT  # before anything that imports torchvision

# isort: split
import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.loss import SoftTargetCrossEntropy
from torchvision import datasets as torchvision_datasets

from datasets import Augmentation, build_dataset, build_transform
from engine import Learner
from evo_vit.compat import create_model
from flags import family_defaults
from losses import DistillationLoss
from runtime.command import need_compiler
from runtime.errors import UserError
from runtime.learning.average import ModelEma
from runtime.learning.models import (
    EVO_DEIT,
    apply_token_schedule,
    check_model_name,
    default_input_size,
    is_evo,
    is_evo_name,
    needs_batches,
    parameters_without_gradient,
)
from runtime.learning.optimizer import build_optimizer
from runtime.learning.quantized import Quantized, adds_exactly, quantize
from runtime.learning.teacher import Teacher, View, fold_batch_norms
from runtime.learning.teacher_precision import DTYPES, INT8, need_precision
from runtime.machine.compiling import compile_module, frozen_weights
from runtime.machine.cost import count_macs
from runtime.machine.images import normalize
from runtime.machine.machine import Machine
from runtime.machine.precision import build_precision
from runtime.machine.processes import is_distributed
from runtime.machine.versions import RESIZES_BYTES, prefers_channels_last
from runtime.pictures.batches import TrainingView, collate
from samplers import RASampler

from .plain import PlainEvoLeViT, PlainTraining

CLASSES = 1000
_MODES = {"plain", "published", "dense", "keep", "compile", "amp", "channels-last", "contiguous"}
WORDS = {"inference": _MODES | {"fuse"}, "train": _MODES | {"teacher", "teacher-size", "teacher-precision", "stored"},
         "loader": {"draft", "fast", "normalized", "once"}}
_WITH_VALUE = {"keep", "teacher", "teacher-size", "teacher-precision"}
# {task: {word: those that would change nothing beside it}}
_EXCLUDED = {"inference": {"dense": {"keep"}, "channels-last": {"contiguous"}}, "loader": {}, "train": {
    "dense": {"keep"}, "channels-last": {"contiguous"},
    "plain": {"compile", "amp", "teacher-precision", "teacher-size", "stored", "channels-last"},
    "stored": {"teacher", "teacher-size", "teacher-precision"}}}


class Contender(NamedTuple):
    """`run()` does the work once, on `images` images, and does not wait for the device; `macs`: its multiply-adds."""
    run: Callable
    images: int
    macs: Optional[int] = None


def parse(task, text):
    """(name, {word: value or True}) of a contender as benchmark.py's documentation writes it; raises UserError."""
    name, *words = text.split(",")
    pairs = [(word.split("=", 1) + [True])[:2] for word in words]
    options = dict(pairs)
    for word in sorted(_WITH_VALUE):
        if [own for own, _ in pairs].count(word) > 1:
            raise UserError("contender {}: {} stands there twice; give it one value".format(text, word))
    for word, value in options.items():
        if word not in WORDS[task]:
            raise UserError("contender {}: '{}' is none of {}'s words: {}".format(
                text, word, task, ", ".join(sorted(WORDS[task]))))
        if (value is True) == (word in _WITH_VALUE):
            raise UserError("contender {}: {} {} value".format(text, word, "needs a" if value is True else "takes no"))
    for one, others in _EXCLUDED[task].items():
        if one in options and others & set(options):
            raise UserError("contender {}: {} has no effect beside {}".format(
                text, " and ".join(sorted(others & set(options))), one))
    if options.get("teacher") == "none" and {"teacher-precision", "teacher-size"} & set(options):
        raise UserError("contender {}: teacher=none has no teacher to run".format(text))
    if "compile" in options:
        need_compiler("contender {}: compile".format(text))
    try:
        if not 0 < float(options.get("keep", 1)) <= 1:
            raise ValueError
    except ValueError:
        raise UserError("contender {}: keep=SHARE is above 0 and at most 1".format(text))
    size = str(options.get("teacher-size", 1))
    if not size.isdecimal() or int(size) < 1:
        raise UserError("contender {}: teacher-size=N is a number of pixels, above 0".format(text))
    if options.get("teacher-precision", INT8) not in list(DTYPES) + [INT8]:
        raise UserError("contender {}: teacher-precision is one of {}, int8".format(text, ", ".join(DTYPES)))
    if task == "loader":
        if name not in ("plain", "recipe"):
            raise UserError("contender {}: a loader is plain or recipe".format(text))
        return name, options
    check_model_name(name, "--compare")
    if ("plain" in options or "dense" in options or "keep" in options) and not is_evo_name(name):
        raise UserError("contender {}: only Evo-LeViT and Evo-DeiT can run dense or with keep=SHARE, and only "
                        "Evo-LeViT plain".format(text))
    if task == "train" and options.get("teacher") != "none" and not is_evo_name(name) and "published" not in options:
        raise UserError("contender {}: only Evo-LeViT and Evo-DeiT have the heads that a teacher's labels train; add "
                        "teacher=none{}".format(text, " in place of stored" if "stored" in options else ""))
    if "published" in options and (not is_evo_name(name) or set(options) - {"published", "teacher"}):
        raise UserError("contender {}: the published code has Evo-LeViT and Evo-DeiT, and runs them one way; beside "
                        "published only teacher=NAME".format(text))
    if "plain" in options and not name.startswith("EvoLeViT"):
        raise UserError("contender {}: only Evo-LeViT has a plain transcription".format(text))
    return name, options


def is_plain(task, text):
    """Whether the contender `text` is there to compare with, and so runs with the C library as it is. Raises
    UserError."""
    name, options = parse(task, text)
    return name == "plain" or "plain" in options or "published" in options


def channels_last(options, device):
    """Whether a contender has that memory format: as it says, else what suits the device; plain: no."""
    if "channels-last" in options or "contiguous" in options or "plain" in options:
        return "channels-last" in options
    return prefers_channels_last(device.type)


def own_model(name, size, device, distillation):
    """The model `name` of timm's registry on `device`, for images of `size` pixels, with random weights."""
    options = dict(img_size=size) if is_evo_name(name) or name.startswith(("levit", "vit", "deit")) else {}
    if is_evo_name(name):
        options.update(distillation=distillation)
    try:
        model = create_model(name, num_classes=CLASSES, **options).to(device)
    except (ValueError, AssertionError, RuntimeError, TypeError) as error:
        raise UserError("{} at {} pixels: {}".format(name, size, str(error).split("\n")[0]))
    if is_evo(model):
        model.set_distilled_training(distillation)
    return model


def macs_of(text, model, name, size, advice):
    """count_macs of the contender `text`'s `model`, or of its teacher; raises UserError, with what to do, where that
    does not take images of `size` pixels."""
    try:
        return count_macs(model, size)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError("contender {}: {} cannot take images of {} pixels ({}); {}".format(
            text, name, size, str(error).split("\n")[0].rstrip("."), advice))


def need_batch(text, model, batch):
    """Raises UserError for a training batch of one image where `model` cannot normalise it."""
    if batch == 1 and needs_batches(model):
        raise UserError("contender {}: it normalises by the statistics of a batch, which one image does not have; use "
                        "at least --batch-size 2".format(text))


@torch.no_grad()
def _fuse(model):
    """`model` with every batch norm folded that knows how: Evo-LeViT's and timm's dense LeViT's."""
    if isinstance(model, EvoLeViT):
        return model.fuse()
    for name, child in model.named_children():
        setattr(model, name, child.fuse() if hasattr(child, "fuse") else _fuse(child))
    return model


def inference(text, batch, size, device):
    """A forward pass in eval mode of random images."""
    name, options = parse("inference", text)
    model = own_model(name, size, device, True).eval().requires_grad_(False)
    if "dense" in options:
        model.set_token_selection(False)
    if "keep" in options:
        model.set_keep_ratio(float(options["keep"]))
    macs = batch * macs_of(text, model, name, size, "give another --input-size")
    if "fuse" in options:
        model = _fuse(model)
    images = torch.randn(batch, 3, size, size).to(device)
    precision = build_precision(device, "native" if "amp" in options else "none")
    if precision.dtype is not None:
        model, images = model.to(precision.dtype), images.to(precision.dtype)
    if channels_last(options, device):
        model, images = (x.to(memory_format=torch.channels_last) for x in (model, images))
    if "plain" in options:
        model = PlainEvoLeViT(model)
    if "compile" in options:
        compile_module(model, device.type, frozen=True)

    def run():
        with torch.no_grad(), frozen_weights(device.type):
            return model(images)
    return Contender(run, batch, macs)


class Training:
    """The recipe's step on random images: plain, or as main.py makes it."""

    def __init__(self, text, batch, size, device):
        name, options = parse("train", text)
        family = family_defaults(name)
        teacher_name = options.get("teacher", "none" if "distillation_type" in family else "regnety_160")
        teacher_size = int(options.get("teacher-size", size))
        plain, distil = "plain" in options, teacher_name != "none"
        if distil:
            check_model_name(teacher_name, "teacher")
        more_heads = distil or "stored" in options or name.startswith(EVO_DEIT)
        self.model = model = own_model(name, size, device, more_heads).train()
        if "keep" in options:
            model.set_keep_ratio(float(options["keep"]))
        apply_token_schedule(model, 0, 1 if "dense" in options else 0, 200)  # as in the first 200 of the 300 epochs
        need_batch(text, model, batch)
        self.macs = 3 * batch * macs_of(text, model, name, size, "give another --input-size")
        last = channels_last(options, device)
        precision = build_precision(device, "native" if "amp" in options else "none")
        self.images = torch.randn(batch, 3, size, size).to(device)
        self.targets = torch.rand(batch, CLASSES).softmax(1).to(device)
        self.taught, teacher = None, None
        if "stored" in options:
            self.taught = torch.randint(0, CLASSES, (batch,)).to(device)
        elif distil:
            teacher = create_model(teacher_name, num_classes=CLASSES).eval().requires_grad_(False)
            advice = "name another teacher, or --input-size {}" if plain else "add teacher-size={}"
            self.macs += batch * macs_of(text, teacher, teacher_name, teacher_size,
                                         advice.format(default_input_size(teacher_name)))
            if not plain:
                fold_batch_norms(teacher, torch.zeros(1, 3, teacher_size, teacher_size))
                teacher = self._teacher(teacher, teacher_size, precision, last, options.get("teacher-precision"))
            teacher.to(device)
            if "compile" in options and not plain:
                teacher.compile_network(device.type)
        kind = "cls" if distil or self.taught is not None else "none"
        self.criterion = DistillationLoss(SoftTargetCrossEntropy(), teacher, kind, 0.5, 1.0, name.startswith(EVO_DEIT))
        unused = parameters_without_gradient(model, self.criterion, self.images, self.targets) \
            if is_distributed() and not plain else ()
        args = Namespace(opt="adamw", lr=1e-4, weight_decay=family.get("weight_decay", 0.025), opt_eps=1e-8,
                         opt_betas=None, momentum=0.9)
        self.optimizer = build_optimizer(args, model, device)
        if plain:
            training = PlainTraining(model, self.criterion, self.optimizer.param_groups)
            self.run = lambda: training.step(self.images, self.targets)
            return
        machine = Machine(device, precision=precision, channels_last=last)
        machine.place(model)
        if last:
            self.images = self.images.contiguous(memory_format=torch.channels_last)
        average = ModelEma(model, 0.99996)
        model, self.optimizer = precision.prepare(model, self.optimizer, teacher)
        if "compile" in options:
            compile_module(model, device.type)
        self.learner = Learner(model, self.criterion, self.optimizer, machine, family.get("clip_grad", 0.01), "agc",
                               average)
        self.learner.share(unused)

    def _teacher(self, network, size, precision, last, name):
        """The folded `network` in the number format `name`, or in the student's."""
        if name is None:
            return Teacher(network, View(size), precision.dtype, last)
        need_precision(name, Machine(self.images.device, precision=precision))
        teacher = Teacher(network, View(size), torch.float32, last, own_format=True)
        if name == INT8:
            content = quantize(network, [torch.randn(8, 3, size, size)], adds_exactly())
            teacher.replace(Quantized(content, count_macs(network, size)))
        else:
            teacher.compute_in(DTYPES[name])
        return teacher

    def run(self):
        return self.learner.update([(self.images, self.targets, self.taught)])


def train(text, batch, size, device):
    """A training step with the recipe's losses, clipping, optimiser and average."""
    training = Training(text, batch, size, device)
    return Contender(training.run, batch, training.macs)


@contextmanager
def photos(width, height, count=48):
    """A folder, in ImageNet's layout, of JPEGs cut out of scikit-learn's two sample photographs."""
    with tempfile.TemporaryDirectory() as folder:
        _write_photos(folder, width, height, count)
        yield folder


def _write_photos(folder, width, height, count):
    from sklearn.datasets import load_sample_images
    sources = [Image.fromarray(photo) for photo in load_sample_images().images]  # 640 x 427 pixels each
    random = np.random.RandomState(0)
    for number in range(count):
        photo = sources[number % 2]
        w = random.randint(photo.width * 3 // 4, photo.width)
        h = min(w * height // width, photo.height)
        left, top = random.randint(0, photo.width - w + 1), random.randint(0, photo.height - h + 1)
        picture = photo.crop((left, top, left + w, top + h)).resize((width, height), Image.BICUBIC)
        for part in ("train", "val"):
            path = os.path.join(folder, part, "class{}".format(number % 2))
            os.makedirs(path, exist_ok=True)
            picture.save(os.path.join(path, "{}.jpg".format(number)), quality=90)


class _Plain(torch.utils.data.Dataset):
    """torchvision's ImageFolder under timm's transform, whose samples come without their seeds."""

    def __init__(self, folder, size):
        transform = create_transform(input_size=size, is_training=True, auto_augment="rand-m9-mstd0.5-inc1",
                                     interpolation="bicubic", re_prob=0.25, re_mode="pixel", re_count=1,
                                     mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
        self.dataset = torchvision_datasets.ImageFolder(os.path.join(folder, "train"), transform)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]


def loader(text, batch, size, device, folder):
    """A batch of augmented pictures, in this process, in the order of repeated augmentation."""
    name, options = parse("loader", text)
    if name == "plain":
        view = _Plain(folder, size)
    else:
        draft, fast = "draft" in options, "fast" in options
        if fast and (draft or not RESIZES_BYTES):
            raise UserError("contender {}: {}".format(text, "fast replaces draft" if draft else
                                                      "fast needs PyTorch 2.1 or newer"))
        backend = "fast" if fast else "pillow"
        transform = build_transform(True, "IMNET", size, Augmentation(jpeg_draft=draft, image_backend=backend))
        dataset = build_dataset(True, "IMNET", folder, transform, jpeg_draft=draft, image_backend=backend)
        view = TrainingView(dataset, keep_generators=not fast)
    sampler = RASampler(view, repeats=1 if "once" in options else 3)
    place = [0]

    def run():
        with _one_thread():
            order = list(sampler)
            items = []
            for _ in range(batch):
                index = order[place[0] % len(order)]
                if place[0] % len(order) == 0:
                    sampler.set_epoch(sampler.epoch + 1)
                place[0] += 1
                items.append(view[index] if name == "plain" else view[index, place[0]])
            if name == "plain":
                return torch.utils.data.dataloader.default_collate(items)
            made = collate(items)
            return normalize(made[0], device, channels_last({}, device)) if "normalized" in options else made
    return Contender(run, batch)


@contextmanager
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
