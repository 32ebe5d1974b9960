"""Evo-DeiT through the commands: its published recipe by default, with and without a teacher, fine-tuned, looked at,
exported."""
import json
import os
import re
import sys

import commands
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy

import export
import predict
import visualize
from flags import family_defaults, get_args_parser, published_global_batch
from losses import DistillationLoss
from runtime.errors import UserError
from runtime.keeping.checkpoint import Checkpoint
from runtime.learning.finetuning import start_from
from runtime.learning.models import build_model
from runtime.machine.versions import has_bf16

NAME = "evo_deit_tiny_patch16_224"
SMALL = ["--device", "cpu", "--num_workers", "0", "--input-size", "64", "--batch-size", "32", "--model", NAME]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digit_folder):
    """(output folder, what was printed) of a run of two epochs, one in either mode, by the family's recipe."""
    out = tmp_path_factory.mktemp("evo_deit")
    return str(out), commands.succeed("--data-path", digit_folder, "--epochs", 2, "--stage-wise-epoch", 1,
         "--output_dir", out, small=SMALL)


def log(folder):
    with open(os.path.join(str(folder), "log.txt")) as f:
        return [json.loads(line) for line in f]


def test_the_published_recipe_of_the_family_is_the_default(trained):
    assert trained[1].startswith("Published recipe of {}: --distillation-type none, --clip-grad 0.0, --clip-mode norm, "
                                 "--weight-decay 0.05\n".format(NAME))
    assert "reached with a global batch of 2048 and 300 epochs" in trained[1]
    with open(os.path.join(trained[0], "args.json")) as f:
        args = json.load(f)
    assert (args["distillation_type"], args["clip_grad"], args["weight_decay"], args["batch_size"]) == ("none", 0.0,
         0.05, 32)
    assert [entry["mode"] for entry in log(trained[0])] == ["layer-wise", "stage-wise"]
    assert log(trained[0])[0]["keep_ratios"] == [1, 0.5, 0.5]
    assert [family_defaults("evo_deit_{}_patch16_{}".format(*size))["batch_size"] for size in (
        ("tiny", 224), ("small", 224), ("base", 224), ("small", 384), ("base", 384))] == [256, 128, 128, 128, 64]
    assert published_global_batch("evo_deit_base_patch16_384",
        384) == published_global_batch("evo_deit_small_patch16_224", 224) == 1024


def test_evaluation_prediction_pages_and_export_read_it(trained, digit_folder, tmp_path, capsys):
    path = os.path.join(trained[0], "checkpoint.pth")
    printed = commands.succeed("--eval", "--resume", path, small=["--device", "cpu"])
    assert "stage-wise" in printed and float(printed.split("loss ")[-1].split()[0]) == pytest.approx(
        log(trained[0])[-1]["test_loss"], abs=1e-4)
    predict.main([os.path.join(digit_folder, "val", "digit3"), "--resume", path, "--json"])
    assert len(capsys.readouterr().out.splitlines()) == 6
    visualize.main(["--resume", path, "--count", "1", "--output_dir", str(tmp_path / "tokens")])
    assert "Tokens that {} keeps".format(NAME) in (tmp_path / "tokens" / "index.html").read_text()
    capsys.readouterr()
    export.main(["--resume", path, "--format", "torchscript", "--output", str(tmp_path / "model.pt")])
    assert float(re.search(r"largest difference (\S+)", capsys.readouterr().out).group(1)) < 1e-4
    printed = commands.succeed("--eval", "--resume", tmp_path / "model.pt", "--data-path", digit_folder,
                               small=["--device", "cpu"])
    assert float(printed.split("loss ")[-1].split()[0]) == pytest.approx(log(trained[0])[-1]["test_loss"], abs=1e-4)
    if not has_bf16("cpu"):
        return
    code, _, err = commands.run([sys.executable, commands.MAIN, "--eval", "--device", "cpu", "--resume", tmp_path /
                                 "model.pt", "--data-path", digit_folder, "--opt-level", "O1"])
    assert code == 2 and "runs as it was written, in float32; leave --opt-level and --amp-dtype out" in err


@pytest.mark.skipif(not hasattr(torch, "compile"), reason="older PyTorch has no operator of GELU for ONNX's")
def test_onnx_agrees_and_uses_operators_that_ascends_converter_lists(trained, tmp_path, capsys):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    with open(os.path.join(commands.UNIT, "data", "cann_8.0_onnx_operators.txt")) as f:
        listed = set(f.read().split())
    target = str(tmp_path / "model.onnx")
    for mode in ([], ["--layer-wise"]):
        export.main(["--resume", os.path.join(trained[0], "checkpoint.pth"), "--format", "onnx", "--output", target]
            + mode)
        out = capsys.readouterr().out
        assert float(re.search(r"largest difference (\S+)", out).group(1)) < 1e-4 and "Opset 11" in out
        assert {node.op_type for node in onnx.load(target).graph.node} <= listed


