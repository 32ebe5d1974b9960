"""benchmark.py from its command line, with models and images that tests can afford."""
import itertools
import json
import os
import re
import signal
import sys

import commands
import pytest
import torch

import benchmark
from bench import contenders, operators, report, turns
from runtime.errors import RunFailed
from runtime.machine.compiling import can_compile
from runtime.machine.versions import has_autocast

pytestmark = pytest.mark.once

BENCHMARK = [sys.executable, commands.ROOT + "/benchmark.py"]
QUICK = ["--device", "cpu", "--batch-size", "2"]
TURNS = {"breakdown": ["--rounds", "2"], "operators": []}  # of the tasks that do not race


def measure(tmp_path, task, *flags):
    flags = TURNS.get(task, ["--rounds", "2", "--seconds", "0.01"]) + list(flags)
    code, out, err = commands.run(BENCHMARK + [task] + QUICK + ["--json", tmp_path / "figures.json"] + flags)
    assert code == 0, out + err
    with open(str(tmp_path / "figures.json")) as f:
        return json.load(f), out


def test_inference_compares_contenders_at_every_batch_and_size(tmp_path):
    figures, out = measure(tmp_path, "inference", "--input-size", 64, 96, "--batch-size", 1, 3, "--compare",
                          "EvoLeViT_128S,plain", "EvoLeViT_128S,fuse", "EvoLeViT_128S,dense", "regnety_002")
    rows = figures["rows"]
    assert [(r["batch_size"], r["input_size"]) for r in rows[::4]] == [(1, 64), (1, 96), (3, 64), (3, 96)]
    for plain, fused, dense, other in zip(*[iter(rows)] * 4):
        assert plain["ratio"] == plain["ratio_min"] == plain["ratio_max"] == 1
        assert plain["gflops"] == fused["gflops"] < dense["gflops"] and other["gflops"] > 0
        for row in (plain, fused, dense, other):
            assert row["milliseconds_min"] <= row["milliseconds"] <= row["milliseconds_max"]
            assert row["images_per_s"] == pytest.approx(1e3 * row["batch_size"] / row["milliseconds"])
            assert 0 < row["of_matmul_rate"] and 100 < row["peak_memory_mb"] < 4000
    assert out.count("| EvoLeViT_128S,plain |") == 4 and "GFLOP/s" in out


PUBLISHED = {"utils.py": "def replace_batchnorm(net):\n    pass\n", "levit/__init__.py": "",
             "levit/evo_levit_384.py": "", "levit/evo_levit.py": """
import torch
import utils


class EvoLeViT(torch.nn.Module):
    def __init__(self, classes, distillation):
        super().__init__()
        self.heads = torch.nn.ModuleList([torch.nn.Linear(3, classes) for _ in range(4 if distillation else 1)])
        self.stage_wise_prune = True

    def set_learn_tradeoff(self, mode):
        self.learned = mode

    def forward(self, x):
        assert self.stage_wise_prune != self.training
        outputs = tuple(head(x.mean(dim=(2, 3))) for head in self.heads)
        return outputs if self.training and len(outputs) == 4 else outputs[0]


def EvoLeViT_128S(num_classes=1000, distillation=True, fuse=False):
    if fuse:
        utils.replace_batchnorm(None)
    return EvoLeViT(num_classes, distillation)
""", "levit/losses_levit.py": """
import torch


class DistillationLoss(torch.nn.Module):
    def __init__(self, base, teacher, kind, alpha, tau):
        super().__init__()
        assert kind == ("none" if teacher is None else "cls")
        self.base, self.teacher = base, teacher

    def forward(self, inputs, outputs, labels):
        if self.teacher is None:
            return self.base(outputs, labels)
        with torch.no_grad():
            assert self.teacher(inputs).shape == labels.shape
        return sum(self.base(output, labels) for output in outputs)
"""}


@pytest.fixture
def published(tmp_path):
    """A folder that has what a checkout of the published code has, as small as can be."""
    for name, text in PUBLISHED.items():
        path = tmp_path / "published" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(tmp_path / "published")


