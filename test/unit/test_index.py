"""The index of the pictures: found once, kept, and made anew where the data have changed."""
import os
import shutil
import sys
import time
from collections import Counter

import commands
import numpy as np
import pytest

from datasets import build_dataset
from runtime.errors import UserError
from runtime.pictures import folders
from runtime.pictures.found import Names
from runtime.pictures.index import Index

BEGAN = time.time() - 3600


def settle(root):
    """The folders were made an hour ago."""
    for folder, _, _ in os.walk(str(root)):
        os.utime(folder, (BEGAN, BEGAN))


@pytest.fixture
def data(tmp_path):
    root = commands.write_digits(tmp_path / "data", classes=3, train=3, val=2)
    os.makedirs(os.path.join(root, "train", "digit1", "deeper"))
    first = sorted(os.listdir(os.path.join(root, "train", "digit1")))[0]
    shutil.move(os.path.join(root, "train", "digit1", first), os.path.join(root, "train", "digit1", "deeper", first))
    with open(os.path.join(root, "train", "digit0", "notes.txt"), "w") as f:
        f.write("no picture")
    settle(root)
    return root


@pytest.fixture
def walks(monkeypatch):
    """The folders that are searched from now on."""
    seen = []
    find = folders._pictures
    monkeypatch.setattr(folders, "_pictures", lambda root, *rest: seen.append(root) or find(root, *rest))
    return seen


class Run:
    """A run's index: `names()` of the training pictures, and what was said."""

    def __init__(self, data, cache):
        self.said = []
        self.index = Index(str(cache), say=self.said.append, made=True)
        self.dataset = build_dataset(True, "IMNET", data, None, index=self.index)
        self.index.keep()

    def content(self):
        d = self.dataset
        return [d.names[i] for i in range(len(d))], d.labels.tolist(), d.classes, d.left_out


def test_a_second_run_takes_the_index_of_the_first(data, tmp_path, walks):
    plain = build_dataset(True, "IMNET", data, None)
    del walks[:]
    first = Run(data, tmp_path / "cache")
    assert len(walks) == 6 and first.said == []
    del walks[:]
    second = Run(data, tmp_path / "cache")
    assert walks == [] and second.said == []
    assert first.content() == second.content() and first.content()[0] == [plain.names[i] for i in range(len(plain))]
    assert second.content()[3] == Counter({".txt": 1}) and len(second.dataset) == 9
    assert sorted(os.listdir(str(tmp_path / "cache"))) == ["index-train.npz", "index-val.npz"]
    assert second.dataset[4][0].mode == "RGB" and os.path.exists(second.dataset.path(4))


def added(root):
    shutil.copy(next(os.path.join(root, "digit0", n) for n in os.listdir(os.path.join(root, "digit0")) if ".png" in n),
                os.path.join(root, "digit0", "new.png"))


def removed(root):
    os.remove(next(os.path.join(root, "digit0", n) for n in os.listdir(os.path.join(root, "digit0")) if ".png" in n))


def removed_deeper(root):
    shutil.rmtree(os.path.join(root, "digit1", "deeper"))


def renamed(root):
    for part in ("train", "val"):
        folder = os.path.join(os.path.dirname(root), part)
        os.rename(os.path.join(folder, "digit2"), os.path.join(folder, "another"))
    settle(os.path.dirname(root))  # as if no folder's time told of it


@pytest.mark.parametrize("change", [added, removed, removed_deeper, renamed])
def test_a_change_of_the_data_is_noticed_and_told_in_one_line(change, data, tmp_path, walks):
    Run(data, tmp_path / "cache")
    change(os.path.join(data, "train"))
    again = Run(data, tmp_path / "cache")
    lines = [line for line in again.said if os.path.join(data, "train") in line]
    assert len(lines) == 1 and "does not hold any more; looking through" in lines[0], again.said
    plain = build_dataset(True, "IMNET", data, None)
    assert again.content()[0] == [plain.names[i] for i in range(len(plain))] and again.dataset.classes == plain.classes
    settle(data)
    Run(data, tmp_path / "cache")
    del walks[:]
    assert Run(data, tmp_path / "cache").said == [] and walks == []


def test_a_folder_that_changed_while_it_was_read_is_read_again(data, tmp_path, walks):
    os.utime(os.path.join(data, "train", "digit0"))
    Run(data, tmp_path / "cache")
    del walks[:]
    again = Run(data, tmp_path / "cache")
    assert len(walks) == 3 and "changed just before it was read" in again.said[0]


def test_an_index_of_other_data_is_not_taken(data, tmp_path, walks):
    Run(data, tmp_path / "cache")
    other = str(tmp_path / "other")
    shutil.copytree(data, other)
    settle(other)
    del walks[:]
    assert "holds other data" in Run(other, tmp_path / "cache").said[0] and len(walks) == 6


