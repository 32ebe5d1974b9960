"""Curves of one or more runs, laid over each other, and what their configurations differ in, as one web page:
python report.py RUN [RUN ...] [--output FILE]"""
import json
import os
import sys
from typing import Dict, List, NamedTuple, Optional

from runtime import command
from runtime.errors import UserError
from runtime.keeping.files import write_text
from runtime.keeping.output import median_speed
from runtime.pictures import page

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
STYLES = ("-", "--", ":", "-.")
PARTS = ("computing", "waiting for data", "evaluating, saving")  # of an epoch's time


class Curve(NamedTuple):
    """One panel: a title, the axis, and the names of log.txt's figures, each with what it is called."""
    title: str
    unit: str
    figures: Dict[str, str]
    log_scale: bool = False


CURVES = (
    Curve("Loss", "", {"train_loss": "training", "test_loss": "validation",
                       "test_ema_loss": "validation of the average"}),
    Curve("Accuracy", "%", {"test_acc1": "top-1", "test_acc5": "top-5", "test_ema_acc1": "top-1 of the average"}),
    Curve("Learning rate", "", {"train_lr": "learning rate"}),
    Curve("Images/s", "", {"train_images_per_s": "training", "test_images_per_s": "evaluation"}),
    Curve("Loss scale", "", {"loss_scale": "loss scale"}, log_scale=True))


class Run(NamedTuple):
    name: str
    log: List[dict]  # log.txt's lines
    configuration: Optional[dict]  # args.json
    notes: List[str]  # what is wrong with its files


def read_run(path):
    """The Run in the folder `path`, or of the log file `path`. Lines that are not whole are left out and noted.

    Raises UserError where there is no log, or no whole line in it.
    """
    log = os.path.join(path, "log.txt") if os.path.isdir(path) else path
    try:
        with open(log, errors="replace") as f:
            lines = f.read().splitlines()
    except OSError as error:
        raise UserError("{} cannot be read ({}); name a run's output folder or its log.txt".format(log, error.strerror))
    entries, bad = [], []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            entries.append(dict(entry, epoch=int(entry["epoch"])))
        except (ValueError, TypeError, KeyError):
            bad.append(number)
    if not entries:
        raise UserError("{} holds no line of a finished epoch".format(log))
    notes = ["{}: line {} is not whole and was left out; the other {} are used".format(log, number, len(entries))
             for number in bad]
    configuration = None
    try:
        with open(os.path.join(os.path.dirname(log), "args.json")) as f:
            configuration = dict(json.load(f))
    except (OSError, ValueError, TypeError) as error:
        notes.append("{} has no readable args.json beside it, so its configuration is not known ({})".format(
            log, getattr(error, "strerror", None) or "not whole"))
    return Run(path.rstrip("/") or path, entries, configuration, notes)


# ------------------------------------------------------------------------------------------------- drawing

def _numbers(log, figure):
    """([epochs], [values]) of the lines that have that figure."""
    found = [(entry["epoch"], entry[figure]) for entry in log if isinstance(entry.get(figure), (int, float))]
    return [epoch for epoch, _ in found], [value for _, value in found]


def _new_axis(title, unit):
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    figure = Figure(figsize=(6, 2.8))
    axis = figure.subplots()
    axis.set_title(page.label(title), loc="left", fontsize=11)
    axis.set_xlabel("epoch")
    axis.set_ylabel(unit)
    axis.grid(alpha=0.25)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure, axis


def _finish(figure, axis, description):
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return page.image(page.draw(figure, "svg"), "svg+xml", description)


def missing(title, runs):
    """What stands in a panel's place where none of the `runs` has its figures."""
    return "<p>{}: not in {} log.</p>".format(page.text(title), "this" if len(runs) == 1 else "any")


def draw_curve(curve, runs):
    """The panel of a Curve over `runs` as HTML; a sentence where no run has these figures."""
    figure, axis = _new_axis(curve.title, curve.unit)
    drawn = False
    for number, run in enumerate(runs):
        for style, (name, called) in zip(STYLES, curve.figures.items()):
            epochs, values = _numbers(run.log, name)
            if epochs:
                axis.plot(epochs, values, style, color=COLOURS[number % len(COLOURS)], marker="." if len(
                    epochs) < 30 else None, label=page.label("{}: {}".format(run.name, called)))
                drawn = True
    if not drawn:
        return missing(curve.title, runs)
    if curve.log_scale:
        axis.set_yscale("log", base=2)
    return _finish(figure, axis, "{} over epochs".format(curve.title))


