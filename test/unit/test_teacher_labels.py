"""Stored teacher labels give the training that the live teacher gives on the same crops."""
import argparse
import json
import os
import shutil
import sys
from multiprocessing.pool import ThreadPool

import commands
import numpy as np
import pytest
import torch

import main
from runtime.errors import UserError
from runtime.keeping.settings import pictures_sum
from runtime.keeping.state import Done, TrainingState
from runtime.keeping.teacher_labels import FORMAT, WEIGHTS, LabelWriter, TeacherLabels, sample_crops
from runtime.pictures.batches import TrainingView, collate
from samplers import Feed, build_train_sampler

pytestmark = pytest.mark.once

RECIPE = ["--model", "EvoLeViT_128S", "--teacher-model", "regnety_002"]


def losses(folder):
    with open(os.path.join(str(folder), "log.txt")) as f:
        return [json.loads(line)["train_loss"] for line in f]


def write(digit_folder, teacher, labels, *flags, **kwargs):
    return commands.succeed("--data-path", digit_folder, "--teacher-path", teacher, "--write-teacher-labels", labels,
                            *RECIPE + list(flags), **kwargs)


@pytest.fixture(scope="module")
def labels(tmp_path_factory, digit_folder, teacher):
    folder = tmp_path_factory.mktemp("labels") / "labels"
    printed = write(digit_folder, teacher, folder, "--epochs", 2)
    assert "256 images x 2 epochs" in printed and "--teacher-labels" in printed
    return str(folder)


def test_stored_labels_give_the_losses_of_the_live_teacher(labels, digit_folder, teacher, tmp_path):
    live, stored = tmp_path / "live", tmp_path / "stored"
    commands.succeed("--data-path", digit_folder, "--teacher-path", teacher, "--epochs", 2, "--stage-wise-epoch", 1,
                     "--output_dir", live, *RECIPE)
    printed = commands.succeed("--data-path", digit_folder, "--teacher-labels", labels, "--epochs", 4,
         "--stage-wise-epoch", 1, "--output_dir", stored, "--teacher-path", os.path.basename(teacher), *RECIPE)
    assert "Teacher labels: 2 epochs" in printed
    # the schedules differ with the number of epochs, but not before the first warm-up epochs are over
    assert losses(stored)[:2] == pytest.approx(losses(live), abs=1e-6)
    assert len(losses(stored)) == 4  # the third epoch has the crops of the first again


def test_stored_labels_have_a_line_for_every_image_and_take_two_bytes(labels):
    names = sorted(os.listdir(labels))
    with open(os.path.join(labels, "settings.json")) as f:
        assert json.load(f)[FORMAT] == "float32"
    assert names == ["epoch-0000-replica-0000.npy", "epoch-0001-replica-0000.npy", "settings.json"]
    first = np.load(os.path.join(labels, names[0]))
    assert first.shape == (256,) and first.dtype == np.int16 and 0 <= first.min() and first.max() < 10


@pytest.mark.slow
def test_labels_of_two_processes_serve_one_process_that_accumulates(digit_folder, teacher, tmp_path):
    folder = tmp_path / "labels"
    launch = [command for name, command in commands.launchers(2).items() if name != "launch"][0]
    write(digit_folder, teacher, folder, "--epochs", 1, launch=launch)
    alone = tmp_path / "alone"
    write(digit_folder, teacher, alone, "--epochs", 1, "--accum-steps", 2)
    for name in sorted(os.listdir(str(folder))):
        if name.endswith(".npy"):
            assert np.array_equal(np.load(str(folder / name)), np.load(str(alone / name))), name
    commands.succeed("--data-path", digit_folder, "--teacher-labels", folder, "--epochs", 1, "--accum-steps", 2,
                     "--teacher-path", os.path.basename(teacher), "--output_dir", tmp_path / "out", *RECIPE)
    cut = str(folder / "epoch-0000-replica-0001.npy")
    os.truncate(cut, 200)  # what the second process alone stumbles over is told all the same
    code, out, err = commands.run(launch + [commands.MAIN] + commands.SMALL + ["--data-path", digit_folder,
         "--teacher-labels", folder, "--epochs", 1, "--teacher-path", os.path.basename(teacher), "--output_dir",
         tmp_path / "cut"] + RECIPE)
    assert code != 0 and "process 1: error: --teacher-labels: {} ".format(cut) in err, out + err


