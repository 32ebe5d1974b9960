"""main.py from its command line: training, distillation and evaluation of an ImageFolder of real pictures."""
import json
import os
import re
import shutil
import sys
import types

import commands
import pytest
import torch

from runtime.keeping.state import TrainingState


def read_log(folder):
    with open(os.path.join(folder, "log.txt")) as f:
        return [json.loads(line) for line in f]


def result(printed):
    """{name: number} of the last line that --eval prints."""
    line = [line for line in printed.splitlines() if line.startswith("Acc@1")][-1]
    return {name: float(value) for name, value in re.findall(r"(\S+) ([0-9.]+)", line)}


def test_training_says_what_it_does_before_it_does_it(student):
    lines = student[1].splitlines()
    assert re.match(r"Model: EvoLeViT_128S, [0-9,]+ parameters, [0-9.]+ M FLOPs .* 64 pixels", lines[0])
    assert lines[1].startswith("Device: cpu x 1, precision float32, torch ")
    assert lines[2] == "Data: IMNET, 260 training images"
    assert lines[3] == "Global batch: 32 = 32 images x 1 processes x 1 accumulation steps"
    assert lines[4] == "Learning rate: 3.125e-05 after scaling (0.0005 x 32 / 512)"
    assert lines[5] == "Updates: 8 per epoch, 2 epochs"
    assert "Warning: the published accuracy" in lines[6] and "2048 and 300 epochs" in lines[6]


def test_training_prints_no_warning_of_a_library(student):
    assert [line for line in student[1].splitlines() if "Warning" in line] == [
        line for line in student[1].splitlines() if line.startswith("Warning: the published")]


def test_log_has_a_json_object_for_each_epoch(student):
    first, second = read_log(student[0])
    assert (first["epoch"], first["mode"], second["epoch"], second["mode"]) == (0, "layer-wise", 1, "stage-wise")
    for entry in (first, second):
        assert entry["test_images"] == 60 and 0 <= entry["test_acc1"] <= entry["test_acc5"] <= 100
        for name in ("train_loss", "train_lr", "train_images_per_s", "test_loss", "test_images_per_s", "seconds",
                     "peak_memory_mb", "n_parameters"):
            assert entry[name] > 0, name


def test_eval_takes_everything_from_the_checkpoint(student, digit_folder, tmp_path):
    last = read_log(student[0])[-1]
    printed = commands.succeed("--eval", "--resume", os.path.join(student[0], "checkpoint.pth"), cwd=tmp_path,
                               small=["--device", "cpu"])
    assert "stage-wise" in printed and "60 images of IMNET" in printed and "64 pixels" in printed
    assert result(printed)["Acc@1"] == pytest.approx(last["test_acc1"], abs=1e-3)
    assert result(printed)["loss"] == pytest.approx(last["test_loss"], abs=1e-3)
    assert os.listdir(str(tmp_path)) == []


def test_eval_without_resume_evaluates_the_best_of_the_output_folder(student, tmp_path):
    shutil.copytree(student[0], str(tmp_path / "save"))
    printed = commands.succeed("--eval", cwd=tmp_path, small=["--device", "cpu"])
    assert result(printed)["Acc@1"] == pytest.approx(max(e["test_acc1"] for e in read_log(student[0])), abs=1e-3)


def test_eval_ema_evaluates_the_averaged_weights(student):
    path = os.path.join(student[0], "checkpoint.pth")
    plain, averaged = (commands.succeed("--eval", "--resume", path, *more) for more in ([], ["--eval-ema"]))
    assert "averaged weights" in averaged and result(plain)["loss"] != result(averaged)["loss"]
    swapped = torch.load(path, map_location="cpu")
    swapped["model"] = swapped["model_ema"]
    other = os.path.join(student[0], "swapped.pth")
    torch.save(swapped, other)
    assert result(commands.succeed("--eval", "--resume", other))["loss"] == result(averaged)["loss"]


def test_a_published_style_checkpoint_evaluates(student, digit_folder, tmp_path):
    """The published code pickles its arguments as a Namespace and knows no data path of ours."""
    import argparse
    state = torch.load(os.path.join(student[0], "checkpoint.pth"), map_location="cpu")["model"]
    torch.save({"model": state, "epoch": 299, "args": argparse.Namespace(model="EvoLeViT_128S", input_size=64)},
               str(tmp_path / "published.pth"))
    printed = commands.succeed("--eval", "--resume", tmp_path / "published.pth", "--data-path", digit_folder,
                               small=["--device", "cpu"])
    assert "stage-wise" in printed
    assert result(printed)["loss"] == pytest.approx(read_log(student[0])[-1]["test_loss"], abs=1e-3)


def test_resume_goes_on_where_the_checkpoint_ends(student, digit_folder, teacher, tmp_path):
    out = str(tmp_path / "out")
    shutil.copytree(student[0], out)
    printed = commands.succeed(
        "--resume", os.path.join(out, "checkpoint.pth"), "--model", "EvoLeViT_128S", "--teacher-model", "regnety_002",
        "--teacher-path", teacher, "--data-path", digit_folder, "--epochs", 3, "--stage-wise-epoch", 1,
        "--output_dir", out)
    assert "Epoch 2 (stage-wise)" in printed and "Epoch 0" not in printed
    assert [entry["epoch"] for entry in read_log(out)] == [0, 1, 2]
    assert torch.load(os.path.join(out, "checkpoint.pth"), map_location="cpu")["epoch"] == 2


