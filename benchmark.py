"""Measures speed and memory, contender against contender in turn, each in a process of its own. PERFORMANCE.md holds
such tables.

python benchmark.py inference --compare EvoLeViT_256,plain EvoLeViT_256,fuse levit_256,fuse
python benchmark.py train     --compare EvoLeViT_256,plain EvoLeViT_256 EvoLeViT_256,compile
python benchmark.py loader    --compare plain recipe
python benchmark.py breakdown --compare EvoLeViT_256
python benchmark.py operators --compare EvoLeViT_256_384,teacher=none    (how many are launched, and which)
python benchmark.py report    (all tables, about 40 minutes; --quick: 5)

A contender is a model of timm's registry and, behind commas, how it runs:
  plain          bench/plain.py: the paper's equations and the published step, written down without a thought of speed;
                 the C library gives its memory back to the system, as it does when it is left alone
  published      the published code itself, with its own defaults; --published names a checkout of its repository
  dense          no token selection: every token goes through every block
  keep=SHARE     this share of the tokens goes the slow way where tokens are selected
  fuse           batch norms folded (inference)
  compile        torch.compile
  amp            mixed precision: bf16 on a CPU, else fp16; for inference the whole model is in that format
  channels-last, contiguous    memory format; if not given the one that suits the device
  teacher=NAME   distils from this model (train; regnety_160 if not given), or from none
  teacher-size=N shows the teacher images of N pixels
  teacher-precision=P    the teacher in a format of its own, as main.py's flag: float32, bf16, int8 (train)
  stored         has the teacher's labels already, as with main.py --teacher-labels
A loader is plain (torchvision's and timm's) or recipe (main.py's), and behind commas draft (--jpeg-draft), fast
(--image-backend fast), normalized (with the work that main.py leaves to the device), once (without repeated
augmentation).

python benchmark.py inference --keep-ratio 1 0.9 0.7 0.5 0.3 --compare EvoLeViT_256,fuse --resume FILE --plot FILE.html
races a contender with each share of its tokens and evaluates a checkpoint of it with each: speed against accuracy.
"""
import argparse
import itertools
import os
import statistics
import time
from contextlib import nullcontext

from runtime import command  # first: it makes torchvision importable on a CPU-only PyTorch

# isort: split
import torch

import engine
from bench import contenders, operators, report, tradeoff, turns
from evo_vit.compat import versions
from runtime.errors import UserError
from runtime.keeping.files import write_json, write_text
from runtime.learning.models import default_input_size
from runtime.machine.cost import measure_matmul_rate
from runtime.machine.devices import select_device, synchronize
from runtime.machine.machine import Machine
from runtime.machine.memory import keep_freed_memory

TASKS = {"inference": ["EvoLeViT_256,plain", "EvoLeViT_256,fuse", "levit_256,fuse"],
         "train": ["EvoLeViT_256,plain", "EvoLeViT_256"], "loader": ["plain", "recipe"], "breakdown": ["EvoLeViT_256"],
         "operators": ["EvoLeViT_256_384,teacher=none"]}
TRADE_OFF = {"inference": "EvoLeViT_256,fuse", "train": "EvoLeViT_256"}  # what --keep-ratio races if nothing is named
FLAGS = ("compile", "channels-last", "amp", "fuse")


def get_args_parser():
    parser = command.Parser(prog="python benchmark.py", description=__doc__, **command.RAW_DESCRIPTION)
    add = parser.add_argument
    add("task", choices=sorted(TASKS) + ["report"], help="what to measure; report: all tables, as a page of this "
        "machine in docs/performance")
    add("--compare", nargs="+", metavar="CONTENDER", help="the first is the one that the others are compared with "
        "(default: {})".format("; ".join("for {} {}".format(task, " ".join(names)) for task,
        names in sorted(TASKS.items()))))
    for flag in FLAGS:
        add("--" + flag, action="store_true", help="the same as the word {} behind every contender".format(flag))
    add("--batch-size", type=command.positive, nargs="+", default=[16], metavar="N", help="images at a time")
    add("--input-size", type=command.positive, nargs="+", metavar="PIXELS",
        help="side of the images (default: the first contender's own)")
    add("--photo-size", type=command.positive, nargs=2, default=(500, 375),
        metavar=("WIDTH", "HEIGHT"), help="of the loader's JPEGs, in pixels")
    add("--rounds", type=command.positive, default=7, metavar="N", help="how often every contender has its turn")
    add("--processes", type=command.positive, default=1, metavar="N", help="inference and train: processes of every "
        "contender, each with its share of the cores and a batch of its own; they average their gradients")
    add("--seconds", type=float, default=1.0, metavar="S", help="how long a turn lasts at least, in seconds")
    add("--device", default="auto", choices=("auto", "npu", "cuda", "cpu"), help="auto takes the first of npu, cuda "
        "and cpu")
    add("--published", type=command.path, metavar="DIR", help="a checkout of the published code, for the contenders "
        "named published; report: what the tables compare with, in place of plain")
    add("--json", type=command.path, metavar="FILE", help="write the figures there")
    add("--keep-ratio", type=float, nargs="+", metavar="SHARE", help="inference and train: every contender with each "
        "of these shares of its tokens")
    add("--resume", type=command.path, metavar="FILE", help="with --keep-ratio: a checkpoint whose accuracy is "
        "measured, too")
    add("--data-path", type=command.path, metavar="DIR", help="its validation pictures (default: where training found "
        "them)")
    add("--plot", type=command.path, metavar="FILE", help="with --keep-ratio: write the table and the curve as a page")
    add("--quick", action="store_true", help="report: fewer rounds, and without the compiler")
    add("--output", type=command.path, metavar="DIR", help="report: folder of the page, docs/performance if not given")
    return parser


