"""python benchmark.py report: every table of speed, on this machine.

It writes docs/performance/MACHINE.md, and the figures beside it, after each table; the same command goes on where it
was interrupted, and measures anew what is asked for otherwise than it was (--quick). It takes about 40 minutes, and
with --quick, without the compiler, about 5.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from typing import Dict, List, NamedTuple, Optional, Tuple

import torch

from evo_vit.compat import versions
from evo_vit.race import processor
from runtime.errors import RunFailed, UserError
from runtime.keeping.files import write_json, write_text

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
QUICK = ["--rounds", "2", "--seconds", "0.2"]


class Table(NamedTuple):
    """A call of benchmark.py, and what its ratios should be at least: {contender: (in words, ratio)}."""
    title: str
    arguments: List[str]
    contenders: List[str]
    targets: Dict[str, Tuple[str, float]] = {}


TABLES = [
    Table("Training step", ["train", "--memory"],
          ["EvoLeViT_256,plain", "EvoLeViT_256", "EvoLeViT_256,compile", "EvoLeViT_256,amp", "EvoLeViT_256,stored"],
          {"EvoLeViT_256": ("full step with teacher, float32", 1.35),
           "EvoLeViT_256,compile": ("the same, compiled", 1.6),
           "EvoLeViT_256,amp": ("the same in mixed precision", 2.4),
           "EvoLeViT_256,stored": ("the same with stored teacher labels, float32", 4.0)}),
    Table("Training step at 384 pixels, the teacher at 224", ["train", "--input-size", "384", "--batch-size", "4"],
          ["EvoLeViT_256_384,plain", "EvoLeViT_256_384,teacher-size=224", "EvoLeViT_256_384,teacher-size=224,compile"],
          {"EvoLeViT_256_384,teacher-size=224": ("at 384 with the teacher at 224, float32", 3.0),
           "EvoLeViT_256_384,teacher-size=224,compile": ("the same, compiled", 3.0)}),
    Table("Training step without a teacher", ["train"],
          ["EvoLeViT_256,plain,teacher=none", "EvoLeViT_256,teacher=none", "EvoLeViT_256,compile,teacher=none",
           "EvoLeViT_256,amp,teacher=none"],
          {"EvoLeViT_256,teacher=none": ("student step alone, float32", 1.25),
           "EvoLeViT_256,amp,teacher=none": ("the same in mixed precision", 1.8)}),
    Table("Parts of a step", ["breakdown"], ["EvoLeViT_256"]),
    Table("Inference", ["inference"],
          ["EvoLeViT_256,plain", "EvoLeViT_256,plain,fuse", "EvoLeViT_256,fuse", "EvoLeViT_256,fuse,compile",
           "EvoLeViT_256,fuse,amp", "levit_256,fuse", "EvoLeViT_256,dense,fuse"],
          {"EvoLeViT_256,fuse": ("inference, batch 16, float32", 1.1),
           "EvoLeViT_256,fuse,compile": ("the same, compiled", 1.2),
           "EvoLeViT_256,fuse,amp": ("the same in half precision", 2.0)}),
    Table("Inference of one image", ["inference", "--batch-size", "1"],
          ["EvoLeViT_256,plain", "EvoLeViT_256,fuse", "EvoLeViT_256,fuse,compile"],
          {"EvoLeViT_256,fuse,compile": ("inference, batch 1, compiled", 1.4)}),
    Table("Inference over sizes", ["inference", "--batch-size", "4", "--input-size", "224", "320", "384", "512"],
          ["EvoLeViT_256,plain", "EvoLeViT_256,fuse"]),
    Table("Evo-DeiT, inference", ["inference"],
          ["deit_small_patch16_224", "evo_deit_small_patch16_224"],
          {"evo_deit_small_patch16_224": ("Evo-DeiT-small against dense deit_small, inference", 1.35)}),
    Table("Loader, one core", ["loader"], ["plain", "recipe", "recipe,fast", "recipe,normalized"],
          {"recipe": ("loader, JPEGs of 500 x 375, three times in a row", 1.5),
           "recipe,fast": ("the same, fast", 1.9)}),
    Table("Loader, one core, each picture once", ["loader"], ["plain,once", "recipe,once", "recipe,once,fast"],
          {"recipe,once,fast": ("the same, each picture once, fast", 1.5)}),
    Table("Loader, one core, photographs of 3000 x 2000", ["loader", "--photo-size", "3000", "2000"],
          ["plain,once", "recipe,once", "recipe,once,draft"]),
]


def markdown(rows):
    """The lines of a Markdown table of benchmark.py's `rows`: contenders, or the parts of a step."""
    if "part" in rows[0]:
        return ["| part of a step of {contender} | ms | share |".format(**rows[0]), "|---|---|---|"] + [
            "| {part} | {milliseconds:.1f} | {share:.1%} |".format(**row) for row in rows]
    lines = ["| contender | batch | pixels | ms (min-max) | images/s | ratio (min-max) | GFLOPs | of matmul rate "
             "| peak MiB |", "|---|---|---|---|---|---|---|---|---|"]
    number = lambda value, form: "-" if value is None else form.format(value)  # noqa: E731
    for row in rows:
        lines.append("| {contender} | {batch_size} | {input_size} | {milliseconds:.1f} "
                     "({milliseconds_min:.1f}-{milliseconds_max:.1f}) | {images_per_s:.1f} | {ratio:.2f} "
                     "({ratio_min:.2f}-{ratio_max:.2f}) | {flops} | {share} | {memory} |".format(
                         flops=number(row["gflops"], "{:.1f}"), share=number(row["of_matmul_rate"], "{:.0%}"),
                         memory=number(row["peak_memory_mb"], "{:.0f}"), **row))
    return lines