def test_a_fresh_run_keeps_the_files_of_an_earlier_one(student, digit_folder, tmp_path):
    out = str(tmp_path / "out")
    shutil.copytree(student[0], out)
    for name in ("nonfinite-3.json", "profile/trace.json", "notes.txt"):
        os.makedirs(os.path.dirname(os.path.join(out, name)), exist_ok=True)
        open(os.path.join(out, name), "w").close()
    printed = commands.succeed("--model", "EvoLeViT_128S", "--distillation-type", "none", "--data-path", digit_folder,
                               "--epochs", 1, "--prune-warmup-epoch", 1, "--output_dir", out)
    assert "previous-1" in printed
    aside = os.path.join(out, "previous-1")
    assert {"nonfinite-3.json", "profile", "summary.json"} < set(os.listdir(aside))
    assert not {"nonfinite-3.json", "profile"} & set(os.listdir(out)) and "notes.txt" in os.listdir(out)
    assert len(read_log(out)) == 1 and read_log(os.path.join(out, "previous-1")) == read_log(student[0])
    assert read_log(out)[0]["mode"] == "layer-wise, no token selection"


def test_finetuning_starts_from_another_size_and_class_count(student, tmp_path):
    few = commands.write_digits(tmp_path / "few", classes=4, train=10, val=2)
    printed = commands.succeed(
        "--finetune", os.path.join(student[0], "checkpoint.pth"), "--model", "EvoLeViT_128S", "--distillation-type",
        "none", "--data-path", few, "--epochs", 1, "--output_dir", tmp_path / "out",
        small=["--device", "cpu", "--num_workers", "0", "--input-size", "96", "--batch-size", "8"])
    left_out = [line for line in printed.splitlines() if line.startswith("Finetuning")][0]
    assert "head.l.weight" in left_out and "poss" not in left_out
    entry = read_log(str(tmp_path / "out"))[0]
    assert entry["test_images"] == 8


def test_an_epoch_without_a_hit_is_the_best_so_far_if_it_is_the_first():
    machine = types.SimpleNamespace(world=None)
    learner, scheduler = types.SimpleNamespace(machine=machine), types.SimpleNamespace(step=lambda *_: None)
    state = TrainingState(learner, scheduler, None, [], {"start_epoch": 0, "best_by": "test_acc1"})
    best = [state.finish_epoch({"epoch": epoch, "test_acc1": accuracy}) for epoch, accuracy in enumerate((0.0, 0.0, 5.0,
         4.0))]
    assert best == [True, False, True, False] and state.max_accuracy == 5.0 and state.epoch == 4


def test_a_first_epoch_leaves_a_best_checkpoint(tmp_path):
    few = commands.write_digits(tmp_path / "few", classes=10, train=2, val=1)
    out = tmp_path / "out"
    commands.succeed("--model", "EvoLeViT_128S", "--distillation-type", "none", "--data-path", few, "--epochs", 1,
                     "--lr", 1e-9, "--output_dir", out,
                     small=["--device", "cpu", "--num_workers", "0", "--input-size", "64", "--batch-size", "20"])
    assert (out / "best_checkpoint.pth").exists()


def test_a_checkpoint_from_elsewhere_leaves_the_run_that_is_there(student, digit_folder, teacher, tmp_path):
    """Its files move aside, and the best of the new ones is kept whatever the checkpoint's run had reached."""
    out = str(tmp_path / "out")
    shutil.copytree(student[0], out)
    content = torch.load(os.path.join(student[0], "checkpoint.pth"), map_location="cpu")
    content["log"][-1]["test_acc1"] = 100.0  # no epoch is better
    content["args"].update(images=999, labels_sum=1)
    elsewhere = str(tmp_path / "elsewhere.pth")
    torch.save(content, elsewhere)
    printed = commands.succeed("--resume", elsewhere, "--teacher-path", teacher, "--data-path", digit_folder,
                               "--epochs", 3, "--output_dir", out)
    assert "Note: the checkpoint's run had 999 training images and this one has 260" in printed
    assert read_log(os.path.join(out, "previous-1")) == read_log(student[0])
    best = torch.load(os.path.join(out, "best_checkpoint.pth"), map_location="cpu")
    assert best["epoch"] == 2 and [entry["epoch"] for entry in best["log"]] == [0, 1, 2]
    with open(os.path.join(out, "summary.json")) as f:
        summary = json.load(f)
    log = read_log(out)
    assert summary["updates"] == sum(entry["updates"] for entry in log) == 3 * log[0]["updates"]
    assert summary["seconds"] >= sum(entry["seconds"] for entry in log)


@pytest.mark.parametrize("log", [[{"loss": 1.0}], [{"epoch": 0}], [{"epoch": "one", "test_acc1": 1.0}], [3], 7])
def test_a_log_of_another_program_is_refused(log):
    state = TrainingState(types.SimpleNamespace(machine=types.SimpleNamespace(world=None)), None, None, [],
                          {"start_epoch": 0, "best_by": "test_acc1"})
    with pytest.raises((AttributeError, KeyError, TypeError, ValueError)):  # those that `restore` puts in a sentence
        state._take_place({"log": log}, False)


@pytest.mark.parametrize("content, sentence", [
    (None, "log.txt cannot be read (No such file"), ("", "log.txt holds no finished epoch"),
    ("no json", "log.txt is no log"), ('{"loss": 1}\n', "log.txt is no log"), ("7\n", "log.txt is no log")])
def test_the_closing_table_names_what_it_cannot_read(content, sentence, tmp_path):
    if content is not None:
        (tmp_path / "log.txt").write_text(content)
    for arguments, said in ((["one={}".format(tmp_path)], sentence), ([str(tmp_path)], "is not NAME=OUTPUT_DIR"),
                            (["one="], "is not NAME=OUTPUT_DIR"), ([], "name finished runs")):
        code, out, err = commands.run([sys.executable, "-m", "runtime.keeping.table"] + arguments)
        assert code == 2 and said in err and err.count("\n") == 1 and not out, err
