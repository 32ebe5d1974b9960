"""The tools around main.py as their users call them: predict.py, visualize.py, report.py, --tensorboard."""
import base64
import json
import os
import re
import shutil
import sys

import commands
import numpy as np
import pytest
import torch

import export
import main as recipe
import predict
import report
import visualize
from datasets import build_transform
from evo_vit import EvoLeViT
from runtime.keeping.checkpoint import load_checkpoint
from runtime.keeping.restore import restore_evo
from runtime.learning.models import build_model
from runtime.pictures import page
from runtime.pictures.gallery import Picture, photographs, to_batch
from runtime.pictures.reading import load_picture

pytestmark = pytest.mark.once


@pytest.fixture
def refused(capsys):
    """refused(tool's main, *arguments): the one sentence with which it ends."""
    def run(tool, *arguments):
        with pytest.raises(SystemExit) as stopped:
            tool([str(argument) for argument in arguments])
        err = capsys.readouterr().err
        assert stopped.value.code == 2
        assert err.splitlines()[-1].startswith("error: ") and "Traceback" not in err, err
        return err.splitlines()[-1]
    return run


@pytest.fixture(scope="module")
def checkpoint(student):
    return os.path.join(student[0], "best_checkpoint.pth")


@pytest.fixture
def pictures(digit_folder, tmp_path):
    """A folder with four good pictures, in one of its folders, and a file that is none."""
    folder = tmp_path / "pictures"
    for digit in (1, 3, 5, 7):
        source = os.path.join(digit_folder, "val", "digit{}".format(digit))
        (folder / "more").mkdir(parents=True, exist_ok=True)
        shutil.copy(os.path.join(source, sorted(os.listdir(source))[0]), str(folder / "more" / "{}.png".format(digit)))
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


# ------------------------------------------------------------------------------------------------- restoring

def test_a_checkpoint_says_its_model_size_classes_and_mode(checkpoint):
    restored = restore_evo(checkpoint)
    saved = load_checkpoint(checkpoint, "it")
    assert (restored.name, restored.input_size, restored.data_set) == ("EvoLeViT_128S", 64, "IMNET")
    assert restored.classes == ["digit{}".format(digit) for digit in range(10)]
    assert restored.mode == ("layer-wise", "stage-wise")[saved.content["epoch"]] and not restored.model.training
    assert restored.model.stage_wise == (restored.mode == "stage-wise")


def test_a_published_checkpoint_needs_its_models_name(tmp_path, refused):
    model = build_model("EvoLeViT_128S", 10, 64, distillation=True)
    path = str(tmp_path / "published.pth")
    torch.save({"model": model.state_dict()}, path)
    assert "does not say which model it holds; add --model NAME" in refused(predict.main, "x.png", "--resume", path)
    restored = restore_evo(path, "EvoLeViT_128S", 64)
    assert restored.classes[9] == "class 9" and restored.mode == "stage-wise"
    assert "does not fit EvoLeViT_128S at this size" in refused(
        predict.main, "x.png", "--resume", path, "--model", "EvoLeViT_128S")


def test_checkpoints_of_other_models_are_refused_by_every_tool(teacher, refused):
    for tool, arguments in ((predict.main, ["x.png"]), (visualize.main, ["x.png"])):
        assert "holds the model regnety_002, and this is for trained Evo-LeViT and Evo-DeiT models" in refused(
            tool, *(arguments + ["--resume", teacher]))
        assert "holds another model" in refused(tool, *(arguments + ["--resume", teacher, "--model", "EvoLeViT_128S"]))
        assert "there is no file nowhere.pth" in refused(tool, *(arguments + ["--resume", "nowhere.pth"]))


# ------------------------------------------------------------------------------------------------- predict.py

