"""Teacher labels on disk, per image and crop (fast knowledge distillation, https://arxiv.org/abs/2112.01528).

A folder holds `settings.json`, what the crops and labels depend on, and for each epoch and each replica (a process, or
one of the processes that an accumulation step stands for) `epoch-E-replica-R.npy`: for "hard" and "cls" distillation
the teacher's first choice for each image, int16 or int32, for "soft" its logits, float32, in the order of training.
Every image is augmented, and every batch mixed, from seeds that depend on epoch and place alone, so the same crops come
again.
"""
import json
import os

import numpy as np
import torch

from ..errors import UserError
from ..machine.agreement import Agreement
from ..pictures.batches import TrainingView
from .files import write_json, write_whole
from .settings import IMPLIED, flag_name, labels_sum, pictures_sum

SETTINGS = "settings.json"
# what the images that the teacher sees depend on, and what is kept of its answer
DEPENDS_ON = ("data_set", "inat_category", "input_size", "batch_size", "seed", "repeated_aug", "color_jitter", "aa",
              "train_interpolation", "reprob", "remode", "recount", "jpeg_draft", "image_backend", "mixup", "cutmix",
              "cutmix_minmax", "mixup_prob", "mixup_switch_prob", "mixup_mode", "distillation_type", "teacher_model",
              "teacher_path", "teacher_input_size", "teacher_precision")


WEIGHTS = "teacher_weights"  # the hash of the teacher's file, which only who writes labels has
PICTURES, LABELS = "pictures", "labels"  # settings.pictures_sum and labels_sum
CROPS = "crops"  # sample_crops
FORMAT = "computed_in"  # the teacher's number format, which again only who writes has
_SAMPLES = 16  # pictures
_MEANS = 4  # a side
_UNLIKE = 8.0  # of 255: copies of a picture in another size or quality stay below
_FEW = 2  # samples that may be unlike: a policy's thresholds (solarize) can turn rounding into a difference
_WORDS = {"replicas": "processes x --accum-steps", "images": "the number of training images",
          "num_classes": "the number of classes", WEIGHTS: "teacher weights of the SHA-256", FORMAT: "a teacher in",
          PICTURES: "the checksum of names", LABELS: "labels of the checksum"}


def label_settings(args, replicas: int, data) -> dict:
    """The settings of a run on the data set `data`, as they stand in settings.json; the teacher's file by its name
    alone."""
    settings = {name: getattr(args, name) for name in DEPENDS_ON}
    settings["teacher_path"] = os.path.basename(settings["teacher_path"])
    return dict(settings, replicas=replicas, images=len(data), num_classes=len(data.classes),
                **{PICTURES: pictures_sum(data), LABELS: labels_sum(data), CROPS: sample_crops(data)})


def sample_crops(data):
    """Some pictures of the data set `data`, spread over it, as they are augmented from fixed seeds: of each the means
    (whole numbers, 0 to 255) of 4 x 4 parts. Other versions of torchvision, timm or Pillow may draw other crops from
    the same seeds, and other pictures may lie under the same names."""
    view, crops = TrainingView(data), []
    for seed, place in enumerate(np.linspace(0, len(data) - 1, min(len(data), _SAMPLES)).astype(int)):
        (pixels, _), *_ = view[int(place), seed]
        means = torch.nn.functional.adaptive_avg_pool2d(pixels.float().mean(dim=2)[None, None], _MEANS)
        crops.append(means.round().int().flatten().tolist())
    return crops


def _alike(crops, others):
    """Whether two lists of sample_crops are of the same pictures and draws."""
    distances = np.abs(np.array(crops, dtype=float) - np.array(others, dtype=float)).mean(axis=1)
    return (distances > _UNLIKE).sum() <= _FEW


def _path(folder, epoch, replica):
    return os.path.join(folder, "epoch-{:04d}-replica-{:04d}.npy".format(epoch, replica))


