"""Picture files of a folder for each class, found by one walk."""
import os
from collections import Counter
from typing import Callable, List

import numpy as np

from ..errors import UserError
from .found import Found, Names, Sign
from .reading import is_picture_name


def listed(folder: str) -> List[os.DirEntry]:
    """What is in `folder`. Raises UserError where it cannot be read."""
    try:
        return list(os.scandir(folder))
    except OSError as error:
        _refuse_unreadable(error)


def _refuse_unreadable(error):
    raise UserError("--data-path: {} cannot be read ({})".format(error.filename, error.strerror))


def class_names(root: str) -> List[str]:
    """The names of the class folders in `root`, sorted; those that begin with a dot are an editor's or a system's."""
    return sorted(entry.name for entry in listed(root) if entry.is_dir() and not entry.name.startswith("."))


def walk(root: str, classes: List[str], shown: Callable = lambda items: items) -> Found:
    """Finds the pictures of `classes` in `root`, through symbolic links, without files and folders that begin with a
    dot. shown: shown(classes) yields them and shows how far the walk is.

    Raises UserError for a class folder that holds no picture.
    """
    counts, left_out, signs = [], Counter(), [Sign.of(root, "")]

    def names():
        for name in shown(classes):
            found = _pictures(root, name, left_out, signs)
            if not found:
                _refuse_empty(root, name)
            counts.append(len(found))
            for path in found:
                yield path

    packed = Names(names())
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    return Found(root, classes, packed, labels, left_out, signs)


def _refuse_empty(root, name):
    raise UserError("--data-path: the class folder {} holds no picture; fill it or remove it from train and val".format(
        os.path.join(root, name)))


def _pictures(root, name, left_out, signs):
    """The class's pictures, from its folder on."""
    found, top = [], os.path.join(root, name)
    for folder, files, status in sorted(_visible(top), key=lambda entry: entry[:2]):
        signs.append(Sign(os.path.relpath(folder, root), status.st_mtime_ns, status.st_size))
        for file in sorted(files):
            if is_picture_name(file):
                found.append(os.path.relpath(os.path.join(folder, file), top))
            elif not file.startswith("."):
                count_left_out(left_out, file)
    return found


def count_left_out(left_out: Counter, file: str):
    """Counts a file that is no picture by its suffix."""
    left_out[os.path.splitext(file)[1].lower() or "without a suffix"] += 1


def count_outside(root: str, of_what: str) -> Counter:
    """The pictures that lie in `root` itself, outside of what is read: as in a Found's left_out."""
    outside = sum(is_picture_name(entry.name) and entry.is_file() for entry in listed(root))
    return Counter({"outside " + of_what: outside} if outside else {})


def _visible(top):
    """As visible_folders, with each folder's status from before its files were listed."""
    seen, statuses = set(), {top: os.stat(top)}
    for folder, folders, files in os.walk(top, onerror=_refuse_unreadable, followlinks=True):
        status = statuses.pop(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link back to a folder above
            folders[:] = []
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        statuses.update((path, os.stat(path)) for path in [os.path.join(folder, name) for name in folders])
        yield folder, files, status


def visible_folders(top: str):
    """Yields (folder, names of its files) for `top` and the folders below, through symbolic links, each once, without
    those that begin with a dot."""
    for folder, files, _ in _visible(top):
        yield folder, files


def describe_left_out(left_out: Counter) -> str:
    """"3 of .txt, 1 without a suffix", the most frequent first."""
    return ", ".join("{} {}{}".format(count, "of " if suffix.startswith(".") else "", suffix)
                     for suffix, count in left_out.most_common(8))
