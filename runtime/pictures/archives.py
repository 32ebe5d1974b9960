"""Pictures in tar archives: WebDataset's shards, and ImageNet's archive of an archive for each class."""
import os
import tarfile
from array import array
from collections import Counter
from typing import Callable, Iterator, List, NamedTuple, Tuple

import numpy as np

from ..errors import UserError
from .folders import count_left_out, listed
from .found import Found, Names, Places, Sign
from .reading import Member, is_picture_name

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4", ".zip", ".7z", ".rar")
UNFINISHED = "unfinished"  # a file that lies beside shards while shards.py writes them
CLASSES = "classes.txt"  # a class's name in each line, beside train/ and val/: what the number in a .cls file means
_BLOCK = 512  # bytes


def archive_names(root: str) -> List[str]:
    """The names of the tar archives in `root`, sorted."""
    return sorted(entry.name for entry in listed(root)
                  if entry.name.endswith(".tar") and not entry.name.startswith(".") and entry.is_file())


def compressed_names(root: str) -> List[str]:
    """The names of the files in `root` that look like compressed archives, which are not read, sorted."""
    return sorted(entry.name for entry in listed(root) if entry.name.lower().endswith(COMPRESSED)
                  and not entry.name.startswith(".") and entry.is_file())


def member(places: Places, root: str, index: int, path: str) -> Member:
    """The picture `index` of `places`, which messages call `path`."""
    return Member(os.path.join(root, places.archives[int(places.numbers[index])]), int(places.offsets[index]),
                  int(places.sizes[index]), path)


def read_archives(root: str, archives: List[str], shown: Callable = lambda items: items) -> Found:
    """The pictures of the tar files `archives` in `root`, by their headers alone:

    - shards as WebDataset has them (KEY.jpg and KEY.cls, a class's number, next to one another), in their order;
    - an archive for each class, named after it, or one that holds these: in the order that their folders would have.

    shown: shown(items) yields them and shows how far the search is. Raises UserError for what is neither, for both, and
    for an archive that is cut off.
    """
    signs = [Sign.of(root, name) for name in archives]
    first = _first_names(os.path.join(root, archives[0]))
    found = _Pictures(root, archives)
    if any(name.endswith(".cls") for name in first):
        classes = _read_classes(root)
        signs.append(Sign.of(root, os.path.relpath(_classes_file(root), root)))
        names = Names(found.of_shards(shown, len(classes)))
    else:
        parts = sorted(part for number in range(len(archives)) for part in found.parts(number))
        classes = [part.name for part in parts]
        twice = [name for name, count in Counter(classes).items() if count > 1]
        if twice:
            raise UserError("--data-path: {} has two archives of the class '{}'".format(root, twice[0]))
        names = Names(found.of_classes(shown, parts))
    labels = np.array(found.labels, dtype=np.int32)
    empty = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
    if len(empty):
        raise UserError("--data-path: the archives in {} hold no picture of the class '{}'".format(
            root, classes[empty[0]]))
    places = Places(archives, np.array(found.numbers, dtype=np.uint32), np.array(found.offsets, dtype=np.int64),
                    np.array(found.sizes, dtype=np.uint32))
    return Found(root, classes, names, labels, found.left_out, signs, places)


class _Part(NamedTuple):
    """A class's archive: all of archive `number`, or what begins at `offset` in it."""
    name: str
    number: int
    offset: int


