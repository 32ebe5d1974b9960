"""Where a run meets the world: other people's data, checkpoints, teachers and launchers. Each test is of a kind of
mistake, with several inputs of the kind."""
import enum
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import commands
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

import main
import predict
import visualize
from datasets import Augmentation, build_dataset, build_transform
from evo_vit import evo_levit
from evo_vit.compat import TORCH
from flags import get_args_parser
from runtime.errors import RunFailed, UserError
from runtime.keeping.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, without_prefixes
from runtime.keeping.restore import restore
from runtime.learning.models import build_model
from runtime.machine.processes import read_world
from runtime.pictures.batches import loaded
from runtime.pictures.reading import IMAGE_EXTENSIONS, load_picture

TINY = "EvoLeViT_small_for_test_world"
CPU = ["--device", "cpu", "--num_workers", "0"]
PLAIN = CPU + ["--no-repeated-aug", "--mixup", "0", "--cutmix", "0", "--aa", "none", "--reprob", "0",
     "--distillation-type", "none", "--input-size", "64", "--batch-size", "8", "--model", TINY]


@pytest.fixture(scope="module", autouse=True)
def tiny_model():
    evo_levit._register(TINY, dict(embed_dim=(16, 32, 48), key_dim=16, num_heads=(1, 2, 3), depth=(3, 2, 2)), 64)


@pytest.fixture(scope="module")
def three_digits(tmp_path_factory):
    """16 pictures each of three digits to train on, 6 each to validate."""
    return commands.write_digits(tmp_path_factory.mktemp("three"), classes=3, train=16, val=6)


@pytest.fixture
def call(capsys):
    """call(*flags): what main.py prints, in this process; it must succeed."""
    def run(*flags):
        capsys.readouterr()
        main.main([str(flag) for flag in flags])
        return capsys.readouterr().out
    return run


@pytest.fixture
def refused(capsys):
    """refused(*flags, tool=main): the one sentence with which a command ends."""
    def run(*flags, **kwargs):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            kwargs.get("tool", main).main([str(flag) for flag in flags])
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
        return err
    return run


@pytest.fixture(scope="module")
def trained(three_digits, tmp_path_factory):
    """The output folder of a run of two epochs, layer-wise and stage-wise."""
    out = tmp_path_factory.mktemp("trained")
    main.main(PLAIN + ["--data-path", three_digits, "--epochs", "2", "--stage-wise-epoch", "1", "--warmup-epochs", "0",
         "--lr", "0.05", "--output_dir", str(out)])
    return str(out)


def renamed(folder, target, names):
    """A copy of the data in `folder` with its classes digit0, digit1, ... under other names; None leaves one out."""
    for part in ("train", "val"):
        for number, name in enumerate(names):
            if name is not None:
                shutil.copytree(os.path.join(folder, part, "digit{}".format(number)), os.path.join(str(target), part,
                     name))
    return str(target)


def figures(printed):
    """(top-1, loss) that --eval printed."""
    words = [line for line in printed.splitlines() if line.startswith("Acc@1")][-1].split()
    return float(words[1]), float(words[5])


# ------------------------------------------------------------------------------------------- 1: classes

@pytest.mark.parametrize("names", [["digit0", "digit1", "digit3"], ["a", "b", "c"], ["digit0", "digit10", "digit2"]])
def test_other_classes_under_the_same_count_are_refused(names, trained, three_digits, tmp_path, refused):
    path = os.path.join(trained, "checkpoint.pth")
    other = renamed(three_digits, tmp_path / "other", names)
    first = [name for name in sorted(names) if name not in ("digit0", "digit1", "digit2")][0]
    for flags in (["--eval"], PLAIN + ["--epochs", 3, "--output_dir", tmp_path / "out"]):
        sentence = refused(*CPU + flags + ["--resume", path, "--data-path", other])
        assert "was trained on other classes" in sentence and "'{}'".format(first) in sentence


