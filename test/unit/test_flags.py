"""Flags of main.py: that each says what it does, and that those for schedule, optimiser and augmentation do it."""
import argparse
import json
import os
import re
import sys

import commands
import numpy as np
import pytest
import torch

import main
from datasets import Augmentation, build_dataset, build_transform
from flags import get_args_parser, parse_args
from runtime.keeping.settings import micro_batches
from runtime.learning.average import ModelEma
from runtime.learning.optimizer import build_optimizer, build_schedule
from runtime.machine.machine import Machine
from runtime.machine.processes import read_world


def actions():
    return [action for action in get_args_parser()._actions if action.option_strings and action.dest != "help"]


def test_every_flag_has_a_help_text_with_its_default():
    parser = get_args_parser()
    formatter = parser._get_formatter()
    shown = [action for action in actions() if action.help is not argparse.SUPPRESS]
    assert len(shown) > 90
    for action in shown:
        text = formatter._expand_help(action)
        assert len(text.split("(default")[0]) > 8, action.option_strings
        other = isinstance(action, argparse._StoreFalseAction) or action.default in ("", None)
        assert "(default" in text or other, text
        if action.default is None and action.nargs is None and not isinstance(action, argparse._StoreFalseAction):
            assert "(default" in text or action.dest == "data_path", text
    assert {group.title for group in parser._action_groups} > {"data", "model", "optimiser", "augmentation",
         "evaluation"}


def test_every_flag_is_named_in_a_test():
    texts = ""
    for name in os.listdir(commands.UNIT):
        if name.endswith(".py"):
            with open(os.path.join(commands.UNIT, name)) as f:
                texts += f.read()
    missing = [action.option_strings[0] for action in actions() if not any(
        re.search(re.escape(option) + r"(?![\w-])", texts) for option in action.option_strings)]
    assert missing == []


def args_of(*flags):
    return get_args_parser().parse_args([str(flag) for flag in flags])


def rates(*flags, **metric):
    """The learning rate of each epoch that a run with these flags has."""
    args = args_of(*flags)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    scheduler = build_schedule(args, optimizer)
    found = []
    for epoch in range(args.epochs):
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch, metric.get("metric", 50.0))
    return found


BASE = ["--epochs", 10, "--lr", 1.0, "--warmup-epochs", 2, "--warmup-lr", 0.1, "--min-lr", 0.01]


def test_the_schedules_follow_their_flags():
    cosine = rates("--sched", "cosine", *BASE)
    assert cosine[0] == cosine[1] == 0.1 and max(cosine) == pytest.approx(0.9055, abs=1e-3) and 0.01 < cosine[-1] < 0.11
    assert rates("--sched", "tanh", *BASE)[5] != pytest.approx(cosine[5], abs=1e-3)
    step = rates("--sched", "step", "--decay-epochs", 3, "--decay-rate", 0.5, *BASE)
    assert step[4] == 0.5 and step[7] == 0.25 and rates("--sched", "step", "--decay-epochs", 3, "--dr", 0.25,
        *BASE)[4] == 0.25
    falling = rates("--sched", "plateau", "--patience-epochs", 1, "--cooldown-epochs", 0, "--decay-rate", 0.5, *BASE)
    patient = rates("--sched", "plateau", "--patience-epochs", 9, "--cooldown-epochs", 0, "--decay-rate", 0.5, *BASE)
    assert falling[-1] < patient[-1]
    assert rates("--sched", "plateau", *BASE + ["--warmup-epochs", 0])[:4] == [1.0] * 4
    noisy = rates("--lr-noise", 0.3, 0.9, "--lr-noise-pct", 0.5, "--lr-noise-std", 0.2, *BASE)
    assert noisy[2] == cosine[2] and noisy[5] != cosine[5] and abs(noisy[5] / cosine[5] - 1) <= 0.5