def test_the_published_code_is_a_contender(tmp_path, published):
    figures, _ = measure(tmp_path, "inference", "--compare", "EvoLeViT_128S,published", "EvoLeViT_128S,fuse",
                         "--published", published, "--batch-size", 1)
    theirs, ours = figures["rows"]
    assert theirs["gflops"] == ours["gflops"] and theirs["ratio"] == 1.0 and ours["ratio"] > 0 < theirs["images_per_s"]
    for teacher in ("regnety_002", "none"):
        figures, _ = measure(tmp_path, "train", "--compare", "EvoLeViT_128S,published,teacher=" + teacher,
                             "--published", published)
        assert figures["rows"][0]["images_per_s"] > 0


@pytest.mark.parametrize("flags,sentence", [
    ([], "--published DIR names a checkout"),
    (["--published", "nowhere"], "nowhere: there is no such folder"),
    (["--published", "."], "levit.evo_levit cannot be imported from there"),
    (["--published", "{}", "--input-size", "96"], "takes images of 224 pixels alone")])
def test_what_the_published_code_cannot_run_is_said(flags, sentence, published, capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.main(["inference", "--device", "cpu", "--compare", "EvoLeViT_128S,published"] + [
            flag.format(published) for flag in flags])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and sentence in err, err


def end_at_once(*_):
    os._exit(3)


def end_between_turns(connection, *_):
    connection.send((1, 1))
    connection.close()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("serve,code", [
    (end_at_once, "3$"), (end_between_turns, "-9, as the system does where memory runs out")])
def test_a_contenders_process_that_ends_is_named(serve, code, monkeypatch):
    monkeypatch.setattr(turns, "_serve", serve)
    with pytest.raises(RunFailed, match="contender EvoLeViT_128S: its process ended with exit code " + code):
        turns.race(["EvoLeViT_128S"], turns.Place("inference", 1, 64, "cpu"), 1, 0.1)


@pytest.mark.slow
def test_training_step_memory_and_breakdown(tmp_path):
    train = ["train", "--input-size", 64, "--compare"]
    figures, _ = measure(tmp_path, *train + \
                        ["EvoLeViT_128S,plain,teacher=regnety_002", "EvoLeViT_128S,stored"])
    plain, stored = figures["rows"]
    assert all(100 < row["peak_memory_mb"] < 4000 for row in figures["rows"])
    figures, _ = measure(tmp_path, *train + \
                        ["EvoLeViT_128S,teacher=regnety_002,teacher-size=32", "EvoLeViT_128S,teacher=none",
                         "EvoLeViT_128S,teacher=regnety_002,teacher-precision=int8"])
    small, none, int8 = figures["rows"]
    assert int8["gflops"] == plain["gflops"]
    assert plain["gflops"] > small["gflops"] > stored["gflops"] > none["gflops"]
    assert stored["gflops"] == pytest.approx(none["gflops"], rel=0.03)  # it has the teacher's heads
    figures, _ = measure(tmp_path, "breakdown", "--input-size", 64, "--compare", "EvoLeViT_128S,teacher=regnety_002")
    shares = {row["part"]: row["share"] for row in figures["rows"]}
    assert set(shares) == {"data (one core)", "transfer, normalisation", "teacher forward", "student forward", "loss",
                           "backward", "clipping", "optimiser", "average"}
    assert sum(shares.values()) == pytest.approx(1) and all(share > 0 for share in shares.values())


@pytest.mark.slow
def test_every_contender_may_have_two_processes(tmp_path, published):
    """Each with a batch of its own; a process that waits for another in vain would never end."""
    train = ["train", "--published", published, "--compare", "EvoLeViT_128S,published,teacher=none",
             "EvoLeViT_128S,plain,teacher=none", "EvoLeViT_128S,stored"]
    one, _ = measure(tmp_path, *train)
    two, out = measure(tmp_path, *train, "--processes", 2)
    for alone, shared in zip(one["rows"], two["rows"]):
        assert shared["gflops"] == 2 * alone["gflops"]
        assert shared["images_per_s"] == pytest.approx(4e3 / shared["milliseconds"])


@pytest.mark.skipif(operators.TorchDispatchMode is None, reason="this PyTorch's operators cannot be watched")
def test_operators_are_counted_by_name(tmp_path):
    figures, out = measure(tmp_path, "operators", "--input-size", 64, "--compare", "EvoLeViT_128S,teacher=none")
    layer_wise, stage_wise, inference = rows = figures["rows"]
    assert [row["part"] for row in rows] == ["training step, layer-wise", "training step, stage-wise",
                                             "inference, stage-wise"]
    assert layer_wise["operators"] > stage_wise["operators"] > 2 * inference["operators"] > 200
    assert [row["host_waits"] for row in rows] == [1, 1, 0]  # the loss
    for row in rows:
        assert sum(row["list"].values()) == row["operators"] and row["list"]["hardswish"] == 25
        assert "| {part} | {operators} | {host_waits} |".format(**row) in out
    assert [row["list"]["sort"] for row in rows] == [7, 2, 2]  # blocks, and stages, that select


@pytest.mark.skipif(operators.TorchDispatchMode is None, reason="this PyTorch's operators cannot be watched")
def test_operators_of_a_dense_contender_select_nothing():
    parts = operators.count_parts("EvoLeViT_128S,dense,teacher=none", 2, 64, torch.device("cpu"))
    assert list(parts) == [part + ", no token selection" for part in (
        "training step, layer-wise", "training step, stage-wise", "inference, stage-wise")]
    assert not any(found["sort"] for found in parts.values())


def test_loader_makes_the_pictures_of_either_pipeline(tmp_path):
    figures, _ = measure(tmp_path, "loader", "--input-size", 64, "--photo-size", 160, 120,
                        "--compare", "plain", "recipe", "recipe,normalized", "recipe,once,draft")
    assert [row["contender"] for row in figures["rows"]] == ["plain", "recipe", "recipe,normalized",
                                                             "recipe,once,draft"]
    assert all(row["gflops"] is None and row["images_per_s"] > 0 for row in figures["rows"])


@pytest.mark.skipif(not has_autocast("cpu"), reason="this PyTorch has no mixed precision on a CPU")
def test_flags_hold_for_every_contender(tmp_path):
    figures, _ = measure(tmp_path, "inference", "--input-size", 64, "--amp", "--fuse", "--compare", "EvoLeViT_128S")
    assert figures["rows"][0]["contender"] == "EvoLeViT_128S,amp,fuse"


def test_one_set_of_weights_at_many_speeds(tmp_path, student):
    """The trade between speed and accuracy, from one command."""
    path = student[0] + "/checkpoint.pth"
    figures, out = measure(tmp_path, "inference", "--input-size", 64, "--keep-ratio", 1, 0.5, 0.2, "--compare",
         "EvoLeViT_128S,fuse", "--resume", path, "--plot", tmp_path / "curve.html")
    rows = figures["rows"]
    assert [row["keep_ratio"] for row in rows] == [1, 0.5, 0.2] and {row["model"]
        for row in rows} == {"EvoLeViT_128S,fuse"}
    assert rows[0]["gflops"] > rows[1]["gflops"] > rows[2]["gflops"] and all(0 <= row["acc1"] <= 100 for row in rows)
    html = (tmp_path / "curve.html").read_text()
    assert "Accuracy over images/s" in html and html.count("<tr>") == 4 and "shows the curve" in out


@pytest.mark.parametrize("flags,sentence", [
    (["inference", "--compare", "EvoLeViT_12"], "did you mean EvoLeViT"),
    (["inference", "--compare", "EvoLeViT_128S,fast"], "'fast' is none of inference's words"),
    (["inference", "--compare", "regnety_002,plain"], "only Evo-LeViT"),
    (["inference", "--compare", "EvoLeViT_128S", "--input-size", "100"], "multiples of 16"),
    (["loader", "--compare", "mine"], "a loader is plain or recipe"),
    (["loader", "--keep-ratio", "0.5"], "--keep-ratio is for inference and train"),
    (["loader", "--processes", "2"], "--processes is for inference and train"),
    (["inference", "--plot", "x.html"], "need --keep-ratio"),
    (["inference", "--keep-ratio", "1.5"], "keep=SHARE is above 0 and at most 1"),
    (["inference", "--compare", "regnety_002,keep=0.5"], "only Evo-LeViT and Evo-DeiT"),
    (["train", "--compare", "EvoLeViT_128S,teacher=regnet_y"], "there is no such model"),
    (["train", "--compare", "EvoLeViT_128S,teacher-size=big"], "teacher-size"),
    (["train", "--compare", "EvoLeViT_128S,teacher-size=0"], "teacher-size=N is a number of pixels, above 0"),
    (["inference", "--compare", "EvoLeViT_128S,keep=0.1,keep=1"], "keep stands there twice"),
    (["inference", "--compare", "EvoLeViT_128S,keep=0.5", "--keep-ratio", "1"], "keep stands there twice"),
    (["inference", "--compare", "EvoLeViT_128S,channels-last,contiguous"],
     "contiguous has no effect beside channels-last"),
    (["train", "--channels-last", "--compare", "EvoLeViT_128S,contiguous"],
     "contiguous has no effect beside channels-last"),
    (["train", "--compare", "EvoLeViT_128S,teacher-precision=int4"], "teacher-precision is one of float32, bf16, int8"),
    (["breakdown", "--compare", "EvoLeViT_128S,published"], "runs in inference and train alone"),
    (["inference", "--compare", "EvoLeViT_128S,published,fuse"], "runs them one way"),
    (["inference", "--compare", "EvoLeViT_128S,published=here"], "published takes no value"),
    (["train", "--compare", "EvoLeViT_128S,teacher-precision"], "teacher-precision needs a value"),
    (["train", "--compare", "EvoLeViT_128S,stored,teacher-precision=int8"], "has no effect beside stored"),
    (["train", "--compare", "EvoLeViT_128S,plain,stored"], "stored has no effect beside plain"),
    (["inference", "--compare", "EvoLeViT_128S,dense,keep=0.5"], "keep has no effect beside dense"),
    (["report", "--rounds", "3"], "--rounds has no effect on report here"),
    (["operators", "--rounds", "3"], "--rounds has no effect on operators here"),
    (["operators", "--seconds", "3"], "--seconds has no effect on operators here"),
    (["operators", "--published", "."], "--published has no effect on operators here"),
    (["loader", "--published", "."], "--published has no effect on loader here"),
    (["inference", "--published", ".", "--compare", "EvoLeViT_128S"], "--published has no effect on inference here"),
    (["breakdown", "--seconds", "3"], "--seconds has no effect on breakdown here"),
    (["inference", "--quick"], "--quick has no effect on inference here"),
    (["breakdown", "--batch-size", "2", "4"], "on breakdown here; leave it out, or give one value"),
    (["inference", "--data-path", "x"], "--data-path has no effect on inference here"),
    (["inference", "--keep-ratio", "1", "0.5", "--resume", "x", "--input-size", "64", "96"], "one --input-size"),
    (["train", "--keep-ratio", "0.5", "--resume", "x"], "--resume measures accuracy, which is that of inference"),
    (["breakdown", "--keep-ratio", "0.5", "--resume", "x"], "leave it out of breakdown"),
    (["inference", "--keep-ratio", "0.5", "--resume", "x", "--amp"], "amp computes otherwise"),
    (["inference", "--keep-ratio", "0.5", "--resume", "x", "--compare", "EvoLeViT_128S,amp"], "amp computes otherwise"),
    (["train", "--compare", "resnet18,teacher=regnety_002"],
     "have the heads that a teacher's labels train; add teacher=none"),
    (["train", "--compare", "levit_256"], "add teacher=none"),
    (["train", "--compare", "levit_256,stored"], "add teacher=none in place of stored"),
    (["train", "--input-size", "64", "--compare", "EvoLeViT_128S,teacher=deit_tiny_patch16_224"],
     "); add teacher-size=224"),
    (["train", "--input-size", "64", "--compare", "EvoLeViT_128S,plain,teacher=deit_tiny_patch16_224"],
     "); name another teacher, or --input-size 224"),
    (["train", "--input-size", "64", "--batch-size", "1", "--compare", "EvoLeViT_128S,teacher=none"],
     "normalises by the statistics of a batch, which one image does not have"),
    (["train", "--compare", "EvoLeViT_128S,plain,compile"], "compile has no effect beside plain"),
    (["train", "--compare", "EvoLeViT_128S,teacher=none,teacher-size=64"], "teacher=none has no teacher to run"),
    (["inference", "--compare", "regnety_002,published"], "has Evo-LeViT and Evo-DeiT"),
    (["breakdown", "--compare", "EvoLeViT_128S,plain,teacher=none"], "recipe's own step"),
    (["breakdown", "--compare", "EvoLeViT_128S,teacher=none", "--compile"],
     "own step, not compiled" if can_compile() else "compile needs PyTorch 2.1 or newer"),
    (["operators", "--compare", "EvoLeViT_128S,plain,teacher=none"], "recipe's own step"),
    (["inference", "--rounds", "0"], "0 is not a positive whole number"),
    (["inference", "--batch-size", "big"], "big is not a positive whole number")])
def test_mistakes_end_in_one_sentence(flags, sentence, capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.main(flags + ["--device", "cpu"])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and sentence in err, err


def test_the_report_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, capsys):
    small = ["inference", "--input-size", "64", "--batch-size", "2"]
    names = ["EvoLeViT_128S,plain", "EvoLeViT_128S,fuse"]
    targets = {names[1]: report.Target("inference", 0.001, 0.002)}, {
        names[1]: report.Target("the same again", 1000, 2000), names[0]: report.Target("between", 0.5, 1.5)}
    tables = [report.Table("First", small, names, targets[0]), report.Table("Parts", ["breakdown"], ["EvoLeViT_12"])]
    monkeypatch.setattr(report, "TABLES", tables)
    flags = ["report", "--quick", "--device", "cpu", "--output", str(tmp_path)]
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        benchmark.main(flags[:-1] + [str(tmp_path / "file")])
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: --output: the folder ")
    with pytest.raises(SystemExit) as end:
        benchmark.main(flags)
    assert end.value.code == 1 and "the tables before it are kept" in capsys.readouterr().err
    page, = set(tmp_path.glob("*.md")) - {tmp_path / "machines.md"}
    first = page.read_text()
    assert first.startswith("# ") and "| inference | EvoLeViT_128S,plain | 0.001 / 0.002 |" in first
    assert "| met |" in first
    monkeypatch.setattr(report, "TABLES", [tables[0], report.Table("Second", small, names + [
        "EvoLeViT_128S,fuse,compile"], targets[1])])
    benchmark.main(flags)
    assert "1 of 2" not in capsys.readouterr().out
    second = page.read_text()
    one, other = (text.split("## First")[1].split("## ")[0].strip() for text in (first, second))
    assert one == other
    assert "| the same again | EvoLeViT_128S,plain | 1000 / 2000 |" in second and "**missed**" in second
    assert "| met the lower one |" in second and second.count("| EvoLeViT_128S,fuse | 2 | 64 |") == 2
    assert "compile" not in second  # --quick
    together = (tmp_path / "machines.md").read_text()
    assert "]({})".format(page.name) in together
    assert "| between: 0.5 / 1.5 | 1.00 to EvoLeViT_128S,plain, met the lower one |" in together
    assert re.search(r"\| the same again: 1000 / 2000 \| [0-9.]+ to EvoLeViT_128S,plain, \*\*missed\*\* \|", together)


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="this system does not say what its processors do")
def test_own_programs_are_no_other_work(monkeypatch):
    before, times = report._others_seconds(), os.times()
    monkeypatch.setattr(os, "times", lambda: tuple(seconds + 1000 * part for part, seconds in enumerate(times, 1)))
    assert before - report._others_seconds() == pytest.approx(1000 * (1 + 2 + 3 + 4), abs=500)