def test_no_damaged_index_is_believed(data, tmp_path):
    expected = Run(data, tmp_path / "cache").content()
    path = tmp_path / "cache" / "index-train.npz"
    good, random = path.read_bytes(), np.random.RandomState(0)
    for number in range(120):
        content = bytearray(good)
        if number % 3:
            content[random.randint(len(content))] ^= 1 << random.randint(8)
        else:
            del content[random.randint(len(content)):]
        path.write_bytes(bytes(content))
        again = Run(data, tmp_path / "cache")
        assert again.content() == expected and len(again.said) <= 1
        if again.said:  # a bit that nothing reads, such as a time in the zip file, may be flipped
            assert "is damaged" in again.said[0] or "does not hold" in again.said[0]
    for content in (b"", b"PK", b"no index", good[:100]):
        path.write_bytes(content)
        again = Run(data, tmp_path / "cache")
        assert again.content() == expected and "is damaged" in again.said[0]


def test_a_folder_that_cannot_be_written_costs_a_line(data, tmp_path):
    (tmp_path / "file").write_text("")
    run = Run(data, tmp_path / "file" / "cache")
    assert len(run.said) == 2 and all("is not kept" in line and "\n" not in line for line in run.said)
    index = Index(str(tmp_path / "none"))  # an output folder that no run has made is not made here
    build_dataset(True, "IMNET", data, None, index=index)
    index.keep()
    assert not os.path.exists(str(tmp_path / "none"))


def test_an_empty_class_is_refused_with_an_index_as_without(data, tmp_path):
    Run(data, tmp_path / "cache")
    for part in ("train", "val"):
        os.mkdir(os.path.join(data, part, "digit3"))
    with pytest.raises(UserError, match="digit3 holds no picture"):
        Run(data, tmp_path / "cache")


def test_a_million_names_take_the_memory_of_their_letters():
    names = Names("n{:07d}.JPEG".format(number) for number in range(10 ** 5))
    packed, ends = names.arrays()
    assert packed.nbytes + ends.nbytes == 10 ** 5 * (13 + 4)
    assert names[0] == "n0000000.JPEG" and names[-1] == names[99999] == "n0099999.JPEG" and len(names) == 10 ** 5
    with pytest.raises(IndexError):
        names[10 ** 5]
    with pytest.raises(ValueError):
        Names.of_arrays(packed[:-1], ends)


FAST = ["--device", "cpu", "--num_workers", "0", "--input-size", "64", "--model", "EvoLeViT_128S", "--batch-size", "4",
        "--distillation-type", "none", "--no-repeated-aug", "--max-steps", "1"]


@pytest.mark.once
def test_a_run_keeps_the_index_in_its_output_folder_and_a_refused_one_leaves_no_folder(data, tmp_path):
    out = tmp_path / "out"
    commands.succeed("--data-path", data, "--output_dir", out, small=FAST)
    assert {"index-train.npz", "index-val.npz"} <= set(os.listdir(str(out)))
    commands.succeed("--data-path", data, "--output_dir", tmp_path / "x", "--index-cache", tmp_path / "i", small=FAST)
    assert len(os.listdir(str(tmp_path / "i"))) == 2 and not (tmp_path / "x" / "index-train.npz").exists()
    (tmp_path / "file").write_text("")
    code, _, err = commands.run([sys.executable, commands.MAIN] + FAST + [
        "--data-path", data, "--output_dir", tmp_path / "no", "--index-cache", tmp_path / "file"])
    assert code == 2 and err == "error: --index-cache: {} is a file; name a folder\n".format(tmp_path / "file")
    code, _, err = commands.run([sys.executable, commands.MAIN] + FAST + [
        "--data-path", data, "--output_dir", tmp_path / "no", "--batch-size", 2000])
    assert code == 2 and not (tmp_path / "no").exists(), err


@pytest.mark.once
def test_one_process_of_a_machine_searches_and_all_meet_its_refusal(data, tmp_path):
    shutil.rmtree(os.path.join(data, "val", "digit2"))
    for launch in list(commands.launchers(2).values())[:1]:
        for damage, sentence in (("whole", ""), ("empty", "holds no picture")):
            if damage == "whole":
                shutil.copytree(os.path.join(data, "train", "digit2"), os.path.join(data, "val", "digit2"))
                settle(data)
            else:
                shutil.rmtree(os.path.join(data, "val", "digit0"))
                os.mkdir(os.path.join(data, "val", "digit0"))
            code, out, err = commands.helper("count_walks", str(data), str(tmp_path / "walks"), launch=launch)
            with open(str(tmp_path / "walks")) as f:
                lines = sorted(f.read().split("\n"))
            os.remove(str(tmp_path / "walks"))
            assert code == 0, out + err
            if sentence:
                assert sum(sentence in line for line in lines) == 2, lines
            else:
                assert lines == ["", "rank 0: 9 pictures, 6 folders searched", "rank 1: 9 pictures, 0 folders searched"]