@pytest.mark.once
@pytest.mark.parametrize("kept", [[0], [2], [0, 2], [1, 2]])
def test_a_subset_of_the_classes_is_evaluated_by_their_names(kept, trained, three_digits, tmp_path, call):
    path = os.path.join(trained, "checkpoint.pth")
    part = renamed(three_digits, tmp_path / "part", ["digit{}".format(n) if n in kept else None for n in range(3)])
    single = []
    for number in kept:
        one = renamed(three_digits, tmp_path / str(number), ["digit{}".format(n) if n == number else None
            for n in range(3)])
        single.append(figures(call("--eval", "--resume", path, "--data-path", one, *CPU)))
    together = figures(call("--eval", "--resume", path, "--data-path", part, *CPU))
    assert together == pytest.approx(np.mean(single, axis=0), abs=2e-3)
    restored = restore(load_checkpoint(path, "--resume"))
    dataset = build_dataset(False, "IMNET", three_digits, build_transform(False, "IMNET", 64))
    right = 0
    with torch.no_grad():
        for index in range(len(dataset)):
            (pixels, _), label = dataset[index]
            x = (pixels.permute(2, 0, 1).float() / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None,
                None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
            right += label in kept and restored.model(x[None]).argmax().item() == label
    assert together[0] == pytest.approx(100.0 * right / (6 * len(kept)), abs=1e-2)


def test_resuming_needs_all_classes(trained, three_digits, tmp_path, refused):
    part = renamed(three_digits, tmp_path / "part", ["digit0", "digit1", None])
    sentence = refused(*PLAIN + ["--epochs", 3, "--resume", os.path.join(trained, "checkpoint.pth"), "--data-path",
        part])
    assert "'digit2' is missing here" in sentence


def test_finetuning_on_other_classes_starts_the_classifier_anew(trained, three_digits, tmp_path, call):
    path = os.path.join(trained, "checkpoint.pth")
    flags = PLAIN + ["--epochs", 1, "--max-steps", 1, "--finetune", path]
    same = call(*flags + ["--data-path", three_digits, "--output_dir", tmp_path / "same"])
    assert "of its tensors left out: none" in same and "classifier starts anew" not in same
    other = renamed(three_digits, tmp_path / "other", ["a", "b", "c"])
    told = call(*flags + ["--data-path", other, "--output_dir", tmp_path / "out"])
    assert "Its classes differ from the data set's (first 'digit0', here 'a'), so the classifier starts anew" in told
    assert "head.l.weight" in told


def test_a_teacher_is_asked_by_the_names_of_its_classes(three_digits, tmp_path, call, refused):
    import timm
    teacher, model = tmp_path / "teacher.pth", timm.create_model("resnet18", num_classes=4)
    names = ["digit2", "cat", "digit0", "digit1"]
    flags = CPU + ["--mixup", 0, "--cutmix", 0, "--aa", "none", "--reprob", 0, "--input-size", 64, "--batch-size", 8,
         "--model", TINY, "--teacher-model", "resnet18", "--teacher-path", teacher, "--data-path", three_digits,
         "--epochs", 1]
    soft = ["--distillation-type", "soft", "--write-teacher-labels"]

    def logits(name, classes):
        state = dict(model.state_dict())
        if classes is not None:
            order = [names.index(one) for one in classes]
            state.update({key: state[key][order] for key in ("fc.weight", "fc.bias")})
        save_checkpoint({"model": state, "classes": classes or names}, str(teacher))
        call(*flags + soft + [tmp_path / name])
        return np.load(str(tmp_path / name / "epoch-0000-replica-0000.npy"))

    by_name = logits("all", None)
    assert by_name.shape == (48, 3) and np.abs(by_name).max() > 0
    assert np.allclose(by_name, logits("same", ["digit0", "digit1", "digit2"]), atol=1e-6)
    save_checkpoint({"model": model.state_dict(), "classes": ["digit0", "digit1", "dog", "cat"]}, str(teacher))
    assert "does not know 'digit2'" in refused(*flags + ["--output_dir", tmp_path / "out"])


# ------------------------------------------------------------------------------------------- 2: settings of a resume

CHANGES = {"--epochs": [4, 6, 9], "--lr": [0.01, 0.1, 0.5], "--min-lr": [1e-4, 1e-6], "--weight-decay": [0.0, 0.1],
     "--sched": ["cosine", "tanh", "step", "plateau"], "--warmup-epochs": [0, 2], "--warmup-lr": [1e-5],
    "--decay-rate": [0.5], "--decay-epochs": [2.0], "--patience-epochs": [0]}


def drawn(draw, most):
    return {flag: draw.choice(values) for flag, values in draw.sample(sorted(CHANGES.items()), draw.randint(0, most))}


def words(flags):
    return [str(word) for pair in flags.items() for word in pair]


def rates(flags, log):
    """What a fresh run with these flags would train at, given the accuracies that this one reached."""
    args = get_args_parser().parse_args(words(flags))
    args.lr = args.lr * 8 / 512
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    scheduler = main.build_schedule(args, optimizer)
    found = []
    for entry in log:
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step(entry["epoch"], entry["test_acc1"])
    return found


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:PlateauLRScheduler")
@pytest.mark.parametrize("pairs", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_a_resumed_run_has_the_rates_of_a_fresh_one_with_its_flags(pairs, three_digits, tmp_path, call):
    draw = random.Random(3)
    for number in range(pairs):
        first, second = dict({"--epochs": 4, "--warmup-epochs": 0}, **drawn(draw, 4)), drawn(draw, 3)
        first["--epochs"] = 4
        out = tmp_path / str(number)
        flags = PLAIN + ["--data-path", three_digits, "--output_dir", out, "--no-model-ema"]
        call(*flags + words(first) + ["--max-steps", 12])  # two epochs of six updates
        told = call(*flags + words(second) + ["--resume", "auto"])
        with open(str(out / "log.txt")) as f:
            log = [json.loads(line) for line in f]
        merged = dict(first, **second)
        assert len(log) == merged["--epochs"], (first, second)
        found, expected = [entry["train_lr"] for entry in log], rates(merged, log)
        assert found[2:] == pytest.approx(expected[2:], rel=1e-9), (first, second, found, expected)
        checkpoint = torch.load(str(out / "checkpoint.pth"), map_location="cpu")
        decays = {group["weight_decay"] for group in checkpoint["optimizer"]["param_groups"]}
        assert decays == {0.0, merged.get("--weight-decay", 0.025)}
        defaults = vars(get_args_parser().parse_args([]))
        for flag, value in second.items():
            was = first.get(flag, defaults[flag[2:].replace("-", "_")])
            assert ("{} {} (was {})".format(flag, value, was) in told) == (value != was), (flag, told)
        shutil.rmtree(str(out))


@pytest.mark.parametrize("flags, sentence", [
    (["--opt", "sgd"], "was trained with --opt adamw, and its weights and moments do not go on with --opt sgd"),
    (["--model", "EvoLeViT_128S"], "--model EvoLeViT_128S"), (["--input-size", "96"], "does not fit"),
    (["--epochs", "2"], "has finished epoch 2 of 2 already")])
def test_what_a_resume_cannot_change_is_refused(flags, sentence, trained, three_digits, tmp_path, refused):
    base = [flag for flag in PLAIN]
    assert sentence in refused(*base + ["--data-path", three_digits, "--epochs", 3, "--resume", os.path.join(
        trained, "checkpoint.pth"), "--output_dir", tmp_path] + flags)


# ------------------------------------------------------------------------------------------- 3, 6: processes

def start_ranks(outs, *flags, **kwargs):
    """Two processes as a launcher starts them, each with an output folder of its own; [(code, out, err)]."""
    port = commands.free_port()
    env = kwargs.get("env", lambda rank: dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2,
                                              MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
    base = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    own = kwargs.get("own", ([], []))
    processes = [subprocess.Popen(
        [sys.executable, commands.MAIN] + [str(word) for word in list(flags) + list(own[rank]) + ["--output_dir", out]],
        env=dict(base, OMP_NUM_THREADS="1", **{k: str(v) for k, v in env(rank).items()}), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, universal_newlines=True) for rank, out in enumerate(outs)]
    return [(process.returncode,) + texts for process, texts in [(p, p.communicate(timeout=300)) for p in processes]]


SMALL_RUN = ["--device", "cpu", "--num_workers", "0", "--input-size", "64", "--batch-size", "8", "--model",
     "EvoLeViT_128S", "--distillation-type", "none", "--no-repeated-aug"]


@pytest.mark.once
def test_processes_that_find_different_checkpoints_take_the_first_ones(three_digits, tmp_path):
    """Two machines without a shared disk: the folder of the second one is empty."""
    flags = SMALL_RUN + ["--data-path", three_digits, "--epochs", 2, "--resume", "auto"]
    commands.succeed(*flags[8:] + ["--max-steps", 6, "--output_dir", tmp_path / "a"], small=flags[:8])
    (code, out, err), (other, _, other_err) = start_ranks([tmp_path / "a", tmp_path / "b"], *flags)
    assert (code, other) == (0, 0), err + other_err
    assert "Note: the processes found different checkpoints" in out and "Resuming" in out and "Epoch 0" not in out


@pytest.mark.slow
@pytest.mark.share
def test_processes_with_other_flags_or_data_are_refused(three_digits, tmp_path):
    less = renamed(three_digits, tmp_path / "less", ["digit0", "digit1", None])
    for own, sentence in ((([], ["--lr", "0.1"]), "--lr is 0.0005 for process 0 and 0.1 for process 1"),
                          ((["--data-path", three_digits], ["--data-path", less]), "the processes do not agree")):
        results = start_ranks([tmp_path / "a", tmp_path / "b"], *SMALL_RUN + ["--data-path", three_digits, "--epochs",
            1], own=own)
        assert all(code for code, _, _ in results) and sentence in "".join(err for _, _, err in results), results


LAUNCHED = [
    (dict(RANK=3, WORLD_SIZE=8, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2), (3, 8, 1, 2)),
    (dict(SLURM_PROCID=5, SLURM_NTASKS=8, SLURM_LOCALID=1, SLURM_NTASKS_PER_NODE=4, SLURM_JOB_ID=7), (5, 8, 1, 4)),
    (dict(SLURM_PROCID=1, SLURM_STEP_NUM_TASKS=2, SLURM_NTASKS=16, SLURM_LOCALID=1), (1, 2, 1, 2)),
    (dict(SLURM_PROCID=6, SLURM_NTASKS=8, SLURM_LOCALID=2, SLURM_TASKS_PER_NODE="4(x2)"), (6, 8, 2, 4)),
    (dict(OMPI_COMM_WORLD_RANK=1, OMPI_COMM_WORLD_SIZE=2, OMPI_COMM_WORLD_LOCAL_RANK=1, OMPI_COMM_WORLD_LOCAL_SIZE=2),
     (1, 2, 1, 2)),
    (dict(PMI_RANK=2, PMI_SIZE=4, MPI_LOCALRANKID=0, MPI_LOCALNRANKS=2), (2, 4, 0, 2)),
    (dict(RANK_ID=3, RANK_SIZE=8, DEVICE_ID=3), (3, 8, 3, 8)), (dict(RANK_ID=11, RANK_SIZE=16), (11, 16, 3, 8)),
    (dict(RANK=0, WORLD_SIZE=2, SLURM_PROCID=0, SLURM_NTASKS=1), (0, 2, 0, 2)),  # torchrun inside a SLURM job
    (dict(), (0, 1, 0, 1)), (dict(SLURM_JOB_ID=4, SLURM_NTASKS=8), (0, 1, 0, 1))]
VARIABLES = {name for env, _ in LAUNCHED for name in env}


@pytest.mark.parametrize("environment, world", LAUNCHED)
def test_the_place_of_a_process_comes_from_its_launchers_variables(environment, world, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    assert read_world()[:4] == world


@pytest.mark.parametrize("environment, sentence", [
    (dict(RANK=1), "has RANK but not WORLD_SIZE"), (dict(WORLD_SIZE=4), "torchrun --nproc_per_node"),
    (dict(SLURM_PROCID="one", SLURM_NTASKS=2), "must be whole numbers"),
    (dict(RANK_ID=9, RANK_SIZE=8), "does not divide"),
    (dict(RANK_ID=0, RANK_SIZE=1, DEVICE_ID=3), "DEVICE_ID 3 is not below 1"),
    (dict(RANK_ID=0, RANK_SIZE=4, DEVICE_ID=4), "DEVICE_ID 4 is not below 4, .* number it from 0"),
    (dict(OMPI_COMM_WORLD_RANK=0, OMPI_COMM_WORLD_SIZE=3, OMPI_COMM_WORLD_LOCAL_SIZE=2), "does not divide")])
def test_half_a_launcher_is_refused(environment, sentence, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=sentence):
        read_world()


@pytest.mark.once
def test_two_tasks_of_srun_train_together(three_digits, tmp_path):
    def env(rank):
        return dict(SLURM_PROCID=rank, SLURM_NTASKS=2, SLURM_LOCALID=rank, SLURM_JOB_ID=os.getpid())
    results = start_ranks([tmp_path / "save"] * 2, *SMALL_RUN + ["--data-path", three_digits, "--epochs", 1], env=env)
    assert [code for code, _, _ in results] == [0, 0], results
    assert "Device: cpu x 2" in results[0][1] and "Processes: as srun (SLURM) says" in results[0][1]
    assert sorted(os.listdir(str(tmp_path / "save"))) == ["args.json", "best_checkpoint.pth", "checkpoint.pth",
                                                          "index-train.npz", "index-val.npz", "log.txt", "summary.json"]


# ------------------------------------------------------------------------------------------- 4: exports

@pytest.mark.parametrize("mode, schedule", [
    ("stage-wise", ["--stage-wise-epoch", 0]),
    pytest.param("layer-wise", ["--stage-wise-epoch", 9], marks=pytest.mark.slow),
    pytest.param("layer-wise, no token selection", ["--prune-warmup-epoch", 9], marks=pytest.mark.slow)])
def test_every_export_gives_the_loss_of_the_checkpoint(mode, schedule, three_digits, tmp_path, call):
    import export
    from runtime.keeping.exported import FORMATS
    call(*PLAIN + ["--data-path", three_digits, "--epochs", 1, "--warmup-epochs", 0, "--lr", 0.5, "--output_dir",
         tmp_path, "--export-weights", tmp_path / "weights.safetensors"] + schedule)
    path = tmp_path / "checkpoint.pth"
    printed = call("--eval", "--resume", path, *CPU)
    assert "({}, {})".format("weights", mode) in printed
    expected, seen = figures(printed), 0
    for name, row in FORMATS.items():
        if TORCH < row.oldest_torch:
            continue
        for package in row.packages:
            pytest.importorskip(package)
        target = tmp_path / ("model" + row.suffix)
        export.main(["--resume", str(path), "--format", name, "--output", str(target)])
        seen += 1
        for file in (target, tmp_path / "weights.safetensors"):
            told = call("--eval", "--resume", file, "--data-path", three_digits, *CPU)
            assert figures(told) == pytest.approx(expected, abs=1e-5) and mode in told, (name, told)
    assert seen >= 2
    content = load_checkpoint(str(tmp_path / "weights.safetensors"), "it").content
    assert content["mode"] == mode and content["classes"] == ["digit0", "digit1",
        "digit2"] and content["crop_pct"] == 0.875
    assert content["input_size"] == [3, 64, 64] and content["interpolation"] == "bicubic" and len(content["mean"]) == 3


def test_a_finished_run_that_is_resumed_exports_the_mode_it_ended_in(three_digits, tmp_path, call):
    command = PLAIN + ["--data-path", three_digits, "--epochs", 1, "--warmup-epochs", 0, "--stage-wise-epoch", 9,
                       "--output_dir", tmp_path]
    call(*command)
    call(*command + ["--resume", "auto", "--export-weights", tmp_path / "late.safetensors"])
    late, path = load_checkpoint(str(tmp_path / "late.safetensors"), "it"), tmp_path / "checkpoint.pth"
    assert late.content["mode"] == "layer-wise"
    figures_of = [figures(call("--eval", "--resume", file, "--data-path", three_digits, *CPU))
                  for file in (path, tmp_path / "late.safetensors")]
    assert figures_of[0] == figures_of[1]


# ------------------------------------------------------------------------------------------- 7, 8, 13, 14, 15: pictures

@settings(max_examples=25)
@given(kind=st.sampled_from(["f4", "i4", "u2"]), top=st.sampled_from([1, 255, 1000, 4095, 65535, 10 ** 6]),
       low=st.sampled_from([0, 0, -3]))
def test_greys_of_any_range_keep_their_greys(kind, top, low, tmp_path_factory):
    if kind == "u2" and (top > 65535 or low < 0 or top == 1) or kind != "f4" and top == 1:
        return
    ramp = np.linspace(low, top, 64 * 64).reshape(64, 64).astype(kind)
    path = str(tmp_path_factory.mktemp("grey") / "grey.tiff")
    Image.fromarray(ramp).save(path)
    grey = np.asarray(load_picture(path))[..., 0].astype(int)
    assert grey.shape == (64, 64) and (np.diff(grey.flatten()) >= 0).all()
    assert grey.max() > (50 if top == 1000 else 240) and grey.min() < 20 and grey.std() > (15 if top == 1000 else 60)


def test_a_flat_or_broken_grey_is_still_a_picture(tmp_path):
    for number, pixels in enumerate((np.zeros((8, 8), "f4"), np.full((8, 8), np.nan, "f4"), np.full((8, 8), 7, "i4"),
                                     np.full((8, 8), -7, "i4"))):
        path = str(tmp_path / "{}.tiff".format(number))
        Image.fromarray(pixels).save(path)
        assert load_picture(path).size == (8, 8)


def test_pictures_are_found_by_suffix_through_links_and_without_shadows(three_digits, tmp_path, call):
    root = tmp_path / "data"
    shutil.copytree(three_digits, str(root))
    zero = root / "val" / "digit0"
    picture = Image.open(str(sorted(zero.iterdir())[0]))
    more = [suffix for suffix in (".jfif", ".gif", ".jpe") if suffix in IMAGE_EXTENSIONS]
    assert len(more) == 3
    for number, suffix in enumerate(more):
        picture.convert("RGB").save(str(zero / "more{}{}".format(number, suffix)), "GIF" if suffix == ".gif"
            else "JPEG")
    for part in ("train", "val"):
        for name in (".ipynb_checkpoints", ".cache"):
            (root / part / name).mkdir()
        (root / part / "digit1" / "._x.png").write_bytes(b"shadow")
        (root / part / "digit1" / ".ipynb_checkpoints").mkdir()
        shutil.copy(str(sorted((root / part / "digit0").iterdir())[0]),
            str(root / part / "digit1" / ".ipynb_checkpoints" / "y.png"))
        (root / part / "digit1" / "notes.txt").write_text("no picture")
        outside = tmp_path / (part + "-outside")
        shutil.move(str(root / part / "digit2"), str(outside))
        (root / part / "digit2").mkdir()
        os.symlink(str(outside), str(root / part / "digit2" / "linked"))
        os.symlink(str(root / part / "digit2"), str(outside / "loop"))
    dataset = build_dataset(False, "IMNET", str(root), None)
    assert dataset.classes == ["digit0", "digit1", "digit2"]
    assert np.bincount(dataset.labels).tolist() == [9, 6, 6] and dict(dataset.left_out) == {".txt": 1}
    printed = call(*PLAIN + ["--data-path", root, "--epochs", 1, "--max-steps", 1, "--output_dir", tmp_path / "out"])
    assert "holds files that are left out: 1 of .txt" in printed
    for index in range(len(dataset)):
        assert dataset[index][0].mode == "RGB"


@pytest.mark.parametrize("what", ["profile", "text", "many texts"])
def test_a_sound_png_with_a_large_profile_or_text_is_read(what, tmp_path):
    path, noise = str(tmp_path / "large.png"), np.random.RandomState(0).bytes(3 * 2 ** 20)
    info = PngImagePlugin.PngInfo()
    if what == "text":
        info.add_text("comment", "x" * (5 * 2 ** 20), zip=True)
    if what == "many texts":
        for number in range(40):
            info.add_text("comment{}".format(number), "y" * 2 ** 21, zip=True)
    Image.new("RGB", (8, 8), (1, 200, 3)).save(path, pnginfo=info, **({"icc_profile": noise} if what == "profile"
        else {}))
    assert load_picture(path).getpixel((0, 0)) == (1, 200, 3)


# ------------------------------------------------------------------------------------------- 9, 10: other people's
# files

@settings(max_examples=30)
@given(prefixes=st.lists(st.sampled_from(["module.", "_orig_mod.", "model."]), max_size=4))
def test_prefixes_of_wrappers_go_in_any_order(prefixes):
    state = build_model(TINY, 3, 64, distillation=True).state_dict()
    wrapped = {"".join(prefixes) + name: value for name, value in state.items()}
    assert list(without_prefixes(wrapped)) == list(state)
    restored = restore(Checkpoint({"state_dict": wrapped}, "file.pth", "--resume"), TINY, 64)
    assert torch.equal(restored.model.cls_token, state["cls_token"])


class Config:
    """Somebody's configuration class, which this project does not have."""

    def __init__(self):
        self.lr, self.path = 0.1, pathlib.Path("/tmp/x")


class Kind(enum.Enum):
    LARGE = 1


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, ("touch {}".format(self.path),))


@pytest.mark.parametrize("beside", ["path", "config", "enum", "hostile", "arguments", "function", "set of paths"])
def test_what_lies_beside_the_weights_does_no_harm(beside, trained, three_digits, tmp_path, call):
    content = torch.load(os.path.join(trained, "checkpoint.pth"), map_location="cpu")
    trap = tmp_path / "executed"
    arguments = argparse_like(content["args"])
    extra = {"path": pathlib.PosixPath("/a/b"), "config": Config(), "enum": Kind.LARGE, "hostile": Trap(trap),
             "arguments": arguments, "function": os.path.join, "set of paths": {pathlib.PosixPath("/a")}}[beside]
    saved = {"model": content["model"], "classes": content["classes"], "epoch": 1, "something": extra,
             "args": arguments if beside == "arguments" else {"model": TINY, "input_size": 64, "stage_wise_epoch": 1}}
    path = tmp_path / "other.pth"
    torch.save(saved, str(path))
    printed = call("--eval", "--resume", path, "--data-path", three_digits, *CPU)
    expected = figures(call("--eval", "--resume", os.path.join(trained, "checkpoint.pth"), *CPU))
    assert figures(printed) == expected and "also holds" in printed and not trap.exists()


def argparse_like(args):
    import argparse
    return argparse.Namespace(**dict(args, data_path=None, output_dir=pathlib.PosixPath("/x"), config=Config()))


@pytest.mark.parametrize("content, sentence", [
    ({"model": Config()}, "holds test_world.Config under 'model' and not its weights"),
    ({"epoch": 3}, "holds no weights"),
    (Config(), "holds a test_world.Config, not a checkpoint")])
def test_a_file_without_weights_is_named(content, sentence, tmp_path, refused):
    torch.save(content, str(tmp_path / "file.pth"))
    assert sentence in refused("--eval", "--resume", tmp_path / "file.pth", "--data-set", "DIGITS", "--model", TINY,
        *CPU)


# ------------------------------------------------------------------------------------------- 11: fine-tuning

@pytest.mark.parametrize("name, size", [("vit_tiny_patch16_224", 96), ("deit_tiny_distilled_patch16_224", 96)] + (
    [("swin_tiny_patch4_window7_224", 112), ("beit_base_patch16_224", 96)] if hasattr(torch, "compile") else []))
def test_timms_models_are_resampled_for_another_size_as_timm_does(name, size, tmp_path):
    import timm

    from runtime.learning.finetuning import start_from
    source, model = timm.create_model(name), build_model(name, 5, size)
    checkpoint = Checkpoint({"model": source.state_dict()}, "file.pth", "--finetune")
    start = start_from(checkpoint.weights(), model, name, True, checkpoint.refuse)
    assert not [key for key in start.new if "pos" in key or "bias_table" in key], start.new
    assert all("head" in key or "attn_mask" in key or "index" in key for key in start.left_out), start.left_out
    own = model.state_dict()
    model.load_state_dict(start.state, strict=False)
    for key, value in source.state_dict().items():
        if key in own and own[key].shape == value.shape and "head" not in key:
            assert torch.equal(model.state_dict()[key], value), key


def test_a_model_that_is_not_resampled_is_refused(tmp_path):
    import timm

    from runtime.learning.finetuning import start_from
    source = timm.create_model("mixer_s32_224")
    checkpoint = Checkpoint({"model": source.state_dict()}, "file.pth", "--finetune")
    half = {key: value[:, :10] if key.endswith("mlp_tokens.fc1.weight") else value for key,
        value in source.state_dict().items()}
    with pytest.raises(UserError, match="is not resampled"):
        start_from(half, timm.create_model("mixer_s32_224"), "mixer_s32_224", True, checkpoint.refuse)
    few = {key: value for key, value in source.state_dict().items() if key.startswith("stem")}
    with pytest.raises(UserError, match="of the weights of mixer_s32_224"):
        start_from(few, timm.create_model("mixer_s32_224"), "mixer_s32_224", True, checkpoint.refuse)


# ------------------------------------------------------------------------------------------- 12, 16, 17, 21: messages

@pytest.mark.once
@pytest.mark.parametrize("name", [b"\xff\xfe.png", pytest.param(b"caf\xe9.png", marks=pytest.mark.slow),
                                  pytest.param("写真.png".encode("utf-8"), marks=pytest.mark.slow)])
def test_names_that_are_no_utf8_are_shown(name, trained, three_digits, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    source = os.path.join(three_digits, "val", "digit1")
    shutil.copy(os.path.join(source, sorted(os.listdir(source))[0]), os.path.join(os.fsencode(str(folder)), name))
    path = os.path.join(trained, "checkpoint.pth")
    predict.main([str(folder), "--resume", path])
    predict.main([str(folder), "--resume", path, "--json"])
    visualize.main([str(folder), "--resume", path, "--output_dir", str(tmp_path / "out")])
    assert len([file for file in os.listdir(str(tmp_path / "out")) if file.endswith(".png")]) == 2
    code = commands.helper("print_name", os.path.join(str(folder), os.fsdecode(name)),
        env={"PYTHONIOENCODING": "utf-8:strict"})
    assert code[0] == 0, code


@pytest.mark.parametrize("flags, sentence", [
    (["--opt", "nosuch"], "--opt nosuch: timm builds no such optimiser"), (["--opt", "adahessian"], "--opt adahessian"),
    (["--opt", "lookahead_nosuch"], "--opt lookahead_nosuch"), (["--aa", "foo"], "--aa foo: timm knows no such"),
    (["--aa", "rand-foo"], "'foo' is no part of a rand policy"), (["--aa", "rand-m9-bar3"], "'bar3'"),
    (["--aa", "augmix-x"], "'x' is no part"), (["--aa", "v7"], "--aa v7"),
    (["--num_workers", "-1"], "is not a whole number from 0"),
    (["--warmup-epochs", "-2"], "is not a whole number"), (["--device_id", "x"], "is not a whole number")])
def test_a_wrong_value_is_named_in_one_sentence(flags, sentence, three_digits, tmp_path, refused):
    assert sentence in refused(*PLAIN + ["--data-path", three_digits, "--epochs", 1, "--output_dir", tmp_path] + flags)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m9-n3-mstd0.5", "augmix-m5-w4-d2", "original", "v0",
                                    "original-mstd0.5", "none"])
def test_policies_that_timm_knows_are_taken(policy):
    assert build_transform(True, "IMNET", 64, Augmentation(aa=policy))(Image.new("RGB", (80, 80)))


@pytest.mark.parametrize("error, remedy", [
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that workers are "
                  "out of shared memory."), "--shm-size"),
    (RuntimeError("unable to mmap 12 bytes from file </torch_7>: No space left on device (28): shm"), "--shm-size"),
    (OSError(24, "Too many open files"), "ulimit -n"), (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
    (OSError(12, "Cannot allocate memory"), "--num_workers"),
    (RuntimeError("worker is killed by signal: Killed."), "--batch-size")])
def test_limits_of_the_system_are_named_with_their_remedy(error, remedy):
    def loader():
        yield 1
        raise error
    batches = loaded(loader())
    assert next(batches) == 1
    with pytest.raises(RunFailed, match=remedy) as raised:
        next(batches)
    assert "\n" not in str(raised.value)
    with pytest.raises(RuntimeError, match="another"):
        list(loaded(iter_raising(RuntimeError("another"))))


def iter_raising(error):
    yield 1
    raise error


def test_the_opset_is_the_one_that_is_asked_for(trained, tmp_path, refused):
    import export
    onnx = pytest.importorskip("onnx")
    if not hasattr(torch, "compile"):
        pytest.skip("older PyTorch writes other opsets")
    target = str(tmp_path / "model.onnx")
    export.main(["--resume", os.path.join(trained, "checkpoint.pth"), "--format", "onnx", "--opset", "17", "--output",
         target])
    assert onnx.load(target).opset_import[0].version == 17
    flags = ["--resume", os.path.join(trained, "checkpoint.pth")]
    assert "--opset 3" in refused(*flags + ["--format", "onnx", "--opset", 3, "--output", target], tool=export)
    assert "--opset is for --format onnx" in refused(*flags + ["--format", "torchscript", "--opset", 3], tool=export)


# ------------------------------------------------------------------------------------------- 5: teachers

FAMILIES = ["resnet18", "regnety_002", "efficientnet_b0", "mobilenetv3_small_100", "convnext_atto", "densenet121",
     "vgg11_bn", "vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224",
     "beit_base_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224", "levit_128s", "maxvit_rmlp_pico_rw_256",
     "poolformer_s12", "dpn48b", "xcit_nano_12_p16_224", "coat_lite_tiny", "cait_xxs24_224", "nf_resnet50",
     "inception_v3"]
QUICK = ["resnet18", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "mixer_s32_224", "dpn48b"]


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
                                  for name in FAMILIES])
