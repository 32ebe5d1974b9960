"""The teacher's file, as timm 0.4.12 wrote it, gives the same teacher under the installed timm; and its own number
format is held to float32."""
import re
import shutil
import sys
import time

import commands
import pytest
import torch
from reference import draw, images, load_json, relative_error

from evo_vit.compat import TORCH
from runtime.errors import UserError
from runtime.keeping.checkpoint import load_checkpoint
from runtime.learning.models import build_model, set_mode
from runtime.learning.quantized import adds_exactly, quantize
from runtime.learning.teacher import Teacher, build_teacher
from runtime.learning.teacher_precision import Shelf, need_precision, set_precision
from runtime.machine.agreement import Agreement
from runtime.machine.machine import Machine
from runtime.machine.processes import World
from runtime.machine.versions import has_autocast, has_bf16
from runtime.pictures.batches import collate


def test_a_teacher_saved_by_timm_0_4_12_gives_equal_outputs(tmp_path):
    facts = load_json("regnety_160_timm_0.4.12")
    state = {name: torch.zeros(shape, dtype=torch.int64) if name.endswith("num_batches_tracked")
             else torch.as_tensor(draw(name, tuple(shape))).float() for name, shape in facts["state_dict"]}
    torch.save({"model": state}, str(tmp_path / "regnety_160.pth"))
    checkpoint = load_checkpoint(str(tmp_path / "regnety_160.pth"), "--teacher-path")
    teacher = build_teacher("regnety_160", checkpoint, list("0123456789"), Machine(torch.device("cpu")), 64)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        logits = teacher(images(64).float())
    assert relative_error(logits, facts["logits"]) < 1e-5


SHELF = Shelf("teacher.pth", Agreement())


@pytest.mark.parametrize("name, heads", [("EvoLeViT_128S", True), ("EvoLeViT_128S", False),
                                         ("evo_deit_tiny_patch16_224", True)])
@torch.no_grad()
def test_a_teacher_of_this_project_runs_as_it_was_trained(name, heads, tmp_path):
    """Its mode, its keep ratio and its heads are those of its checkpoint."""
    machine, x, path = Machine(torch.device("cpu")), torch.randn(4, 3, 128, 128), str(tmp_path / "teacher.pth")
    for mode, keep_ratio in (("layer-wise", 0.9), ("stage-wise", 0.3), ("layer-wise, no token selection", 0.5)):
        torch.manual_seed(0)
        model = build_model(name, 10, 128, heads, keep_ratio=keep_ratio)
        for parameter in model.parameters():  # as if trained, so that tokens and modes differ
            parameter.add_(torch.randn_like(parameter) * 0.1)
        set_mode(model.eval(), mode)
        torch.save({"model": model.state_dict(), "mode": mode, "args": {
            "model": name, "input_size": 128, "keep_ratio": keep_ratio}}, path)
        teacher = build_teacher(name, load_checkpoint(path, "--teacher-path"), [str(n) for n in range(10)], machine,
                                128)
        assert relative_error(teacher(x), model(x)) < 1e-5
        set_mode(model, "stage-wise" if mode.startswith("layer") else "layer-wise")
        assert relative_error(teacher(x), model(x)) > 1e-4


class Close(torch.nn.Module):
    """Two classes whose logits differ by a ten-thousandth, so that bf16 makes them equal: the second one's is larger
    for bright pictures, the first one's for dark ones, which are below ImageNet's mean."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 1.0001]))

    def forward(self, images):
        return images.mean(dim=(1, 2, 3))[:, None] * self.weight


class Pictures:
    """A training view of `count` grey pictures, every second of them dark."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, draw):
        index, _ = draw
        return (torch.full((8, 8, 3), 250 * (index % 2), dtype=torch.uint8), []), 0, index, []


def test_a_teacher_in_bf16_is_held_to_float32(capsys):
    machine = Machine(torch.device("cpu"))
    for needed in (0.0, 0.4):
        teacher = Teacher(Close(), dtype=torch.float32, own_format=True)
        assert 0.4 < set_precision(teacher, "bf16", Pictures(300), machine, needed, SHELF) < 0.6
        assert teacher.dtype is torch.bfloat16 and teacher.model.weight.dtype is torch.bfloat16
        assert "Teacher in bf16: its first choice is that of float32 for 5" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"that of float32 for 5.* of 256 training crops only.* than 0.98"):
        set_precision(Teacher(Close(), dtype=torch.float32, own_format=True), "bf16", Pictures(300), machine, 0.98,
                      SHELF)


