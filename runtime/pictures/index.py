"""The index of a data set's pictures: found by one process of each machine, kept in a file from run to run."""
import io
import json
import os
import platform
import sys
import time
from collections import Counter
from typing import Callable, Iterable, List, Optional

import numpy as np
from tqdm import tqdm

from ..errors import RunFailed, SaveFailed, UserError
from ..keeping.files import write_whole
from ..machine.agreement import Agreement
from ..printing import say as print_it
from . import remote
from .found import Found, Names, Places, Sign
from .reading import IMAGE_EXTENSIONS

FORMAT = 1  # of the file; one of another format is made anew
SETTLED = 2 * 10 ** 9  # nanoseconds: a folder changed later than so long before it was read may change again unnoticed
TELLING = 5.0  # seconds: a search that took longer is told
_ARRAYS = ("names", "ends", "labels")
_PLACES = ("numbers", "offsets", "sizes")


class Index:
    """What `walk`s find, each done once in a process, and once on a machine: by the first of the processes in
    `together`, which all ask the same in the same order; the others are sent what it found.

    together: None for this process alone.
    folder: where the files of earlier runs lie, and new ones go with `keep`; None for none. made: whether to make that
    folder. say: prints a line, on one process.
    """

    def __init__(self, folder: Optional[str] = None, together: Optional[Agreement] = None, say: Callable = print_it,
                 made: bool = False):
        self.folder = folder
        self.together = together
        self.say = say
        self.made = made
        self._found = {}  # root: Found
        self._new = []  # (file name, bytes of the file) that keep() writes

    def of(self, root: str, there: List[str], walk: Callable[[Callable], Found]) -> Found:
        """What walk(shown) finds in the folder `root`, from the index where nothing there has changed since.

        there: the class folders or archives that there are now. Raises UserError as `walk` does, on every process.
        """
        if root not in self._found:
            self._found[root] = self._shared(root, lambda: self._look(root, there, walk))
        return self._found[root]

    def of_server(self, root: str) -> Found:
        """The shards in the folder `root` of a web server, by the index beside it, which is not searched for anew.

        Raises UserError, on every process, where it cannot be read, is damaged, or is not of these shards."""
        if root not in self._found:
            self._found[root] = self._shared(root, lambda: _asked(root))
        return self._found[root]

    def _shared(self, root, look):
        if self.together is None or self.together.alone:
            return look()
        content = found = refusal = None
        if self.together.rank == 0:
            try:
                found = look()
                content = b"found" + _to_bytes(found, 0)
            except UserError as error:
                refusal, content = error, b"error" + str(error).encode("utf-8", "surrogateescape")
        content = self.together.from_process(0, content)
        if refusal is not None:
            raise refusal
        if content[:5] == b"error":
            raise UserError(content[5:].decode("utf-8", "surrogateescape"))
        return found if found is not None else _from_file(io.BytesIO(content[5:]), root)[0]

    def _look(self, root, there, walk):
        name = "index-{}.npz".format(os.path.basename(os.path.normpath(root)))
        # an index may also lie beside the data, as shards are written
        beside = os.path.dirname(os.path.abspath(root))
        for folder in [self.folder, beside] if self.folder and os.path.abspath(self.folder) != beside else [beside]:
            found = self._read(os.path.join(folder, name), root, there, folder == self.folder)
            if found:
                return found
        began = time.time()
        found = walk(lambda items: _shown(items, root))
        if time.time() - began > TELLING:
            self.say("Found {:,} pictures of {} classes in {} in {:.0f} s".format(
                len(found.names), len(found.classes), root, time.time() - began))
        if self.folder is not None:
            self._new.append((name, found, int(began * 1e9)))
        return found

    def _read(self, path, root, there, own):
        """The Found in the file `path`, None where there is none that holds. own: it was kept by an earlier run; only
        then, or where it is that of shards, is it said why it does not hold."""
        if not os.path.exists(path):
            return None
        try:
            found, began, where = _from_file(path, root)
        except Exception as error:  # a damaged file can raise anything in what reads it
            self.say("Note: the index {} is damaged ({}); looking through {} again".format(
                path, " ".join(str(error).split())[:80] or type(error).__name__, root))
            return None
        change = _change(found, began, root, there, where)
        if change is not None and (own or found.places):
            self.say("Note: {}, so the index {} does not hold any more; looking through {} again".format(
                change, path, root))
        return found if change is None else None

    def keep(self, finished: bool = False):
        """Writes what was found anew, whole or not at all, for the next run. Where that cannot be, a line says so.

        finished: nobody changed anything while it was searched, though it was written just before."""
        new, self._new = self._new, []
        for name, found, began in new:
            began += SETTLED + 1 if finished else 0
            path = os.path.join(self.folder, name)
            try:
                if self.made:
                    os.makedirs(self.folder, exist_ok=True)
                if os.path.isdir(self.folder):
                    # another machine may write here at the same time, and fails or wins as a whole
                    own = "{}.{}".format(path, platform.node())
                    write_whole(own, lambda f: _write(f, found, began))
                    os.replace(own, path)
            except (OSError, SaveFailed) as error:
                self.say("Note: the index of {} is not kept, so the next run looks through it again ({})".format(
                    found.root, error))


