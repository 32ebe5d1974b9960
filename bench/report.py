"""python benchmark.py report: every table of speed, on this machine.

It writes docs/performance/MACHINE.md, the figures beside it, and machines.md, which has all machines, after each table;
the same command goes on where it was interrupted, and measures anew what is asked for otherwise than it was (--quick,
--published). A table that other code of the project has measured is kept, and marked; without the file of figures all
are measured. It takes 20 to 40 minutes, and with --quick, without the compiler, about 5.
"""
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from typing import Collection, Dict, List, NamedTuple, Optional

import torch

from evo_vit.compat import versions
from evo_vit.race import processor
from runtime.errors import RunFailed, UserError
from runtime.keeping.files import write_json, write_text
from runtime.learning.teacher_precision import INT8, need_precision
from runtime.machine.cost import measure_matmul_rate
from runtime.machine.machine import Machine

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
QUICK = ["--rounds", "2", "--seconds", "0.2"]
TOGETHER = "machines.md"  # the page of all machines
# What tables depend on; this module only asks for them and writes them down.
CODE = ("evo_vit", "runtime", "bench", "fix_timm", "benchmark.py", "datasets.py", "engine.py", "flags.py", "losses.py",
        "samplers.py")
BUSY = 0.5  # processors at work for other programs: more of them, and a table says so


class Target(NamedTuple):
    """The least ratio asked for on each of two kinds of machine: `least` on an AMD EPYC of family 25, model 17,
    `faster` on one with twice its rate in float32. Where only one is stated, both numbers are the same. The words say
    all: each target has its own."""
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
           "EvoLeViT_256,teacher-precision=bf16": Target("full step, the teacher in bf16", 2.0, 2.5),
           "EvoLeViT_256,teacher-precision=int8": Target("full step, the teacher in int8", 2.5, 3.2),
           "EvoLeViT_256,amp": Target("full step, all in bf16", 2.4, 3.1),
           "EvoLeViT_256,stored": Target("full step with stored teacher labels, float32", 4.0, 4.0)},
          "EvoLeViT_256,published"),
    Table("Training step at 384 pixels, ours with the teacher at 224",
          ["train", "--input-size", "384", "--batch-size", "4", "--rounds", "5"],
          ["EvoLeViT_256_384,plain", "EvoLeViT_256_384,teacher-size=224", "EvoLeViT_256_384,teacher-size=224,compile"],
          {"EvoLeViT_256_384,teacher-size=224": Target("full step at 384 with the teacher at 224, float32", 2.7, 3.0)},
          "EvoLeViT_256_384,published"),
    Table("Training step without a teacher", ["train"],
          ["EvoLeViT_256,plain,teacher=none", "EvoLeViT_256,teacher=none", "EvoLeViT_256,compile,teacher=none",
           "EvoLeViT_256,amp,teacher=none"],
          {"EvoLeViT_256,teacher=none": Target("student step, float32", 1.35, 1.5),
           "EvoLeViT_256,compile,teacher=none": Target("student step, compiled", 1.5, 1.6),
           "EvoLeViT_256,amp,teacher=none": Target("student step in bf16", 1.9, 2.4)},
          "EvoLeViT_256,published,teacher=none"),
    Table("Training step, two processes of half the threads each", ["train", "--processes", "2", "--rounds", "3"],
          ["EvoLeViT_256,plain", "EvoLeViT_256"],
          {"EvoLeViT_256": Target("full step with teacher, two processes, float32", 1.4, 1.6)},
          "EvoLeViT_256,published"),
    Table("Parts of a step", ["breakdown"], ["EvoLeViT_256"]),
    Table("Inference", ["inference"],
          ["EvoLeViT_256,plain,fuse", "EvoLeViT_256,fuse", "EvoLeViT_256,fuse,compile", "EvoLeViT_256,fuse,amp"],
          {"EvoLeViT_256,fuse": Target("inference, batch 16, float32", 1.25, 1.85),
           "EvoLeViT_256,fuse,compile": Target("inference, batch 16, compiled", 1.4, 2.2),
           "EvoLeViT_256,fuse,amp": Target("inference, batch 16, bf16", 2.2, 3.5)},
          "EvoLeViT_256,published"),
    Table("Inference of one image", ["inference", "--batch-size", "1"],
          ["EvoLeViT_256,plain,fuse", "EvoLeViT_256,fuse", "EvoLeViT_256,fuse,compile"],
          {"EvoLeViT_256,fuse,compile": Target("inference, batch 1, compiled", 1.6, 2.2)},
          "EvoLeViT_256,published"),
    Table("Inference against dense models", ["inference"], ["levit_256,fuse", "EvoLeViT_256,fuse",
          "EvoLeViT_256,dense,fuse"],
          {"EvoLeViT_256,fuse": Target("EvoLeViT_256 against timm's levit_256, batch 16", 1.25, 1.25)}),
    Table("Inference over sizes", ["inference", "--batch-size", "4", "--input-size", "224", "320", "384", "512",
                                   "--rounds", "3"], ["EvoLeViT_256,plain,fuse", "EvoLeViT_256,fuse"]),
    Table("Evo-DeiT, inference", ["inference", "--rounds", "5"],
          ["deit_small_patch16_224", "evo_deit_small_patch16_224"],
          {"evo_deit_small_patch16_224": Target("Evo-DeiT-small against dense deit_small, inference", 1.35, 1.35)}),
    Table("Loader, one core", ["loader"], ["plain", "recipe", "recipe,fast", "recipe,normalized"],
          {"recipe": Target("loader, each picture three times in a row", 1.5, 1.5),
           "recipe,fast": Target("fast loader, each picture three times in a row", 1.9, 1.9)}),
    Table("Loader, one core, each picture once", ["loader"], ["plain,once", "recipe,once", "recipe,once,fast"],
          {"recipe,once,fast": Target("fast loader, each picture once", 1.5, 1.5)}),
    Table("Loader, one core, photographs of 3000 x 2000", ["loader", "--photo-size", "3000", "2000", "--rounds", "5"],
          ["plain,once", "recipe,once", "recipe,once,draft"]),
]
# Only where the published code is at hand: plain does not know this family.
PUBLISHED = [
    Table("Evo-DeiT against the published code, inference", ["inference", "--rounds", "9"],
          ["evo_deit_small_patch16_224,published", "evo_deit_small_patch16_224", "evo_deit_small_patch16_224,compile",
           "evo_deit_small_patch16_224,amp"],
          {"evo_deit_small_patch16_224": Target("Evo-DeiT-small, inference, batch 16, float32", 1.2, 1.2),
           "evo_deit_small_patch16_224,compile": Target("Evo-DeiT-small, inference, batch 16, compiled", 1.2, 1.2),
           "evo_deit_small_patch16_224,amp": Target("Evo-DeiT-small, inference, batch 16, bf16", 1.2, 1.2)}),
    Table("Evo-DeiT against the published code, training", ["train", "--rounds", "9"],
          ["evo_deit_small_patch16_224,published", "evo_deit_small_patch16_224,teacher=none",
           "evo_deit_small_patch16_224,compile,teacher=none", "evo_deit_small_patch16_224,amp,teacher=none"],
          {"evo_deit_small_patch16_224,teacher=none": Target("Evo-DeiT-small, training step, float32", 1.2, 1.2),
           "evo_deit_small_patch16_224,compile,teacher=none":
               Target("Evo-DeiT-small, training step, compiled", 1.2, 1.2),
           "evo_deit_small_patch16_224,amp,teacher=none":
               Target("Evo-DeiT-small, training step in bf16", 1.2, 1.2)}),
]