def figures_of_a_table(**more):
    row = dict.fromkeys(("milliseconds", "milliseconds_min", "milliseconds_max", "images_per_s", "ratio", "ratio_min",
                         "ratio_max", "gflops", "of_matmul_rate", "peak_memory_mb"), 1.0)
    return dict({"arguments": ["inference"], "rows": [dict(row, contender="a", batch_size=1, input_size=64)],
                 "seconds": 1.0, "matmul_gflops_per_s": 1.0, "day": "today", "others": 0.0}, **more)


def test_a_table_beside_other_work_says_so():
    about = {"machine": "one", "cores": 2, "memory_gib": 4, "threads": 2, "torch": "2", "timm": "1"}
    for others, said in ((0.1, False), (0.8, True)):
        one = figures_of_a_table(others=others)
        text = report.written(about, {report.TABLES[0].title: one}, {}, "code")
        assert ("**beside other work (0.8 processors)**" in text) == said


def test_a_table_that_other_code_has_measured_says_so(tmp_path, monkeypatch):
    def reported(code, *titles):
        said = []
        monkeypatch.setattr(report, "code_hash", lambda: code)
        monkeypatch.setattr(report, "TABLES", [report.Table(title, ["inference"], ["a"], {"a": report.Target(
            "target of " + title, 1, 2)}) for title in titles])
        report.report(torch.device("cpu"), True, str(tmp_path), say=said.append)
        page, = set(tmp_path.glob("*.md")) - {tmp_path / "machines.md"}
        return said[:-1], page.read_text(), (tmp_path / "machines.md").read_text()

    monkeypatch.setattr(report, "_measure", lambda arguments, published: figures_of_a_table(arguments=arguments))
    said, page, _ = reported("first", "One")
    assert said == ["1 of 1: One"] and "other code" not in page
    assert reported("first", "One")[:2] == ([], page)
    said, page, _ = reported("second", "One", "Two")
    file, = tmp_path.glob("*.json")
    assert said == ["2 of 2: Two", "Kept, though measured with other code: One (today); without {} all are measured "
                    "anew".format(file)]
    one, two = page.split("## One")[1].split("## Two")
    assert "with other code" in one and "other code" not in two
    monkeypatch.setattr(report, "_measure", None)
    tables = json.loads(file.read_text())["tables"]
    assert [tables[title]["code"] for title in ("One", "Two")] == ["first", "second"]
    file.write_text(file.read_text().replace('"code"', '"nothing"'))  # as older reports have left it
    said, page, _ = reported("second", "One", "Two")
    assert "One (today), Two (today)" in said[0] and page.count("with other code") == 2
    monkeypatch.setattr(report, "PUBLISHED", [])
    _, page, together = reported("second", "Two")  # the pages are written also where nothing is measured
    assert "target of One" not in page + together and "target of Two" in page and "target of Two" in together


