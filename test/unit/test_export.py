"""export.py: what it writes computes what the model does, on real pictures, in every format."""
import json
import os
import re
import sys

import numpy as np
import pytest
import reference
import torch
from test_tools import refused  # noqa: F401  (a fixture)

import export
from datasets import build_transform
from evo_vit.compat import TORCH
from runtime.keeping import exported as formats
from runtime.keeping.restore import restore_evo
from runtime.pictures.gallery import photographs, to_batch

HERE = os.path.dirname(os.path.abspath(__file__))
needs_onnx = pytest.mark.skipif(TORCH < (1, 8), reason="PyTorch 1.5 writes ONNX for one batch size only")
needs_pt2 = pytest.mark.skipif(TORCH < (2, 2), reason="pt2 is newer than this PyTorch")


def save_reference(name, path, **kwargs):
    """The named model with the reference weights as float32, as a published checkpoint."""
    torch.save({"model": reference.build(name, gain=1.0, **kwargs).float().state_dict()}, str(path))
    return str(path)


@pytest.fixture
def exported(capsys):
    """exported(*arguments): what export.py printed, and (largest difference, other first choices)."""
    def run(*arguments):
        export.main([str(argument) for argument in arguments])
        out = capsys.readouterr().out
        difference, other = re.search(r"largest difference (\S+) of logits up to \S+, (\d+) other", out).groups()
        return out, float(difference), int(other)
    return run


@needs_onnx
@pytest.mark.parametrize("name", ["EvoLeViT_128S", pytest.param("EvoLeViT_256", marks=pytest.mark.slow),
                                  pytest.param("EvoLeViT_256_384", marks=pytest.mark.slow)])
@torch.no_grad()
def test_onnx_runtime_agrees_with_pytorch_on_real_pictures(name, tmp_path, exported):
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    path = save_reference(name, tmp_path / "published.pth")
    out, difference, other = exported("--resume", path, "--model", name, "--format", "onnx")
    print(out)
    assert "Compared on 32 parts of two photographs in batches of 1 and 5" in out
    assert difference <= 1e-4 and other == 0
    # once more without export.py's own comparison: other pictures, batches of three
    size = 384 if name.endswith("_384") else 224
    images = to_batch(list(photographs(3, size=300)), build_transform(False, "IMNET", size))
    expected = restore_evo(path, name).model(images).numpy()
    actual = export.read_back(str(tmp_path / "published.onnx"))(images).numpy()
    assert np.abs(actual - expected).max() <= 1e-4 and expected.std() > 0.01
    assert np.abs(expected[0] - expected[1]).max() > 1e-3


@needs_onnx
def test_onnx_uses_operators_that_ascends_converter_lists_and_fixed_token_counts(tmp_path, exported):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    path = save_reference("EvoLeViT_128S", tmp_path / "published.pth", img_size=112)
    with open(os.path.join(HERE, "data", "cann_8.0_onnx_operators.txt")) as f:
        listed = set(f.read().split())
    for mode in ([], ["--layer-wise"]):
        out, _, _ = exported("--resume", path, "--model", "EvoLeViT_128S",
                             "--input-size", 112, "--format", "onnx", *mode)
        model = onnx.load(str(tmp_path / "published.onnx"))
        used = {node.op_type for node in model.graph.node}
        assert used <= listed and "BatchNormalization" not in used
        assert "Opset 11; operators: " in out and all("{}(".format(name) in out for name in used)
        batch, *rest = model.graph.input[0].type.tensor_type.shape.dim
        assert batch.dim_param == "batch" and [dim.dim_value for dim in rest] == [3, 112, 112]
        constants = {node.output[0]: node for node in model.graph.node if node.op_type == "Constant"}
        constants.update((tensor.name, tensor) for tensor in model.graph.initializer)
        counts = [node.input[1] in constants for node in model.graph.node if node.op_type == "TopK"]
        assert counts == [True] * (7 if mode else 2)  # one selection in each evolving block, or in each stage
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        assert json.loads(metadata["evo_levit"])["classes"][999] == "class 999"


@pytest.mark.parametrize("format", ["torchscript", "safetensors", pytest.param("pt2", marks=needs_pt2)])
@torch.no_grad()
def test_the_other_formats_agree_too_and_carry_the_classes(format, student, tmp_path, exported):
    if format == "safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    path, output = os.path.join(student[0], "best_checkpoint.pth"), str(tmp_path / "model")
    for mode in ([], ["--layer-wise"]):
        out, difference, other = exported("--resume", path, "--format", format,
                                          "--output", output + formats.FORMATS[format].suffix, *mode)
        assert "Compared on 32 validation pictures of IMNET" in out and difference <= 1e-4 and other == 0
    if format == "safetensors":
        again = restore_evo(output + ".safetensors")
        assert again.classes == restore_evo(path).classes and again.mode == "layer-wise"
        assert not any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in again.model.modules())


def test_an_export_that_differs_is_not_kept_under_its_name(student, tmp_path, monkeypatch, refused):  # noqa: F811
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    monkeypatch.setattr(export, "read_back", lambda path: lambda images: torch.zeros(len(images), 10))
    output = tmp_path / "model.safetensors"
    assert "does not compute what the model does" in refused(export.main, "--resume", os.path.join(student[0],
         "best_checkpoint.pth"), "--format", "safetensors", "--output", output)
    assert not output.exists()


def test_mistakes_end_in_one_sentence(student, teacher, tmp_path, monkeypatch, refused):  # noqa: F811
    path = os.path.join(student[0], "best_checkpoint.pth")
    assert "is the checkpoint itself" in refused(export.main, "--resume", path, "--format", "torchscript", "--output",
         path)
    assert "holds the model regnety_002" in refused(export.main, "--resume", teacher, "--format", "torchscript")
    assert "invalid choice: 'caffe'" in refused(export.main, "--resume", path, "--format", "caffe")
    (tmp_path / "text.png").write_text("no picture")
    assert "none of the 1 files" in refused(export.main, "--resume", path, "--format", "torchscript", "--check-on",
         tmp_path / "text.png")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "--format onnx needs onnx and onnxruntime; pip install onnx onnxruntime" in refused(
        export.main, "--resume", path, "--format", "onnx")
    monkeypatch.setattr(formats, "TORCH", (2, 1))
    assert "--format pt2 needs PyTorch 2.2 or newer" in refused(export.main, "--resume", path, "--format", "pt2")