def tables_for(quick: bool, left_out: Collection[str], published: bool) -> List[Table]:
    """The tables as they are measured: quick ones without the compiler, no contender with a word of `left_out`, with
    `published` the published code first, and plain behind it."""
    without = set(left_out) | ({"compile"} if quick else set())
    made = []
    for table in TABLES + (PUBLISHED if published else []):
        first = [table.published] if published and table.published else []
        contenders = [one for one in first + table.contenders if not without & set(one.split(","))]
        made.append(table._replace(contenders=contenders, arguments=table.arguments + (QUICK if quick else [])))
    return made


def what_it_cannot(device: torch.device) -> Dict[str, str]:
    """{word of a contender that cannot run here, or only emulated: why}."""
    found = {}
    machine = Machine(device)
    for name in ("bf16", INT8):
        try:
            need_precision(name, machine)
        except UserError as error:
            found["teacher-precision=" + name] = str(error).split(": ", 1)[-1]
    if device.type == "cpu" and "teacher-precision=bf16" not in found and \
            measure_matmul_rate(device, torch.bfloat16, 512) < measure_matmul_rate(device, size=512):
        found["teacher-precision=bf16"] = "its products in bf16 are slower than those in float32"
    if device.type == "cpu" and "teacher-precision=bf16" in found:
        found["amp"] = found["teacher-precision=bf16"]
    return found