def test_one_process_writes_the_settings(tmp_path):
    settings = {"distillation_type": "hard", "num_classes": 10}
    for _ in range(10):  # all processes of a run open the folder at the same moment
        folder = str(tmp_path / "labels")
        with ThreadPool(8) as pool:
            writers = pool.map(lambda rank: LabelWriter(folder, settings, rank == 0), range(8))
        writers[5].write(0, 5, [torch.arange(4)])
        assert sorted(os.listdir(folder)) == ["epoch-0000-replica-0005.npy", "settings.json"]
        shutil.rmtree(folder)


def test_labels_of_another_precision_are_not_added_but_read_by_any_run(tmp_path):
    own = {"distillation_type": "hard", "num_classes": 10, "replicas": 1, "batch_size": 4}
    for written, other in (("int8", "bf16"), ("same", "int8"), (None, "float32")):  # None: older than the flag
        folder, settings = str(tmp_path / str(written)), dict(own)
        if written is not None:
            settings["teacher_precision"] = written
        LabelWriter(folder, settings).write(0, 0, [torch.arange(4)])
        LabelWriter(folder, dict(own, teacher_precision=written or "same"))
        with pytest.raises(UserError, match="were written with --teacher-precision .* and this run has " + other):
            LabelWriter(folder, dict(own, teacher_precision=other))
        assert TeacherLabels(folder, dict(own, teacher_precision="same")).epochs == 1


@pytest.mark.parametrize("name, written, own, sentence", [
    (FORMAT, "bf16", "float32", "written with a teacher in bf16 and this run has float32"),
    (WEIGHTS, "a1", "b2", "written with teacher weights of the SHA-256 a1 and this run has b2")])
def test_labels_of_another_teacher_of_that_name_are_not_added(name, written, own, sentence, tmp_path):
    settings = {"distillation_type": "hard", "num_classes": 10, "replicas": 1, "batch_size": 4,
                "teacher_precision": "same"}
    for number, stored in enumerate((written, own, None)):  # None: older than what only who writes knows
        folder = str(tmp_path / str(number))
        LabelWriter(folder, dict(settings, **{name: stored} if stored else {})).write(0, 0, [torch.arange(4)])
        if stored != written:
            LabelWriter(folder, dict(settings, **{name: own}))
        else:
            with pytest.raises(UserError, match=sentence):
                LabelWriter(folder, dict(settings, **{name: own}))
        assert TeacherLabels(folder, settings).epochs == 1
    with pytest.raises(UserError, match="written with processes x --accum-steps 1 and this run has 8"):
        TeacherLabels(folder, dict(settings, replicas=8))


def test_labels_of_other_pictures_are_not_read(tmp_path):
    own = {"distillation_type": "hard", "num_classes": 10, "replicas": 1, "batch_size": 4}
    writer = LabelWriter(str(tmp_path / "pictures"), dict(own, pictures="in folders 1", labels=3))
    writer.write(0, 0, [torch.arange(4)])
    assert TeacherLabels(writer.folder, dict(own, pictures="in archives 2", labels=3)).epochs == 1
    for pictures, labels, sentence in (("in folders 2", 3, "with the checksum of names in folders 1 and this run has"),
                                       ("in archives 1", 4, "with labels of the checksum 3 and this run has 4")):
        with pytest.raises(UserError, match=sentence):
            TeacherLabels(writer.folder, dict(own, pictures=pictures, labels=labels))


def test_the_crop_epoch_is_decided_in_one_place(tmp_path):
    """Images, seeds and labels of a training epoch beyond the stored ones are those of one stored epoch."""
    settings = {"distillation_type": "hard", "num_classes": 10, "replicas": 2, "batch_size": 4}
    writer = LabelWriter(str(tmp_path), settings)
    for epoch in range(3):
        for replica in range(2):
            writer.write(epoch, replica, [torch.full((8,), 3 * epoch + replica)])
    data = [((torch.zeros(2, 2, 3, dtype=torch.uint8), []), 0)] * 16
    sampler = build_train_sampler(data, 4, 0, 1, accum_steps=2, repeated_aug=False)
    loader = torch.utils.data.DataLoader(TrainingView(data), batch_sampler=sampler, collate_fn=collate)
    feed, plain = Feed(loader, sampler, labels=TeacherLabels(str(tmp_path), settings)), Feed(loader, sampler)
    for epoch, stored in ((1, 1), (3, 0), (5, 2)):
        seen = [(number, [(b.indices.tolist(), b.seed, b.taught.tolist()) for b in batches])
                for number, batches in feed.updates(epoch)]
        expected = [(number, [(b.indices.tolist(), b.seed, [3 * stored + replica] * 4) for replica,
            b in enumerate(batches)]) for number, batches in plain.updates(stored)]
        assert seen == expected and len(seen) == 2
        assert [number for number, _ in feed.updates(epoch, Done(1))] == [1]