@pytest.mark.parametrize("flags, name, options", [
    (["--opt", "adamw", "--opt-eps", 1e-5, "--opt-betas", 0.8, 0.9, "--weight-decay", 0.3], "AdamW",
     dict(eps=1e-5, betas=(0.8, 0.9))),
    (["--opt", "momentum", "--momentum", 0.7], "SGD", dict(momentum=0.7, nesterov=False)),
])
def test_the_optimiser_follows_its_flags(flags, name, options):
    optimizer = build_optimizer(args_of(*flags), torch.nn.Linear(2, 2), torch.device("cpu"))
    assert type(optimizer).__name__ == name
    found = {key: optimizer.defaults[key] for key in options}
    assert {key: tuple(value) if key == "betas" else value for key, value in found.items()} == options
    if "--weight-decay" in flags:
        assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.3]


def test_augmentation_follows_its_flags():
    def names(**changes):
        return str(build_transform(True, "IMNET", 64, Augmentation(**changes)))
    args = args_of("--data-set", "DIGITS", "--input-size", 64, "--batch-size", 8, "--color-jitter", 0.2, "--aa", "none",
         "--train-interpolation", "bilinear", "--reprob", 0.3, "--remode", "rand", "--recount", 2, "--num_workers", 0)
    args = argparse.Namespace(**dict(vars(args), micro_batches=1))
    view = main.build_train_loader(args, Machine(torch.device("cpu"))).dataset
    jitter = [t for t in view.dataset.transform.transforms if type(t).__name__ == "ColorJitter"]
    erasing = view.dataset.transform.transforms[-1].erasing
    assert len(jitter) == 1 and (erasing.probability, erasing.max_count, erasing.rand_color) == (0.3, 2, True)
    assert "ColorJitter" in names(aa="none", color_jitter=0.3) and "ColorJitter" not in names(aa="none",
        color_jitter=0.0)
    assert "RandAugment" in names() and "AutoAugment" in names(aa="original")
    erasing = build_transform(True, "IMNET", 64, Augmentation(
        reprob=0.7, remode="const", recount=3)).transforms[-1].erasing
    assert (erasing.probability, erasing.max_count) == (0.7, 3) and not erasing.per_pixel and not erasing.rand_color
    assert build_transform(True, "IMNET", 64, Augmentation(reprob=0.0)).transforms[-1].erasing is None
    random = build_transform(True, "IMNET", 64, Augmentation(train_interpolation="random")).transforms[0].interpolation
    assert isinstance(random, (tuple, list)) and len(random) == 2


@pytest.mark.parametrize("flags, expected", [
    (["--mixup", 0.3, "--cutmix", 0, "--mixup-prob", 0.6, "--mixup-mode", "elem", "--smoothing", 0.2],
     dict(mixup_alpha=0.3, cutmix_alpha=0.0, mix_prob=0.6, mode="elem", label_smoothing=0.2)),
    (["--mixup-switch-prob", 0.9, "--cutmix-minmax", 0.2, 0.4], dict(switch_prob=0.9, cutmix_minmax=[0.2, 0.4])),
])
def test_mixing_follows_its_flags(flags, expected):
    _, mixup = main.build_criterion(args_of(*flags), 10, None)
    assert {name: getattr(mixup, name) for name in expected} == expected


def test_distillation_follows_its_flags():
    criterion, _ = main.build_criterion(args_of("--distillation-type", "soft",
                                        "--distillation-alpha", 0.3, "--distillation-tau", 2), 10, None)
    assert (criterion.distillation_type, criterion.alpha, criterion.tau) == ("soft", 0.3, 2.0)


def train(digit_folder, out, *flags):
    small = ["--device", "cpu", "--num-workers", "0", "--input-size", "64", "--batch-size", "32", "--model",
         "EvoLeViT_128S", "--distillation-type", "none", "--data-path", digit_folder, "--epochs", "1",
         "--no-repeated-aug"]
    commands.succeed(*flags, "--output-dir", out, small=small)
    with open(os.path.join(str(out), "log.txt")) as f:
        return json.loads(f.readline())