def test_no_kept_table_has_lost_its_title():
    folder = os.path.join(commands.ROOT, "docs", "performance")
    titles = {table.title for table in report.TABLES + report.PUBLISHED}
    kept = [set(report._read(os.path.join(folder, name))["tables"]) for name in os.listdir(folder)
            if name.endswith(".json")]
    assert kept and all(own <= titles for own in kept)


def test_the_hash_of_the_code_knows_what_is_measured(tmp_path):
    def hash_with(**files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_py", ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return report.code_hash(str(tmp_path))
    first = hash_with(evo_vit__model_py="a", engine_py="b")
    assert hash_with(README="c", visualize_py="d", bench__report_py="e") == first
    hashes = [first, hash_with(evo_vit__model_py="b"), hash_with(runtime__machine__cost_py="a"),
              hash_with(engine_py="a")]
    assert len(set(hashes)) == 4 and hash_with(evo_vit__model_py="a", engine_py="b") not in hashes
    assert re.match("[0-9a-f]{16}$", first) and report.code_hash() == report.code_hash()


def test_the_tables_of_a_report_suit_what_is_there():
    step, = [table for table in report.tables_for(True, ["amp"], True) if table.title == "Training step"]
    assert step.contenders[:2] == ["EvoLeViT_256,published", "EvoLeViT_256,plain"]
    assert not {"amp", "compile"} & set(",".join(step.contenders).split(","))
    whats = [target.what for table in report.TABLES + report.PUBLISHED for target in table.targets.values()]
    assert len(set(whats)) == len(whats)
    for quick, published in itertools.product((True, not can_compile()), (True, False)):
        for table in report.tables_for(quick, [], published):
            task = table.arguments[0]
            for text in table.contenders if task != "breakdown" else ():
                assert published or "published" not in contenders.parse(task, text)[1]  # parse knows all its words
            assert all(one in table.contenders for one in table.targets if "compile" not in one)


def test_what_cannot_run_is_left_out_with_its_reason():
    on_cuda = report.what_it_cannot(torch.device("cuda"))
    assert "is for a CPU" in on_cuda["teacher-precision=int8"] and "amp" not in on_cuda
    here = report.what_it_cannot(torch.device("cpu"))
    assert ("amp" in here) == ("teacher-precision=bf16" in here)


def test_machines_stand_side_by_side(monkeypatch):
    def figures(name, **ratios):
        rows = [{"contender": text, "ratio": ratio, "ratio_min": ratio, "ratio_max": ratio}
                for text, ratio in [("first", 1.0)] + sorted(ratios.items())]
        return {"about": {"machine": name, "threads": 2}, "tables": {"Table": {"rows": rows, "code": name}},
                "left_out": {}}

    tables = [report.Table("Table", [], [], {"b": report.Target("two", 1, 2), "a": report.Target("one", 1, 3)})]
    monkeypatch.setattr(report, "TABLES", tables)
    page = report.side_by_side({"x": figures("X", b=2.5), "y": figures("Y", a=0.5, b=1.5)}, "Y")
    assert page.splitlines()[-2:] == [
        "| two: 1 / 2 | 2.50 to first, met (other code) | 1.50 to first, met the lower one |",
        "| one: 1 / 3 | - | 0.50 to first, **missed** |"]


def test_the_cost_of_a_data_set_without_its_pictures(tmp_path):
    code, out, err = commands.run([sys.executable, "-m", "bench.data", "--images", 2560, 5120, "--batches", 8, "--json",
                                   tmp_path / "figures.json", "--plot", tmp_path / "memory.svg"])
    assert code == 0, out + err
    svg = (tmp_path / "memory.svg").read_text()
    assert "<svg" in svg and "growth of a worker" in svg and "private memory, MiB" in svg
    with open(str(tmp_path / "figures.json")) as f:
        rows = json.load(f)["rows"]
    assert [row["images"] for row in rows] == [2560, 5120] and out.count("\n|") == 4 and ", family " in out
    for row in rows:
        assert 0 < row["open_s"] < row["first_batch_s"] and row["worker_pictures"] == 2048
        assert row["main_mib"] < 50 and row["worker_grows_mib"] < 20


@pytest.mark.parametrize("task, text", sorted(benchmark.TRADE_OFF.items()))
def test_what_keep_ratio_races_by_default_is_a_contender_of_the_task(task, text):
    assert contenders.parse(task, text + ",keep=0.5")[1]["keep"] == "0.5"


def test_outputs_that_are_not_finite_have_no_accuracy(student, tmp_path, capsys):
    content = torch.load(student[0] + "/checkpoint.pth", map_location="cpu")
    content["model"]["head.l.weight"][1, 0] = float("nan")
    torch.save(content, str(tmp_path / "nan.pth"))
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["inference", "--device", "cpu", "--keep-ratio", "0.5", "--resume", str(tmp_path / "nan.pth"),
                        "--compare", "EvoLeViT_128S", "--input-size", "64", "--batch-size", "1", "--rounds", "1"])
    assert stopped.value.code == 1 and "the model's output is not finite for" in capsys.readouterr().err


def test_the_accuracy_of_one_model_does_not_stand_beside_the_speed_of_another(student, capsys):
    for more, sentence in (
            ([], "is of EvoLeViT_128S at 64 pixels and the contender is EvoLeViT_256 at 224"),
            (["--compare", "EvoLeViT_128S", "--input-size", "96"], "the contender is EvoLeViT_128S at 96")):
        with pytest.raises(SystemExit):
            benchmark.main(["inference", "--device", "cpu", "--keep-ratio", "0.5", "--resume",
                            student[0] + "/checkpoint.pth"] + more)
        assert sentence in capsys.readouterr().err
