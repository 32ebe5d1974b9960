"""benchmark.py from its command line, with models and images that tests can afford."""
import json
import sys

import commands
import pytest

import benchmark
from bench import operators, report
from runtime.machine.compiling import can_compile
from runtime.machine.versions import has_autocast

pytestmark = pytest.mark.once

BENCHMARK = [sys.executable, commands.ROOT + "/benchmark.py"]
QUICK = ["--device", "cpu", "--rounds", "2", "--seconds", "0.01", "--batch-size", "2"]


def measure(tmp_path, task, *flags):
    code, out, err = commands.run(BENCHMARK + [task] + QUICK + ["--json", tmp_path / "figures.json"] + list(flags))
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
            assert 0 < row["of_matmul_rate"] and row["peak_memory_mb"] is None
    assert out.count("| EvoLeViT_128S,plain |") == 4 and "GFLOP/s" in out


@pytest.mark.slow
def test_training_step_memory_and_breakdown(tmp_path):
    train = ["train", "--input-size", 64, "--compare"]
    figures, _ = measure(tmp_path, *train + \
                        ["EvoLeViT_128S,plain,teacher=regnety_002", "EvoLeViT_128S,stored", "--memory"])
    plain, stored = figures["rows"]
    assert all(100 < row["peak_memory_mb"] < 4000 for row in figures["rows"])
    figures, _ = measure(tmp_path, *train + \
                        ["EvoLeViT_128S,teacher=regnety_002,teacher-size=32", "EvoLeViT_128S,teacher=none"])
    small, none = figures["rows"]
    assert plain["gflops"] > small["gflops"] > stored["gflops"] == none["gflops"]
    figures, _ = measure(tmp_path, "breakdown", "--input-size", 64, "--compare", "EvoLeViT_128S,teacher=regnety_002")
    shares = {row["part"]: row["share"] for row in figures["rows"]}
    assert set(shares) == {"data (one core)", "transfer, normalisation", "teacher forward", "student forward", "loss",
                           "backward", "clipping", "optimiser", "average"}
    assert sum(shares.values()) == pytest.approx(1) and all(share > 0 for share in shares.values())


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
    figures, out = measure(tmp_path, "inference", "--input-size", 96, "--keep-ratio", 1, 0.5, 0.2, "--compare",
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
    (["inference", "--plot", "x.html"], "need --keep-ratio"),
    (["inference", "--keep-ratio", "1.5"], "keep=SHARE is above 0 and at most 1"),
    (["inference", "--compare", "regnety_002,keep=0.5"], "only Evo-LeViT and Evo-DeiT"),
    (["train", "--compare", "EvoLeViT_128S,teacher=regnet_y"], "there is no such model"),
    (["train", "--compare", "EvoLeViT_128S,teacher-size=big"], "teacher-size"),
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
    targets = {names[1]: ("inference", 0.001)}, {names[1]: ("the same again", 1000)}
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
    page, = tmp_path.glob("*.md")
    first = page.read_text()
    assert first.startswith("# ") and "| inference | 0.001 |" in first and "| met |" in first
    monkeypatch.setattr(report, "TABLES", [tables[0], report.Table("Second", small, names + [
        "EvoLeViT_128S,fuse,compile"], targets[1])])
    benchmark.main(flags)
    assert "1 of 2" not in capsys.readouterr().out
    second = page.read_text()
    one, other = (text.split("## First")[1].split("## ")[0].strip() for text in (first, second))
    assert one == other
    assert "| the same again | 1000 |" in second and "**missed**" in second
    assert second.count("| EvoLeViT_128S,fuse | 2 | 64 |") == 2 and "compile" not in second  # --quick


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
