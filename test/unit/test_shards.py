"""Pictures in tar archives are the pictures of the folder: the same order, classes, training, damage and resume."""
import http.server
import io
import json
import os
import shutil
import sys
import tarfile
import threading
import time
import urllib.parse

import commands
import kill_and_resume
import numpy as np
import pytest

from datasets import build_dataset
from runtime.errors import DamagedImage, RunFailed, UserError
from runtime.pictures import archives, index, remote, shards
from runtime.pictures.batches import TrainingView

FAST = ["--device", "cpu", "--num_workers", "0", "--input-size", "64", "--model", "EvoLeViT_128S",
        "--distillation-type", "none", "--lr", "0.01", "--model-ema-decay", "0.9"]
HOUR = time.time() - 3600


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """48 digits to train on, in class folders of which one has folders inside; a damaged file among them."""
    root = commands.write_digits(tmp_path_factory.mktemp("shards") / "folder", classes=4, train=12, val=3)
    top = os.path.join(root, "train", "digit2")
    names = sorted(os.listdir(top))
    for name, inside in zip(names[:4], ("b", "a.d", "b/c", "z")):
        os.makedirs(os.path.join(top, inside), exist_ok=True)
        os.rename(os.path.join(top, name), os.path.join(top, inside, name))
    with open(os.path.join(root, "train", "digit1", "0.dam.aged.png"), "wb") as f:
        f.write(b"no picture")
    return root