def draw_keep_ratios(runs):
    """For each stage of each run, the share of tokens that its blocks update slowly."""
    figure, axis = _new_axis("Keep ratio of each stage", "share of tokens")
    drawn = False
    for number, run in enumerate(runs):
        found = [(entry["epoch"], entry["keep_ratios"])
                  for entry in run.log if isinstance(entry.get("keep_ratios"), list)]
        for stage in range(max((len(ratios) for _, ratios in found), default=0)):
            points = [(epoch, ratios[stage]) for epoch, ratios in found if stage < len(ratios)]
            axis.step(*zip(*points), where="mid", linestyle=STYLES[stage % len(STYLES)], linewidth=4 - stage, alpha=0.8,
                      color=COLOURS[number % len(COLOURS)],
                      label=page.label("{}: stage {}".format(run.name, stage + 1)))
            drawn = True
    if not drawn:
        return missing("Keep ratio of each stage", runs)
    axis.set_ylim(0, 1.05)
    return _finish(figure, axis, "Keep ratio of each stage over epochs")


def draw_time(run):
    """How an epoch's seconds divide, for one run."""
    title = "Time of an epoch: {}".format(run.name)
    rows = [(e["epoch"], e["train_seconds"] * (1 - e["waiting_for_data"]), e["train_seconds"] * e["waiting_for_data"],
             max(e["seconds"] - e["train_seconds"], 0))
            for e in run.log if all(isinstance(e.get(name), (int, float))
                                    for name in ("train_seconds", "waiting_for_data", "seconds"))]
    if not rows:
        return missing(title, [run])
    figure, axis = _new_axis(title, "seconds")
    epochs = [row[0] for row in rows]
    bottom = [0.0] * len(rows)
    for colour, part, values in zip(COLOURS, PARTS, zip(*(row[1:] for row in rows))):
        axis.bar(epochs, values, bottom=bottom, color=colour, width=0.9, label=part)
        bottom = [a + b for a, b in zip(bottom, values)]
    return _finish(figure, axis, title)


# ------------------------------------------------------------------------------------------------- tables

def summary(runs):
    """A table of what each run reached."""
    rows = []
    for run in runs:
        best = max(run.log, key=lambda entry: entry.get("test_acc1", -1))
        speed = median_speed(_numbers(run.log, "train_images_per_s")[1])
        rows.append([run.name, len(run.log), "{:.2f} % (epoch {})".format(best.get("test_acc1", float("nan")),
            best["epoch"]), "{:.4f}".format(run.log[-1].get("train_loss", float("nan"))), "{:.1f}".format(speed)
            if speed else "-", "{:.1f}".format(sum(_numbers(run.log, "seconds")[1]) / 60)])
    return page.table(["run", "epochs", "best top-1", "last training loss", "images/s (median)", "minutes"], rows)


def differences(runs):
    """[[flag, its value in each run]] for the flags in which the runs with a known configuration are not alike."""
    known = [run.configuration for run in runs if run.configuration is not None]
    names = sorted(set(name for configuration in known for name in configuration))
    rows = [[name] + [json.dumps(configuration[name]) if name in configuration else "-" for configuration in known]
            for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def configurations(runs):
    """The configurations as HTML: the differences first, then all of each run."""
    known = [run for run in runs if run.configuration is not None]
    parts = []
    if len(known) > 1:
        rows = differences(known)
        parts.append(page.table(["flag"] + [run.name for run in known], rows) if rows else "<p>They do not differ.</p>")
    for run in known:
        parts.append("<details><summary>All of {}</summary>{}</details>".format(page.text(run.name),
                     page.table(["flag", "value"], [[k, json.dumps(v)] for k, v in sorted(run.configuration.items())])))
    return "\n".join(parts) or "<p>Not known.</p>"


def build_page(runs):
    """The whole page of a list of Runs, as text."""
    notes = ["<p class=\"note\">{}</p>".format(page.text(note)) for run in runs for note in run.notes]
    panels = [draw_curve(curve, runs) for curve in CURVES] + [draw_keep_ratios(runs)] + [draw_time(run) for run in runs]
    panels.sort(key=lambda panel: panel.startswith("<p>"))  # what is missing comes last
    return page.page("Training of " + ", ".join(run.name for run in runs), "\n".join(
        notes + [summary(runs), "<h2>Curves</h2><div class=\"side-by-side\">"] + panels + [
            "</div><h2>Configuration{}</h2>".format("" if len(runs) == 1 else ": what differs"), configurations(runs)]))


def run(args):
    command.need("report.py", "matplotlib")
    runs = [read_run(path) for path in args.runs]
    for note in (note for one in runs for note in one.notes):
        print("Note: " + note, file=sys.stderr)
    first = args.runs[0]
    output = args.output or os.path.join(first if os.path.isdir(first) else os.path.dirname(first), "report.html")
    write_text(output, build_page(runs))
    print("{} shows {} epochs of {}".format(output, sum(len(one.log)
          for one in runs), ", ".join(one.name for one in runs)))


def main(argv=None):
    parser = command.Parser(prog="python report.py", description=__doc__)
    parser.add_argument("runs", nargs="+", type=command.path, metavar="RUN",
                        help="a run's output folder, or its log.txt")
    parser.add_argument("--output", type=command.path, metavar="FILE",
                        help="the page (default: report.html in the first run's folder)")
    command.run(run, parser.parse_args(argv))


if __name__ == "__main__":
    main()
