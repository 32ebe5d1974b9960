"""What a folder or an archive holds: names, labels and places of a million pictures in a few packed arrays."""
import os
from array import array
from collections import Counter
from typing import Iterable, List, NamedTuple, Optional, Tuple

import numpy as np


class Names:
    """A list of file names in two arrays, so that a million of them are two objects: data-loading processes, forked
    from this one, share their memory however often they read it, where a list's reference counts would copy every
    page."""

    def __init__(self, names: Iterable[str]):
        packed, lengths = bytearray(), array("I")
        for name in names:
            encoded = os.fsencode(name)
            packed += encoded
            lengths.append(len(encoded))
        ends = np.cumsum(np.frombuffer(lengths, dtype=np.uint32), dtype=np.int64)
        self._take(np.frombuffer(packed, dtype=np.uint8), ends)

    @classmethod
    def of_arrays(cls, packed: np.ndarray, ends: np.ndarray) -> "Names":
        """The list that `arrays` gave; raises ValueError where they do not fit together."""
        if len(ends) and int(ends[-1]) != len(packed) or len(packed) and not len(ends):
            raise ValueError("names end at another place than their list says")
        self = cls.__new__(cls)
        self._take(packed, ends)
        return self

    def _take(self, packed, ends):
        self._bytes = packed
        # half the memory where four bytes are enough
        self._ends = ends.astype(np.uint32 if len(packed) < 2 ** 32 else np.int64, copy=False)

    def arrays(self) -> Tuple[np.ndarray, np.ndarray]:
        """(all names' bytes one behind another (uint8), where each one ends)."""
        return self._bytes, self._ends

    def __len__(self):
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._bytes[start:self._ends[index]].tobytes())


class NamesInClasses:
    """Names that begin with the folder of their class, which is kept once for each class."""

    def __init__(self, names: Names, labels: np.ndarray, classes: List[str]):
        self._names = names
        self._labels = labels
        self._classes = classes

    def __len__(self):
        return len(self._names)

    def __getitem__(self, index: int) -> str:
        return os.path.join(self._classes[int(self._labels[index])], self._names[index])


class Places(NamedTuple):
    """Where in archives pictures lie: picture i is sizes[i] bytes from offsets[i] on in archives[numbers[i]]."""
    archives: List[str]  # from the root on
    numbers: np.ndarray  # (N,) uint32
    offsets: np.ndarray  # (N,) int64
    sizes: np.ndarray  # (N,) uint32


class Sign(NamedTuple):
    """By what a change of a folder or an archive is noticed."""
    path: str  # from the root on
    time: int  # of its last change, in nanoseconds
    size: int  # bytes

    @classmethod
    def of(cls, root: str, path: str) -> "Sign":
        """That of root/path now. Raises OSError."""
        status = os.stat(os.path.join(root, path))
        return cls(path, status.st_mtime_ns, status.st_size)


class Found(NamedTuple):
    """The pictures of a folder: of ROOT/CLASS/.../PICTURE, in the order of torchvision's ImageFolder, or of archives in
    it."""
    root: str
    classes: List[str]
    names: Names  # of the files, from their class's folder on; in archives from the root on
    labels: np.ndarray  # (N,) int32, the place of each one's class in `classes`
    left_out: Counter  # {suffix of files that are no pictures, or where pictures lie that are not read: how many}
    signs: List[Sign]  # of each folder or archive that was looked into, from before that
    places: Optional[Places] = None  # where they lie, if in archives

    def paths(self):
        """The names from the root on, as a list."""
        return self.names if self.places else NamesInClasses(self.names, self.labels, self.classes)