@pytest.mark.once
def test_flags_that_change_the_step_change_the_loss(digit_folder, tmp_path):
    """From the command line: two updates each at a high rate."""
    base = ["--max-steps", 3, "--warmup-epochs", 0, "--lr", 0.05, "--model-ema-force-cpu", "--dist_url", "env://"]
    plain = train(digit_folder, tmp_path / "plain", *base)
    assert 0 <= plain["test_ema_acc1"] <= 100 and plain["test_ema_loss"] > 0
    for number, flags in enumerate((["--clip-mode", "norm", "--clip-grad", 0.001],
                                   ["--seed", 3], ["--drop-path", 0.5])):
        assert train(digit_folder, tmp_path / str(number), *base + flags)["train_loss"] != plain["train_loss"], flags
    again = train(digit_folder, tmp_path / "again", *base + ["--no-pin-mem"])
    assert again["train_loss"] == plain["train_loss"]


def test_flags_in_pairs_have_an_opposite():
    for name, on, off in (("pin_mem", "--pin-mem", "--no-pin-mem"), ("repeated_aug", "--repeated-aug",
             "--no-repeated-aug"), ("dist_eval", "--dist-eval", "--no-dist-eval"), ("model_ema", "--model-ema",
             "--no-model-ema"), ("channels_last", "--channels-last", "--no-channels-last")):
        assert getattr(args_of(on), name) is True and getattr(args_of(off), name) is False
        assert getattr(args_of(off, on), name) is True


@pytest.mark.once
def test_the_average_follows_its_flags(digit_folder, tmp_path):
    model = torch.nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(0.0)
        cold, warm = ModelEma(model, 0.999), ModelEma(model, 0.999, warmup=True)
        model.weight.fill_(1.0)
        for _ in range(3):
            cold.update(model)
            warm.update(model)
    kept = 1.0
    for update in (1, 2, 3):
        kept *= (1 + update) / (10 + update)
    assert warm.module.weight.item() == pytest.approx(1 - kept) and cold.module.weight.item() == pytest.approx(1
        - 0.999 ** 3)
    base = ["--max-steps", 2, "--lr", 0.05, "--warmup-epochs", 0]
    entry = train(digit_folder, tmp_path / "warm", *base + ["--model-ema-warmup", "--best-by", "test_ema_acc1"])
    checkpoint = torch.load(str(tmp_path / "warm" / "best_checkpoint.pth"), map_location="cpu")
    assert checkpoint["max_accuracy"] == entry["test_ema_acc1"] and checkpoint["ema_updates"] == 2
    assert "test_ema_acc1" not in train(digit_folder, tmp_path / "none", *base + ["--no-model-ema"])
    code, _, err = commands.run([sys.executable, commands.MAIN] + commands.SMALL + [
        "--data-set", "DIGITS", "--no-model-ema", "--best-by", "test_ema_acc1"])
    assert code == 2 and "--best-by test_ema_acc1 needs the average" in err


@pytest.mark.once
def test_the_keep_ratio_is_the_models(digit_folder, tmp_path):
    entry = train(digit_folder, tmp_path / "save", "--max-steps", 1, "--keep-ratio", 0.25, "--stage-wise-epoch", 0)
    assert entry["keep_ratios"] == [1.0, 0.25, 0.25]
    path = tmp_path / "save" / "checkpoint.pth"
    flags = ["--device", "cpu", "--num_workers", "0"]
    as_trained, dense = (commands.succeed("--eval", "--resume", path, *more, small=flags) for more in ([],
        ["--keep-ratio", 1]))
    losses = [text.split("loss ")[-1].split()[0] for text in (as_trained, dense)]
    flops = [float(re.search(r"([0-9.,]+) M FLOPs", text).group(1)) for text in (as_trained, dense)]
    assert flops[0] < flops[1] and float(losses[0]) == pytest.approx(entry["test_loss"], abs=1e-4)
    for wrong in (0, 1.5, -0.5):
        code, _, err = commands.run([sys.executable, commands.MAIN, "--eval", "--resume", path, "--keep-ratio", wrong]
            + flags)
        assert code == 2 and err.startswith("error: --keep-ratio") and err.count("\n") == 1, err
    code, _, err = commands.run([sys.executable, commands.MAIN, "--eval", "--resume", path, "--keep-ratio", 0.7,
         "--prune-warmup-epoch", 300] + flags)
    assert code == 2 and "no token selection, in which all tokens are kept; leave it out" in err
    code, _, err = commands.run([sys.executable, commands.MAIN, "--data-set", "DIGITS", "--model", "resnet18",
         "--distillation-type", "none", "--keep-ratio", 0.5, "--input-size", 64, "--batch-size", 8] + flags)
    assert code == 2 and "resnet18 keeps all its tokens" in err