def test_the_loss_is_the_mean_over_both_heads_and_distils_each():
    torch.manual_seed(0)
    patch, cls, teacher = (torch.randn(5, 4) for _ in range(3))
    labels, base = torch.rand(5, 4).softmax(1), SoftTargetCrossEntropy()
    plain = DistillationLoss(base, None, "none", 0.5, 1.0, every_head=True)
    assert torch.allclose(plain(None, (patch, cls), labels), (base(patch, labels) + base(cls, labels)) / 2)
    taught = teacher.argmax(1)
    for kind in ("hard", "cls"):
        loss = DistillationLoss(base, lambda images: teacher, kind, 0.3, 1.0, every_head=True)
        expected = sum(0.7 * base(x, labels) + 0.3 * F.cross_entropy(x, taught) for x in (patch, cls)) / 2
        assert torch.allclose(loss(None, (patch, cls), labels), expected)


@pytest.mark.once
def test_it_is_distilled_and_resumed(digit_folder, teacher, tmp_path):
    flags = ["--data-path", digit_folder, "--distillation-type", "hard", "--teacher-model", "regnety_002",
         "--teacher-path", teacher, "--epochs", 2, "--output_dir", tmp_path, "--max-steps", 8]
    commands.succeed(*flags, small=SMALL)
    printed = commands.succeed("--resume", "auto", "--data-path", digit_folder, "--output_dir", tmp_path, small=SMALL)
    assert "--distillation-type hard" in printed and "Epoch 1" in printed and "Published recipe" not in printed


@pytest.mark.once
def test_it_starts_from_deits_own_weights_of_another_size(digit_folder, tmp_path):
    deit = timm.create_model("deit_tiny_patch16_224")
    path = tmp_path / "deit.pth"
    torch.save({"model": deit.state_dict()}, str(path))
    printed = commands.succeed("--finetune", path, "--data-path", digit_folder, "--epochs", 1, "--max-steps", 1,
         "--output_dir", tmp_path / "out", small=SMALL)
    assert "of its tensors left out: head.weight, head.bias" in printed
    (new,) = [line for line in printed.splitlines() if line.startswith("Not in it, so drawn at random: ")]
    assert set(new.split(": ")[1].split(", ")) == {name + part for name in ("head", "norm_cls", "head_cls")
                                                   for part in (".weight", ".bias")}
    model = build_model(NAME, 10, 64, distillation=True)
    others = ({"blocks.0.ls1.gamma": torch.ones(192)}, {"pos_embed": deit.pos_embed.detach()[:, 1:]})
    refuse = Checkpoint({}, "x.pth", "--finetune").refuse
    for other, sentence in zip(others, ("blocks.0.ls1.gamma is not a weight", "a position embedding of 196 rows")):
        with pytest.raises(UserError, match="x.pth cannot be fine-tuned as {}: {}".format(NAME, sentence)):
            start_from(dict(deit.state_dict(), **other), model, NAME, True, refuse)
    start = start_from(deit.state_dict(), model, NAME, True, pytest.fail)
    assert torch.equal(start.state["vs.3.v.weight"], deit.blocks[3].attn.qkv.weight[384:])
    assert start.state["pos_embed"].shape == (1, 17, 192) and torch.equal(start.state["pos_embed"][:, 0],
        deit.pos_embed[:, 0])


@pytest.mark.once
@pytest.mark.slow
def test_it_learns_digits_from_a_teacher(tmp_path):
    """The quickstart's teacher: both modes reach 97 % of DIGITS' validation pictures."""
    recipe = ["--device", "cpu", "--data-set", "DIGITS", "--input-size", "112", "--batch-size", "32", "--warmup-epochs",
         "0", "--mixup", "0", "--cutmix", "0", "--aa", "none", "--color-jitter", "0", "--reprob", "0",
         "--no-repeated-aug"]
    commands.succeed("--model", "regnety_002", "--distillation-type", "none", "--clip-grad", 0, "--no-model-ema",
         "--epochs", 7, "--lr", 0.016, "--output_dir", tmp_path / "teacher", small=recipe, timeout=1800)
    # without convolutions it learns more slowly: many epochs of small images, and a warm-up; single epochs are uneven,
    # so the average counts
    flags = ["--model-ema-decay", 0.995,
             "--input-size", 64, "--warmup-epochs", 5, "--model", NAME, "--distillation-type", "hard",
             "--teacher-model", "regnety_002", "--teacher-path", tmp_path / "teacher" / "best_checkpoint.pth",
             "--teacher-input-size", 112, "--lr", 0.008, "--epochs", 120, "--stage-wise-epoch", 100]
    commands.succeed(*flags + ["--output_dir", tmp_path / "student"], small=recipe, timeout=6000)
    best = {mode: max(entry["test_ema_acc1"] for entry in log(tmp_path / "student") if entry["mode"] == mode)
            for mode in ("layer-wise", "stage-wise")}
    print(best)
    assert min(best.values()) >= 97.0, best


def test_main_names_the_family_in_its_help():
    assert "--weight-decay 0.05" in " ".join(get_args_parser().format_help().split())