@pytest.mark.slow
def test_soft_labels_are_stored_as_logits(digit_folder, teacher, tmp_path):
    soft = ["--distillation-type", "soft", "--distillation-tau", 3, "--epochs", 1]
    write(digit_folder, teacher, tmp_path / "labels", *soft)
    assert np.load(str(tmp_path / "labels" / "epoch-0000-replica-0000.npy")).shape == (256, 10)
    for name, flags in (("live", ["--teacher-path", teacher]), ("stored", ["--teacher-labels",
                        tmp_path / "labels", "--teacher-path", os.path.basename(teacher)])):
        commands.succeed("--data-path", digit_folder, "--output_dir", tmp_path / name, *RECIPE + soft + flags)
    assert losses(tmp_path / "live") == pytest.approx(losses(tmp_path / "stored"), abs=1e-6)


def test_labels_that_do_not_belong_to_the_run_are_refused(labels, digit_folder, tmp_path, capsys):
    cut, empty, other = (str(tmp_path / name) for name in ("cut", "empty", "other"))
    shutil.copytree(labels, cut)
    first = os.path.join(cut, "epoch-0000-replica-0000.npy")
    with open(first, "rb") as f:
        content = f.read()
    with open(first, "wb") as f:
        f.write(content[:200])
    shutil.copytree(labels, empty)
    for name in os.listdir(empty):
        if name.endswith(".npy"):
            os.remove(os.path.join(empty, name))
    with open(os.path.join(labels, "settings.json")) as f:
        settings = json.load(f)
    path = settings["teacher_path"]
    shutil.copytree(labels, other)
    with open(os.path.join(other, "settings.json"), "w") as f:  # written where pictures are mirrored otherwise
        json.dump(dict(settings, crops=[np.reshape(crop, (4, 4))[:, ::-1].flatten().tolist()
                                        for crop in settings["crops"]]), f)
    for flags, sentence in (
            ([labels, "--seed", 5], "were written with --seed 0 and this run has 5"),
            ([labels, "--mixup", 0.5], "were written with --mixup 0.8"),
            ([labels, "--batch-size", 16], "--batch-size 32 and this run has 16"),
            ([other], "were written for other crops of the pictures than are drawn here"),
            ([tmp_path / "none"], "settings.json cannot be read"),
            ([empty], "has no whole epoch of labels"),
            ([cut], "write it again"),
            ([labels, "--distillation-type", "none"], "has no teacher"),
            ([labels, "--write-teacher-labels", tmp_path / "new"], "use one at a time")):
        with pytest.raises(SystemExit) as end:
            main.main([str(word) for word in commands.SMALL + RECIPE + [
                "--data-path", digit_folder, "--teacher-path", path, "--epochs", 2, "--output_dir", tmp_path / "out",
                "--teacher-labels"] + flags])
        err = capsys.readouterr().err
        assert end.value.code == 2 and sentence in err and err.count("\n") == 1, err


class Photos:
    """Pictures (24, 24, 3) of nine colours, mirrored at random; `change` is what becomes of all of them before."""

    def __init__(self, change=None, draw=torch.rand):
        generator = torch.Generator().manual_seed(0)
        parts = torch.rand(40, 3, 3, 3, generator=generator) * 255
        self.pictures = parts.repeat_interleave(8, 1).repeat_interleave(8, 2)
        if change is not None:
            self.pictures = change(self.pictures)
        self.draw = draw

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        picture = self.pictures[index]
        return (picture.flip(1) if self.draw(1)[0] < 0.5 else picture, []), 0