def markdown(rows):
    """The lines of a Markdown table of benchmark.py's `rows`: contenders, or the parts of a step."""
    if "part" in rows[0]:
        return ["| part of a step of {contender} | ms | share |".format(**rows[0]), "|---|---|---|"] + [
            "| {part} | {milliseconds:.1f} | {share:.1%} |".format(**row) for row in rows]
    lines = ["| contender | batch | pixels | ms (min-max) | images/s | ratio (min-max) | GFLOP (2 a multiply-add) "
             "| of matmul rate | peak MiB |", "|---|---|---|---|---|---|---|---|---|"]
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
    return processor() if device.type == "cpu" else getattr(torch, device.type).get_device_name(device)


def _about(device):
    memory = 0
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2 ** 30
    return {"machine": machine_name(device), "cores": os.cpu_count(), "memory_gib": round(memory),
            "threads": torch.get_num_threads(), "torch": versions()["torch"], "timm": versions()["timm"]}


def _others_seconds() -> float:
    """Seconds that the machine's processors have worked for programs other than this one and the ended ones that it
    had started; 0 where the system does not say."""
    try:
        with open("/proc/stat") as f:
            user, nice, system, _, _, interrupts, soft = (int(word) for word in f.readline().split()[1:8])
    except (OSError, ValueError):
        return 0.0
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def code_hash(root: str = ROOT) -> str:
    """What tells the project's code, as far as tables depend on it, from other code."""
    paths = [os.path.join(root, name) for name in CODE]
    for folder in list(paths):
        for inner, _, names in os.walk(folder):
            paths += [os.path.join(inner, name) for name in names]
    found = hashlib.sha256()
    for name in sorted(os.path.relpath(path, root).replace(os.sep, "/") for path in paths):
        if name.endswith(".py") and name != "bench/report.py" and os.path.isfile(os.path.join(root, name)):
            with open(os.path.join(root, name), "rb") as f:
                content = f.read()
            found.update("{} {}\n".format(name, len(content)).encode() + content)
    return found.hexdigest()[:16]


def _measure(arguments, published):
    """benchmark.py's figures, with when they were taken and how many processors worked for other programs meanwhile."""
    began, others = time.time(), _others_seconds()
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "figures.json")
        command = [sys.executable, os.path.join(ROOT, "benchmark.py")] + arguments + ["--json", file]
        if any("published" in text.split(",") for text in arguments):
            command += ["--published", published]
        result = subprocess.run(command, stdout=subprocess.DEVNULL)
        if result.returncode:
            raise RunFailed("benchmark.py {} ended with exit code {}; the tables before it are kept".format(
                " ".join(arguments), result.returncode))
        figures = _read(file)
    seconds = time.time() - began
    return {"arguments": arguments, "rows": figures["rows"], "matmul_gflops_per_s": figures["matmul_gflops_per_s"],
            "others": (_others_seconds() - others) / seconds, "day": time.strftime("%Y-%m-%d", time.gmtime(began)),
            "seconds": seconds}


def _read(path):
    try:
        with open(path) as f:
            values = json.load(f)
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _verdict(ratio, target):
    if ratio >= target.faster:
        return "met"
    return "met the lower one" if ratio >= target.least else "**missed**"


def _targets(found, code):
    """(Target, the row that it is asked of, the first contender's row, its verdict), of each that was measured. code:
    code_hash, which says whether other code was."""
    for table in TABLES + PUBLISHED:
        one = found.get(table.title, {})
        for row in one.get("rows", []):
            if row.get("contender") in table.targets:
                target = table.targets[row["contender"]]
                verdict = _verdict(row["ratio"], target) + ("" if one.get("code") == code else " (other code)")
                yield target, row, one["rows"][0], verdict


def side_by_side(machines: Dict[str, dict], code: str) -> str:
    """A page that has all machines beside each other. machines: {name of the page: its figures, as `report` writes
    them}. code: code_hash, of which figures of another are marked."""
    measured = {(name, target): "{:.2f} to {}, {}".format(row["ratio"], first["contender"], verdict)
                for name, kept in machines.items() for target, row, first, verdict in _targets(kept["tables"], code)}
    text = ["# Machines side by side", "", "`python benchmark.py report` writes a page for the machine that it runs "
            "on, and this one. A cell: the ratio to the contender that it names. Other code: what figures depend on "
            "has changed since.", "",
            "| at least, family 25 model 17 / faster kind | {} |".format(" | ".join(
                "[{}, {} threads]({}.md)".format(kept["about"]["machine"], kept["about"]["threads"], name)
                for name, kept in machines.items())), "|---|" + "---|" * len(machines)]
    for target in [target for table in TABLES + PUBLISHED for target in table.targets.values()]:
        cells = [measured.get((name, target), "-") for name in machines]
        if set(cells) != {"-"}:
            text.append("| {}: {:g} / {:g} | {} |".format(target.what, target.least, target.faster, " | ".join(cells)))
    return "\n".join(text + [""])