@torch.no_grad()
def test_predict_names_classes_with_the_models_probabilities(checkpoint, pictures, capsys):
    predict.main([str(pictures), "--resume", checkpoint, "--json", "--topk", "3", "--batch-size", "2"])
    captured = capsys.readouterr()
    said = [json.loads(line) for line in captured.out.splitlines()]
    assert "broken.png" in captured.err and captured.err.count("\n") == 1
    assert [os.path.basename(one["picture"]) for one in said] == ["1.png", "3.png", "5.png", "7.png"]
    restored = restore_evo(checkpoint)
    for one in said:
        image = to_batch([Picture("", load_picture(one["picture"]))], build_transform(False, "IMNET", 64))
        expected = restored.model(image).softmax(1)[0]
        values = [guess["probability"] for guess in one["classes"]]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        for guess in one["classes"]:
            assert abs(expected[restored.classes.index(guess["name"])].item() - guess["probability"]) < 1e-5
    predict.main([str(pictures / "more" / "3.png"), "--resume", checkpoint])
    line = capsys.readouterr().out
    assert line.count("%") == 5 and said[1]["classes"][0]["name"] in line and line.count("\n") == 1


def test_pictures_that_are_none_are_refused(checkpoint, pictures, tmp_path, refused):
    (tmp_path / "empty").mkdir()
    assert "none of the 1 files is a picture" in refused(predict.main, pictures / "broken.png", "--resume", checkpoint)
    assert "there is no file or folder" in refused(predict.main, tmp_path / "no.png", "--resume", checkpoint)
    assert "there is no picture in" in refused(predict.main, tmp_path / "empty", "--resume", checkpoint)
    assert "none of the 1 files is a picture" in refused(
        visualize.main, pictures / "broken.png", "--resume", checkpoint, "--output_dir", tmp_path / "out")


# ------------------------------------------------------------------------------------------------- visualize.py

