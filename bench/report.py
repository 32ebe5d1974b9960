"""python benchmark.py report: every table of speed, on this machine.

It writes docs/performance/MACHINE.md, and the figures beside it, after each table; the same command goes on where it
was interrupted, and measures anew what is asked for otherwise than it was (--quick, --published). It takes about 40
minutes, and with --quick, without the compiler, about 5.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from typing import Dict, List, NamedTuple, Optional

import torch

from evo_vit.compat import versions
from evo_vit.race import processor
from runtime.errors import RunFailed, UserError
from runtime.keeping.files import write_json, write_text
from runtime.machine.cost import measure_matmul_rate
from runtime.machine.versions import has_bf16

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
QUICK = ["--rounds", "2", "--seconds", "0.2"]


class Target(NamedTuple):
    """What a contender's ratio should be at least on the two kinds of machine for which targets are stated (AMD EPYC,
    family 25 model 17, and a faster one; PERFORMANCE.md), the same number where there is one."""
    what: str
    least: float
    faster: float


class Table(NamedTuple):
    """A call of benchmark.py, and what is asked of it: {contender: Target}. The first contender is the one that the
    others are compared with. published: a contender of the published code, which takes its place where that is at
    hand."""
    title: str
    arguments: List[str]
    contenders: List[str]
    targets: Dict[str, Target] = {}
    published: Optional[str] = None


TABLES = [
    Table("Training step", ["train", "--rounds", "5"],
          ["EvoLeViT_256,plain", "EvoLeViT_256", "EvoLeViT_256,compile", "EvoLeViT_256,amp",
           "EvoLeViT_256,teacher-precision=bf16", "EvoLeViT_256,teacher-precision=int8", "EvoLeViT_256,stored"],
          {"EvoLeViT_256": Target("full step with teacher, float32", 1.45, 1.7),
           "EvoLeViT_256,teacher-precision=bf16": Target("the same, the teacher in bf16", 2.0, 2.5),
           "EvoLeViT_256,teacher-precision=int8": Target("the same, the teacher in int8", 2.5, 3.2),
           "EvoLeViT_256,amp": Target("the same, all in bf16", 2.4, 3.1),
           "EvoLeViT_256,stored": Target("the same with stored teacher labels, float32", 4.0, 4.0)},
          "EvoLeViT_256,published"),
    Table("Training step at 384 pixels, the teacher at 224",
          ["train", "--input-size", "384", "--batch-size", "4", "--rounds", "5"],
          ["EvoLeViT_256_384,plain", "EvoLeViT_256_384,teacher-size=224", "EvoLeViT_256_384,teacher-size=224,compile"],
          {"EvoLeViT_256_384,teacher-size=224": Target("at 384 with the teacher at 224, float32", 2.7, 3.0)},
          "EvoLeViT_256_384,published"),
    Table("Training step without a teacher", ["train"],
          ["EvoLeViT_256,plain,teacher=none", "EvoLeViT_256,teacher=none", "EvoLeViT_256,compile,teacher=none",
           "EvoLeViT_256,amp,teacher=none"],
          {"EvoLeViT_256,teacher=none": Target("student step alone, float32", 1.35, 1.5),
           "EvoLeViT_256,compile,teacher=none": Target("the same, compiled", 1.5, 1.6),
           "EvoLeViT_256,amp,teacher=none": Target("the same in bf16", 1.9, 2.4)},
          "EvoLeViT_256,published,teacher=none"),
    Table("Parts of a step", ["breakdown"], ["EvoLeViT_256"]),
    Table("Inference", ["inference"],
          ["EvoLeViT_256,plain", "EvoLeViT_256,fuse", "EvoLeViT_256,fuse,compile", "EvoLeViT_256,fuse,amp"],
          {"EvoLeViT_256,fuse": Target("inference, batch 16, float32", 1.25, 1.85),
           "EvoLeViT_256,fuse,compile": Target("the same, compiled", 1.4, 2.2),
           "EvoLeViT_256,fuse,amp": Target("the same in bf16", 2.2, 3.5)},
          "EvoLeViT_256,published"),
    Table("Inference of one image", ["inference", "--batch-size", "1"],
          ["EvoLeViT_256,plain", "EvoLeViT_256,fuse", "EvoLeViT_256,fuse,compile"],
          {"EvoLeViT_256,fuse,compile": Target("inference, batch 1, compiled", 1.6, 2.2)},
          "EvoLeViT_256,published"),
    Table("Inference against dense models", ["inference"], ["levit_256,fuse", "EvoLeViT_256,fuse",
          "EvoLeViT_256,dense,fuse"],
          {"EvoLeViT_256,fuse": Target("EvoLeViT_256 against timm's levit_256, batch 16", 1.25, 1.25)}),
    Table("Inference over sizes", ["inference", "--batch-size", "4", "--input-size", "224", "320", "384", "512",
                                   "--rounds", "3"], ["EvoLeViT_256,plain", "EvoLeViT_256,fuse"]),
    Table("Evo-DeiT, inference", ["inference", "--rounds", "5"],
          ["deit_small_patch16_224", "evo_deit_small_patch16_224"],
          {"evo_deit_small_patch16_224": Target("Evo-DeiT-small against dense deit_small, inference", 1.35, 1.35)}),
    Table("Loader, one core", ["loader"], ["plain", "recipe", "recipe,fast", "recipe,normalized"],
          {"recipe": Target("loader, JPEGs of 500 x 375, three times in a row", 1.35, 1.35),
           "recipe,fast": Target("the same, fast", 1.9, 1.9)}),
    Table("Loader, one core, each picture once", ["loader"], ["plain,once", "recipe,once", "recipe,once,fast"],
          {"recipe,once,fast": Target("the same, each picture once, fast", 1.5, 1.5)}),
    Table("Loader, one core, photographs of 3000 x 2000", ["loader", "--photo-size", "3000", "2000", "--rounds", "5"],
          ["plain,once", "recipe,once", "recipe,once,draft"]),
]
# Only where the published code is at hand: plain does not know this family.
PUBLISHED = [
    Table("Evo-DeiT against the published code, inference", ["inference", "--rounds", "5"],
          ["evo_deit_small_patch16_224,published", "evo_deit_small_patch16_224", "evo_deit_small_patch16_224,compile"],
          {"evo_deit_small_patch16_224": Target("Evo-DeiT-small, inference, batch 16, float32", 1.2, 1.2)}),
    Table("Evo-DeiT against the published code, training", ["train", "--rounds", "5"],
          ["evo_deit_small_patch16_224,published", "evo_deit_small_patch16_224,teacher=none",
           "evo_deit_small_patch16_224,compile,teacher=none"],
          {"evo_deit_small_patch16_224,teacher=none": Target("Evo-DeiT-small, training step, float32", 1.2, 1.2)}),
]


def tables_for(quick: bool, half: bool, published: bool) -> List[Table]:
    """The tables as they are measured: quick ones without the compiler, without `half` those of half precision, with
    `published` the published code first, and plain behind it."""
    made = []
    for table in TABLES + (PUBLISHED if published else []):
        first = [table.published] if published and table.published else []
        contenders = [one for one in first + table.contenders
                      if not (quick and "compile" in one.split(","))
                      and (half or not {"amp", "teacher-precision=bf16"} & set(one.split(",")))]
        made.append(table._replace(contenders=contenders, arguments=table.arguments + (QUICK if quick else [])))
    return made


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


def machine_name(device: torch.device) -> str:
    """The card's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def _about(device):
    memory = 0
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2 ** 30
    return {"machine": machine_name(device), "cores": os.cpu_count(), "memory_gib": round(memory),
            "threads": torch.get_num_threads(), "torch": versions()["torch"], "timm": versions()["timm"],
            "half": _has_fast_half(device)}


