"""python -m runtime.pictures.shards DIR OUT: writes a folder of pictures in ImageNet's layout as tar shards that
main.py (--data-path OUT) and WebDataset read, with their index.

OUT holds classes.txt, and in train/ and val/ shard-000000.tar, ...: of each picture CLASS/NUMBER-NAME.SUFFIX with its
file's bytes as they are, and CLASS/NUMBER-NAME.cls with its class's number, in the order of the folder. What an
interrupted call has finished is compared with DIR and kept; shards of other pictures are left alone and refused.
"""
import io
import os
import sys
import tarfile
from typing import Iterator, List, NamedTuple

from tqdm import tqdm

from ..errors import RunFailed, UserError
from ..keeping.files import write_whole
from ..printing import say
from .archives import CLASSES, UNFINISHED, archive_names, members, read_archives, split_key
from .folders import class_names, walk
from .found import Found
from .index import Index
from .reading import Member, read_bytes

PICTURES = 2000  # in a shard: 220 MB of ImageNet


class Sample(NamedTuple):
    """A picture on its way into a shard."""
    key: str
    suffix: str  # of its file, without the dot
    path: str  # of its file
    label: int


def samples(found: Found, first: int, end: int) -> Iterator[Sample]:
    """The pictures first .. end of a folder. Keys differ by the picture's number, and have no dots, at which
    WebDataset would split them."""
    names = found.paths()
    for number in range(first, min(end, len(names))):
        folder, name = os.path.split(names[number])
        stem, suffix = os.path.splitext(name)
        key = "{}/{:08d}-{}".format(found.classes[int(found.labels[number])], number, stem.replace(".", "_"))
        yield Sample(key, suffix[1:].lower(), os.path.join(found.root, names[number]), int(found.labels[number]))


def write_shard(path: str, pictures: List[Sample]):
    """Writes a shard, whole or not at all. Raises SaveFailed, and RunFailed where a picture cannot be read."""
    def write(file):
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8",
                          errors="surrogateescape") as archive:
            for picture in pictures:
                for suffix, content in ((picture.suffix, _content(picture.path)), ("cls", b"%d" % picture.label)):
                    info = tarfile.TarInfo("{}.{}".format(picture.key, suffix))
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    write_whole(path, write)


def _content(path):
    try:
        return read_bytes(path)
    except OSError as error:
        raise RunFailed("{} cannot be read ({}); the shards before it are whole".format(path, error.strerror))


SAME, CHANGED, OTHER = "the same", "other bytes", "other pictures"


def compare(path: str, pictures: List[Sample]) -> str:
    """What the file `path` holds beside these pictures and labels: SAME, byte for byte; CHANGED: it is damaged, or its
    pictures' files have changed; OTHER: its files have other names."""
    files, found = members(path), SAME
    try:
        for picture in pictures:
            for suffix, content in ((picture.suffix, _content(picture.path)), ("cls", b"%d" % picture.label)):
                info = next(files, None)
                if info is None or info.name != "{}.{}".format(picture.key, suffix):
                    return OTHER
                if info.size != len(content) or read_bytes(
                        Member(path, info.offset_data, info.size, info.name)) != content:
                    found = CHANGED
        return found if next(files, None) is None else OTHER
    except UserError:  # cut off
        return CHANGED


class Written(NamedTuple):
    """What write_part has done: numbers of pictures, of shards, of those that were there already, and of those that
    were there with other bytes."""
    pictures: int
    shards: int
    kept: int
    replaced: int

    def __str__(self):
        shards = [_counted(self.shards, "shard")]
        if self.kept:
            shards.append("{:,} of them there already".format(self.kept))
        if self.replaced:
            shards.append("{:,} of them there with other bytes and written anew".format(self.replaced))
        return "{} in {}, each compared with its files byte for byte".format(
            _counted(self.pictures, "picture"), ", ".join(shards))


def _counted(number, what):
    return "{:,} {}{}".format(number, what, "" if number == 1 else "s")