def embedded(html):
    """The files inside a page's images."""
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/[a-z+]+;base64,([^"]+)"', html)]


def test_visualize_writes_a_png_of_each_mode_and_a_page_with_all(checkpoint, pictures, tmp_path, capsys):
    out = tmp_path / "tokens"
    visualize.main([str(pictures), "--resume", checkpoint, "--output_dir", str(out)])
    captured = capsys.readouterr()
    assert "broken.png" in captured.err and "4 pictures" in captured.out
    files = sorted(name for name in os.listdir(str(out)) if name.endswith(".png"))
    assert files == ["{:04d}-{}.png.{}.png".format(i, digit, mode) for i, digit in enumerate((1, 3, 5, 7))
                     for mode in ("layer-wise", "stage-wise")]
    page = (out / "index.html").read_text()
    assert sorted(embedded(page)) == sorted((out / name).read_bytes() for name in files)
    assert all(content.startswith(b"\x89PNG") for content in embedded(page))
    assert not re.search(r'(src|href)="(?!data:)', page) and "<script" not in page
    assert page.count("<img alt=") == 8 and page.count("%") > 8 * 5  # five classes each


def test_visualize_shows_validation_pictures_unless_others_are_named(checkpoint, tmp_path, refused):
    out = tmp_path / "tokens"
    visualize.main(["--resume", checkpoint, "--count", "3", "--output_dir", str(out)])
    page = (out / "index.html").read_text()
    assert [re.sub("<.*?>", "", title) for title in re.findall("<h2>.*</h2>", page)] == [
        "0 (class digit0)", "20 (class digit3)", "40 (class digit6)"]
    assert "--data-path: there is no folder" in refused(
        visualize.main, "--resume", checkpoint, "--data-path", tmp_path / "no", "--output_dir", out)
    for flags in (["--data-path", tmp_path], ["--count", 3]):
        assert flags[0] + " is for validation pictures" in refused(visualize.main, "a.png", *flags)


def test_a_checkpoint_of_digits_is_shown_whole_pictures_by_every_file_that_is_made_of_it(student, tmp_path, refused):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    content = torch.load(os.path.join(student[0], "best_checkpoint.pth"), map_location="cpu")
    content["args"].update(data_set="DIGITS", data_path=None)
    own = tmp_path / "digits-20261126.pth"  # a day, no hash
    torch.save(content, str(own))
    export.main(["--resume", str(own), "--format", "safetensors"])
    for path in (own, tmp_path / "digits-20261126.safetensors"):
        restored = restore_evo(str(path))
        assert restored.data_set == "DIGITS" and "CenterCrop" not in str(build_transform(False, restored.data_set, 64))
    assert "is not read: the data set here is DIGITS" in refused(visualize.main, "--resume", own, "--data-path",
                                                                 tmp_path)
    del content["log"], content["amp_backend"]
    torch.save(dict(content, mean=[0.5] * 3, std=[0.5] * 3, args={"model": "EvoLeViT_128S"}), str(own))
    assert "wants images normalised by mean (0.5, 0.5, 0.5)" in refused(
        export.main, "--resume", own, "--format", "torchscript", "--input-size", 64)


def test_names_are_drawn_as_they_are():
    from matplotlib.figure import Figure
    figure = Figure()
    axis = figure.subplots()
    for name in ("_old", "a$_$b", "caf\udce9", "$"):
        axis.plot([0, 1], [0, 1], label=page.label(name))
    axis.legend()
    text = page.draw(figure, "svg").decode()
    assert "_old" in text and "a$_$b" in text


@pytest.mark.parametrize("stage_wise", [True, False])
@torch.no_grad()
def test_every_pixel_shows_the_token_that_stands_for_it(stage_wise):
    model = EvoLeViT((16, 32, 48), 16, (1, 2, 3), (3, 2, 2), num_classes=5, img_size=112).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.set_stage_wise(stage_wise)
    images = to_batch(photographs(3), build_transform(False, "IMNET", 112))
    maps, logits = visualize.stage_maps(model, images)
    assert torch.equal(logits, model(images))
    stages = model.forward_stages(images)
    for one, number in zip(maps, range(3)):
        for stage, (tokens, state), cell, side in zip(one, stages, (16, 32, 64), (7, 4, 2)):
            assert stage.tokens == side ** 2 == tokens.shape[1] - 1 and stage.kept_tokens == side ** 2 // 2
            for row, column in ((0, 0), (17, 80), (50, 50), (111, 0), (3, 111), (95, 96), (111, 111)):
                token = row // cell * side + column // cell
                assert stage.kept[row, column] == (token in state.slow[number].tolist())
                assert stage.attention[row, column] == state.score[number, token].item()
            assert stage.kept.shape == stage.attention.shape == (112, 112)


def test_without_selection_all_tokens_count_as_kept():
    model = EvoLeViT((16, 32, 48), 16, (1, 2, 3), (3, 2, 2), num_classes=5, img_size=64).eval()
    model.set_token_selection(False)
    (one,), _ = visualize.stage_maps(model, torch.randn(1, 3, 64, 64))
    assert [stage.kept_tokens for stage in one] == [16, 4, 1] and all(stage.kept.all() for stage in one)
    assert model.keep_ratios() == [1, 1, 1]
    model.set_token_selection(True)
    assert model.keep_ratios() == [(1 + 1 + 0.5) / 3, 0.5, 0.5]


def test_a_missing_package_is_named_with_its_pip_command(checkpoint, student, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert refused(visualize.main, "--resume",
        checkpoint) == "error: visualize.py needs matplotlib; pip install matplotlib"
    assert refused(report.main, student[0]) == "error: report.py needs matplotlib; pip install matplotlib"
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert refused(recipe.main, "--data-set", "DIGITS", "--device", "cpu", "--batch-size", 32, "--tensorboard") == \
        "error: --tensorboard needs tensorboard; pip install tensorboard"


# ------------------------------------------------------------------------------------------------- runtime.report

def alternatives(html):
    return re.findall('<img alt="(.*?)"', html)


def test_the_report_of_a_run_shows_its_curves_and_configuration(student, tmp_path, capsys):
    report.main([student[0], "--output", str(tmp_path / "report.html")])
    assert "shows 2 epochs" in capsys.readouterr().out
    html = (tmp_path / "report.html").read_text()
    assert alternatives(html) == ["{} over epochs".format(name) for name in ("Loss", "Accuracy", "Learning rate",
         "Images/s", "Keep ratio of each stage")] + ["Time of an epoch: " + student[0]]
    assert "Loss scale: not in this log." in html and "stage_wise_epoch</td><td>1" in html
    assert all(b"</svg>" in content for content in embedded(html)) and "<script" not in html
    assert not re.search(r'(src|href)="(?!data:)', html)


def test_two_runs_are_laid_over_each_other_with_what_differs(student, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    with open(os.path.join(student[0], "log.txt")) as f:
        log = [json.loads(line) for line in f]
    with open(os.path.join(student[0], "args.json")) as f:
        args = json.load(f)
    (other / "log.txt").write_text("".join(json.dumps(dict(entry, loss_scale=128.0)) + "\n" for entry in log))
    (other / "args.json").write_text(json.dumps(dict(args, lr=0.25, new_flag=True)))
    runs = [report.read_run(student[0]), report.read_run(str(other))]
    assert report.differences(runs) == [["lr", "0.0005", "0.25"], ["new_flag", "-", "true"]]
    html = report.build_page(runs)
    assert "Loss scale over epochs" in alternatives(html)
    loss = embedded(html)[0].decode()
    for run in runs:
        assert "{}: training".format(run.name) in loss and "{}: validation".format(run.name) in loss
    assert report.differences([runs[0], runs[0]]) == [
                              ] and "They do not differ." in report.build_page([runs[0], runs[0]])


def test_a_log_that_is_cut_off_gives_what_is_whole(student, tmp_path, capsys, refused):
    run = tmp_path / "run"
    run.mkdir()
    with open(os.path.join(student[0], "log.txt")) as f:
        text = f.read()
    (run / "log.txt").write_text(text[:-100])
    report.main([str(run)])
    err = capsys.readouterr().err
    assert "log.txt: line 2 is not whole and was left out; the other 1 are used" in err
    assert "no readable args.json" in err and "is not whole" in (run / "report.html").read_text()
    (run / "log.txt").write_text("[1]\n{\"epoch\": null}\n\x00\n" + text)
    assert len(report.read_run(str(run)).log) == 2 and len(report.read_run(str(run)).notes) == 4
    (run / "log.txt").write_text(text[:50])
    assert "holds no line of a finished epoch" in refused(report.main, run)
    assert "cannot be read (No such file" in refused(report.main, tmp_path / "nothing")


def test_the_report_copes_with_logs_of_older_revisions(tmp_path):
    (tmp_path / \
     "log.txt").write_text('{"epoch": 0, "train_loss": 2.5, "test_acc1": NaN}\n{"epoch": 1, "train_loss": 1e400}\n')
    html = report.build_page([report.read_run(str(tmp_path))])
    assert alternatives(html) == ["Loss over epochs", "Accuracy over epochs"] and "Images/s: not in this log." in html


def test_the_report_leaves_out_figures_that_are_no_numbers(tmp_path):
    (tmp_path / \
     "log.txt").write_text('{"epoch": 0, "train_images_per_s": null}\n{"epoch": 1, "train_images_per_s": 12.5}\n')
    report.main([str(tmp_path)])
    assert "12.5" in (tmp_path / "report.html").read_text()


# ------------------------------------------------------------------------------------------------- --tensorboard

def test_tensorboard_gets_the_figures_of_log_txt_also_after_a_resume(digit_folder, tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    flags = commands.SMALL + ["--model", "EvoLeViT_128S", "--distillation-type", "none", "--data-path", digit_folder,
                              "--output_dir", str(tmp_path), "--tensorboard", "--max-steps", "2", "--no-repeated-aug"]
    recipe.main([str(flag) for flag in flags + ["--epochs", 1]])
    recipe.main([str(flag) for flag in flags + ["--epochs", 2, "--resume", "auto"]])
    with open(str(tmp_path / "log.txt")) as f:
        log = [json.loads(line) for line in f]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for tag, name in (("loss/train_loss", "train_loss"), ("accuracy/test_acc1",
                      "test_acc1"), ("schedule/train_lr", "train_lr")):
        assert [event.step for event in events.Scalars(tag)] == [0, 1]
        np.testing.assert_allclose([event.value for event in events.Scalars(tag)],
                                   [entry[name] for entry in log], rtol=1e-6)
    assert [event.value for event in events.Scalars("keep_ratio/stage_2")] == [0.5, 0.5]