class _Pictures:
    """Takes pictures down one by one; its generators yield their names."""

    def __init__(self, root, archives):
        self.root = root
        self.archives = archives
        self.labels, self.numbers, self.offsets, self.sizes = array("i"), array("I"), array("q"), array("I")
        self.left_out = Counter()

    def _take(self, label, number, info):
        self.labels.append(label)
        self.numbers.append(number)
        self.offsets.append(info.offset_data)
        self.sizes.append(info.size)

    def parts(self, number) -> List[_Part]:
        """The archives of classes in archive `number`: those inside it, else itself."""
        name = self.archives[number]
        inside, others = [], 0
        for info in members(os.path.join(self.root, name)):
            if info.name.endswith(".tar"):
                inside.append(_Part(_stem(info.name), number, info.offset_data))
            else:
                others += 1
                if not inside:
                    break  # pictures, which are looked at later
        if inside and others:
            raise UserError("--data-path: {} holds archives and other files".format(os.path.join(self.root, name)))
        return inside or [_Part(_stem(name), number, 0)]

    def of_classes(self, shown, parts) -> Iterator[str]:
        for label, part in enumerate(shown(parts)):
            archive = self.archives[part.number]
            found, seen = [], set()
            for info in members(os.path.join(self.root, archive), part.offset):
                _need_new(info.name, seen, os.path.join(self.root, archive))
                if info.name.endswith(".cls"):
                    raise UserError("--data-path: {} is a shard with labels and {} is none; leave one of the two kinds"
                                    .format(os.path.join(self.root, archive), self.archives[0]))
                if _is_picture(info):
                    found.append((os.path.split(os.path.normpath(info.name)), info))
                elif not os.path.basename(info.name).startswith("."):
                    count_left_out(self.left_out, info.name)
            folder = os.path.join(archive, part.name + ".tar") if part.offset else archive
            for (above, name), info in sorted(found, key=lambda entry: entry[0]):
                self._take(label, part.number, info)
                yield os.path.join(folder, above, name)

    def of_shards(self, shown, classes) -> Iterator[str]:
        for number, archive in enumerate(shown(self.archives)):
            path = os.path.join(self.root, archive)
            with open(path, "rb") as file:
                for key, picture, label in self._samples(path):
                    if picture is None and label is None:
                        continue
                    if picture is None or label is None:
                        raise UserError("--data-path: {}: the sample {} has no {}".format(
                            path, key, "picture" if picture is None else ".cls file with its class's number"))
                    text = os.pread(file.fileno(), label.size, label.offset_data).decode("latin-1").strip()
                    if not text.isdecimal() or int(text) >= classes:
                        raise UserError("--data-path: {}: the class of the sample {} is '{}', which is no number from "
                                        "0 to {}".format(path, key, text[:20], classes - 1))
                    self._take(int(text), number, picture)
                    yield os.path.join(archive, picture.name)

    def _samples(self, path):
        """Yields (key, its picture, its .cls file) of a shard, None for what it has not."""
        seen, last, files = set(), None, []
        for info in members(path):
            key, _ = split_key(info.name)
            if key != last:
                if files:
                    yield self._sample(path, last, files)
                _need_new(key, seen, path)
                last, files = key, []
            files.append(info)
        if files:
            yield self._sample(path, last, files)

    def _sample(self, path, key, files):
        """(key, its picture, its .cls file) of a sample's files. A picture KEY.jpg goes before KEY.seg.jpg."""
        label, plain, dotted = None, [], []
        for info in files:
            suffix = split_key(info.name)[1]
            if suffix == "cls":
                label = info
            elif _is_picture(info):
                (dotted if "." in suffix else plain).append(info)
            elif not os.path.basename(info.name).startswith("."):
                count_left_out(self.left_out, info.name)
        pictures = plain or dotted
        if len(pictures) > 1:
            raise UserError("--data-path: {}: the sample {} has two pictures, {} and {} (a sample's name ends at its "
                            "first dot)".format(path, key, pictures[0].name, pictures[1].name))
        for info in dotted if plain else ():
            count_left_out(self.left_out, info.name)
        return key, pictures[0] if pictures else None, label


def _need_new(name, seen, path):
    """Notes `name`, of a file or a sample; raises UserError where it is there for the second time, as after tar
    --append: one of the two is out of date."""
    if name in seen:
        raise UserError("--data-path: {} holds {} twice; write the archive anew".format(path, name))
    seen.add(name)


def split_key(name: str) -> Tuple[str, str]:
    """(key, suffix) of a shard's file as WebDataset splits them: at the first dot of its own name."""
    folder, own = os.path.split(name)
    key, _, suffix = own.partition(".")
    return os.path.join(folder, key), suffix


def _stem(name):
    return os.path.basename(name)[:-len(".tar")]


def _is_picture(info):
    return is_picture_name(info.name) and not any(
        part.startswith(".") and part != "." for part in os.path.dirname(info.name).split("/"))


def members(path: str, offset: int = 0) -> Iterator[tarfile.TarInfo]:
    """The ordinary files of the tar archive that begins at `offset` in the file `path`, with their places in that file.

    Raises UserError where it cannot be read, is cut off, or holds a link in a picture's place.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape", encoding="utf-8") as archive:
                # Python 3.7's tarfile cannot be asked for the next file of an empty archive
                for info in iter(archive.next, None) if archive.firstmember is not None else ():
                    archive.members = []  # else it keeps all of them
                    if info.isreg() and not info.issparse():
                        yield info
                    elif not info.isdir() and is_picture_name(info.name):
                        raise UserError("--data-path: {}: {} is a link or something else than a file".format(
                            path, info.name))
                file.seek(archive.offset)
                # a header that makes no sense looks to tarfile like the end
                if file.read(_BLOCK) != bytes(_BLOCK):
                    raise UserError("--data-path: the archive {} is cut off or damaged at byte {:,}".format(
                        path, archive.offset))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError("--data-path: the archive {} cannot be read ({})".format(
            path, "it is compressed; unpack it to a plain .tar" if _is_compressed(path) else error))


def _is_compressed(path):
    try:
        with open(path, "rb") as file:
            return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04"))
    except OSError:
        return False


def _first_names(path):
    found = []
    for info in members(path):
        found.append(info.name)
        if len(found) == 16:
            break
    if not found:
        raise UserError("--data-path: the archive {} is empty".format(path))
    return found


def _classes_file(root):
    return next((path for path in (os.path.join(folder, CLASSES) for folder in (os.path.dirname(root), root))
                 if os.path.isfile(path)), os.path.join(os.path.dirname(root), CLASSES))


def _read_classes(root):
    path = _classes_file(root)
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().splitlines()
    except OSError:
        raise UserError("--data-path: the shards in {} name classes by their numbers alone; write the names, one a "
                        "line, to {}".format(root, path))