def write_part(folder: str, out: str, classes: List[str]) -> Written:
    """Writes the pictures of `folder` as shards into `out`, and compares what lies there with it, byte for byte. Raises
    UserError for a shard of other pictures, RunFailed where one is not read as it was written, and SaveFailed."""
    found = walk(folder, classes, lambda names: _bar(names, "Looking through {}".format(folder)))
    os.makedirs(out, exist_ok=True)
    starts = range(0, len(found.names), PICTURES)
    names = ["shard-{:06d}.tar".format(number) for number in range(len(starts))]
    others = sorted(set(archive_names(out)) - set(names))
    if others:
        raise _foreign(os.path.join(out, others[0]), folder)
    kept = replaced = 0
    mark = os.path.join(out, UNFINISHED)
    with _bar(None, out, total=len(found.names), unit=" pictures") as bar:
        for name, start in zip(names, starts):
            path, pictures = os.path.join(out, name), list(samples(found, start, start + PICTURES))
            for picture in pictures:
                if split_key(picture.key) != (picture.key, ""):
                    raise UserError("{} cannot go into a shard under this name".format(picture.path))
            there = compare(path, pictures) if os.path.exists(path) else None
            if there == OTHER:
                raise _foreign(path, folder)
            if there == SAME:
                kept += 1
            else:
                replaced += there == CHANGED
                if not os.path.exists(mark):
                    write_whole(mark, lambda f: None)  # until the last shard is there
                write_shard(path, pictures)
                if compare(path, pictures) != SAME:
                    raise RunFailed("{} does not hold what was written to it; the disk or its memory is damaged, or {} "
                                    "has changed meanwhile".format(path, folder))
            bar.update(len(pictures))
    if os.path.exists(mark):
        os.remove(mark)
    return Written(len(found.names), len(names), kept, replaced)


def _foreign(path, folder):
    return UserError("OUT: {} is none of the shards of {} as it is now; name another folder, or remove it".format(
        path, folder))


def _bar(items, text, **options):
    return tqdm(items, desc=text, file=sys.stderr, leave=False, disable=not sys.stderr.isatty(), **options)


def _write_classes(path, content):
    """Leaves a file that is right as it is, with its time, by which the index holds; refuses one of other classes."""
    if not os.path.isfile(path):
        write_whole(path, lambda f: f.write(content))
        return
    with open(path, "rb") as f:
        if f.read() != content:
            raise UserError("OUT: {} names other classes than DIR has; name another folder, or remove it".format(path))


def _check_out(data, out, parts):
    """Raises UserError where shards would come to lie among the pictures, and neither could be read any more."""
    for part in ("train", "val"):
        there = os.path.join(out, part)
        if os.path.isdir(there) and class_names(there):
            raise UserError("OUT: {} holds class folders; name another folder than that of pictures".format(there))
    for part in parts:
        above = os.path.realpath(os.path.join(data, part))
        if os.path.commonpath([above, os.path.realpath(out)]) == above:
            raise UserError("OUT: {} lies in {}, among the pictures; name another folder".format(
                out, os.path.join(data, part)))


def main(data: str, out: str):
    """The command. Raises UserError for a folder that has not ImageNet's layout, and for one that cannot be written
    to."""
    parts = [part for part in ("train", "val") if os.path.isdir(os.path.join(data, part))]
    if not parts:
        raise UserError("DIR: {} has neither a folder 'train' nor 'val'".format(data))
    for part in parts:
        archives = archive_names(os.path.join(data, part))
        if archives:
            raise UserError("DIR: {} holds archives already, such as {}".format(os.path.join(data, part), archives[0]))
    _check_out(data, out, parts)
    classes = class_names(os.path.join(data, parts[0]))
    for part in parts:
        own = class_names(os.path.join(data, part))
        if own != classes or not own:
            one = sorted(set(own) ^ set(classes))
            raise UserError("DIR: {}".format("the class folders of train and val differ: '{}' is in one of them alone"
                            .format(one[0]) if one else "{} has no class folders".format(os.path.join(data, part))))
    wrong = [name for name in classes if len(name.splitlines()) != 1]
    if wrong:
        raise UserError("DIR: the name of the class folder {!r} is not one line, as {} needs it".format(wrong[0],
                                                                                                         CLASSES))
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise UserError("OUT: {} cannot be made ({})".format(out, error.strerror))
    index = Index(out)
    content = "".join(name + "\n" for name in classes).encode("utf-8", "surrogateescape")
    _write_classes(os.path.join(out, CLASSES), content)
    for part in parts:
        folder = os.path.join(out, part)
        say("{}: {}".format(folder, write_part(os.path.join(data, part), folder, classes)))
        archives = archive_names(folder)
        index.of(folder, archives, lambda shown: read_archives(folder, archives, shown))
    index.keep(finished=True)
    say("Train with --data-path {}".format(out))


if __name__ == "__main__":
    from .. import command
    parser = command.Parser(prog="python -m runtime.pictures.shards", description=__doc__, **command.RAW_DESCRIPTION)
    parser.add_argument("data", type=command.path, metavar="DIR", help="folder with train/ and val/, or one of them, "
                        "each with a folder for each class")
    parser.add_argument("out", type=command.path, metavar="OUT", help="folder for the shards, which is made")
    command.run(lambda args: main(args.data, args.out), parser.parse_args())