def test_labels_are_for_the_crops_that_were_drawn(tmp_path):
    """The same pictures in another quality are taken; other draws from the same seeds, and other pictures, are not."""
    own = {"distillation_type": "hard", "num_classes": 10, "replicas": 1, "batch_size": 4}
    folder = str(tmp_path)
    LabelWriter(folder, dict(own, crops=sample_crops(Photos()))).write(0, 0, [torch.arange(4)])
    noise = torch.rand(40, 24, 24, 3, generator=torch.Generator().manual_seed(1)) * 16 - 8
    for change, draw, same in (
            (None, torch.rand, True),
            (lambda x: (x + noise).clamp(0, 255).round(), torch.rand, True),
            (lambda x: (x / 8).round() * 8, torch.rand, True),
            (None, lambda n: 1 - torch.rand(n), False),
            (None, np.random.rand, False),
            (lambda x: x.flip(2), torch.rand, False),
            (lambda x: x.flip(0), torch.rand, False),
            (lambda x: 255 - x, torch.rand, False)):
        settings = dict(own, crops=sample_crops(Photos(change, draw)))
        if same:
            assert TeacherLabels(folder, settings).epochs == 1
            LabelWriter(folder, settings)
            continue
        for flag, reads in (("--teacher-labels", TeacherLabels), ("--write-teacher-labels", LabelWriter)):
            with pytest.raises(UserError, match=flag + ": the labels in .* were written for other crops"):
                reads(folder, settings)
    with open(os.path.join(folder, "settings.json"), "w") as f:
        json.dump(own, f)  # older than the crops
    assert TeacherLabels(folder, settings).epochs == 1


def test_pictures_are_told_apart_by_their_names():
    def pictures(*names, **more):
        return pictures_sum(argparse.Namespace(names=names, **more))
    own = pictures("a/1.jpg", "b/2.jpg")
    assert own == pictures("a/1.jpg", "b/2.jpg", places=None) and own.startswith("in folders ")
    assert len({own, pictures("a/2.jpg", "b/1.jpg"), pictures("a/1.jpg", "b/2.jpg", places=1)}) == 3
    assert pictures_sum(argparse.Namespace()) == "in folders 0"  # no files


def test_labels_of_many_damaged_pictures_are_refused_and_of_few_told(digit_folder, teacher, tmp_path):
    data = str(tmp_path / "data")
    shutil.copytree(digit_folder, data)
    for digit in (2, 7):
        name = sorted(os.listdir(os.path.join(data, "train", "digit{}".format(digit))))[0]
        with open(os.path.join(data, "train", "digit{}".format(digit), name), "wb") as f:
            f.write(b"no picture")
    flags = ["--data-path", data, "--teacher-path", teacher, "--epochs", 1, "--no-repeated-aug"] + RECIPE
    printed = commands.succeed("--write-teacher-labels", tmp_path / "few", *flags)
    assert "Note: 2 damaged pictures, named above, have the labels of those that take their places" in printed
    code, out, err = commands.run([sys.executable, commands.MAIN] + commands.SMALL + flags + ["--write-teacher-labels",
        tmp_path / "many", "--max-bad-images", 1])
    assert code == 1 and "2 picture files cannot be decoded and --max-bad-images allows 1" in err, err


def test_labels_are_written_also_where_this_loss_would_not_use_them(digit_folder, teacher, tmp_path):
    write(digit_folder, teacher, tmp_path / "labels", "--epochs", 1, "--distillation-alpha", 0)
    assert np.load(str(tmp_path / "labels" / "epoch-0000-replica-0000.npy")).shape == (256,)


def test_all_processes_need_as_many_stored_epochs():
    labels = TeacherLabels.__new__(TeacherLabels)
    labels.epochs = 3
    for stored in ([3.0], [3.0, 3.0]):
        labels.need_everywhere(argparse.Namespace(gather=lambda value, stored=stored: stored))
    with pytest.raises(UserError, match="process 0 finds 3 whole epochs of labels and process 1 finds 2"):
        labels.need_everywhere(argparse.Namespace(gather=lambda value: [float(value), 2.0]))


@pytest.mark.parametrize("before, now, epoch, inside, said", [
    (10, 20, 12, True, True), (20, 10, 12, True, True), (10, 20, 25, True, False), (10, 20, 12, False, False),
    (10, 10, 12, True, False), (None, 20, 12, True, False)])
def test_going_on_inside_an_epoch_with_more_stored_epochs_is_told(before, now, epoch, inside, said):
    settings = dict(epochs=99, images=8, labels_sum=0, global_batch=4, processes=1)
    state = argparse.Namespace(settings=dict(settings, stored_epochs=now), epoch=epoch,
                               progress={"images": 4} if inside else None)
    written = dict(settings, stored_epochs=before)
    checkpoint = argparse.Namespace(settings=lambda: written, recipe=lambda: written, path="x", flag="--resume")
    lines = []
    TrainingState._say_where(state, checkpoint, False, lines.append)
    assert any("stored epochs of teacher labels" in line for line in lines) == said