class Lagging(Close):
    """Close, and much later in float32 or in bf16."""

    def __init__(self, late):
        super().__init__()
        self.late = late

    def forward(self, images):
        time.sleep(0.02 * (images.dtype is self.late))
        return super().forward(images)


@pytest.mark.parametrize("late", [torch.float32, torch.bfloat16])
def test_how_fast_a_format_is_is_said(late, capsys):
    teacher = Teacher(Lagging(late), dtype=torch.float32, own_format=True)
    set_precision(teacher, "bf16", Pictures(300), Machine(torch.device("cpu")), 0.0, SHELF)
    printed = capsys.readouterr().out
    times = float(re.search(r"of 256 training crops; ([0-9.e+-]+) times as fast\n", printed).group(1))
    assert times > 2 if late is torch.float32 else times < 0.5
    assert ("Note: --teacher-precision bf16 is slower than float32 on this machine\n" in printed) == (times < 1)


class Levels(torch.nn.Module):
    """Four classes of brightness, with convolutions and a linear map for int8 to round."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 16, 3, bias=True)
        self.linear = torch.nn.Linear(16, 4)

    def forward(self, images):
        return self.linear(self.conv(images).relu().mean(dim=(2, 3)))


def need_onnxruntime():
    pytest.importorskip("onnxruntime.quantization", reason="ONNX Runtime is not there for this Python")


@pytest.mark.skipif(TORCH < (1, 8), reason="this PyTorch writes ONNX for one batch size alone")
@pytest.mark.parametrize("instructions", (None, False), ids=["this-processor", "one-without-instructions"])
def test_a_teacher_in_int8_is_made_once_and_held_to_float32(tmp_path, capsys, monkeypatch, instructions):
    need_onnxruntime()
    import onnx
    if instructions is not None:
        monkeypatch.setattr("runtime.learning.teacher_precision.adds_exactly", lambda: instructions)
    machine, made = Machine(torch.device("cpu")), []
    shelf = Shelf(str(tmp_path / "teacher.pth"), Agreement())
    pictures = Pictures(300)
    for run in range(3):
        if run == 2:  # damaged: made anew
            kept, = tmp_path.iterdir()
            kept.write_bytes(kept.read_bytes()[:1000])
        teacher = Teacher(Levels().eval(), dtype=torch.float32, own_format=True)
        x = machine.images(collate([pictures[draw] for draw in ((0, 0), (1, 1), (2, 2))])[0])
        exact, size = teacher(x), teacher.image_macs(8)
        assert set_precision(teacher, "int8", pictures, machine, 0.9, shelf) > 0.9
        assert 0 < relative_error(teacher(x), exact) < 0.05 and teacher.image_macs(8) == size
        network = teacher.model
        monkeypatch.setattr("runtime.learning.teacher.compile_module", pytest.fail)
        teacher.compile_network("cpu")  # leaves it alone
        assert teacher.model is network
        made.append(teacher(x))
        printed = capsys.readouterr().out
        assert "Teacher in int8: its first choice is that of float32 for " in printed
        assert ("calibrating it on 64 training crops" in printed) == (run != 1)
        assert ("cannot be used and is made anew" in printed) == (run == 2)
    assert all(torch.equal(logits, made[0]) for logits in made) and len(list(tmp_path.iterdir())) == 1
    graph = onnx.load(str(next(tmp_path.iterdir()))).graph
    weight, = [onnx.numpy_helper.to_array(one) for one in graph.initializer
               if len(one.dims) == 4 and one.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)]
    # what a processor without an instruction for them adds up without an overflow
    assert instructions is None or weight.dtype == "uint8" or abs(weight.astype(int)).max() <= 64
    # other weights have another file
    other = Levels().eval()
    with torch.no_grad():
        other.linear.bias[2] += 1.0
    set_precision(Teacher(other, dtype=torch.float32, own_format=True), "int8", pictures, machine, 0.9, shelf)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(TORCH < (1, 8), reason="this PyTorch writes ONNX for one batch size alone")
@pytest.mark.parametrize("value", (0.0, 0.5))
def test_layers_of_equal_biases_are_in_int8_as_well(value):
    """The exporter writes equal tensors once, and a layer that shares its bias would stay in float32."""
    need_onnxruntime()
    import onnx
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU(),
              torch.nn.Conv2d(8, 8, 1), torch.nn.ReLU(), torch.nn.Flatten()]
    for layer in layers[::2][:3]:
        torch.nn.init.constant_(layer.bias, value)
    content = quantize(torch.nn.Sequential(*layers).eval(), [torch.rand(2, 3, 8, 8)], adds_exactly())
    graph = onnx.load_from_string(content).graph
    maker = {output: node.op_type for node in graph.node for output in node.output}
    inputs = [[maker.get(name) for name in node.input] for node in graph.node if node.op_type == "Conv"]
    assert inputs == 3 * [3 * ["DequantizeLinear"]]


@pytest.mark.skipif(TORCH < (1, 8), reason="this PyTorch writes ONNX for one batch size alone")
def test_a_teacher_in_int8_that_cannot_be_kept_is_used_once(tmp_path, capsys):
    need_onnxruntime()
    teacher = Teacher(Levels().eval(), dtype=torch.float32, own_format=True)
    assert set_precision(teacher, "int8", Pictures(300), Machine(torch.device("cpu")), 0.9,
                         Shelf(str(tmp_path / "gone" / "teacher.pth"), Agreement())) > 0.9
    assert "it is not kept for the next run" in capsys.readouterr().out


@pytest.mark.skipif(TORCH < (1, 8), reason="this PyTorch writes ONNX for one batch size alone")
def test_where_a_teacher_cannot_compute_in_int8():
    need_onnxruntime()
    with pytest.raises(UserError, match="int8 is for a CPU; on cuda use bf16"):
        need_precision("int8", Machine(torch.device("cuda")))

    class Unwritable(Levels):
        def forward(self, images):
            return super().forward(torch.fft.ifft(torch.fft.fft(images)).real)

    with pytest.raises(UserError, match="the teacher cannot be written in int8"):
        set_precision(Teacher(Unwritable().eval(), dtype=torch.float32, own_format=True), "int8", Pictures(300),
                      Machine(torch.device("cpu")), 0.9, SHELF)


def test_of_more_processes_than_crops_each_has_one():
    teacher = Teacher(Close(), dtype=torch.float32, own_format=True)
    machine = Machine(torch.device("cpu"), World(300, 512, 4, 8))
    assert set_precision(teacher, "bf16", Pictures(1000), machine, 0.0, SHELF) in (0.0, 1.0)


@pytest.mark.skipif(not has_autocast("cpu"), reason="this PyTorch has no mixed precision on a CPU")
def test_a_teachers_own_format_holds_in_a_student_of_another():
    x, layer = images(64).float(), torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten())
    with torch.no_grad():
        exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Teacher(layer, dtype=torch.float32, own_format=True)(x), exact)
        assert not torch.equal(Teacher(layer)(x), exact)


@pytest.mark.once
@pytest.mark.parametrize("name", [
    pytest.param("bf16", marks=pytest.mark.skipif(not has_bf16("cpu"), reason="this PyTorch's CPU has no bf16")),
    pytest.param("int8", marks=pytest.mark.skipif(TORCH < (1, 8), reason="this PyTorch writes no such ONNX"))])
def test_main_trains_with_a_teacher_in_a_format_of_its_own(name, digit_folder, teacher, tmp_path):
    if name == "int8":
        need_onnxruntime()
    shutil.copy(teacher, str(tmp_path / "teacher.pth"))
    teacher = tmp_path / "teacher.pth"
    flags = ["--teacher-model", "regnety_002", "--teacher-path", teacher, "--data-path", digit_folder, "--epochs", 1,
             "--max-steps", 2, "--output_dir", tmp_path / "out", "--model", "EvoLeViT_128S"]
    found, launch = commands.launchers(2), [sys.executable]
    if name == "int8":  # one process makes the network, both use it
        launch = found.get("torchrun", found["launch"])
    printed = commands.succeed("--teacher-precision", name, "--teacher-agreement", 0.5, *flags, launch=launch)
    assert printed.count("Teacher in int8: calibrating") == len(list(tmp_path.glob("*.onnx"))) == (name == "int8")
    share = re.search("Teacher in {}: its first choice is that of float32 for ([0-9.]+)% of 256".format(name), printed)
    assert 50 <= float(share.group(1)) <= 100
    for wrong, sentence in ((["--distillation-type", "none"], "--distillation-type none has no teacher to run"),
                            (["--teacher-labels", tmp_path], "--teacher-labels has no teacher to run")):
        code, _, err = commands.run([sys.executable, commands.MAIN] + commands.SMALL + flags + [
            "--teacher-precision", name] + wrong)
        assert code == 2 and sentence in err and err.count("\n") == 1, err
