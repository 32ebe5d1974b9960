"""Contenders take turns, each in a process of its own: with its own C library settings, caches and peak of memory."""
import math
import multiprocessing
import os
import signal
import tempfile
import time
from contextlib import contextmanager
from typing import List, NamedTuple, Optional

from runtime import command  # noqa: F401  (first: it makes torchvision importable on a CPU-only PyTorch)

# isort: split
from runtime.errors import RunFailed, UserError
from runtime.machine.devices import select_device, synchronize
from runtime.machine.memory import (
    forget_peak_memory,
    give_back_freed,
    keep_freed_memory,
    peak_memory_mb,
    use_huge_pages,
)
from runtime.machine.processes import World, barrier, init_processes
from runtime.machine.threads import share_cores

from . import contenders

WARM_UP = 2  # runs after a first one, which compiles


class Place(NamedTuple):
    """What a contender is given beside its name: task, batch, side of the images, device by name, and folders."""
    task: str
    batch: int
    size: int
    device: str  # npu, cuda or cpu
    photos: Optional[str] = None  # the loader's pictures
    published: Optional[str] = None  # a checkout of the published code
    processes: int = 1  # of every contender, with their share of the cores each


class Result(NamedTuple):
    """What a contender has shown: seconds per run in each round, its images and multiply-adds per run (those of all its
    processes), and the peak memory of a process in MiB."""
    seconds: List[float]
    images: int
    macs: Optional[int]
    peak_memory_mb: float


def build(text, place, device):
    """The contenders.Contender of `text`. Raises UserError as contenders' functions do."""
    if place.task == "loader":
        return contenders.loader(text, place.batch, place.size, device, place.photos)
    if "published" in contenders.parse(place.task, text)[1]:
        from . import published  # nothing else here imports the published code
        return published.build(text, place, device)
    return getattr(contenders, place.task)(text, place.batch, place.size, device)


def _timed(contender, count, device):
    """Seconds per run of `count` runs, which all processes of a contender make together."""
    barrier()
    start = time.perf_counter()
    for _ in range(count):
        contender.run()
    synchronize(device)
    return (time.perf_counter() - start) / count


def _serve(connection, text, place, rank, meeting):
    """A contender's process: says what it is, then runs as often as each number that it receives says, and ends with
    its peak memory when it receives None. meeting: a file by which several find each other."""
    try:
        device = select_device(place.device, rank, place.processes)
        share_cores(place.processes)
        init_processes(World(rank, place.processes, rank, place.processes), device, "file://" + meeting)
        if not contenders.is_plain(place.task, text):
            keep_freed_memory(place.processes)
        contender = build(text, place, device)
    except UserError as error:
        connection.send(error)
        return
    contender.run()
    if not contenders.is_plain(place.task, text):
        give_back_freed(place.processes)  # what building and compiling have left
        contender.run()
        use_huge_pages()
    for _ in range(WARM_UP):
        contender.run()
    synchronize(device)
    forget_peak_memory(device)  # that of building it
    connection.send((contender.images, contender.macs))
    try:
        for count in iter(connection.recv, None):
            connection.send(_timed(contender, count, device))
    except EOFError:  # the first process is gone
        return
    connection.send(peak_memory_mb(device))


class _Process:
    """The first process's end of one of a contender's."""

    def __init__(self, text, place, rank, meeting):
        self.text = text
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads that it does not have
        self.connection, theirs = context.Pipe()
        # no daemon, which may have no children: a compiler starts some
        self.process = context.Process(target=_serve, args=(theirs, text, place, rank, meeting))
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for the first process alone
        try:
            self.process.start()
        finally:
            signal.signal(signal.SIGINT, handler)
        theirs.close()

    def send(self, value):
        with self._ended_is_said():
            self.connection.send(value)

    def receive(self):
        with self._ended_is_said():
            answer = self.connection.recv()
        if isinstance(answer, UserError):
            raise answer
        return answer

    @contextmanager
    def _ended_is_said(self):
        try:
            yield
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            raise RunFailed("contender {}: its process ended with exit code {}{}".format(
                self.text, code, ", as the system does where memory runs out" if code == -9 else ""))

    def stop(self):
        self.process.terminate()
        self.process.join()


class _Worker:
    """A contender's processes, mostly one."""

    def __init__(self, text, place, meeting):
        self.processes = [_Process(text, place, rank, meeting) for rank in range(place.processes)]
        self.images = self.macs = None

    def wait(self):
        """Until it is built, and has run."""
        answers = [process.receive() for process in self.processes]
        self.images = sum(images for images, _ in answers)
        self.macs = sum(macs for _, macs in answers) if answers[0][1] else None

    def _ask(self, value):
        """The largest of what its processes answer to `value`."""
        for process in self.processes:
            process.send(value)
        return max(process.receive() for process in self.processes)

    def take_turn(self, seconds):
        """Seconds per run, of runs that last for `seconds` at least."""
        taken = self._ask(1)  # finds the caches as the contender before it has left them
        # of so long a run they are a small part
        return taken if taken >= seconds else self._ask(math.ceil(seconds / taken))

    def peak(self):
        return self._ask(None)

    def stop(self):
        for process in self.processes:
            process.stop()


def race(texts: List[str], place: Place, rounds: int, seconds: float) -> List[Result]:
    """Every contender of `texts` in turn in every one of `rounds`, for `seconds` at least.

    They are built one after the other, so that none slows another's start. Raises UserError for one that cannot be
    built, and RunFailed for one whose process ends.
    """
    workers = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number, text in enumerate(texts):
                workers.append(_Worker(text, place, os.path.join(folder, str(number))))
                workers[-1].wait()
            times = [[worker.take_turn(seconds) for worker in workers] for _ in range(rounds)]
            peaks = [worker.peak() for worker in workers]
        finally:
            for worker in workers:
                worker.stop()
    return [Result(list(own), worker.images, worker.macs, peak)
            for own, worker, peak in zip(zip(*times), workers, peaks)]