def test_local_rank_stands_for_the_launchers_variable(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert read_world(args_of("--local_rank", 1).local_rank).local_rank == 1


def write_inat(folder, year):
    """iNaturalist's layout with two classes of one order, and real pictures."""
    source = commands.write_digits(folder / "pictures", classes=2, train=8, val=4)
    categories = [{"id": number, "name": "species {}".format(number), "order": "digits"} for number in range(2)]
    (folder / "categories.json").write_text(json.dumps(categories))
    for part in ("train", "val"):
        images, annotations = [], []
        for label in range(2):
            names = sorted(os.listdir(os.path.join(source, part, "digit{}".format(label))))
            for name in names:
                images.append({"id": len(images), "file_name": "pictures/{}/digit{}/{}".format(part, label, name)})
                annotations.append({"image_id": images[-1]["id"], "category_id": label})
        (folder / "{}{}.json".format(part, year)).write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder


@pytest.mark.once
@pytest.mark.parametrize("name, year", [("INAT", 2018), ("INAT19", 2019)])
def test_inaturalist_trains_on_the_level_that_is_asked_for(name, year, tmp_path):
    root = write_inat(tmp_path, year)
    flags = ["--data-set", name, "--model", "EvoLeViT_128S", "--distillation-type", "none", "--epochs", 1,
        "--data-path", root]
    small = ["--device", "cpu", "--num_workers", "0", "--input-size", "64", "--batch-size", "8", "--max-steps", "1"]
    out = tmp_path / "out"
    commands.succeed(*flags + ["--inat-category", "name", "--output_dir", out], small=small)
    checkpoint = torch.load(str(out / "checkpoint.pth"), map_location="cpu")
    assert checkpoint["classes"] == ["species 0", "species 1"] and checkpoint["log"][0]["test_images"] == 8
    for category, sentence in (("order", "there is one class only, 'digits'"), ("genus", "categories.json has order, "
            "name")):
        code, _, err = commands.run([sys.executable, commands.MAIN] + small + flags + ["--inat-category", category])
        assert code == 2 and sentence in err and err.count("\n") == 1, err
    (root / "categories.json").write_text("[]")
    code, out, err = commands.run([sys.executable, commands.MAIN] + \
                                  small + flags + ["--output_dir", tmp_path / "bad"])
    assert code == 2 and "do not fit together" in err and err.count("\n") == 1


def test_cifar_is_read_at_its_own_size(tmp_path, monkeypatch):
    import hashlib
    import pickle

    from torchvision import datasets as torchvision_datasets
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    random, lists = np.random.RandomState(0), {}
    for part, count in (("train", 40), ("test", 20)):
        content = pickle.dumps({"data": random.randint(0, 256, (count, 3072)).astype(np.uint8),
                                "fine_labels": [number % 100 for number in range(count)]})
        (folder / part).write_bytes(content)
        lists[part + "_list"] = [[part, hashlib.md5(content).hexdigest()]]
    content = pickle.dumps({"fine_label_names": ["class {}".format(number) for number in range(100)]})
    (folder / "meta").write_bytes(content)
    for name, value in lists.items():
        monkeypatch.setattr(torchvision_datasets.CIFAR100, name, value)
    monkeypatch.setattr(torchvision_datasets.CIFAR100, "meta",
                        {"filename": "meta", "key": "fine_label_names", "md5": hashlib.md5(content).hexdigest()})
    dataset = build_dataset(True, "CIFAR", str(tmp_path), build_transform(True, "CIFAR", 32))
    (pixels, _), label = dataset[3]
    assert pixels.shape == (32, 32, 3) and label == 3 and len(dataset) == 40 and len(dataset.classes) == 100
    with pytest.raises(main.UserError, match="does not hold CIFAR-100"):
        build_dataset(False, "CIFAR", str(folder), None)
    main.main(["--device", "cpu", "--num_workers", "0", "--data-set", "CIFAR", "--data-path", str(tmp_path), "--model",
         "resnet10t", "--distillation-type", "none", "--input-size", "32", "--batch-size", "20", "--epochs", "1",
         "--output_dir", str(tmp_path / "out")] if hasattr(torch, "compile") else ["--device", "cpu", "--num_workers",
         "0", "--data-set", "CIFAR", "--data-path", str(tmp_path), "--model", "resnet18", "--distillation-type", "none",
         "--input-size", "32", "--batch-size", "20", "--epochs", "1", "--output_dir", str(tmp_path / "out")])
    assert torch.load(str(tmp_path / "out" / "checkpoint.pth"), map_location="cpu")["log"][0]["test_images"] == 20


def test_a_path_may_begin_with_the_home_folder(digit_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args, given = main.parse_args(["--output_dir", "~/x", "--resume", "~/y.pth",
                                  "--teacher-path=~/z", "--data_path", "~"])
    assert [args.output_dir, args.resume, args.teacher_path, args.data_path] == [
        str(tmp_path / "x"), str(tmp_path / "y.pth"), str(tmp_path / "z"), str(tmp_path)]
    assert given == {"output_dir", "resume", "teacher_path", "data_path"}


def test_the_warm_up_is_noted_where_it_is_the_whole_run(student):
    assert "Note: --warmup-epochs 5 is not shorter than --epochs 2" in student[1]


@pytest.mark.parametrize("processes, flags, expected", [
    (8, [], 2), (4, [], 4), (2, [], 8), (1, [], 16), (16, [], 1),  # the global batch of 128 is kept
    (3, [], 2), (32, [], 2),  # it is not divided by them
    (4, ["--accum-steps", 2], 4), (4, ["--accum-steps", 5], 5), (4, ["--batch-size", 24], 2)])
def test_other_processes_keep_the_global_batch_by_accumulation(processes, flags, expected):
    saved = {"processes": 8, "batch_size": 8, "accum_steps": 2, "global_batch": 128}
    args, given = parse_args([str(flag) for flag in flags])
    args = argparse.Namespace(**dict(dict(saved, **vars(args)), **{k: saved[k] for k in saved if k not in given}))
    said = []
    checkpoint = argparse.Namespace(recipe=lambda: saved)
    assert micro_batches(args, given, checkpoint, processes, said.append) == expected
    kept = processes != 8 and args.batch_size * processes * expected == 128
    assert len(said) == kept and (not kept or "keeps the global batch of 128" in said[0])
    assert micro_batches(args, given, None, processes, said.append) == args.accum_steps


def test_a_run_that_goes_on_twice_with_fewer_processes_keeps_its_global_batch():
    args, given = parse_args(["--batch-size", "8"])
    saved = {"processes": 8, "batch_size": 8, "accum_steps": 1, "global_batch": 64}
    for processes, expected in ((1, 8), (1, 8), (2, 4), (2, 4), (8, 1)):
        found = micro_batches(args, given, argparse.Namespace(recipe=lambda: saved), processes, lambda text: None)
        assert found == expected
        saved = dict(saved, processes=processes, micro_batches=found)  # what that run's checkpoints say