def pack(path, files):
    """A tar of [(name, path of a file or bytes)]."""
    with tarfile.open(str(path), "w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in files:
            if not isinstance(content, bytes):
                with open(content, "rb") as f:
                    content = f.read()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


def as_archives(root, out, nested):
    """ImageNet's own form: an archive for each class in train/ and val/, or an archive of these; in no order."""
    for part in ("train", "val"):
        os.makedirs(os.path.join(str(out), part))
        made = []
        for name in sorted(os.listdir(os.path.join(root, part)), reverse=True):
            top = os.path.join(root, part, name)
            found = [os.path.join(folder, file) for folder, _, files in os.walk(top) for file in files]
            files = [(os.path.relpath(path, top), path) for path in sorted(found, key=len)[::-1]]
            made.append(pack(os.path.join(str(out), part, name + ".tar"), files))
        if nested:
            pack(os.path.join(str(out), part, "ILSVRC2012_img_{}.tar".format(part)),
                 [(os.path.basename(path), path) for path in made])
            for path in made:
                os.remove(path)
    return str(out)


@pytest.fixture(scope="module")
def forms(folder, tmp_path_factory):
    """{form: folder} of the same pictures."""
    out = tmp_path_factory.mktemp("forms")
    found = {"folder": folder, "classes": as_archives(folder, out / "classes", False),
             "archive": as_archives(folder, out / "archive", True), "shards": str(out / "shards")}
    pictures, shards.PICTURES = shards.PICTURES, 10
    try:
        shards.main(folder, found["shards"])
    finally:
        shards.PICTURES = pictures
    return found


FORMS = ["shards", "classes", "archive"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_folders_pictures_in_its_order(forms, form):
    for is_train in (True, False):
        plain, packed = (build_dataset(is_train, "IMNET", forms[name], None) for name in ("folder", form))
        assert packed.classes == plain.classes and packed.labels.tolist() == plain.labels.tolist()
        assert len(plain) == (49 if is_train else 12)
        bad = 0
        for number in range(len(plain)):
            try:
                expected = plain[number]
            except DamagedImage:
                with pytest.raises(DamagedImage) as error:
                    packed[number]
                assert "dam" in error.value.path and ".tar" in error.value.path
                bad += 1
                continue
            assert np.array_equal(np.asarray(packed[number][0]), np.asarray(expected[0])), number
        assert bad == int(is_train)


@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_picture_is_named_and_replaced_as_in_a_folder(forms, form):
    plain, packed = (TrainingView(build_dataset(True, "IMNET", forms[name], None)) for name in ("folder", form))
    for number in range(len(plain)):
        expected, found = plain[number, 1], packed[number, 1]
        assert found[1:3] == expected[1:3] and [one[0] for one in found[3]] == [one[0] for one in expected[3]]
        assert [one[2:] for one in found[3]] == [one[2:] for one in expected[3]]
        assert packed.name(number).startswith(os.path.join(forms[form], "train")) and ".tar" in packed.name(number)


@pytest.mark.once
def test_twelve_steps_are_the_same_bit_for_bit_from_every_form(forms, tmp_path):
    """Repeated augmentation, workers and evaluation included."""
    ends = {}
    for form in ["folder"] + FORMS:
        out = tmp_path / form
        commands.succeed(*FAST + ["--batch-size", 8, "--epochs", 2, "--stage-wise-epoch", 1, "--data-path",
                                  forms[form], "--output_dir", out], small=[])
        ends[form] = kill_and_resume.ends(str(out))
        for checkpoint in ends[form][:2]:
            assert checkpoint["args"].pop("data_path") == forms[form]
    assert len(ends["folder"][2]) == 2 and ends["folder"][2][0]["damaged_images"] >= 0
    assert ends["folder"][0]["log"][-1]["updates"] == 6  # 12 steps in two epochs
    for form in FORMS:
        assert kill_and_resume.differences(ends["folder"], ends[form]) == [], form


@pytest.mark.once
def test_stored_labels_of_a_folder_serve_its_shards(forms, tmp_path, teacher_of_four):
    flags = ["--device", "cpu", "--num_workers", "0", "--input-size", "64", "--batch-size", "8", "--model",
             "EvoLeViT_128S", "--teacher-model", "regnety_002", "--epochs", "1"]
    commands.succeed("--data-path", forms["folder"], "--write-teacher-labels", tmp_path / "labels", "--teacher-path",
                     teacher_of_four, small=flags)
    seen = []
    for form in ("folder", "shards"):
        commands.succeed("--data-path", forms[form], "--teacher-labels", tmp_path / "labels", "--output_dir",
                         tmp_path / form, "--teacher-path", os.path.basename(teacher_of_four), small=flags)
        with open(str(tmp_path / form / "log.txt")) as f:
            seen.append(json.loads(f.readline())["train_loss"])
    assert seen[0] == seen[1]


@pytest.fixture
def teacher_of_four(forms, tmp_path):
    out = tmp_path / "teacher"
    commands.succeed("--model", "regnety_002", "--distillation-type", "none", "--max-steps", 1, "--data-path",
                     forms["folder"], "--output_dir", out, small=FAST[:6] + ["--batch-size", "8"])
    return str(out / "checkpoint.pth")


# ------------------------------------------------------------------------------------------------- the tool

def test_the_tool_goes_on_where_it_was_interrupted_and_repairs(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shards, "PICTURES", 10)
    out = str(tmp_path / "out")
    written, write = [], shards.write_shard

    def interrupted(path, pictures):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        write(path, pictures)

    monkeypatch.setattr(shards, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shards.main(folder, out)
    shutil.copytree(os.path.join(out, "train"), str(tmp_path / "half" / "val"))
    with pytest.raises(UserError, match="the shards in .*/half/val are unfinished; run"):
        build_dataset(False, "IMNET", str(tmp_path / "half"), None)
    monkeypatch.setattr(shards, "write_shard", lambda path, pictures: written.append(path) or write(path, pictures))
    shards.main(folder, out)
    train = os.path.join(out, "train")
    assert len(written) == len(set(written)) == 7 and ", 3 of them there already" in capsys.readouterr().out
    contents = {name: open(os.path.join(train, name), "rb").read() for name in os.listdir(train)}
    assert len(contents) == 5
    del written[:]
    for name, damage in (("shard-000000.tar", lambda c: c[:len(c) // 2]), ("shard-000001.tar", lambda c: c[:700] +
                         bytes([c[700] ^ 1]) + c[701:]), ("shard-000004.tar", lambda c: b"")):
        with open(os.path.join(train, name), "wb") as f:
            f.write(damage(contents[name]))
    shards.main(folder, out)
    assert "5 shards, 2 of them there already, 3 of them there with other bytes and written" in capsys.readouterr().out
    assert [os.path.basename(path) for path in written] == ["shard-000000.tar", "shard-000001.tar", "shard-000004.tar"]
    assert {name: open(os.path.join(train, name), "rb").read() for name in os.listdir(train)} == contents
    monkeypatch.setattr(shards, "write_shard", lambda path, pictures: write(path, pictures[:-1]))
    with pytest.raises(RunFailed, match="does not hold what was written"):
        shards.main(folder, str(tmp_path / "other"))


def test_a_second_call_changes_nothing_and_says_nothing_of_changes(folder, tmp_path, capsys):
    out = tmp_path / "out"
    for call in range(2):
        shards.main(folder, str(out))
    printed = capsys.readouterr().out
    assert "Note" not in printed and printed.count("in 1 shard, 1 of them there already, each compared") == 2
    build_dataset(True, "IMNET", str(out), None, index=index.Index(str(out), say=pytest.fail))
    time.sleep(0.01)  # for a file system of coarse times
    os.utime(str(out / "classes.txt"))
    said = []
    build_dataset(True, "IMNET", str(out), None, index=index.Index(str(out), say=said.append))
    assert [line.split(",")[0] for line in said] == [
        "Note: {} has changed".format(out / "classes.txt")] * 2  # once for val and once for train


@pytest.mark.parametrize("case, sentence", [
    ("DIR itself", "OUT: .*/train holds class folders; name another folder"),
    ("a folder in train", "OUT: .* lies in .*/train, among the pictures"),
    ("shards of more pictures", "OUT: .*/train/shard-000000.tar is none of the shards of .*/train as it is now"),
    ("shards of fewer pictures", "OUT: .*/train/shard-000000.tar is none of the shards of .*/train as it is now"),
    ("shards of other classes", "OUT: .*/classes.txt names other classes than DIR has"),
    ("shards as DIR", "DIR: .*/train holds archives already, such as shard-000000.tar")])
def test_the_tool_leaves_alone_what_it_did_not_write(case, sentence, folder, forms, tmp_path):
    data, out = str(tmp_path / "data"), str(tmp_path / "out")
    shutil.copytree(folder, data)
    one = os.path.join(data, "train", "digit0", sorted(os.listdir(os.path.join(data, "train", "digit0")))[0])
    if case == "DIR itself":
        out = data
    elif case == "a folder in train":
        out = os.path.join(data, "train", "digit9")
    elif case == "shards as DIR":
        data = forms["shards"]
    else:
        shards.main(data, out)
        if case == "shards of more pictures":
            os.remove(one)
        elif case == "shards of fewer pictures":
            shutil.copy(one, os.path.join(data, "train", "digit3", "zz.png"))
        else:
            for part in ("train", "val"):
                os.rename(os.path.join(data, part, "digit0"), os.path.join(data, part, "digit00"))

    def state():
        return {path: (os.stat(path).st_mtime_ns, os.stat(path).st_size) for top in (data, out)
                for above, _, names in os.walk(top) for path in [os.path.join(above, name) for name in names]}

    before = state()
    with pytest.raises(UserError, match=sentence) as error:
        shards.main(data, out)
    assert "\n" not in str(error.value) and state() == before


def test_the_index_lies_beside_the_shards_and_moves_with_them(forms, tmp_path, monkeypatch):
    assert sorted(os.listdir(forms["shards"])) == ["classes.txt", "index-train.npz", "index-val.npz", "train", "val"]
    moved = str(tmp_path / "moved")
    shutil.copytree(forms["shards"], moved)  # with the files' times
    read = []
    monkeypatch.setattr(archives, "members", lambda *a: read.append(a))
    dataset = build_dataset(True, "IMNET", moved, None)
    assert read == [] and len(dataset) == 49 and dataset[0][0].mode == "RGB"
    assert dataset.source(0).archive.startswith(moved)


def test_shards_whose_own_index_does_not_hold_are_searched_again_with_a_line(forms, tmp_path):
    root, said = str(tmp_path / "copied"), []
    shutil.copytree(forms["shards"], root)
    for folder, _, files in os.walk(root):  # what a copy that keeps no times does, long ago
        for name in files:
            os.utime(os.path.join(folder, name), (HOUR, HOUR))
    lengths = []
    for _ in range(2):
        one = index.Index(str(tmp_path / "cache"), say=said.append, made=True)
        lengths.append(len(build_dataset(True, "IMNET", root, None, index=one)))
        one.keep()
    train, val = [[line for line in said if part in line] for part in ("index-train", "index-val")]
    assert len(train) == 1 and len(said) == len(train) + len(val) and lengths[0] == lengths[1]
    assert root in train[0] and "has changed, so the index" in train[0]


def test_a_changed_archive_is_read_again(forms, tmp_path):
    moved, said = str(tmp_path / "moved"), []
    shutil.copytree(forms["classes"], moved)
    for name in os.listdir(os.path.join(moved, "train")):
        os.utime(os.path.join(moved, "train", name), (HOUR, HOUR))
    for number in range(3):
        one = index.Index(str(tmp_path / "cache"), say=said.append, made=True)
        dataset = build_dataset(True, "IMNET", moved, None, index=one)
        one.keep()
        if number == 1:
            said[:] = [line for line in said if "train" in line]
            assert said == [] and len(dataset) == 49
            top = os.path.join(moved, "train", "digit0.tar")
            pack(top, [("only.png", dataset_file(forms["folder"]))])
    assert len(dataset) == 38 and sum("digit0.tar has changed" in line for line in said) == 1


def dataset_file(root):
    dataset = build_dataset(False, "IMNET", root, None)
    return dataset.path(0)


def test_the_command_line_of_the_tool(folder, tmp_path):
    run = [sys.executable, "-m", "runtime.pictures.shards"]
    code, out, err = commands.run(run + [folder, tmp_path / "out"])
    assert code == 0 and "49 pictures in 1 shard, each" in out and "Train with --data-path" in out, err
    (tmp_path / "empty").mkdir()
    code, _, err = commands.run(run + [tmp_path / "empty", tmp_path / "out"])
    assert code == 2 and err.count("\n") == 1 and "has neither a folder 'train' nor 'val'" in err


# ------------------------------------------------------------------------------------------------- over HTTP

class Ranges(http.server.SimpleHTTPRequestHandler):
    """Files of `folder`, whole or a range of bytes; `fault(path)` may send another answer and say so."""
    protocol_version = "HTTP/1.1"
    folder, fault = None, staticmethod(lambda handler: False)

    def translate_path(self, path):
        return os.path.join(self.folder, urllib.parse.unquote(path).lstrip("/"))

    def answer(self, code, content=b"", length=None, first=None):
        self.send_response(code)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        if first is not None:
            self.send_header("Content-Range", "bytes {}-{}/*".format(first, first + len(content) - 1))
        self.end_headers()
        self.wfile.write(content)
        return True

    def hang_up(self):
        self.close_connection = True
        return True

    def do_GET(self):
        if "Range" not in self.headers or not os.path.isfile(self.translate_path(self.path)):
            return super().do_GET()
        if self.fault(self):
            return
        first, last = (int(word) for word in self.headers["Range"][len("bytes="):].split("-"))
        with open(self.translate_path(self.path), "rb") as f:
            f.seek(first)
            self.answer(206, f.read(last - first + 1), first=first)

    def log_message(self, *_):
        pass


def range_of(handler):
    """(first byte, number of bytes) that are asked for."""
    first, last = (int(word) for word in handler.headers["Range"][len("bytes="):].split("-"))
    return first, last - first + 1


class Server(http.server.HTTPServer):
    daemon_threads = True

    def process_request(self, request, client_address):
        thread = threading.Thread(target=self.process_request_thread, args=(request, client_address))
        thread.daemon = True
        thread.start()

    def process_request_thread(self, request, client_address):
        try:
            self.finish_request(request, client_address)
        except ConnectionError:
            pass
        finally:
            self.shutdown_request(request)


@pytest.fixture
def served(monkeypatch):
    """served(folder, fault=...) -> its address on a web server of this machine."""
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def serve(folder, fault=lambda handler: False):
        handler = type("Handler", (Ranges,), {"folder": folder, "fault": staticmethod(fault)})
        server = Server(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return "http://127.0.0.1:{}".format(server.server_address[1])

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.once
def test_shards_on_a_web_server_train_bit_for_bit_as_on_a_disk(forms, tmp_path, served):
    """Two processes with a worker each, evaluation, and `--eval` of what came out."""
    ends, said = {}, {}
    for form, root in (("disk", forms["shards"]), ("server", served(forms["shards"]) + "/")):
        out = tmp_path / form
        flags = FAST + ["--num_workers", 1, "--batch-size", 8, "--epochs", 1, "--data-path", root, "--output_dir", out]
        commands.succeed(*flags, small=[], launch=list(commands.launchers(2).values())[-1])
        ends[form] = kill_and_resume.ends(str(out))
        for checkpoint in ends[form][:2]:
            assert checkpoint["args"].pop("data_path") == root
        said[form] = commands.succeed("--eval", "--device", "cpu", "--num_workers", 0, "--resume",
                                      out / "checkpoint.pth", small=[])
    assert kill_and_resume.differences(ends["disk"], ends["server"]) == []
    results = [said[form].splitlines()[-1].split(" images/s")[0] for form in ("disk", "server")]
    assert results[0] == results[1] and "Acc@1" in results[0] and "loss" in results[0]
    assert os.listdir(str(tmp_path / "server")).count("index-train.npz") == 0


@pytest.mark.once
@pytest.mark.parametrize("wrong, sentence", [
    ("no index", "there is no .*/index-val.npz; shards on a server need the index"),
    ("damaged index", "the index .*/index-val.npz is damaged"),
    ("a page in its place", "what the server has as .*/index-val.npz is no index .it begins with '<html>"),
    ("an index of folders", "is the index of a folder; on a server only shards can be read"),
    ("a shard is gone", "val/shard-000000.tar is not there, and its index says"),
    ("a shard is shorter", "val/shard-000000.tar has 100 bytes, and its index says"),
    ("another data set", "--data-path: INAT on a server")])
def test_what_is_wrong_on_a_web_server_is_said_in_one_sentence(wrong, sentence, forms, folder, tmp_path, served):
    root = str(tmp_path / "root")
    shutil.copytree(forms["shards"], root)
    shard, listed = os.path.join(root, "val", "shard-000000.tar"), os.path.join(root, "index-val.npz")
    if wrong == "no index":
        os.remove(listed)
    elif wrong == "damaged index":
        with open(listed, "r+b") as f:
            f.truncate(300)
    elif wrong == "a page in its place":
        with open(listed, "wb") as f:
            f.write(b"<html>log in</html>")
    elif wrong == "an index of folders":
        one = index.Index(str(tmp_path / "index"), made=True)
        build_dataset(False, "IMNET", folder, None, index=one)
        one.keep(finished=True)
        shutil.copy(str(tmp_path / "index" / "index-val.npz"), listed)
    elif wrong == "a shard is gone":
        os.remove(shard)
    elif wrong == "a shard is shorter":
        with open(shard, "r+b") as f:
            f.truncate(100)
    with pytest.raises(UserError, match=sentence) as error:
        build_dataset(False, "INAT" if wrong == "another data set" else "IMNET", served(root), None)
    assert "\n" not in str(error.value)


@pytest.mark.once
@pytest.mark.parametrize("fault, sentence", [
    (lambda handler: handler.answer(200, b"all of it"), "gives no parts of files"),
    (lambda handler: handler.answer(403), "the answer is 403"),
    (lambda handler: handler.answer(206, b"less"), "4 bytes of"),
    (lambda handler: handler.answer(206, bytes(range_of(handler)[1]), first=0), "cannot be read from byte"),
    (lambda handler: handler.answer(206, bytes(range_of(handler)[1])), "cannot be read from byte"),
    (lambda handler: handler.answer(206, bytes(range_of(handler)[1]), first=range_of(handler)[0]),
     "is not at its place on the server"),
    (lambda handler: handler.answer(206, b"cut off", length=10 ** 6) and handler.hang_up(), "cannot be read"),
    (lambda handler: handler.hang_up(), "cannot be read")])
def test_a_server_that_fails_ends_the_run_and_damages_no_picture(fault, sentence, forms, served, monkeypatch):
    monkeypatch.setattr(remote, "TRIES", 1)
    remote._sessions.clear()
    dataset = TrainingView(build_dataset(True, "IMNET", served(forms["shards"], fault), None))
    with pytest.raises(RunFailed, match=sentence) as error:
        dataset[3, 1]
    assert not isinstance(error.value, DamagedImage) and "\n" not in str(error.value)
    remote._sessions.clear()


@pytest.mark.once
def test_a_shard_of_the_same_size_with_other_pictures_is_noticed(forms, tmp_path, served):
    """Under an index that is older than it, or in the middle of a run; labels and places would be others'."""
    root = str(tmp_path / "root")
    shutil.copytree(forms["shards"], root)
    dataset = build_dataset(True, "IMNET", served(root), None)
    for number in range(10):
        try:
            assert dataset[number][0].size == (48, 48)
        except DamagedImage as error:
            assert "dam" in error.path
    path = os.path.join(root, "train", "shard-000000.tar")
    with tarfile.open(path) as archive:
        names = archive.getnames()
        files = {name: archive.extractfile(name).read() for name in names}
    order = [name for pair in zip(names[2::4] + names[:2], names[3::4] + names[1:2]) for name in pair]
    order = order + [name for name in names if name not in order]
    size = os.path.getsize(path)
    pack(path, [(name, files[name]) for name in order])
    assert os.path.getsize(path) == size and order != names
    with pytest.raises(RunFailed, match="is not at its place on the server; the shard is another one than its index"):
        for number in range(10):
            try:
                dataset[number]
            except DamagedImage:
                pass


@pytest.mark.once
@pytest.mark.parametrize("address, sentence", [
    ("s3://bucket/imagenet", "only http:// and https:// addresses are read"), ("file:///data", "only http:// and"),
    ("http://", "names no server"), ("http://:80/x", "names no server"), ("http://host:port/x", "is no address"),
    ("http://me:secret@host/x", "leave name and password out"), ("http://host/x?token=1", "give a folder's"),
    ("https://host/x#part", "give a folder's"), ("HTTP://127.0.0.1:1/x", "cannot be read .*[Rr]efused")])
def test_addresses_that_cannot_be_those_of_shards(address, sentence, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(remote, "TRIES", 1)
    remote._sessions.clear()
    with pytest.raises(UserError, match=sentence) as error:
        build_dataset(False, "IMNET", address, None)
    assert "\n" not in str(error.value) and "secret" not in str(error.value)
    remote._sessions.clear()


@pytest.mark.once
def test_a_server_that_falters_is_asked_again(forms, served):
    asked = []

    def falter(handler):
        asked.append(handler.path)
        if len(asked) == 3:  # an answer that breaks off
            handler.answer(206, b"x" * 10, length=range_of(handler)[1], first=range_of(handler)[0])
        return len(asked) <= 3 and (handler.answer(503) if len(asked) == 1 else handler.hang_up())

    remote._sessions.clear()
    over, local = (build_dataset(False, "IMNET", root, None) for root in (served(forms["shards"], falter),
                                                                            forms["shards"]))
    assert np.array_equal(np.asarray(over[0][0]), np.asarray(local[0][0])) and len(asked) == 4


@pytest.mark.once
@pytest.mark.parametrize("stalls", [1, 9])
def test_a_server_that_stands_still_inside_an_answer_is_asked_again(stalls, forms, served, monkeypatch):
    asked = []

    def stall(handler):
        asked.append(handler.path)
        if len(asked) > stalls:
            return False
        handler.answer(206, b"x" * 10, length=range_of(handler)[1], first=range_of(handler)[0])
        time.sleep(1)
        return handler.hang_up()

    monkeypatch.setattr(remote, "TIMEOUT", 0.3)
    monkeypatch.setattr(remote, "TRIES", 2)
    remote._sessions.clear()
    over, local = (build_dataset(False, "IMNET", root, None) for root in (served(forms["shards"], stall),
                                                                          forms["shards"]))
    if stalls == 1:
        assert np.array_equal(np.asarray(over[0][0]), np.asarray(local[0][0])) and len(asked) == 2
    else:
        with pytest.raises(RunFailed, match="cannot be read .*timed out"):
            over[0]
    remote._sessions.clear()


# ------------------------------------------------------------------------------------------------- others' archives

def shard(tmp_path, files, classes="cat\ndog\n"):
    """A data set whose train/ and val/ have one shard of these files."""
    for part in ("train", "val"):
        os.makedirs(str(tmp_path / "data" / part), exist_ok=True)
        pack(tmp_path / "data" / part / "shard-000000.tar", files)
    if classes is not None:
        (tmp_path / "data" / "classes.txt").write_text(classes)
    return str(tmp_path / "data")


def test_somebody_elses_shards_keep_their_order_and_names(forms, tmp_path):
    png = dataset_file(forms["folder"])
    root = shard(tmp_path, [("b.cls", b"1\n"), ("b.png", png), ("b.json", b"{}"), ("a.png", png), ("a.cls", b"0"),
                            ("c.seg.png", png), ("c.cls", b"1"), ("d.seg.png", png), ("d.jpg", png), ("d.cls", b"0")])
    dataset = build_dataset(True, "IMNET", root, None)
    assert dataset.classes == ["cat", "dog"] and dataset.labels.tolist() == [1, 0, 1, 0]
    assert [os.path.basename(dataset.names[i]) for i in range(4)] == ["b.png", "a.png", "c.seg.png", "d.jpg"]
    assert dict(dataset.left_out) == {".json": 1, ".png": 1}


@pytest.mark.parametrize("files, classes, sentence", [
    ([("a.png", None)], "cat\ndog\n", "hold no picture|class folders of train and val differ|archives in"),
    ([("a.png", None), ("a.cls", b"0"), ("b.cls", b"1")], "cat\ndog\n", "the sample b has no picture"),
    ([("a.png", None), ("a.cls", b"0"), ("b.png", None)], "cat\ndog\n", "the sample b has no .cls file"),
    ([("a.png", None), ("a.jpg", None), ("a.cls", b"0")], "cat\ndog\n", "the sample a has two pictures"),
    ([("a.x.png", None), ("a.y.png", None), ("a.cls", b"0")], "cat\ndog\n", "two pictures, a.x.png and a.y.png .a sa"),
    ([("a.png", None), ("a.cls", b"0"), ("b.png", None), ("b.cls", b"1"), ("a.png", None), ("a.cls", b"1")],
     "cat\ndog\n", "holds a twice; write the archive anew"),
    ([("a/x.png", None), ("a/y.png", None), ("a/x.png", None)], None, "holds a/x.png twice; write the archive anew"),
    ([("a.png", None), ("a.cls", b"2")], "cat\ndog\n", "is '2', which is no number from 0 to 1"),
    ([("a.png", None), ("a.cls", b"cat")], "cat\ndog\n", "is 'cat', which is no number"),
    ([("a.png", None), ("a.cls", b"0")], "cat\ndog\n", "hold no picture of the class 'dog'"),
    ([("a.png", None), ("a.cls", b"0")], None, "write the names, one a line, to .*classes.txt"),
    ([("a.tar", b""), ("b.png", None)], None, "holds archives and other files"),
    ([], None, "is empty")])
def test_shards_that_do_not_make_sense_are_refused_in_one_sentence(files, classes, sentence, forms, tmp_path):
    png = dataset_file(forms["folder"])
    root = shard(tmp_path, [(name, png if content is None else content) for name, content in files], classes)
    if files == [("a.png", None)]:  # an archive of one class: with another one it is a data set
        assert build_dataset(True, "IMNET", root, None).classes == ["shard-000000"]
        return
    with pytest.raises(UserError, match=sentence) as error:
        build_dataset(True, "IMNET", root, None)
    assert "\n" not in str(error.value)


def test_archives_that_are_cut_off_damaged_or_mixed_are_refused(forms, tmp_path):
    for form in FORMS:
        root = str(tmp_path / form)
        shutil.copytree(forms[form], root)
        top = os.path.join(root, "train")
        path = os.path.join(top, sorted(os.listdir(top))[-1])
        with open(path, "rb") as f:
            good = f.read()
        headers = [info.offset for info in tarfile.open(path)]
        for content in (good[:headers[-1] + 700], good[:headers[-1]], good[:headers[1]] + b"\0x" + good[headers[1] + 2:]
                        if len(headers) > 1 else good[:900], b"", b"no archive" * 200):
            with open(path, "wb") as f:
                f.write(content)
            with pytest.raises(UserError, match="--data-path: .*(cut off or damaged|cannot be read|is empty)"):
                build_dataset(True, "IMNET", root, None)
        with open(path, "wb") as f:
            f.write(good)
        os.mkdir(os.path.join(top, "digit0"))
        with pytest.raises(UserError, match="holds class folders .* and archives"):
            build_dataset(True, "IMNET", root, None)
    link = tarfile.TarInfo("x.png")
    link.type, link.linkname = tarfile.SYMTYPE, "y.png"
    with tarfile.open(str(tmp_path / "link.tar"), "w") as archive:
        archive.addfile(link)
    with pytest.raises(UserError, match="x.png is a link"):
        list(archives.members(str(tmp_path / "link.tar")))
    shutil.copy(os.path.join(forms["shards"], "train", "shard-000000.tar"), os.path.join(tmp_path, "classes", "train"))
    os.rmdir(os.path.join(str(tmp_path), "classes", "train", "digit0"))
    with pytest.raises(UserError, match="is a shard with labels and .* is none"):
        build_dataset(True, "IMNET", str(tmp_path / "classes"), None)


@pytest.mark.parametrize("kind", ["alone", "beside plain ones", "under a plain one's name"])
@pytest.mark.parametrize("suffix", [".tar.gz", ".TGZ", ".tar.zst", ".zip"])
def test_compressed_archives_are_refused(kind, suffix, forms, tmp_path):
    root = str(tmp_path / "data")
    shutil.copytree(forms["shards"], root)
    top, sentence = os.path.join(root, "val"), "shard-000001{} is compressed, and only plain .tar".format(suffix)
    plain, packed = (os.path.join(top, name) for name in ("shard-000001.tar", "shard-000001" + suffix))
    magic = {".tar.gz": b"\x1f\x8b", ".TGZ": b"\x1f\x8b", ".tar.zst": b"\x28\xb5\x2f\xfd", ".zip": b"PK\x03\x04"}
    with open(plain, "wb") as f:
        f.write(magic[suffix] + b"packed" * 200)
    if kind == "under a plain one's name":
        sentence = "shard-000001.tar cannot be read .it is compressed; unpack it to a plain .tar"
    else:
        os.rename(plain, packed)
        if kind == "alone":
            os.remove(os.path.join(top, "shard-000000.tar"))
    with pytest.raises(UserError, match=sentence) as error:
        build_dataset(False, "IMNET", root, None)
    assert "\n" not in str(error.value)


@pytest.mark.once
def test_pictures_outside_of_what_is_read_are_told(forms, tmp_path):
    """Beside class folders and beside archives, in training and in evaluation."""
    for form, where in (("folder", "the class folders"), ("shards", "the archives")):
        root = str(tmp_path / form)
        shutil.copytree(forms[form], root)
        for name in ("x.png", "y.PNG", "notes.txt", ".z.png"):
            shutil.copy(dataset_file(forms["folder"]), os.path.join(root, "val", name))
        small = FAST + ["--batch-size", "8", "--data-path", root, "--output_dir", tmp_path / ("out-" + form)]
        printed = commands.succeed("--epochs", 1, "--max-steps", 1, small=small)
        printed += commands.succeed("--eval", "--resume", tmp_path / ("out-" + form) / "checkpoint.pth", "--data-path",
                                    root, small=FAST[:4])
        line = "Note: {} holds files that are left out: 2 outside {}\n".format(os.path.join(root, "val"), where)
        assert printed.count(line) == 2 and printed.count("left out") == 2


def test_pictures_lie_beyond_8_gib_in_a_large_archive(forms, tmp_path):
    """There tar writes sizes in another form; the file is sparse."""
    png, top = dataset_file(forms["folder"]), tmp_path / "data" / "val"
    os.makedirs(str(top))
    pack(top / "a.tar", [("x.png", png)])
    small = (top / "a.tar").read_bytes()
    large = tarfile.TarInfo("large.bin")
    large.size = 9 * 2 ** 30
    with open(str(top / "b.tar"), "wb") as f:
        f.write(large.tobuf(tarfile.GNU_FORMAT))
        f.seek(large.size, os.SEEK_CUR)
        f.write(small)
    dataset = build_dataset(False, "IMNET", str(tmp_path / "data"), None)
    assert dataset.labels.tolist() == [0, 1] and dataset.source(1).offset > 2 ** 33
    assert np.array_equal(np.asarray(dataset[0][0]), np.asarray(dataset[1][0]))
