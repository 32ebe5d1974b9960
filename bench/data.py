"""python -m bench.data: what a data set of a given number of pictures costs beside the pictures themselves, without
having them: memory of the main process and of a data-loading process, the sampler's time, the time to the first batch.

Each size is measured in a process of its own, on an index of made names in ImageNet's form, all of which stand for one
file. "private" is what no other process shares (/proc/self/smaps_rollup), over what the imports take.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter

from runtime import command  # (first: it makes torchvision importable on a CPU-only PyTorch)

# isort: split
import numpy as np
import torch
from PIL import Image

from datasets import PictureFiles, build_dataset, build_transform
from evo_vit.race import processor
from runtime.errors import RunFailed
from runtime.keeping.files import write_json, write_whole
from runtime.pictures import page
from runtime.pictures.batches import TrainingView, collate
from runtime.pictures.found import Found, Names, Sign
from runtime.pictures.index import Index
from runtime.pictures.reading import LastPicture
from samplers import build_train_sampler

SIZES = (10000, 100000, 1281167, 14197122)  # ImageNet-1k and ImageNet-21k are the last two
CLASSES, FOLDERS = {14197122: 21841}, 1000
SETTLED = 10 ** 18  # nanoseconds since 1970: the made folders' time, long ago


def private() -> float:
    """MiB of this process's memory that it shares with no other."""
    with open("/proc/self/smaps_rollup") as f:
        return sum(int(line.split()[1]) for line in f if line.startswith("Private_")) / 1024


def make(root: str, images: int):
    """The index of a data set of `images` pictures in as many folders as ImageNet has, in `root`, as a walk would have
    left it; one picture is there."""
    count = min(CLASSES.get(images, FOLDERS), images // 10)
    classes = ["n{:08d}".format(number) for number in range(count)]
    for part, pictures in (("train", images), ("val", count)):
        for name in classes:
            os.makedirs(os.path.join(root, part, name))
        labels = np.sort(np.arange(pictures, dtype=np.int32) % count)
        names = Names("{}_{}.JPEG".format(classes[label], number) for number, label in enumerate(labels.tolist()))
        signs = []
        for name in [""] + classes:
            os.utime(os.path.join(root, part, name), ns=(SETTLED, SETTLED))
            signs.append(Sign.of(os.path.join(root, part), name))
        index, folder = Index(root), os.path.join(root, part)
        index.of(folder, classes, lambda shown: Found(folder, classes, names, labels, Counter(), signs))
        index.keep()
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (375, 500, 3)).astype(np.uint8)).save(
        os.path.join(root, "one.jpg"))


class _One(LastPicture):
    """Every picture is the one that is there; also where the worker's memory is asked for."""

    def __init__(self, path):
        super().__init__()
        self.one = path

    def __call__(self, path):
        assert path.endswith(".JPEG")  # its name was read
        return super().__call__(self.one)