@torch.no_grad()
def test_any_timm_classifier_teaches_as_timm_has_it(name, tmp_path):
    import timm
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    from runtime.learning.teacher import build_teacher
    from runtime.machine.machine import Machine
    if not timm.models.is_model(name):
        pytest.skip("timm {} has no {}".format(timm.__version__, name))
    torch.manual_seed(1)
    plain = timm.create_model(name, num_classes=7).eval()
    for module in plain.modules():  # as if trained
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    path = str(tmp_path / "teacher.pth")
    torch.save(plain.state_dict(), path)
    teacher = build_teacher(name, load_checkpoint(path, "--teacher-path"), list("abcdefg"),
        Machine(torch.device("cpu")), 64)
    pixels = torch.rand(3, 3, 64, 64)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    cfg = getattr(plain, "pretrained_cfg", None) or plain.default_cfg
    own = pixels
    if teacher.input_size:
        assert teacher.input_size == cfg["input_size"][-1]
        own = torch.nn.functional.interpolate(pixels, size=(teacher.input_size,) * 2, mode="bilinear",
            align_corners=False)
    own_mean, own_std = (torch.tensor(cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    expected = plain((own - own_mean) / own_std)
    got = teacher((pixels - mean) / std)
    assert (got - expected).abs().max() < 2e-4 * max(expected.abs().max().item(), 1)
    assert torch.equal(got.argmax(1), expected.argmax(1))


# ------------------------------------------------------------------------------------------- what strangers met

@pytest.mark.parametrize("flags", [
    ["--clip-grad", "-1"], ["--distillation-alpha", "2"], ["--distillation-tau", "0"], ["--model-ema-decay", "-1"],
    ["--drop-path", "1"], ["--smoothing", "1.5"], ["--mixup", "nan"], ["--mixup-prob", "2"], ["--reprob", "-1"],
    ["--weight-decay", "-1"], ["--decay-epochs", "0"], ["--cutmix-minmax", "0.9", "0.1"],
    ["--opt-betas", "0.9", "0.95", "0.99"], ["--seed", "-1"],
    ["--seed", "99999999999"], ["--dist-timeout", "nan"], ["--lr", "inf"],
    ["--lr-noise", "0.5", "0.2"],
    ["--save-every-minutes", "-1"], ["--color-jitter", "-1"], ["--momentum", "2"],
    ["--finetune", "a.pth", "--resume", "b.pth"]])
def test_values_without_meaning_are_refused(flags, three_digits, tmp_path, refused):
    sentence = refused(*PLAIN + ["--data-path", three_digits, "--epochs", 1, "--output_dir", tmp_path / "out"] + flags)
    assert flags[0] in sentence or "no file b.pth" in sentence
    assert not (tmp_path / "out").exists()


def test_one_class_alone_is_refused(three_digits, tmp_path, refused):
    one = renamed(three_digits, tmp_path / "one", ["images", None, None])
    assert "there is one class only, 'images'" in refused(*PLAIN + ["--data-path", one, "--epochs", 1])


def test_outputs_that_are_not_finite_count_as_wrong_and_end_the_evaluation(trained, three_digits, tmp_path, capsys):
    content = torch.load(os.path.join(trained, "checkpoint.pth"), map_location="cpu")
    content["model"]["head.l.weight"][1, 0] = float("nan")
    torch.save(content, str(tmp_path / "nan.pth"))
    with pytest.raises(SystemExit) as stopped:
        main.main(["--eval", "--resume", str(tmp_path / "nan.pth")] + CPU)
    captured = capsys.readouterr()
    assert stopped.value.code == 1 and "not finite for 18 of 18 images" in captured.err
    assert "Acc@1 0.000" in captured.out
    with pytest.raises(SystemExit) as stopped:
        predict.main([os.path.join(three_digits, "val", "digit0"), "--resume", str(tmp_path / "nan.pth")])
    assert stopped.value.code == 1 and "not finite" in capsys.readouterr().err


def test_two_runs_do_not_share_an_output_folder(tmp_path, monkeypatch):
    from runtime.keeping.output import Lock
    monkeypatch.setattr(Lock, "PATIENCE", 0.3)
    with Lock(str(tmp_path / "out")):
        with pytest.raises(UserError, match="another run is writing to"):
            Lock(str(tmp_path / "out")).__enter__()
    with Lock(str(tmp_path / "out")), Lock(None):
        assert os.listdir(str(tmp_path / "out")) == []


def test_a_models_own_normalisation_is_used_at_evaluation(three_digits, tmp_path, call):
    import timm
    model = timm.create_model("resnet18", num_classes=3)
    for name, extra in (("plain", {}), ("half", {"mean": [0.5] * 3, "std": [0.5] * 3})):
        torch.save(dict({"model": model.state_dict()}, **extra), str(tmp_path / name))
    flags = ["--eval", "--model", "resnet18", "--input-size", 64, "--data-path", three_digits] + CPU
    plain, half = (call(*flags + ["--resume", tmp_path / name]) for name in ("plain", "half"))
    assert "images are normalised as its training says" in half and "normalised" not in plain and figures(
        plain) != figures(half)


@pytest.mark.parametrize("args, epoch", [({"input_size": [3, 64, 64]}, 12.0), ({"input_size": "64"}, "1"),
                                         ({"input_size": torch.tensor(64)}, torch.tensor(1))])
def test_other_peoples_ways_to_write_a_number_are_read(args, epoch, trained, three_digits, tmp_path, call):
    content = torch.load(os.path.join(trained, "checkpoint.pth"), map_location="cpu")
    path = str(tmp_path / "timm.pth.tar")
    torch.save({"state_dict": content["model"], "args": args, "epoch": epoch, "state_dict_ema": content["model"]}, path)
    flags = ["--eval", "--resume", path, "--model", TINY, "--data-path", three_digits, "--stage-wise-epoch", 0] + CPU
    assert figures(call(*flags)) == figures(call(*flags + ["--eval-ema"]))


def test_what_stands_beside_a_wrapped_model_is_left_out(trained, three_digits, tmp_path, call):
    state = torch.load(os.path.join(trained, "checkpoint.pth"), map_location="cpu")["model"]
    for number, wrapped in enumerate((dict({"model." + k: v for k, v in state.items()},
            **{"criterion.weight": torch.ones(3)}), dict({"module." + k: v for k, v in state.items()},
            n_averaged=torch.tensor(7)))):
        path = str(tmp_path / "{}.ckpt".format(number))
        torch.save({"state_dict": wrapped}, path)
        assert "18 images" in call("--eval", "--resume", path, "--model", TINY, "--input-size", 64, "--data-path",
             three_digits, *CPU)
