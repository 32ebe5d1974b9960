"""Files from strangers: checkpoints that are damaged or hostile, pictures that cannot be decoded, weights from
elsewhere."""
import functools
import hashlib
import http.server
import io
import json
import os
import pickle
import random
import shutil
import sys
import threading
import zipfile

import commands
import numpy as np
import pytest
import torch
from PIL import Image

import main
from datasets import build_transform
from evo_vit import evo_levit
from runtime.errors import SaveFailed, UserError
from runtime.keeping import checkpoint as checkpoints
from runtime.keeping.files import write_whole
from runtime.keeping.unpickling import load_tensors
from runtime.learning.models import build_model

TINY = "EvoLeViT_tiny"


@pytest.fixture(scope="module", autouse=True)
def tiny_model():
    """A model whose checkpoint is small, so that hundreds of them can be read."""
    evo_levit._register(TINY, dict(embed_dim=(16, 32, 48), key_dim=16, num_heads=(1, 2, 3), depth=(2, 1, 1)), 64)
    return build_model(TINY, 10, 64, distillation=True)


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory):
    return commands.write_digits(tmp_path_factory.mktemp("few"), classes=10, train=2, val=1)


@pytest.fixture(scope="module")
def good(tmp_path_factory, tiny_model, few_digits):
    path = str(tmp_path_factory.mktemp("good") / "checkpoint.pth")
    checkpoints.save_checkpoint({"model": tiny_model.state_dict(), "model_ema": None, "epoch": 3, "progress": None,
         "args": {"model": TINY, "input_size": 64, "data_set": "IMNET", "data_path": few_digits}}, path)
    return path


class Hostile:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, ("touch {}".format(self.path),))


def mutations(content, draw, trap):
    """Endless (kind, content) of files that are not the good one."""
    state = torch.load(io.BytesIO(content), map_location="cpu")
    while True:
        kind = draw.choice(["truncated", "flipped", "swapped", "shape", "type",
                           "hostile pickle", "hostile zip", "noise", "missing"])
        changed = dict(state, model=dict(state["model"]))
        names = list(changed["model"])
        name, other = draw.sample(names, 2)
        if kind == "truncated":
            yield kind, content[:draw.randrange(len(content))]
        elif kind == "flipped":
            flipped = bytearray(content)
            flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            yield kind, bytes(flipped)
        elif kind == "hostile pickle":
            yield kind, pickle.dumps({"model": Hostile(trap)}, protocol=draw.choice([2, 3, 4]))
        elif kind == "hostile zip":
            out = io.BytesIO()
            with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(out, "w",
                    zipfile.ZIP_STORED) as target:
                for item in source.namelist():
                    target.writestr(item, pickle.dumps(Hostile(trap), protocol=2) if item.endswith("data.pkl")
                                    else source.read(item))
            yield kind, out.getvalue()
        elif kind == "noise":
            yield kind, bytes(draw.randrange(256) for _ in range(draw.randrange(2000)))
        else:
            if kind == "swapped":
                changed["model"][name], changed["model"][other] = changed["model"][other], changed["model"][name]
                if changed["model"][name].shape == changed["model"][other].shape:
                    continue
            elif kind == "shape":
                changed["model"][name] = torch.zeros(3, 1, 2)
            elif kind == "missing":
                for key in [key for key in names if key.split("blocks.")[-1] == name.split("blocks.")[-1]]:
                    del changed["model"][key]
                changed["model"]["unknown"] = torch.zeros(1)
            else:
                changed[draw.choice(["model", "args", "epoch"])] = draw.choice([7, "text", None, [1, 2], {"a": 1}])
            out = io.BytesIO()
            torch.save(changed, out, _use_new_zipfile_serialization=True)
            yield kind, out.getvalue()