def compare(args, texts, batch, size, device, folder, rate):
    """The rows of one table, as dicts."""
    place = turns.Place(args.task, batch, size, device.type, folder, args.published, args.processes)
    results = turns.race(texts, place, args.rounds, args.seconds)
    rows = []
    for text, (seconds, images, macs, peak) in zip(texts, results):
        median = statistics.median(seconds)
        # round by round, so that noise of minutes cancels
        ratios = [first / own for first, own in zip(results[0].seconds, seconds)]
        rows.append({"contender": text, "batch_size": batch, "input_size": size, "milliseconds": 1e3 * median,
            "milliseconds_min": 1e3 * min(seconds), "milliseconds_max": 1e3 * max(seconds),
            "images_per_s": images / median, "ratio": statistics.median(ratios), "ratio_min": min(ratios),
            "ratio_max": max(ratios), "gflops": macs and 2e-9 * macs,
            "of_matmul_rate": macs and 2 * macs / median / rate, "peak_memory_mb": peak})
    return rows


def show(rows):
    """Prints the rows as a Markdown table."""
    print("\n".join(report.markdown(rows)), flush=True)


class Stopwatch:
    """Sums the time of functions that are called inside one another's owner."""

    def __init__(self, device):
        self.device = device
        self.seconds = {}

    def watch(self, name, owner, attribute):
        """Replaces owner.attribute by itself with a clock. The device is waited for, before and after."""
        inner = getattr(owner, attribute)

        def timed(*args, **kwargs):
            synchronize(self.device)
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            synchronize(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            return result
        setattr(owner, attribute, timed)


def break_down(args, text, batch, size, device, folder):
    """[{part, milliseconds, share}] of a training step whose parts wait for one another, with its data in one
    process."""
    watch = Stopwatch(device)
    keep_freed_memory()
    training = contenders.Training(text, batch, size, device)
    data = contenders.loader("recipe", batch, size, device, folder)
    if not hasattr(training, "learner") or "compile" in text.split(","):  # the compiler would look into the clocks
        raise UserError("contender {}: the breakdown is that of the recipe's own step, not compiled".format(text))
    watched = {"run": data.run, "normalize": contenders.normalize}
    source = argparse.Namespace(**watched)
    watch.watch("data (one core)", source, "run")
    watch.watch("transfer, normalisation", source, "normalize")
    for name, owner, attribute in (
            ("teacher forward", training.criterion, "teach"), ("student forward", training.learner.model, "forward"),
            ("loss", training.criterion, "forward"), ("backward", training.learner.machine.precision, "backward"),
            ("clipping", engine, "clip_gradients"), ("optimiser", training.optimizer, "step"),
            ("average", training.learner.average, "update")):
        watch.watch(name, owner, attribute)
    for run in range(args.rounds + 2):
        if run == 2:
            watch.seconds.clear()
        training.images = source.normalize(source.run()[0], device, contenders.channels_last({}, device))
        training.run()
    total = sum(watch.seconds.values())
    return [{"part": name, "milliseconds": 1e3 * seconds / args.rounds, "share": seconds / total}
            for name, seconds in watch.seconds.items()]


def need_published(task, texts, args):
    """Raises UserError where a contender of `texts`, as `task` knows them, is the published code and there is none or
    the task cannot run it, and for a folder that does not exist."""
    for text in texts:
        if "published" in contenders.parse(task, text)[1]:
            if args.task not in ("inference", "train"):
                raise UserError("contender {}: the published code runs in inference and train alone".format(text))
            if args.published is None:
                raise UserError("contender {}: --published DIR names a checkout of the published code".format(text))
    if args.published is not None and not os.path.isdir(args.published):
        raise UserError("--published {}: there is no such folder".format(args.published))


def measure(args):
    """The figures, as they go to --json."""
    device = select_device(args.device)
    words = [flag for flag in FLAGS if getattr(args, flag.replace("-", "_"))]
    texts = [",".join([text] + words) for text in args.compare or TASKS[args.task]]
    for flag in ("keep_ratio", "processes"):
        if getattr(args, flag) not in (None, 1) and args.task not in ("inference", "train"):
            raise UserError("--{} is for inference and train".format(flag.replace("_", "-")))
    if args.keep_ratio:
        texts = ["{},keep={:g}".format(text, ratio) for text in (texts if args.compare else [TRADE_OFF[args.task]])
                 for ratio in args.keep_ratio]
    elif args.resume or args.plot:
        raise UserError("--resume and --plot need --keep-ratio")
    task = "train" if args.task in ("breakdown", "operators") else args.task
    names = [contenders.parse(task, text)[0] for text in texts]
    need_published(task, texts, args)
    sizes = args.input_size or [224 if args.task == "loader" else default_input_size(names[0])]
    # several processes share a CPU; each has an accelerator of its own
    rate = measure_matmul_rate(device) * (1 if device.type == "cpu" else args.processes)
    figures = {"task": args.task, "device": device.type, "threads": torch.get_num_threads(),
        "torch": versions()["torch"], "matmul_gflops_per_s": rate / 1e9, "rows": []}
    print(
        "{device}, threads {threads}, torch {torch}, float32 matrix products {matmul_gflops_per_s:.0f} GFLOP/s".format(
        **figures))
    with contenders.photos(*args.photo_size) if args.task in ("loader", "breakdown") else nullcontext() as folder:
        if args.task == "breakdown":
            for text in texts:
                rows = [dict(row, contender=text)
                        for row in break_down(args, text, args.batch_size[0], sizes[0], device, folder)]
                show(rows)
                figures["rows"] += rows
            return figures
        if args.task == "operators":
            for text in texts:
                rows = operators.rows(text, operators.count_parts(text, args.batch_size[0], sizes[0], device))
                print("\n".join(operators.markdown(rows)), flush=True)
                figures["rows"] += rows
            return figures
        for batch, size in itertools.product(args.batch_size, sizes):
            rows = compare(args, texts, batch, size, device, folder, rate)
            show(rows)
            figures["rows"] += rows
    return figures


def accuracies(args):
    """{keep ratio: top-1} of --resume, {} without it."""
    if not args.resume:
        return {}
    if args.task != "inference":
        raise UserError("--resume measures accuracy, which is that of inference; leave it out of {}".format(args.task))
    parsed = [contenders.parse(args.task, text) for text in args.compare or [TRADE_OFF[args.task]]]
    if args.amp or any("amp" in options for _, options in parsed):
        raise UserError("--resume is evaluated in float32 and amp computes otherwise; leave one of them out")
    names = {name for name, _ in parsed}
    sizes = args.input_size or [default_input_size(min(names))]
    if len(names) > 1 or len(sizes) > 1:
        raise UserError("--resume is a checkpoint of one model at one size; give one contender and one --input-size")
    return dict(zip(args.keep_ratio, tradeoff.accuracies(args.resume, min(names), sizes[0], args.data_path,
                                                         args.keep_ratio, Machine(select_device(args.device)))))


def add_accuracy(found, rows):
    """Adds model, keep_ratio and acc1, what `accuracies` has found or None, to rows of --keep-ratio."""
    for row in rows:
        row["model"], share = row["contender"].rsplit(",keep=", 1)
        row["keep_ratio"] = float(share)
        row["acc1"] = next((value for ratio, value in found.items() if "{:g}".format(ratio) == share), None)
        if row["acc1"] is not None:
            print("| {contender} | top-1 {acc1:.2f} %, stage-wise |".format(**row))


def check(args):
    """Raises UserError for a flag that the task does not read."""
    defaults = vars(get_args_parser().parse_args([args.task]))
    given = {name for name, value in vars(args).items() if value != defaults[name]}
    read = {"task", "device", "published", "quick", "output"}
    unread = given - read if args.task == "report" else given & {"quick", "output"}
    if args.task in ("breakdown", "operators"):
        unread |= {name for name in ("batch_size", "input_size") if len(getattr(args, name) or []) > 1}
    if args.task not in ("loader", "breakdown"):
        unread |= given & {"photo_size"}
    if args.task in ("breakdown", "operators"):  # no turns; the breakdown has rounds of its own
        unread |= given & {"seconds"}
    if args.task == "operators":
        unread |= given & {"rounds"}
    if args.task != "report" and not any("published" in text.split(",") for text in args.compare or ()):
        unread |= given & {"published"}
    if args.data_path and not args.resume:
        unread.add("data_path")
    if unread:
        raise UserError("--{} has no effect on {} here; leave it out{}".format(
            min(unread).replace("_", "-"), args.task, "" if "size" not in min(unread) else ", or give one value"))


def run(args):
    check(args)
    if args.task == "report":
        need_published("report", [], args)
        report.report(select_device(args.device), args.quick, args.output, args.published)
        return
    if args.plot:
        command.need("--plot", "matplotlib")
    found = accuracies(args) if args.keep_ratio else {}
    figures = measure(args)
    if args.keep_ratio:
        add_accuracy(found, figures["rows"])
        if args.plot:
            title = "Speed and accuracy over the keep ratio ({}, {} threads)".format(figures["device"],
                                                                                     figures["threads"])
            write_text(args.plot, tradeoff.draw(figures["rows"], title))
            print("{} shows the curve".format(args.plot))
    if args.json:
        write_json(args.json, figures)


def main(argv=None):
    command.run(run, get_args_parser().parse_args(argv))


if __name__ == "__main__":
    main()