def _change(found, began, root, there, where):
    """What has changed since the index was made, None for nothing."""
    if where != _identity(found, root):
        return "{} holds other data".format(root)
    before = found.places.archives if found.places else found.classes
    if there != before:
        one = sorted(set(there) ^ set(before))[0]
        return "{} is {}".format(os.path.join(root, one), "new" if one in there else "gone")
    for sign in found.signs:
        path = os.path.normpath(os.path.join(root, sign.path))
        try:
            now = Sign.of(root, sign.path)
        except OSError:
            return "{} is gone".format(path)
        if now != sign:
            return "{} has changed".format(path)
        if sign.time > began - SETTLED:
            return "{} changed just before it was read".format(path)
    return None


def _asked(root):
    try:
        return _of_server(root)
    except RunFailed as error:  # nothing has begun
        raise UserError(str(error))


def _of_server(root):
    folder, part = root.rsplit("/", 1)
    url = "{}/index-{}.npz".format(folder, part)
    content = remote.read_file(url)
    if content is None:
        raise UserError("--data-path: there is no {}; shards on a server need the index that `python -m "
                        "runtime.pictures.shards` writes beside train/ and val/".format(url))
    if content[:2] != b"PK":
        raise UserError("--data-path: what the server has as {} is no index (it begins with {!r})".format(
            url, content[:20].decode("latin-1")))
    try:
        found, _, _ = _from_file(io.BytesIO(content), root)
    except Exception as error:  # a damaged file can raise anything in what reads it
        raise UserError("--data-path: the index {} is damaged ({})".format(
            url, " ".join(str(error).split())[:80] or type(error).__name__))
    if found.places is None:
        raise UserError("--data-path: {} is the index of a folder; on a server only shards can be read".format(url))
    sizes = {sign.path: sign.size for sign in found.signs}
    for name in _shown(found.places.archives, root):
        size = remote.file_size("{}/{}".format(root, name))
        if size != sizes[name]:
            raise UserError("--data-path: {}/{} {}, and its index says {:,} bytes; upload both again".format(
                root, name, "is not there" if size is None else "has {:,} bytes".format(size), sizes[name]))
    return found


def _identity(found, root):
    # archives are told by their sizes and times, and may lie on another machine elsewhere
    return "archives" if found.places else os.path.realpath(root)


def _write(file, found, began):
    np.savez(file, **_arrays(found, began))


def _to_bytes(found, began):
    file = io.BytesIO()
    _write(file, found, began)
    return file.getvalue()


def _arrays(found, began):
    about = {"format": FORMAT, "where": _identity(found, found.root), "began": began, "classes": found.classes,
             "suffixes": list(IMAGE_EXTENSIONS), "left_out": dict(found.left_out), "signs": found.signs,
             "archives": found.places.archives if found.places else None}
    arrays = dict(zip(_ARRAYS, found.names.arrays() + (found.labels,)))
    if found.places:
        arrays.update(zip(_PLACES, found.places[1:]))
    return dict(arrays, about=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8))


def _from_file(file, root):
    """(the Found, when it was looked for in nanoseconds, where) of a file or its path. Raises ValueError and others for
    what is no index."""
    with np.load(file, allow_pickle=False) as arrays:
        about = json.loads(arrays["about"].tobytes().decode())
        if about["format"] != FORMAT or about["suffixes"] != list(IMAGE_EXTENSIONS):
            raise ValueError("it is of another version")
        packed, ends, labels = (arrays[name] for name in _ARRAYS)
        places = None
        if about["archives"] is not None:
            places = Places([str(name) for name in about["archives"]], *(arrays[name] for name in _PLACES))
    names = Names.of_arrays(packed, ends)
    lengths = {len(labels), len(names)} | {len(values) for values in (places[1:] if places else ())}
    if len(lengths) != 1 or not len(names):
        raise ValueError("its parts are of different lengths")
    if int(labels.max()) >= len(about["classes"]) or places and int(places.numbers.max()) >= len(places.archives):
        raise ValueError("it names a class or an archive that it does not have")
    found = Found(root, [str(name) for name in about["classes"]], names, labels, Counter(about["left_out"]),
                  [Sign(*sign) for sign in about["signs"]], places)
    return found, int(about["began"]), about["where"]


def _shown(items: Iterable, root: str):
    """`items`, with a bar on a terminal."""
    return tqdm(items, desc="Looking through {}".format(root), file=sys.stderr, leave=False,
                disable=not sys.stderr.isatty())