@pytest.mark.parametrize("count", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_no_mutated_checkpoint_crashes_or_runs_code(count, good, few_digits, tmp_path, capsys):
    """Each ends in one sentence and exit code 2, or, where a flipped bit hit nothing that is read, evaluates."""
    with open(good, "rb") as f:
        content = f.read()
    trap, path = tmp_path / "executed", tmp_path / "mutated.pth"
    kinds, read = {}, 0
    made = mutations(content, random.Random(1), trap)
    for _ in range(count):
        kind, mutated = next(made)
        kinds[kind] = kinds.get(kind, 0) + 1
        path.write_bytes(mutated)
        try:
            main.main(["--eval", "--device", "cpu", "--num_workers", "0", "--batch-size", "10", "--resume", str(path)])
            assert kind in ("flipped", "type"), kind
            read += 1
            capsys.readouterr()
        except SystemExit as stopped:
            err = capsys.readouterr().err
            assert stopped.code == 2 and err.startswith("error: ") and err.count("\n") == 1, (kind, err)
        assert not trap.exists(), kind
    print(kinds, read)
    assert min(kinds.values()) > count // 25 and read < count // 8


def test_a_namespace_and_numpy_scalars_are_read_as_the_published_code_writes_them(tmp_path):
    import argparse
    path = str(tmp_path / "published.pth")
    torch.save({"model": {"weight": torch.ones(2)}, "epoch": np.int64(299), "max_accuracy": np.float64(72.5),
                "args": argparse.Namespace(model="EvoLeViT_128S", lr=np.float32(0.5))}, path)
    content, unknown = load_tensors(path)
    assert unknown == set() and content["args"].lr == 0.5
    assert (content["epoch"], content["max_accuracy"]) == (299, 72.5)


def test_a_data_set_of_another_program_is_not_ours():
    def said(**args):
        return checkpoints.Checkpoint({"model": {}, "args": args}, "file.pth", "--resume").settings()
    assert said(data_set="CIFAR10", model="deit_tiny_patch16_224") == {"model": "deit_tiny_patch16_224"}
    assert said(data_set="INAT19") == {"data_set": "INAT19"}
    assert said(data_set="DIGITS") == {"data_set": "DIGITS"}  # as export.py's files say


def test_a_flipped_bit_in_a_tensor_is_found(good, tmp_path):
    with open(good, "rb") as f:
        content = bytearray(f.read())
    with zipfile.ZipFile(good) as archive:
        item = max(archive.infolist(), key=lambda item: item.file_size)
    content[item.header_offset + 200 + item.file_size // 2] ^= 1
    (tmp_path / "flipped.pth").write_bytes(bytes(content))
    with pytest.raises(UserError, match="damaged"):
        checkpoints.load_checkpoint(str(tmp_path / "flipped.pth"), "--resume")


def test_a_failed_write_leaves_the_checkpoints_before_it(tmp_path):
    """A disk that fills up, by a limit on the size of the process's files."""
    script = ("import evo_vit, resource, signal, sys, torch; from runtime.errors import SaveFailed; "
              "from runtime.keeping.checkpoint import save_newest\n"
              "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
              "for number in (1, 2): save_newest({'n': number, 'x': torch.zeros(100000)}, sys.argv[1])\n"
              "resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))\n"
              "try: save_newest({'n': 3, 'x': torch.zeros(100000)}, sys.argv[1])\n"
              "except SaveFailed as error: print(str(error).count(chr(10)), error)\n")
    code, out, err = commands.run([sys.executable, "-c", script, tmp_path])
    assert code == 0 and out.startswith("0 ") and "could not be written" in out, out + err
    assert sorted(os.listdir(str(tmp_path))) == ["checkpoint.previous.pth", "checkpoint.pth"]
    assert [torch.load(str(tmp_path / name))["n"] for name in ("checkpoint.previous.pth", "checkpoint.pth")] == [1, 2]


def test_an_output_folder_that_cannot_be_used_is_found_before_training(few_digits, tmp_path, monkeypatch, capsys):
    import collections

    from runtime.keeping import output
    (tmp_path / "file").write_text("")
    flags = ["--device", "cpu", "--num_workers", "0", "--batch-size", "10", "--model", TINY, "--distillation-type",
         "none", "--data_path", few_digits, "--input-size", "64", "--output_dir"]
    usage = collections.namedtuple("usage", "total used free")
    for folder, sentence in ((tmp_path / "file" / "save", "cannot be written"),
                             (tmp_path / "full", "MiB for the run's checkpoints, those that are there counted")):
        if "full" in str(folder):
            monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage(10, 10, 0))
        with pytest.raises(SystemExit) as stopped:
            main.main(flags + [str(folder)])
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and err.count("\n") == 1 and sentence in err
    for exported in (tmp_path / "none" / "weights.safetensors", tmp_path):
        for task in ([str(tmp_path / "out")], [str(tmp_path / "out"), "--eval", "--resume", "none.pth"]):
            with pytest.raises(SystemExit) as stopped:
                main.main(flags + task + ["--export-weights", str(exported)])
            err = capsys.readouterr().err
            assert stopped.value.code == 2 and err.startswith("error: --export-weights: ") and err.count("\n") == 1, err


def test_a_file_in_a_folder_that_is_not_there_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(SaveFailed, match=r"page.html could not be written \(No such file or directory\)"):
        write_whole(str(tmp_path / "none" / "page.html"), lambda f: f.write(b""))


def test_weights_travel_as_safetensors_and_by_url(student, digit_folder, tmp_path, capsys, monkeypatch):
    source = os.path.join(student[0], "checkpoint.pth")
    exported = tmp_path / "weights.safetensors"

    def evaluate(path, *flags):
        """The line of the figures, without the speed."""
        main.main(["--eval", "--device", "cpu", "--num_workers", "0",
                  "--resume", str(path)] + [str(flag) for flag in flags])
        (line,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("Acc@1")]
        return line.split("  images/s")[0]

    line = evaluate(source, "--export-weights", exported)
    assert evaluate(exported, "--data-path", digit_folder) == line
    tuned = commands.succeed("--finetune", exported, "--model", "EvoLeViT_128S", "--distillation-type", "none",
         "--epochs", 1, "--max-steps", 1, "--data-path", digit_folder, "--output_dir", tmp_path / "out")
    assert "Finetuning from" in tuned

    served = tmp_path / "served"
    served.mkdir()
    with open(source, "rb") as f:
        content = f.read()
    right = "student-{}.pth".format(hashlib.sha256(content).hexdigest()[:8])
    for name in (right, "student-00000000.pth", "run1/best.pth", "run2/best.pth"):
        (served / name).parent.mkdir(exist_ok=True)
        (served / name).write_bytes(content)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    address = "http://127.0.0.1:{}/".format(server.server_port)
    try:
        assert evaluate(address + right) == line
        assert evaluate(address + "run1/best.pth") == line and "fetched before" not in capsys.readouterr().out
        (served / "run2" / "best.pth").write_bytes(b"another file of that name")
        with pytest.raises(UserError, match="cannot be read as a checkpoint"):
            checkpoints.load_checkpoint(address + "run2/best.pth", "--resume")
        capsys.readouterr()
        first = checkpoints.load_checkpoint(address + "run1/best.pth", "--resume")
        assert "--resume: {}run1/best.pth was fetched before; delete {}".format(
            address, first.path) in capsys.readouterr().out
        for name, sentence in (("student-00000000.pth", "its SHA-256 starts with"),
                               ("nothing.pth", "cannot be fetched")):
            capsys.readouterr()
            with pytest.raises(SystemExit) as stopped:
                main.main(["--eval", "--device", "cpu", "--resume", address + name])
            out, err = capsys.readouterr()
            assert (stopped.value.code, out) == (2, "") and err.count("\n") == 1 and sentence in err
    finally:
        server.shutdown()
    assert evaluate(address + right) == line, "the file is in the cache now, and the server gone"


def test_a_safetensors_teacher_gives_the_teachers_logits(teacher, tmp_path):
    from safetensors.numpy import save_file

    from runtime.learning.teacher import build_teacher
    from runtime.machine.machine import Machine
    state = checkpoints.load_checkpoint(teacher, "--teacher-path").content["model"]
    save_file({name: tensor.contiguous().numpy()
              for name, tensor in state.items()}, str(tmp_path / "teacher.safetensors"))
    classes = ["digit{}".format(digit) for digit in range(10)]
    one, other = (build_teacher("regnety_002", checkpoints.load_checkpoint(path, "--teacher-path"), classes,
                                Machine(torch.device("cpu")), 64)
                  for path in (teacher, str(tmp_path / "teacher.safetensors")))
    with torch.no_grad():
        assert torch.equal(one(torch.ones(1, 3, 64, 64)), other(torch.ones(1, 3, 64, 64)))


# ----------------------------------------------------------------------------------------------------------- pictures

def picture_bytes(mode="RGB", size=(48, 48), format="PNG", **options):
    out = io.BytesIO()
    pixels = np.random.RandomState(0).randint(0, 256, size[::-1] + (4,)).astype(np.uint8)
    picture = Image.fromarray(pixels[..., :3])
    if mode == "I;16":
        picture = Image.fromarray((pixels[..., 0].astype(np.uint16) << 8) + 255)
    elif mode != "RGB":
        picture = picture.convert(mode)
    picture.save(out, format, **options)
    return out.getvalue()


def unreadable(draw):
    """Endless (name, content) of picture files that cannot be decoded."""
    png, jpeg, bomb = picture_bytes(), picture_bytes(format="JPEG"), picture_bytes("1", (14000, 14000))
    number = 0
    while True:
        number += 1
        kinds = [(".png", b""), (".jpg", b"not a picture"), (".png", png[:draw.randrange(20, len(png) // 2)]),
                 (".jpg", jpeg[:draw.randrange(10, len(jpeg) // 2)]), (".jpg", b"\xff\xd8\xff" + bytes(50)),
                 (".png", png[:40] + bytes(100) + png[140:]), (".png", bomb), (".bmp", b"BM" + bytes(20))]
        ending, content = kinds[number % len(kinds)]
        yield "bad{}{}".format(number, ending), content


def test_every_kind_of_readable_picture_becomes_rgb(tmp_path):
    from runtime.pictures.reading import load_picture
    cases = [("L", {}), ("P", {}), ("RGBA", {}), ("LA", {}), ("1", {}), ("I;16", {}), ("CMYK", dict(format="JPEG")),
        ("RGB", dict(format="JPEG")), ("RGB", dict(format="JPEG", exif=b"Exif\0\0broken")), ("RGB", dict(size=(1, 1))),
         ("RGB", dict(size=(3, 4000))), ("RGB", dict(format="BMP")), ("RGB", dict(format="TIFF")), ("RGB",
        dict(format="WEBP"))]
    for number, (mode, options) in enumerate(cases):
        path = str(tmp_path / str(number))
        with open(path, "wb") as f:
            f.write(picture_bytes(mode, **options))
        picture = load_picture(path)
        assert picture.mode == "RGB" and picture.size == options.get("size", (48, 48)), (mode, options)
    grey = np.asarray(load_picture(str(tmp_path / "5")))
    assert 100 < grey.mean() < 155 and grey.std() > 50  # a 16-bit picture keeps its greys


@commands.slow_on_the_current_line
def test_a_hundred_bad_pictures_are_named_and_nothing_stops(few_digits, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(few_digits, str(root))
    bad = {"train": [], "val": []}
    made = unreadable(random.Random(2))
    for number in range(100):
        part = "train" if number % 2 else "val"
        name, content = next(made)
        path = root / part / "digit{}".format(number // 2 % 10) / name
        path.write_bytes(content)
        bad[part].append(str(path))
    flags = ["--device", "cpu", "--input-size", "64", "--batch-size", "10", "--num_workers", "1", "--model",
        "EvoLeViT_128S", "--distillation-type", "none", "--no-repeated-aug", "--data_path", root, "--epochs", 2]
    code, out, err = commands.run([sys.executable, commands.MAIN] + flags + ["--output_dir", tmp_path / "out"])
    assert code == 0, out + err
    for path in bad["train"]:
        assert err.count("Damaged image, another one takes its place: {} (class digit".format(path)) == 1, path
    for path in bad["val"]:
        assert err.count("Damaged image, counted as wrong: {} (class digit".format(path)) == 2, path
    with open(str(tmp_path / "out" / "log.txt")) as f:
        last = json.loads(f.read().splitlines()[-1])
    assert (last["test_images"], last["test_damaged"], last["damaged_images"]) == (60, 50, 50)
    assert last["test_acc5"] <= 100 * 10 / 60
    main.main(["--eval", "--device", "cpu", "--num_workers", "0", "--resume", str(tmp_path / "out" / "checkpoint.pth")])
    assert "50 damaged images, named above, count as wrong" in capsys.readouterr().out
    code, out, err = commands.run([sys.executable, commands.MAIN] + flags + \
                                  ["--output_dir", tmp_path / "few", "--max-bad-images", 5])
    assert code == 1 and err.splitlines(
    )[-1].startswith("error: training stopped: ") and "--max-bad-images allows 5" in err
    assert "Traceback" not in err


@pytest.mark.once
def test_an_evaluation_without_any_readable_picture_is_no_number(student, digit_folder, tmp_path):
    for part in ("train", "val"):
        for name in os.listdir(os.path.join(digit_folder, part)):
            os.makedirs(str(tmp_path / part / name))
            (tmp_path / part / name / "0.png").write_bytes(b"no picture")
    code, out, err = commands.run([sys.executable, commands.MAIN] + commands.SMALL + [
        "--eval", "--resume", os.path.join(student[0], "checkpoint.pth"), "--data-path", tmp_path])
    assert code == 1 and "Acc@1" not in out and err.splitlines()[-1] == (
        "error: none of the 10 validation pictures could be decoded; they are named above"), out + err


# --------------------------------------------------------------------------------------------- evaluation over ranks

@pytest.mark.parametrize("processes", [2, 3, 8])
def test_evaluation_over_processes_counts_as_one_process_does(processes, tmp_path):
    """61 images, which no such number divides."""
    code, out, err = commands.helper("evaluate_shared", processes, env={"OMP_NUM_THREADS": "1"})
    assert code == 0, out + err
    alone, together = json.loads(out.splitlines()[-1])
    for name in ("acc1", "acc5", "images"):
        assert together[name] == alone[name]
    assert abs(together["loss"] / alone["loss"] - 1) < 1e-6 and alone["images"] == 61


@pytest.mark.parametrize("place", ["", "class"])
def test_a_folder_that_cannot_be_read_is_named(place, digit_folder, monkeypatch):
    """Root may read everything, so the system's refusal is made here."""
    from runtime.pictures import folders
    refused = os.path.join(digit_folder, "train", "digit3") if place else os.path.join(digit_folder, "train")
    scandir = os.scandir

    def scan(path):
        if os.path.normpath(path) == os.path.normpath(refused):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    root = os.path.join(digit_folder, "train")
    with pytest.raises(UserError, match="--data-path: {}.* cannot be read .Permission denied".format(refused)):
        folders.walk(root, folders.class_names(root))


def test_a_fingerprint_sees_weights_wherever_they_lie():
    from runtime.keeping.sharing import _fingerprint
    own = {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.bfloat16)}
    other = dict(own, a=torch.tensor([1.0, 1.0, 2.0]))
    for wrap in (lambda state: {"model": state}, lambda state: {"state_dict": state}, lambda state: state):
        one, two = (_fingerprint(checkpoints.Checkpoint(wrap(state), "x.pth", "--resume")) for state in (own, other))
        assert one != two and one == _fingerprint(checkpoints.Checkpoint(wrap(dict(own)), "x.pth", "--resume"))


def test_small_pictures_of_a_data_set_stay_as_they_are_and_others_are_made_so():
    transform = build_transform(False, "CIFAR", 32)
    pixels = np.random.RandomState(0).randint(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(transform(Image.fromarray(pixels))[0].numpy(), pixels)
    assert tuple(transform(Image.new("RGB", (640, 480)))[0].shape) == (32, 32, 3)


@pytest.mark.parametrize("name", ["run-20261126120000.pth", "run-1767225600.pth", "run-20261126.pth",
                                  "run-1b4e28ba-2fa1-41d2-883f-0016d3cca427.pth", "run-0016d3.pth"])
def test_numbers_and_uuids_at_the_end_of_a_name_are_no_hashes(name, tmp_path):
    assert checkpoints.without_hash(name[:-4]) == name[:-4]
    torch.save({"model": {"weight": torch.zeros(2)}}, str(tmp_path / name))
    assert checkpoints.load_checkpoint(str(tmp_path / name), "--resume").content["model"]["weight"].sum() == 0


@pytest.mark.parametrize("name", ["run-0016d3cc.pth", "run-1b4e28ba-0016d3cc.pth", "a1-2fa1-0016d3cca427.pth"])
def test_other_hexadecimal_endings_are(name, tmp_path):
    torch.save({"model": {"weight": torch.zeros(2)}}, str(tmp_path / name))
    with pytest.raises(UserError, match="its SHA-256 starts with"):
        checkpoints.load_checkpoint(str(tmp_path / name), "--resume")


@pytest.mark.parametrize("own, names", [(["crane", "owl", "crane"], ["owl", "crane"]),
                                        (["crane", "owl"], ["crane", "owl", "crane"])])
def test_a_name_of_several_classes_says_no_place(own, names):
    checkpoint = checkpoints.Checkpoint({"classes": own, "model": {}}, "x.pth", "--resume")
    with pytest.raises(UserError, match="'crane' is the name of several"):
        checkpoint.places_of(names)
    assert checkpoint.places_of(["owl"]) == [1]