def _arguments(table, quick, device):
    """The words of benchmark.py for `table`."""
    contenders = [one for one in table.contenders if not (quick and "compile" in one.split(","))]
    return table.arguments + ["--device", device] + (QUICK if quick else []) + ["--compare"] + contenders


def machine_name(device: torch.device) -> str:
    """The card's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def _about(device):
    memory = 0
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2 ** 30
    return {"machine": machine_name(device), "cores": os.cpu_count(), "memory_gib": round(memory),
            "threads": torch.get_num_threads(), "torch": versions()["torch"]}


def _measure(arguments):
    """benchmark.py's figures, with when they were taken and how much else the machine had to do."""
    began, load = time.time(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "figures.json")
        result = subprocess.run([sys.executable, os.path.join(ROOT, "benchmark.py")] + arguments + ["--json", file],
                                stdout=subprocess.DEVNULL)
        if result.returncode:
            raise RunFailed("benchmark.py {} ended with exit code {}; the tables before it are kept".format(
                " ".join(arguments), result.returncode))
        figures = _read(file)
    return {"arguments": arguments, "rows": figures["rows"], "matmul_gflops_per_s": figures["matmul_gflops_per_s"],
            "load": load, "day": time.strftime("%Y-%m-%d", time.gmtime(began)), "seconds": time.time() - began}


def _read(path):
    try:
        with open(path) as f:
            return json.load(f)
    except (OSError, ValueError):
        return {}


def _targets(found):
    """Rows of the table of targets."""
    for table in TABLES:
        rows = {row.get("contender"): row for row in found.get(table.title, {}).get("rows", [])}
        for contender, (what, least) in table.targets.items():
            if contender in rows:
                ratio = rows[contender]["ratio"]
                yield "| {} | {} | {:.2f} | {} |".format(what, least, ratio, "met" if ratio >= least else "**missed**")


def written(about: dict, found: Dict[str, dict]) -> str:
    """The page."""
    text = ["# {machine}".format(**about), "",
            "`python benchmark.py report` on {cores} cores, {memory_gib} GiB, {threads} threads, PyTorch {torch}. A "
            "ratio is to the first contender of its table, which takes turns with the others.".format(**about), "",
            "| what | at least | measured | |", "|---|---|---|---|"]
    text += list(_targets(found)) + [""]
    for table in TABLES:
        if table.title not in found:
            continue
        one = found[table.title]
        busy = one["load"] > 0.5 * about["cores"]
        text += ["## " + table.title, "", "`python benchmark.py {}`".format(" ".join(one["arguments"])), "",
                 "{}{}; float32 matrix products {:.0f} GFLOP/s".format(
                     one["day"], ", **beside other work (load {:.1f})**".format(one["load"]) if busy else "",
                     one["matmul_gflops_per_s"]), ""]
        text += markdown(one["rows"]) + [""]
    return "\n".join(text)


def report(device: torch.device, quick: bool, folder: Optional[str] = None, say=print):
    """Measures what is missing and writes the page. Raises UserError for a folder that cannot be made, and RunFailed
    where a table cannot be measured."""
    about = _about(device)
    name = re.sub("[^a-z0-9]+", "-", about["machine"].lower()).strip("-")
    path = os.path.join(folder or os.path.join(ROOT, "docs", "performance"), name)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    except OSError as error:
        raise UserError("--output: the folder {} cannot be made ({})".format(os.path.dirname(path), error.strerror))
    kept = _read(path + ".json")
    found = kept.get("tables", {}) if kept.get("about") == about else {}
    for number, table in enumerate(TABLES, 1):
        arguments = _arguments(table, quick, device.type)
        if found.get(table.title, {}).get("arguments") == arguments:
            continue
        say("{} of {}: {}".format(number, len(TABLES), table.title))
        found[table.title] = _measure(arguments)
        write_json(path + ".json", {"about": about, "tables": found})
        write_text(path + ".md", written(about, found))
    say("{}.md holds the tables, {}.json the figures".format(path, path))