class LabelWriter:
    """Fills `folder`, for a run of the given `settings` (label_settings), which the run's first process (`is_main`)
    writes down for all. Raises UserError where the folder has labels of other settings, SaveFailed where it cannot be
    written."""

    def __init__(self, folder, settings, is_main=True):
        self.folder = folder
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise UserError("--write-teacher-labels: {} cannot be made ({})".format(folder, error.strerror))
        if os.path.exists(os.path.join(folder, SETTINGS)):
            _compare(_read_settings(folder, "--write-teacher-labels"), settings, folder, "--write-teacher-labels")
        if is_main:
            write_json(os.path.join(folder, SETTINGS), settings)
        self.dtype = np.int16 if settings["num_classes"] <= 2 ** 15 else np.int32  # of choices

    def has(self, epoch, replica):
        return os.path.exists(_path(self.folder, epoch, replica))

    def write(self, epoch, replica, batches):
        """batches: for each update what losses.DistillationLoss.teach gave for the replica's batch, on the CPU."""
        labels = torch.cat(batches)
        labels = labels.numpy().astype(np.float32 if labels.is_floating_point() else self.dtype)
        write_whole(_path(self.folder, epoch, replica), lambda f: np.save(f, labels))


class TeacherLabels:
    """Reads what LabelWriter wrote. A training epoch has the crops and labels of the stored one that `crop_epoch`
    gives.

    Raises UserError where `folder` has no labels or those of other `settings` than this run's.
    """

    def __init__(self, folder, settings):
        self.folder = folder
        stored = _read_settings(folder, "--teacher-labels")
        settings = dict(settings, teacher_precision=stored.get("teacher_precision", "same"))  # no teacher runs here
        _compare(stored, settings, folder, "--teacher-labels")
        self.epochs = 0
        while all(os.path.exists(_path(folder, self.epochs, r)) for r in range(settings["replicas"])):
            self.epochs += 1
        if not self.epochs:
            raise UserError("--teacher-labels: {} has no whole epoch of labels; write them with "
                            "--write-teacher-labels {}".format(folder, folder))
        self.batch_size = settings["batch_size"]
        self._read = {}  # replica: (epoch, labels)

    def need_everywhere(self, agreement: Agreement):
        """Raises UserError where the processes of a run have other numbers of stored epochs."""
        stored = [int(number) for number in agreement.gather(self.epochs)]
        for rank, number in enumerate(stored):
            if number != stored[0]:
                raise UserError("--teacher-labels: process 0 finds {} whole epochs of labels and process {} finds {}; "
                                "give all machines the same files".format(stored[0], rank, number))

    def crop_epoch(self, epoch: int) -> int:
        """The stored epoch for a training epoch: beyond the last they come again."""
        return epoch % self.epochs

    def batch(self, epoch: int, replica: int, update: int) -> torch.Tensor:
        """The labels of a batch of the stored epoch `epoch`: (B,) int64, or (B, classes) float32."""
        if self._read.get(replica, (None,))[0] != epoch:
            path = _path(self.folder, epoch, replica)
            try:
                self._read[replica] = epoch, np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise UserError(
                    "--teacher-labels: {} cannot be read ({}); remove it and write it again".format(path, error))
        labels = self._read[replica][1][update * self.batch_size:(update + 1) * self.batch_size]
        if len(labels) != self.batch_size:
            raise UserError("--teacher-labels: {} ends before update {}; remove it and write it again".format(
                _path(self.folder, epoch, replica), update))
        labels = torch.from_numpy(np.array(labels))
        return labels if labels.dim() == 2 else labels.long()


def _read_settings(folder, flag):
    path = os.path.join(folder, SETTINGS)
    try:
        with open(path) as f:
            settings = json.load(f)
            return {str(name): value for name, value in settings.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError("{}: {} cannot be read ({})".format(flag, path, error))


def _compare(stored, settings, folder, flag):
    settings = json.loads(json.dumps(settings))  # tuples as lists
    stored = dict(IMPLIED, **stored)
    if str(stored.get(PICTURES)).split()[:2] != str(settings.get(PICTURES)).split()[:2]:
        stored[PICTURES] = settings.get(PICTURES)  # the same pictures have other names in archives
    crops, own = stored.pop(CROPS, None), settings.pop(CROPS, None)
    for name, value in settings.items():
        # older labels do not say whose they are
        if stored.get(name) != value and (name not in (WEIGHTS, FORMAT, PICTURES, LABELS) or name in stored):
            raise UserError("{}: the labels in {} were written with {} {} and this run has {}; other crops or labels "
                            "belong to it".format(flag, folder, _WORDS.get(name) or flag_name(name), stored.get(name),
                                                  value))
    if crops and own and not _alike(crops, own):
        raise UserError("{}: the labels in {} were written for other crops of the pictures than are drawn here; the "
                        "pictures themselves, or the versions of torchvision, timm or Pillow, are others. Write labels "
                        "on this installation, with --write-teacher-labels".format(flag, folder))