def written(about: dict, found: Dict[str, dict], left_out: Dict[str, str], code: str) -> str:
    """The page of a machine. left_out: what_it_cannot. code: code_hash, of which tables of another are marked."""
    text = ["# {machine}".format(**about), "",
            "`python benchmark.py report` on {cores} cores, {memory_gib} GiB, {threads} threads, PyTorch {torch}, timm "
            "{timm}. A ratio is to the first contender of its table, which takes turns with the others; each has a "
            "process of its own.".format(**about), ""]
    text += ["Left out: `{}`, since {}.".format(word, why) for word, why in sorted(left_out.items())]
    text += [""] if left_out else []
    text += ["| what | against | at least, family 25 model 17 / faster kind | measured (min-max) | |",
             "|---|---|---|---|---|"]
    for target, row, first, verdict in _targets(found, code):
        text.append("| {} | {} | {:g} / {:g} | {:.2f} ({:.2f}-{:.2f}) | {} |".format(
            target.what, first["contender"], target.least, target.faster, row["ratio"], row["ratio_min"],
            row["ratio_max"], verdict))
    text.append("")
    for table in TABLES + PUBLISHED:
        if table.title not in found:
            continue
        one = found[table.title]
        busy = one.get("others", 0) > BUSY
        published = any("published" in row.get("contender", "").split(",") for row in one["rows"])
        text += ["## " + table.title, "", "`python benchmark.py {}{}`".format(
                     " ".join(one["arguments"]), " --published DIR" if published else ""), "",
                 "{}{}{}; {:.0f} s; float32 matrix products {:.0f} GFLOP/s".format(
                     one["day"], "" if one.get("code") == code else ", **with other code than this page**",
                     ", **beside other work ({:.1f} processors)**".format(one["others"]) if busy else "",
                     one["seconds"], one["matmul_gflops_per_s"]), ""]
        text += markdown(one["rows"]) + [""]
    return "\n".join(text)


def report(device: torch.device, quick: bool, folder: Optional[str] = None, published: Optional[str] = None,
           say=print):
    """Measures what is missing and writes the page. published: a checkout of the published code. Raises UserError for a
    folder that cannot be made, and RunFailed where a table cannot be measured."""
    about = _about(device)
    name = re.sub("[^a-z0-9]+", "-", about["machine"].lower()).strip("-")
    folder = os.path.abspath(folder or os.path.join(ROOT, "docs", "performance"))
    path = os.path.join(folder, name)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError("--output: the folder {} cannot be made ({})".format(folder, error.strerror))
    kept = _read(path + ".json")
    if kept.get("about") != about:
        kept = {"about": about, "tables": {}, "left_out": what_it_cannot(device)}
    found, left_out = kept["tables"], kept["left_out"]
    tables, stale = tables_for(quick, left_out, published is not None), []
    for number, table in enumerate(tables, 1):
        arguments = table.arguments + ["--device", device.type, "--compare"] + table.contenders
        one = found.get(table.title, {})
        if one.get("arguments") == arguments:
            if one.get("code") != code_hash():
                stale.append("{} ({})".format(table.title, one["day"]))
            continue
        say("{} of {}: {}".format(number, len(tables), table.title))
        found[table.title] = dict({"code": code_hash()}, **_measure(arguments, published))
        write_json(path + ".json", kept)
        _write_pages(path, kept)
    _write_pages(path, kept)  # also where nothing was measured: what is asked may be new
    if stale:
        say("Kept, though measured with other code: {}; without {}.json all are measured anew".format(
            ", ".join(stale), path))
    say("{0}.md holds the tables, {0}.json the figures; {1} has all machines".format(
        path, os.path.join(folder, TOGETHER)))


def _write_pages(path, kept):
    """The page of this machine, and the one that has all."""
    write_text(path + ".md", written(kept["about"], kept["tables"], kept["left_out"], code_hash()))
    folder, pages = os.path.dirname(path), {}
    for file in sorted(os.listdir(folder)):
        kept = _read(os.path.join(folder, file)) if file.endswith(".json") else {}
        if {"about", "tables", "left_out"} <= set(kept):
            pages[os.path.splitext(file)[0]] = kept
    write_text(os.path.join(folder, TOGETHER), side_by_side(pages, code_hash()))
