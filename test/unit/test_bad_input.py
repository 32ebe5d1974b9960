"""A user's mistake ends in one sentence on standard error and exit code 2, before training starts."""
import os
import shutil
import sys

import commands
import pytest
import torch

import main


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """refused(*flags) runs main.py's command line, which must refuse them; returns its one sentence."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        with pytest.raises(SystemExit) as stopped:
            main.main([str(flag) for flag in ["--device", "cpu", "--num_workers", 0, "--batch-size", 32] + list(flags)])
        captured = capsys.readouterr()
        assert stopped.value.code == 2
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
        assert "Epoch" not in captured.out and not os.path.exists("save")
        return captured.err

    return run


def test_a_mistake_exits_with_2_and_one_line_as_a_command_too(tmp_path):
    code, out, err = commands.run([sys.executable, "-u", commands.MAIN, "--device",
                                  "cpu", "--data-path", tmp_path / "no"])
    assert (code, out) == (2, "")
    assert err == "error: --data-path: there is no folder {}\n".format(tmp_path / "no")


@pytest.mark.once
@pytest.mark.parametrize("script", ["main", "predict", "benchmark"])
def test_ctrl_c_while_packages_are_still_imported_leaves_no_traceback(script, tmp_path):
    (tmp_path / "numpy.py").write_text("raise KeyboardInterrupt")  # what Ctrl-C does there, at a time of our choice
    code, out, err = commands.run([sys.executable, os.path.join(commands.ROOT, script + ".py"), "--help"],
                                  env={"PYTHONPATH": str(tmp_path)})
    assert (code, out, err) == (130, "", "Interrupted\n")


@pytest.mark.once
def test_only_one_of_several_processes_prints_the_sentence(tmp_path):
    for name, launch in commands.launchers(2).items():
        code, out, err = commands.run(launch + [commands.MAIN, "--device", "cpu", "--data-path", str(tmp_path / "no")])
        assert code != 0 and err.count("error: --data-path") == 1, (name, err)
        assert "UserError" not in err


@pytest.mark.parametrize("flags, sentence", [
    (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    (["--epochs", 0], "0 is not a positive whole number"),
    (["--lr", "fast"], "invalid float value: 'fast'"),
    (["--device", "tpu"], "invalid choice: 'tpu'"),
    ([], "--data-path is missing"),
    (["--data-path", "nowhere"], "there is no folder nowhere"),
    (["--batch-size", 33, "--data-set", "DIGITS"], "--batch-size 33 is odd"),
    (["--data-set", "DIGITS", "--model", "EvoLeVit_265"], "did you mean EvoLeViT_256"),
    (["--data-set", "DIGITS", "--model", "qqqqqqqq"], "there is no such model; timm.list_models()"),
    (["--data-set", "DIGITS", "--input-size", 100], "image size 100 is not supported"),
    (["--data-set", "DIGITS", "--input-size", 48], "image size 48 is not supported"),
    (["--data-set", "DIGITS", "--model", "regnety_002"], "--model regnety_002 has no distillation heads"),
    (["--data-set", "DIGITS", "--teacher-model", "regnety_2"], "--teacher-model regnety_2: there is no such model"),
    (["--data-set", "DIGITS"], "--teacher-path: there is no file ./regnety_160-a5fe301d.pth"),
    (["--data-set", "DIGITS", "--batch-size", 2000], "1433 training images do not fill one global batch"),
    (["--data-set", "DIGITS", "--batch-size", 1, "--mixup", 0, "--cutmix", 0, "--distillation-type", "none"],
     "--batch-size 1: EvoLeViT_256 normalises by the statistics of a batch"),
    (["--data-set", "DIGITS", "--start_epoch", 300], "--start_epoch 300"),
    (["--data-set", "DIGITS", "--world_size", 3], "--world_size 3 needs a launcher"),
    (["--data-set", "DIGITS", "--finetune", "no.pth"], "--finetune: there is no file no.pth"),
    (["--data-set", "DIGITS", "--resume", "no.pth"], "--resume: there is no file no.pth"),
    (["--eval", "--resume", "no.pth"], "--resume: there is no file no.pth"),
    (["--eval", "--resume", "auto"], "--resume auto is for training; --eval takes " + os.path.join("save", "best")),
    (["--eval", "--finetune", "no.pth"], "--finetune is for training; --eval evaluates --resume FILE"),
    (["--eval", "--write-teacher-labels", "labels"], "--write-teacher-labels is for training"),
    (["--data-set", "DIGITS", "--cutmix-minmax", 0.3, 0.302, "--input-size", 64], "smaller one, by a pixel of 64"),
    (["--data-set", "DIGITS", "--distillation-alpha", 0, "--teacher-labels", "there"], "no teacher; leave --teacher-l"),
    (["--data-set", "DIGITS", "--distillation-alpha", 0, "--teacher-precision", "bf16"], "leave --teacher-precision"),
    (["--data-set", "DIGITS", "--teacher-agreement", 1], "--teacher-agreement is for --teacher-precision bf16 or int8"),
    (["--data-set", "DIGITS", "--model", "evo_deit_tiny_patch16_224", "--teacher-path", "x.pth"],
     "--teacher-path is for a teacher, and with --distillation-type none, the default of Evo-DeiT, there is none"),
    (["--data-set", "DIGITS", "--distillation-type", "none", "--distillation-alpha", 0.9],
     "add --distillation-type hard, or leave it out"),
    (["--data-set", "DIGITS", "--model", "vgg11", "--distillation-type", "none", "--drop-path", 0.1],
     "--drop-path: vgg11 takes none; leave the flag out"),
    (["--data-set", "DIGITS", "--eval-ema"], "--eval-ema says which weights --eval takes; add --eval"),
    (["--data-set", "DIGITS", "--data-path", "there"], "--data-path there is not read: the data set here is DIGITS"),
    (["--eval"], "--eval: there is no " + os.path.join("save", "best_checkpoint.pth")),
])
def test_a_wrong_flag_is_refused(refused, flags, sentence):
    assert sentence in refused(*flags)


@pytest.mark.parametrize("kind", ["cuda", "npu"])
def test_a_device_that_is_not_there_is_refused(refused, kind, monkeypatch):
    from runtime.machine import devices
    monkeypatch.setattr(devices, "_accelerator", lambda kind: (None, None))
    assert "--device {}: no such device".format(kind) in refused("--data-set", "DIGITS", "--device", kind)


@pytest.mark.parametrize("environment, flags, sentence", [
    (dict(RANK="0", WORLD_SIZE="3", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2"), [], "does not divide"),
    (dict(RANK="0", WORLD_SIZE="two"), [], "must be whole numbers"),
    (dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0"), ["--world_size", 4],
     "--world_size 4 does not match the 2 processes"),
])
def test_processes_that_do_not_fit_together_are_refused(refused, environment, flags, sentence, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert sentence in refused("--data-set", "DIGITS", *flags)


def test_a_folder_in_another_layout_is_refused(refused, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    assert "has no folder 'val'" in refused("--data-path", root)
    (root / "val").mkdir()
    assert "has no class folders" in refused("--data-path", root)
    (root / "val" / "a").mkdir()
    assert "holds no picture" in refused("--data-path", root)
    (root / "val" / "a" / "1.png").write_bytes(b"")
    assert "has no folder 'train'" in refused("--data-path", root)
    shutil.copytree(str(root / "val"), str(root / "train"))
    (root / "train" / "b").mkdir()
    (root / "train" / "b" / "1.png").write_bytes(b"")
    assert "'b' is only in train" in refused("--data-path", root)


def test_a_wrong_teacher_file_is_refused(refused, teacher, tmp_path):
    def sentence(path, model="regnety_002", data=("--data-set", "DIGITS")):
        return refused("--teacher-model", model, "--teacher-path", path, "--model", "EvoLeViT_128S", "--input-size", 64,
                       *data)

    with open(teacher, "rb") as f:
        content = f.read()
    (tmp_path / "half.pth").write_bytes(content[:len(content) // 2])
    assert "cannot be read as a checkpoint" in sentence("half.pth")
    (tmp_path / "teacher-0123abcd.pth").write_bytes(content)
    assert "its SHA-256 starts with" in sentence("teacher-0123abcd.pth")
    assert "is not a checkpoint of regnety_004" in sentence(teacher, "regnety_004")
    for name in ("model.onnx", "model.pt2"):
        (tmp_path / name).write_bytes(content[:100])
        assert name + " is an exported program, which main.py --eval alone takes" in sentence(name)
    torch.save([1, 2], str(tmp_path / "list.pth"))
    assert "holds a list, not a checkpoint" in sentence("list.pth")
    torch.save({"epoch": 1}, str(tmp_path / "empty.pth"))
    assert "holds no weights" in sentence("empty.pth")
    few = commands.write_digits(tmp_path / "few", classes=4, train=10, val=1)
    nameless = tmp_path / "nameless.pth"
    torch.save(torch.load(teacher, map_location="cpu")["model"], str(nameless))
    assert "was trained on 10 classes but 4 are needed here" in sentence(nameless, data=("--data-path", few))


def test_a_checkpoint_that_does_not_fit_is_refused(refused, student, digit_folder, tmp_path):
    path = os.path.join(student[0], "checkpoint.pth")
    small = ["--data-path", digit_folder, "--distillation-type", "none", "--input-size", 64, "--model"]
    assert "has finished epoch 2 of 2 already" in refused(
        *small[:2] + ["--input-size", 64, "--model", "EvoLeViT_128S", "--resume", path, "--epochs", 2,
                      "--teacher-model", "regnety_002", "--teacher-path", _fresh_teacher(tmp_path)])
    for sentence, flags in (("is not a checkpoint of EvoLeViT_128 ", ("--model", "EvoLeViT_128")),
                            ("at this size: poss is", ("--input-size", 96))):
        told = refused("--eval", "--resume", path, *flags)
        assert sentence in told and "to start from it, name it by main.py --finetune" in told
    few = commands.write_digits(tmp_path / "few", classes=4, train=1, val=1)
    nameless = str(tmp_path / "nameless.pth")
    content = torch.load(path, map_location="cpu")
    torch.save({"model": content["model"], "args": content["args"]}, nameless)
    assert "was trained on 10 classes but 4 are needed" in refused("--eval", "--resume", nameless, "--data-path", few)
    assert "no tensor of" in refused(*small + ["regnety_002", "--finetune", path])
    shutil.copy(path, str(tmp_path / "checkpoint.pth"))
    goes_on = ["--resume", "auto", "--output_dir", tmp_path, "--distillation-type", "none"]
    assert "leave the flag out, or start anew in another --output_dir" in refused(*goes_on + ["--model",
        "EvoLeViT_256"])
    content["args"].update(data_set="DIGITS", data_path=None)
    torch.save(content, str(tmp_path / "checkpoint.pth"))
    for asked in (goes_on, ["--eval", "--resume", tmp_path / "checkpoint.pth"]):
        assert "is not read: the data set here is DIGITS" in refused(*asked + ["--data-path", digit_folder])


def _fresh_teacher(folder):
    import timm
    path = str(folder / "regnety_002.pth")
    torch.save(timm.create_model("regnety_002", num_classes=10).state_dict(), path)
    return path