def _measure(arguments, published):
    """benchmark.py's figures, with when they were taken and how much else the machine had to do."""
    began, load = time.time(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "figures.json")
        command = [sys.executable, os.path.join(ROOT, "benchmark.py")] + arguments + ["--json", file]
        result = subprocess.run(command + (["--published", published] if published else []),
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


def _verdict(ratio, target):
    if ratio >= target.faster:
        return "met"
    return "met at {:g}".format(target.least) if ratio >= target.least else "**missed**"


def _targets(found):
    """(Target, the row that it is asked of, the first contender's row), of each that was measured."""
    for table in TABLES + PUBLISHED:
        rows = found.get(table.title, {}).get("rows", [])
        for row in rows:
            if row.get("contender") in table.targets:
                yield table.targets[row["contender"]], row, rows[0]


def side_by_side(machines: Dict[str, dict]) -> str:
    """A page that has all machines beside each other. machines: {name of the page: its figures, as `report` writes
    them}."""
    cells, targets = {}, {}
    for name, kept in machines.items():
        for target, row, first in _targets(kept["tables"]):
            against = "published" if "published" in first["contender"].split(",") else first["contender"].split(",")[0]
            if "plain" in first["contender"].split(","):
                against = "plain"
            targets[target.what] = target
            cells[target.what, name] = "{:.2f} of {}, {}".format(row["ratio"], against, _verdict(row["ratio"], target))
    text = ["# Machines side by side", "", "`python benchmark.py report` writes a page for the machine it runs on, and "
            "this one.", "",
            "| at least, family 25 model 17 / faster kind | {} |".format(" | ".join(
                "[{}, {} threads]({}.md)".format(kept["about"]["machine"], kept["about"]["threads"], name)
                for name, kept in machines.items())), "|---|" + "---|" * len(machines)]
    for what, target in targets.items():
        text.append("| {}: {:g} / {:g} | {} |".format(what, target.least, target.faster, " | ".join(
            cells.get((what, name), "-") for name in machines)))
    return "\n".join(text + [""])


def written(about: dict, found: Dict[str, dict]) -> str:
    """The page."""
    text = ["# {machine}".format(**about), "",
            "`python benchmark.py report` on {cores} cores, {memory_gib} GiB, {threads} threads, PyTorch {torch}, timm "
            "{timm}. A ratio is to the first contender of its table, which takes turns with the others; each has a "
            "process of its own.".format(**about), ""]
    if not about["half"]:
        text += ["Products in bf16 are slower than those in float32 here, so its rows are left out.", ""]
    text += ["| what | against | at least, family 25 model 17 / faster kind | measured (min-max) | |",
             "|---|---|---|---|---|"]
    for target, row, first in _targets(found):
        text.append("| {} | {} | {:g} / {:g} | {:.2f} ({:.2f}-{:.2f}) | {} |".format(
            target.what, first["contender"], target.least, target.faster, row["ratio"], row["ratio_min"],
            row["ratio_max"], _verdict(row["ratio"], target)))
    text.append("")
    for table in TABLES + PUBLISHED:
        if table.title not in found:
            continue
        one = found[table.title]
        busy = one["load"] > 0.5 * about["cores"]
        text += ["## " + table.title, "", "`python benchmark.py {}`".format(" ".join(one["arguments"])), "",
                 "{}{}; {:.0f} s; float32 matrix products {:.0f} GFLOP/s".format(
                     one["day"], ", **beside other work (load {:.1f})**".format(one["load"]) if busy else "",
                     one["seconds"], one["matmul_gflops_per_s"]), ""]
        text += markdown(one["rows"]) + [""]
    return "\n".join(text)


def _has_fast_half(device):
    """Whether a CPU computes faster in bf16; other devices do."""
    if device.type != "cpu":
        return True
    return has_bf16("cpu") and measure_matmul_rate(device, torch.bfloat16) > measure_matmul_rate(device)


def report(device: torch.device, quick: bool, folder: Optional[str] = None, published: Optional[str] = None,
           say=print):
    """Measures what is missing and writes the page. published: a checkout of the published code. Raises UserError for a
    folder that cannot be made, and RunFailed where a table cannot be measured."""
    about = _about(device)
    name = re.sub("[^a-z0-9]+", "-", about["machine"].lower()).strip("-")
    path = os.path.join(folder or os.path.join(ROOT, "docs", "performance"), name)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    except OSError as error:
        raise UserError("--output: the folder {} cannot be made ({})".format(os.path.dirname(path), error.strerror))
    kept = _read(path + ".json")
    found = kept.get("tables", {}) if kept.get("about") == about else {}
    tables = tables_for(quick, about["half"], published is not None)
    for number, table in enumerate(tables, 1):
        arguments = table.arguments + ["--device", device.type, "--compare"] + table.contenders
        if found.get(table.title, {}).get("arguments") == arguments:
            continue
        say("{} of {}: {}".format(number, len(tables), table.title))
        found[table.title] = _measure(arguments, published)
        write_json(path + ".json", {"about": about, "tables": found})
        write_text(path + ".md", written(about, found))
        folder = os.path.dirname(path)
        pages = {os.path.splitext(file)[0]: _read(os.path.join(folder, file)) for file in sorted(os.listdir(folder))
                 if file.endswith(".json")}
        write_text(os.path.join(folder, "README.md"), side_by_side(
            {name: kept for name, kept in pages.items() if {"about", "tables"} <= set(kept)}))
    say("{}.md holds the tables, {}.json the figures".format(path, path))
