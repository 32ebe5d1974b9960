"""main.py's flags for speed, from the command line."""
import json
import os

import commands
import pytest

import main
from runtime.machine.compiling import can_compile

needs_compiler = pytest.mark.skipif(not can_compile(), reason="this PyTorch does not compile modules")


COMPILING = 2000  # seconds: PyTorch 2.1 needs 500 beside another test


def train(digit_folder, teacher, out, *flags):
    commands.succeed("--data-path", digit_folder, "--model", "EvoLeViT_128S", "--teacher-model", "regnety_002",
                     "--teacher-path", teacher, "--stage-wise-epoch", 1, "--output_dir", out, *flags, timeout=COMPILING)
    with open(os.path.join(str(out), "log.txt")) as f:
        return [json.loads(line) for line in f]


@pytest.mark.slow
def test_memory_format_and_the_teachers_size_do_what_they_say(digit_folder, teacher, tmp_path):
    plain, contiguous, small = (train(digit_folder, teacher, tmp_path / name, "--epochs", 1, *flags) for name,
        flags in (("plain", []), ("contiguous", ["--no-channels-last"]), ("small", ["--teacher-input-size", 32])))
    assert plain[0]["train_loss"] == pytest.approx(contiguous[0]["train_loss"], rel=1e-4)
    assert plain[0]["train_loss"] != small[0]["train_loss"]
    for entry in plain + contiguous + small:
        assert 0 < entry["mfu"] < 1 and 0 <= entry["waiting_for_data"] < 1


def test_jpeg_draft_trains_on_slightly_different_pixels(tmp_path):
    """Of JPEGs that are large for the images: where no draft is decoded, the loss would be the same."""
    from bench.contenders import photos
    losses = []
    with photos(500, 375, count=16) as folder:
        for name, flags in (("plain", []), ("draft", ["--jpeg-draft"])):
            commands.succeed("--data-path", folder, "--model", "EvoLeViT_128S", "--distillation-type", "none",
                 "--epochs", 1, "--batch-size", 8, "--no-repeated-aug", "--output_dir", tmp_path / name, *flags)
            with open(str(tmp_path / name / "log.txt")) as f:
                losses.append(json.loads(f.readline())["train_loss"])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.1)


@pytest.mark.slow
@needs_compiler
def test_compiled_training_follows_the_plain_one(digit_folder, teacher, tmp_path):
    plain, compiled = (train(digit_folder, teacher, tmp_path / name, "--epochs", 1, *more)
                       for name, more in (("plain", []), ("compiled", ["--compile"])))
    for a, b in zip(plain, compiled):
        assert a["mode"] == b["mode"] and b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-3)
    for flags in ([], ["--compile"], ["--compile", "--opt-level", "O1"]):
        evaluated = commands.succeed(
            "--eval", "--resume", os.path.join(str(tmp_path / "compiled"), "checkpoint.pth"), *flags,
            timeout=COMPILING)
        loss = float(evaluated.split("loss ")[-1].split()[0])
        assert loss == pytest.approx(compiled[0]["test_loss"], abs=1e-3 if len(flags) < 2 else 2e-2), flags


@pytest.mark.skipif(can_compile(), reason="this PyTorch compiles modules")
@pytest.mark.parametrize("task", [[], ["--eval", "--resume", "none.pth"]])
def test_a_pytorch_that_cannot_compile_says_so(task, capsys):
    with pytest.raises(SystemExit) as end:
        main.main(commands.SMALL + ["--data-set", "DIGITS", "--compile"] + task)
    assert (end.value.code, capsys.readouterr().err) == (2, "error: --compile needs PyTorch 2.1 or newer\n")


@pytest.mark.parametrize("flags,sentence", [
    (["--amp-dtype", "fp16"], "needs an NPU or a CUDA device"),
    (["--amp-dtype", "bf16"], "is for PyTorch's own mixed precision"),
    (["--jpeg-draft", "--data-set", "DIGITS"], "large picture files"),
    (["--teacher-input-size", "0"], "not a positive whole number"),
    (["--write-teacher-labels", "labels", "--distillation-type", "none"], "has no teacher")])
def test_flags_that_do_not_go_together_end_in_one_sentence(flags, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main.main(commands.SMALL + ["--output_dir", str(tmp_path / "out")] + flags + (
            [] if "DIGITS" in flags else ["--data-path", str(tmp_path)]))
    err = capsys.readouterr().err
    assert end.value.code == 2 and sentence in err and err.count("\n") == 1, err
