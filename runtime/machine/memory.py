"""A process's memory: how much it has taken, and how the C library gets it from the system."""
import ctypes
import mmap
import os
from functools import lru_cache

import torch

# mallopt's parameters (malloc.h), and madvise's advice (mman.h)
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_HUGE_PAGE, _COLLAPSE = 14, 25
_HUGE, _PIECE = 2 << 20, 32 << 20  # bytes; the system leaves a piece at the first page of it that cannot be moved
_MOST = 16 << 30  # bytes that are reserved

_broken_up = []  # holds something if huge pages can have become small ones since they were last brought together


def peak_memory_mb(device):
    """Peak memory so far in MiB: what PyTorch allocated on an accelerator, the process's resident set on CPU."""
    if device.type != "cpu":
        return getattr(torch, device.type).max_memory_allocated() / 2 ** 20
    if os.path.exists("/proc/self/status"):  # ru_maxrss can be that of the program which started this one
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 2 ** 10
    import resource  # not on Windows, where this line is not reached by the supported launchers
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20  # macOS counts bytes


def forget_peak_memory(device):
    """From now on `peak_memory_mb` is that of what comes; on a CPU where the system can do that (Linux)."""
    if device.type != "cpu":
        getattr(torch, device.type).reset_peak_memory_stats()
        return
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:
        pass


@lru_cache(maxsize=None)
def _glibc():
    """The C library where it is glibc, else None."""
    try:
        library = ctypes.CDLL("libc.so.6")
        library.malloc_trim.argtypes = [ctypes.c_size_t]
        library.mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
        library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        library.malloc.argtypes, library.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
        library.free.argtypes = [ctypes.c_void_p]
    except (OSError, AttributeError):
        return None
    return library


def keep_freed_memory(processes=1):
    """For a run on the CPU, before its tensors are made: what they free stays with the C library for the next ones,
    instead of going back to the system and being asked for anew, page by page, in every step; and it comes in huge
    pages of 2 MB where Linux gives them. processes: that this machine's memory is shared by.

    Does nothing where the C library is another one than glibc.
    """
    libc = _glibc()
    if libc is None:
        return
    libc.mallopt(_MMAP_MAX, 0)  # large tensors, too, come from the heap, which is kept
    libc.mallopt(_TRIM_THRESHOLD, -1)
    _reserve(libc, processes)
    _register_for_forks(libc, processes)


def use_huge_pages():
    """Brings this process's memory together in huge pages again. To be called when a loader's workers have started or
    freed memory was given back, which leaves small ones, and a step has taken what it needs.

    Takes a second or two, and does nothing where neither has been since. Linux before 6.1 leaves it for later.
    """
    libc = _glibc()
    if libc is not None and _broken_up and _may_reserve():
        _broken_up.clear()
        for start, end in _heap():
            for place in range(-(-start // _HUGE) * _HUGE, end, _PIECE):
                libc.madvise(place, min(_PIECE, end - place), _COLLAPSE)


def give_back_freed(processes=1):
    """Gives the system what this process has freed, after work of another kind than the rest. processes: as
    keep_freed_memory was told."""
    libc = _glibc()
    if libc is not None:
        _broken_up.append(True)
        libc.malloc_trim(0)
        _reserve(libc, processes)  # of which nothing is left


def _as_usual(libc):
    """What glibc settles at when it is left alone."""
    libc.mallopt(_MMAP_MAX, 65536)
    libc.mallopt(_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
    libc.mallopt(_TRIM_THRESHOLD, 64 << 20)


@lru_cache(maxsize=None)
def _register_for_forks(libc, processes):
    """Free memory does not pass on to a loader's workers: this process, writing to it again, would copy it page by
    page, small ones, and they would hold what was there. They themselves keep nothing that they free."""
    def start_anew():
        _as_usual(libc)
        libc.malloc_trim(0)

    os.register_at_fork(before=lambda: give_back_freed(processes), after_in_child=start_anew)


def _reserve(libc, processes):
    """Lets the heap grow at once, as far as addresses go (memory is taken where it is touched), and asks for huge pages
    there: a part that it grew by later would have to be asked for later."""
    if not _may_reserve():
        return
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    size = min(half // processes, _MOST)
    try:
        mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except (OSError, ValueError):  # refused: then malloc would leave the heap for good
        return
    libc.free(libc.malloc(size))
    for start, end in _heap():
        libc.madvise(start, end - start, _HUGE_PAGE)


def _may_reserve():
    """Whether the system gives huge pages, of 2 MB (where its small ones are larger they can have 512, and be mostly
    empty), and addresses are free of charge: nobody limits them, and the system does not count them as memory."""
    import resource
    unlimited = all(resource.getrlimit(kind)[0] == resource.RLIM_INFINITY
                    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    pages = "/sys/kernel/mm/transparent_hugepage/"
    enabled, size = (_read(pages + name) for name in ("enabled", "hpage_pmd_size"))
    return (unlimited and enabled is not None and "[never]" not in enabled and size == str(_HUGE)
            and _read("/proc/sys/vm/overcommit_memory") in ("0", "1"))


def _read(path):
    """The text of a system's file, None where there is none."""
    try:
        with open(path) as f:
            return f.read().strip()
    except OSError:
        return None


def _heap():
    """[(start, end)] of the heap's addresses, as Linux lists them."""
    try:
        with open("/proc/self/maps", "rb") as f:
            return [[int(address, 16) for address in line.split()[0].split(b"-")] for line in f
                    if line.rstrip().endswith(b"[heap]")]
    except OSError:
        return []