class _Report(torch.utils.data.Dataset):
    """Reads what a picture's loading reads of the data set, and says the private memory of the process that does it."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, draw):
        index = draw[0]
        self.dataset.path(index), int(self.dataset.labels[index])
        return 0


_start = 0.0  # private memory of a worker at its start


def _note_start(worker):
    global _start
    _start = private()


def _tell(items):
    return _start, private()


def measure(root: str, images: int, steps: int) -> dict:
    """The row of a table, of this process, whose memory before it is that of the imports."""
    torch.set_num_threads(1)
    transform = build_transform(True, "IMNET", 224)
    before, began = private(), time.perf_counter()
    dataset = build_dataset(True, "IMNET", root, transform, index=Index(root))
    assert isinstance(dataset, PictureFiles) and len(dataset) == images
    dataset.loader = _One(os.path.join(root, "one.jpg"))
    opened = time.perf_counter() - began
    sampler = build_train_sampler(dataset, 256, 0, 1)
    loader = torch.utils.data.DataLoader(TrainingView(dataset), batch_sampler=sampler, num_workers=2,
                                         collate_fn=collate)
    batches = iter(loader)
    next(batches)
    first = time.perf_counter() - began
    del batches
    began = time.perf_counter()
    iterator = iter(sampler)
    next(iterator)
    to_first = time.perf_counter() - began
    drawn = 1 + sum(1 for _, _ in zip(range(steps), iterator))
    per_batch = (time.perf_counter() - began - to_first) / max(drawn - 1, 1)
    main = private() - before  # with the epoch's order in memory
    del iterator
    small = torch.utils.data.DataLoader(_Report(dataset), batch_sampler=sampler, num_workers=1, collate_fn=_tell,
                                        worker_init_fn=_note_start)
    readings = [told for told, _ in zip(iter(small), range(steps))]
    return {"images": images, "open_s": opened, "first_batch_s": first, "sampler_first_s": to_first,
            "sampler_batch_ms": 1e3 * per_batch, "main_mib": main, "imports_mib": before,
            "worker_mib": readings[0][0], "worker_grows_mib": max(now for _, now in readings) - readings[0][0],
            "worker_pictures": 256 * len(readings)}


def table(sizes, steps: int, json_file=None, plot_file=None):
    """Prints a row for each of the sizes."""
    print("{}, {} cores, torch {}".format(processor(), os.cpu_count(), torch.__version__))
    print("| pictures | index read, s | first batch of 256, s | sampler: first, s | a batch, ms | main process in an "
          "epoch, over its imports, MiB | a worker at its start, MiB | its growth (over pictures), MiB |\n"
          + "|---" * 8 + "|")
    rows = []
    for images in sizes:
        with tempfile.TemporaryDirectory() as root:
            make(root, images)
            result = subprocess.run([sys.executable, "-m", "bench.data", "--measure", root, "--images", str(images),
                                     "--batches", str(steps)], stdout=subprocess.PIPE, universal_newlines=True)
        if result.returncode:
            raise RunFailed("the measurement of {} pictures ended with exit code {}".format(images, result.returncode))
        row = json.loads(result.stdout.splitlines()[-1])
        rows.append(row)
        print("| {images:,} | {open_s:.2f} | {first_batch_s:.2f} | {sampler_first_s:.2f} | {sampler_batch_ms:.2f} | "
              "{main_mib:.0f} | {worker_mib:.0f} | {worker_grows_mib:.1f} ({worker_pictures:,}) |".format(**row),
              flush=True)
    if json_file:
        write_json(json_file, {"machine": processor(), "rows": rows})
    if plot_file:
        write_whole(plot_file, lambda f: f.write(draw(rows)))


def draw(rows) -> bytes:
    """An SVG of the `rows`' memory over the number of pictures: the main process, and how much a worker grew."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 3))
    axis = figure.subplots()
    images = [row["images"] for row in rows]
    for name, marker, label in (("main_mib", "o", "main process in an epoch, over its imports"),
                                ("worker_grows_mib", "s", "growth of a worker")):
        axis.plot(images, [max(row[name], 0.1) for row in rows], marker=marker, label=label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("pictures in the data set")
    axis.set_ylabel("private memory, MiB")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    return page.draw(figure, "svg")


def get_args_parser():
    parser = command.Parser(prog="python -m bench.data", description=__doc__, **command.RAW_DESCRIPTION)
    parser.add_argument("--images", type=command.positive, nargs="+", default=list(SIZES), metavar="N",
                        help="numbers of pictures")
    parser.add_argument("--batches", type=command.positive, default=500, metavar="N",
                        help="batches of 256 over which the sampler's time and a worker's growth are measured")
    parser.add_argument("--json", type=command.path, metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", type=command.path, metavar="FILE.svg", help="draw the memory there")
    parser.add_argument("--measure", metavar="DIR", help=command.argparse.SUPPRESS)
    return parser


def run(args):
    if args.measure:
        print(json.dumps(measure(args.measure, args.images[0], args.batches)))
    else:
        table(args.images, args.batches, args.json, args.plot)


if __name__ == "__main__":
    command.run(run, get_args_parser().parse_args())
