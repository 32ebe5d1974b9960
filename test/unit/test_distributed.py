"""Two processes, one process that accumulates, and one large batch train alike."""
import copy
import itertools
import json
import os
import sys

import commands
import pytest
import torch
from reference import build, images, load_json
from timm.loss import SoftTargetCrossEntropy

from engine import Learner
from losses import DistillationLoss
from runtime.learning.models import parameters_without_gradient
from runtime.machine.machine import Machine


@pytest.mark.parametrize("drop_path", [0.0, 0.1])
def test_two_processes_stay_identical_and_equal_one_that_averages_both_halves(drop_path, tmp_path):
    """With drop path, too: one process that accumulates draws what each of as many processes would."""
    env_launcher = [command for name, command in commands.launchers(2).items() if name != "launch"][0]
    for launch, name, steps in ((env_launcher, "two", 2), ([sys.executable], "one", 4)):
        code, out, err = commands.helper("equivalence", tmp_path / name, steps, drop_path, launch=launch)
        assert code == 0, out + err
    a, b, one = (torch.load(str(tmp_path / name)) for name in ("two.0", "two.1", "one.0"))
    assert a and all(torch.equal(a[k], b[k]) for k in a)
    for key in one:
        assert (a[key] - one[key]).abs().max() <= 1e-6 * max(one[key].abs().max().item(), 1), key


def test_parameters_without_gradient_are_those_of_the_reference():
    facts = load_json("EvoLeViT_128S")
    for case, stage_wise in (("train_stage", True), ("train_layer", False)):
        model = build("EvoLeViT_128S", num_classes=10)
        model.set_stage_wise(stage_wise)
        model.set_learn_tradeoff(stage_wise)
        before = copy.deepcopy(model.state_dict())
        criterion = DistillationLoss(SoftTargetCrossEntropy(), None, "cls", 0.5, 1.0)
        unused = parameters_without_gradient(model, criterion, images(224), torch.full((2, 10), 0.1).double())
        assert set(unused) == {name for name, norm in facts[case]["grad_norm"].items() if norm is None}
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_four_accumulated_batches_of_8_equal_one_of_32_in_eval_mode_batch_norm():
    model = build("EvoLeViT_128S", gain=1.0, num_classes=10, img_size=64)
    copies = [copy.deepcopy(model) for _ in range(2)]
    x, labels = images(64, batch=32), torch.arange(32) % 10
    soft = torch.nn.functional.one_hot(labels, 10).double()
    criterion = DistillationLoss(SoftTargetCrossEntropy(), lambda i: i[:, 0, 0, :10], "cls", 0.5, 1.0)
    losses = []
    for m, size in zip(copies, (32, 8)):
        m.train()
        for layer in m.modules():
            if isinstance(layer, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
                layer.eval()
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3)
        losses.append(Learner(m, criterion, optimizer, Machine(torch.device("cpu")), 0.01).update(
            list(zip(x.split(size), soft.split(size), itertools.repeat(None)))))
    assert abs(losses[0] - losses[1]) < 1e-6
    moved = 0
    for before, a, b in zip(model.parameters(), copies[0].parameters(), copies[1].parameters()):
        assert (a - b).abs().max() < 1e-6
        moved += (a - before).abs().sum().item()
    assert moved > 0


LAUNCHERS = commands.launchers(2)


@pytest.mark.parametrize("launcher", [
    # where there is torchrun, the older launcher is only a name for it
    pytest.param(name, marks=pytest.mark.slow) if name == "launch" and "torchrun" in LAUNCHERS else name
    for name in sorted(LAUNCHERS)])
def test_main_trains_and_evaluates_in_two_processes(launcher, digit_folder, teacher, tmp_path):
    printed = commands.succeed(
        "--model", "EvoLeViT_128S", "--teacher-model", "regnety_002", "--teacher-path", teacher, "--data-path",
        digit_folder, "--epochs", 2, "--stage-wise-epoch", 1, "--output_dir", tmp_path / "save",
        launch=commands.launchers(2)[launcher])
    assert "Device: cpu x 2" in printed and printed.count("Model: ") == 1
    assert "Global batch: 64 = 32 images x 2 processes" in printed
    assert sorted(os.listdir(str(tmp_path / "save"))) == ["args.json", "best_checkpoint.pth", "checkpoint.previous.pth",
                                                          "checkpoint.pth", "index-train.npz", "index-val.npz",
                                                          "log.txt", "summary.json"]
    with open(str(tmp_path / "save" / "log.txt")) as f:
        last = json.loads(f.read().splitlines()[-1])
    assert last["test_images"] == 60

    flags = ["--eval", "--resume", tmp_path / "save" / "checkpoint.pth"]
    alone = commands.succeed(*flags)
    for more in ([], ["--no-dist-eval"]):
        together = commands.succeed(*flags + more, launch=commands.launchers(2)[launcher])
        assert "60 images" in alone and "60 images" in together
        assert accuracy(alone) == pytest.approx(accuracy(together), abs=2e-6)  # of the loss; the others are counts
    assert accuracy(alone)[0] == pytest.approx(last["test_acc1"], abs=5e-4)
    # each process evaluates its share with the average that it has
    average = accuracy(commands.succeed(*flags + ["--eval-ema"]))[2]
    assert average == pytest.approx(last["test_ema_loss"], abs=2e-6)


def accuracy(printed):
    """[top-1, top-5, loss] that --eval printed."""
    line = [line for line in printed.splitlines() if line.startswith("Acc@1")][0]
    return [float(figure.split()[1]) for figure in line.split("  ")[:3]]


def test_the_group_can_be_left_right_after_a_collective():
    """PyTorch 2.1 to 2.7 stood still there, now and then."""
    code, out, err = commands.helper("leave_often", "120", timeout=120)
    assert (code, out) == (0, "left 120 times\n"), err


@pytest.mark.parametrize("users, expected", [(None, 4), ("1", 1), ("2", 2)])
def test_a_process_takes_its_share_of_the_cores_unless_the_user_says_how_many_threads(users, expected, monkeypatch):
    """Of eight cores two processes take four each; PyTorch's launchers would leave each with one."""
    if users is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", users)
    for name, launch in commands.launchers(2).items():
        code, out, err = commands.helper("print_threads", launch=launch)
        assert code == 0, err
        assert out.count("threads:{}".format(expected)) == 2, (name, out)
