"""python -m bench.chunks: how much work at a time suits this CPU's caches.

Attention matrices (ops.ATTENTION_CHUNK) and a teacher's images (teacher.CPU_CHUNK) come a few at a time. Each of these
sizes is tried at parts and multiples of itself, in turn. A cell is the time in milliseconds, by the median over the
rounds, and in brackets the ratio to that at the size as it is (above 1: slower).
"""
import statistics
import time
from typing import Any, Callable, NamedTuple

from runtime import command  # (first: it makes torchvision importable on a CPU-only PyTorch)

# isort: split
import torch

from evo_vit import ops
from evo_vit.compat import create_model
from runtime.learning import teacher
from runtime.machine.memory import keep_freed_memory

from .contenders import Training, inference

FACTORS = (0.125, 0.25, 0.5, 1, 2, 4, 8)
CPU = torch.device("cpu")


class Size(NamedTuple):
    """`owner`.`name` is the size; `run()` is some work that depends on it."""
    what: str
    owner: Any
    name: str
    run: Callable


def _teacher(batch):
    network = create_model("regnety_160").eval().requires_grad_(False)
    teacher.fold_batch_norms(network, torch.zeros(1, 3, 224, 224))
    built, images = teacher.Teacher(network, channels_last=True), torch.randn(batch, 3, 224, 224)
    return lambda: built(images)


def sizes(batch):
    """What is measured, one after the other, with `batch` images at a time."""
    def attention(kind, run):
        return Size("attention, EvoLeViT_256_384, " + kind, ops, "ATTENTION_CHUNK", run)

    yield attention("inference", inference("EvoLeViT_256_384,fuse", batch, 384, CPU).run)
    yield attention("training step", Training("EvoLeViT_256_384,teacher=none", batch, 384, CPU).run)
    yield Size("teacher, regnety_160", teacher, "CPU_CHUNK", _teacher(batch))


def race(size, rounds):
    """{factor: the median of its seconds}; the size is what it was afterwards."""
    own = getattr(size.owner, size.name)
    seconds = {factor: [] for factor in FACTORS}
    try:
        for _ in range(rounds):
            for factor in FACTORS:
                setattr(size.owner, size.name, max(int(own * factor), 1))
                size.run()  # the others have left their data in the caches
                start = time.perf_counter()
                size.run()
                seconds[factor].append(time.perf_counter() - start)
    finally:
        setattr(size.owner, size.name, own)
    return {factor: statistics.median(found) for factor, found in seconds.items()}


def main(args):
    keep_freed_memory()
    print("| what, {} images | {} |".format(args.batch_size, " | ".join("x {:g}".format(f) for f in FACTORS)))
    print("|---|" + "---|" * len(FACTORS))
    for size in sizes(args.batch_size):
        found = race(size, args.rounds)
        print("| {}: {} | {} |".format(size.what, getattr(size.owner, size.name), " | ".join(
            "{:.0f} ({:.2f})".format(1e3 * seconds, seconds / found[1]) for seconds in found.values())), flush=True)


if __name__ == "__main__":
    parser = command.Parser(prog="python -m bench.chunks", description=__doc__, **command.RAW_DESCRIPTION)
    parser.add_argument("--batch-size", type=command.positive, default=16, metavar="N", help="images at a time")
    parser.add_argument("--rounds", type=command.positive, default=5, metavar="N", help="how often each has its turn")
    command.run(main, parser.parse_args())
