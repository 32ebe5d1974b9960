"""fix_timm/ agrees with timm's own files, and replaces those of timm 0.4.12."""
import argparse
import functools
import importlib
import inspect
import os
import shutil
import sys

import commands
import numpy as np
import pytest
import timm.data.mixup
import timm.optim.optim_factory
import torch

from evo_vit import compat
from fix_timm import mixup, optim_factory

TIMM_0412 = compat.versions()["timm"] == "0.4.12"
pytestmark = pytest.mark.filterwarnings("ignore:`np.bool` is a deprecated")  # in timm's own file
only_0412 = pytest.mark.skipif(not TIMM_0412, reason="it compares with timm 0.4.12, and this is another")

MIXES = [dict(mixup_alpha=0.8, cutmix_alpha=1.0), dict(mixup_alpha=0.8), dict(mixup_alpha=0.0, cutmix_alpha=1.0),
         dict(cutmix_minmax=(0.2, 0.6)), dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.5, correct_lam=False)]


@pytest.fixture
def timm_mixup(monkeypatch):
    """timm's module, with its targets, which assume CUDA, built on the CPU."""
    module = timm.data.mixup
    monkeypatch.setattr(module, "mixup_target", functools.partial(module.mixup_target, device="cpu"))
    return module


@only_0412
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("options", MIXES)
def test_mixup_draws_and_mixes_as_timm_does(timm_mixup, mode, options):
    for seed in range(5):
        results = []
        for module in (timm_mixup, mixup):
            np.random.seed(seed)
            mix = module.Mixup(mode=mode, label_smoothing=0.1, num_classes=7, **options)
            images = torch.arange(6 * 3 * 8 * 8, dtype=torch.float32).view(6, 3, 8, 8).clone()
            results.append(mix(images, torch.tensor([0, 1, 2, 3, 4, 6])) + (np.random.rand(),))
        (x, y, after), (ours_x, ours_y, ours_after) = results
        assert torch.allclose(x, ours_x, atol=1e-4) and torch.allclose(y, ours_y, atol=1e-6) and after == ours_after
        assert torch.allclose(ours_y.sum(1), torch.ones(6))


@only_0412
@pytest.mark.parametrize("mode", ["batch", "pair", "elem", "half"])
@pytest.mark.parametrize("options", MIXES)
def test_collating_mixup_agrees_with_timm(timm_mixup, mode, options):
    random = np.random.RandomState(3)
    batch = [(random.randint(0, 256, (3, 8, 8)).astype(np.uint8), i) for i in range(6)]
    for seed in range(5):
        results = []
        for module in (timm_mixup, mixup):
            np.random.seed(seed)
            collate = module.FastCollateMixup(mode=mode, label_smoothing=0.1, num_classes=7, **options)
            results.append(collate([(image.copy(), label) for image, label in batch]) + (np.random.rand(),))
        (x, y, after), (ours_x, ours_y, ours_after) = results
        assert ours_x.dtype == torch.uint8 and torch.equal(x, ours_x)
        assert torch.allclose(y.float(), ours_y.float(), atol=1e-6) and after == ours_after


def test_targets_need_no_cuda_device():
    assert mixup.mixup_target(torch.tensor([1, 0]), 3, 0.5).device.type == "cpu"  # on the npu: test_npu.py
    assert mixup.one_hot(torch.tensor([1, 0]), 3).tolist() == [[0, 1, 0], [1, 0, 0]]


@only_0412
@pytest.mark.parametrize("name, original", [("data.mixup", mixup), ("optim.optim_factory", optim_factory)])
def test_every_public_name_of_the_original_stays(name, original):
    theirs = importlib.import_module("timm." + name)
    missing = [public for public in vars(theirs) if not public.startswith("_") and public not in ("Optional",)
               and not hasattr(original, public)]
    assert missing == []
    for public, value in vars(theirs).items():
        if inspect.isfunction(value) and value.__module__ == theirs.__name__:
            ours = list(inspect.signature(getattr(original, public)).parameters)
            assert ours == list(inspect.signature(value).parameters), public


