"""Picture files of a folder for each class, found by one walk and kept in packed arrays."""
import os
from collections import Counter
from typing import List, NamedTuple

import numpy as np

from ..errors import UserError
from .reading import is_picture_name


class Names:
    """A list of file names in two arrays, so that a million of them are two objects: data-loading processes, forked
    from this one, share their memory however often they read it, where a list's reference counts would copy every
    page."""

    def __init__(self, names):
        encoded = [os.fsencode(name) for name in names]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self):
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start:self._ends[index]].tobytes())


class Folders(NamedTuple):
    """The pictures of ROOT/CLASS/.../PICTURE, in the order of torchvision's ImageFolder."""
    root: str
    classes: List[str]
    names: Names  # of the files, from root on
    labels: np.ndarray  # (N,) int64, the place of each one's class in `classes`
    left_out: Counter  # how many files of which suffix are no pictures


def class_names(root: str) -> List[str]:
    """The names of the class folders in `root`, sorted; those that begin with a dot are an editor's or a system's."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def walk(root: str, classes: List[str]) -> Folders:
    """Finds the pictures of `classes` in `root`, through symbolic links, without files and folders that begin with a
    dot.

    Raises UserError for a class folder that holds no picture.
    """
    names, labels, left_out = [], [], Counter()
    for label, name in enumerate(classes):
        before = len(names)
        names += _pictures(root, name, left_out)
        if len(names) == before:
            _refuse_empty(root, name)
        labels.append(np.full(len(names) - before, label, dtype=np.int64))
    return Folders(root, classes, Names(names), np.concatenate(labels), left_out)


def need_pictures(root: str, classes: List[str]):
    """Raises UserError unless each class folder holds a picture; looks no further than the first of each."""
    for name in classes:
        if not any(is_picture_name(file) for _, files in visible_folders(os.path.join(root, name)) for file in files):
            _refuse_empty(root, name)


def _refuse_empty(root, name):
    raise UserError("--data-path: the class folder {} holds no picture; fill it or remove it from train and val".format(
        os.path.join(root, name)))


def _pictures(root, name, left_out):
    found = []
    for folder, files in sorted(visible_folders(os.path.join(root, name))):
        for file in sorted(files):
            if is_picture_name(file):
                found.append(os.path.relpath(os.path.join(folder, file), root))
            elif not file.startswith("."):
                left_out[os.path.splitext(file)[1].lower() or "without a suffix"] += 1
    return found


def visible_folders(top: str):
    """Yields (folder, names of its files) for `top` and the folders below, through symbolic links, each once, without
    those that begin with a dot."""
    seen = set()
    for folder, folders, files in os.walk(top, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link back to a folder above
            folders[:] = []
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield folder, files


def describe_left_out(left_out: Counter) -> str:
    """"3 of .txt, 1 of .csv", the most frequent first."""
    return ", ".join("{} {}{}".format(count, "" if suffix.startswith("w") else "of ", suffix)
                     for suffix, count in left_out.most_common(8))