@only_0412
@pytest.mark.parametrize("name",
    ["sgd",
    "nesterov",
    "momentum",
    "adam",
    "adamw",
    "adabelief",
    "nadam",
    "radam",
    "adamp",
    "sgdp",
    "adadelta",
    "adafactor",
    "adahessian",
    "rmsprop",
    "rmsproptf",
    "novograd",
    "nvnovograd",
    "lookahead_adam",
     "AdamW"])
def test_every_optimizer_is_the_one_that_timm_builds(name):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    args = argparse.Namespace(opt=name, lr=0.01, weight_decay=0.02, momentum=0.9, opt_eps=1e-8, opt_betas=None)
    try:
        theirs = timm.optim.optim_factory.create_optimizer(args, model)
    except TypeError as error:  # timm 0.4.12 hands eps to a class without it
        with pytest.raises(TypeError, match=str(error).split(" ")[-1]):
            optim_factory.create_optimizer(args, model)
        return
    ours = optim_factory.create_optimizer(args, model)
    assert type(ours) is type(theirs) and ours.defaults == theirs.defaults
    for mine, other in zip(ours.param_groups, theirs.param_groups):
        assert {k: v for k, v in mine.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}
        assert list(map(id, mine["params"])) == list(map(id, other["params"]))


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="no optimizer 'adamx'; there are adabelief"):
        optim_factory.create_optimizer_v2(torch.nn.Linear(1, 1), "adamx")


STEP = """
import torch, timm.data.mixup, timm.optim, timm.optim.optim_factory as factory
assert timm.__file__.startswith({folder!r}), timm.__file__
assert "Ascend's NpuFusedAdamW" in factory.__doc__ and "on any device" in timm.data.mixup.__doc__
model = timm.create_model("regnety_002", num_classes=10)
optimizer = timm.optim.create_optimizer_v2(model, "adamw", learning_rate=1e-3, weight_decay=0.05)
assert type(optimizer) is torch.optim.AdamW
mix = timm.data.mixup.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=10)
images, targets = mix(torch.randn(4, 3, 64, 64), torch.arange(4))
loss = torch.sum(-targets * torch.log_softmax(model(images), 1), 1).mean()
loss.backward()
before = model.head.fc.weight.clone()
optimizer.step()
assert not torch.equal(before, model.head.fc.weight)
print("stepped")
"""


@only_0412
@pytest.mark.parametrize("way", ["commands", "apply.sh"])
def test_the_files_replace_those_of_an_installed_timm(way, tmp_path):
    """By the README's four commands, and by apply.sh, which can be run twice."""
    folder = tmp_path / "packages"
    shutil.copytree(os.path.dirname(timm.__file__), str(folder / "timm"))
    work = tmp_path / "repository"
    shutil.copytree(os.path.join(commands.ROOT, "fix_timm"), str(work / "fix_timm"))
    path = str(folder / "timm")
    if way == "commands":
        script = ("diff -uN {0}/data/mixup.py ./fix_timm/mixup.py >mixup.patch\ndiff -uN {0}/optim/optim_factory.py "
            "./fix_timm/optim_factory.py >optim.patch\npatch -p0 {0}/data/mixup.py mixup.patch && patch -p0 "
            "{0}/optim/optim_factory.py optim.patch").format(path)
        code, out, err = commands.run(["bash", "-c", script], cwd=work)
        assert code == 0, out + err
    else:
        for expected in ("replaced", "already in place"):
            code, out, err = commands.run(["bash", work / "fix_timm" / "apply.sh"], cwd=tmp_path,
                                          env={"PYTHONPATH": str(folder), "PYTHON": sys.executable})
            assert code == 0 and out.count(expected) == 2, out + err
    code, out, err = commands.run([sys.executable, "-c", STEP.format(folder=str(folder))], cwd=tmp_path,
                                  env={"PYTHONPATH": str(folder)})
    assert code == 0 and out == "stepped\n", out + err
