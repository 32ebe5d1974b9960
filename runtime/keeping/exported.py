"""Trained models for use elsewhere: what is written in each format, and how it is read again.

Every file carries what is needed to run it (`how_to_run`), under the name evo_levit.
"""
import io
import json
import os
import warnings
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from evo_vit.compat import TORCH

from ..errors import UserError
from ..machine.onnx_bytes import OLDEST_TORCH, onnx_bytes
from .checkpoint import export_weights, is_torchscript
from .files import write_whole

KEY = "evo_levit"
ONNX_OPSET = 11  # the oldest that has the operators: converters know it best


def how_to_run(args, classes: List[str], mode: str, crop_pct: float,
               statistics: Tuple[Sequence[float], Sequence[float]] = (IMAGENET_DEFAULT_MEAN,
                                                                      IMAGENET_DEFAULT_STD)) -> dict:
    """What a file says beside its weights: the names of the classes, the mode, the preprocessing in timm's terms, with
    the `statistics` (mean, deviation) by which images are normalised, and those of the run's settings `args` that
    --eval takes."""
    mean, std = statistics
    settings = ("model", "input_size", "data_set", "inat_category", "keep_ratio")
    return {"classes": list(classes), "mode": mode, "mean": list(mean), "std": list(std),
            "interpolation": "bicubic", "crop_pct": crop_pct,
            "input_size": [3, args.input_size, args.input_size],
            "args": {name: getattr(args, name) for name in settings}}


class Program(torch.nn.Module):
    """A function of float32 images on the CPU, (B, 3, H, H) -> logits (B, classes), that came out of an exported
    file."""

    def __init__(self, function: Callable):
        super().__init__()
        self.functions = (function,)  # no module of this one's: some programs refuse eval()

    def forward(self, images):
        if images.device.type != "cpu":
            raise UserError("an exported file is evaluated on the CPU; add --device cpu")
        return self.functions[0](images.float())


def _write_onnx(model, images, path, metadata, opset):
    import onnx
    graph = onnx.load_model_from_string(onnx_bytes(model, images, opset or ONNX_OPSET))
    onnx.helper.set_model_props(graph, {KEY: json.dumps(metadata)})
    onnx.checker.check_model(graph)
    write_whole(path, lambda f: f.write(graph.SerializeToString()))


def _read_onnx(path):
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return (lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]),
            session.get_modelmeta().custom_metadata_map.get(KEY))


# --- torch 1.5 keeps further files in a map of its own, and cannot freeze.
def _extra_files(files):
    if not hasattr(torch._C, "ExtraFilesMap"):
        return files
    made = torch._C.ExtraFilesMap()
    for name, content in files.items():
        made[name] = content
    return made


def _write_torchscript(model, images, path, metadata, opset):
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what tracing fixes, and that newer PyTorch prefers pt2
        traced = torch.jit.trace(model, images)
        if hasattr(torch.jit, "freeze"):
            traced = torch.jit.freeze(traced)
        torch.jit.save(traced, content, _extra_files=_extra_files({KEY: json.dumps(metadata)}))
    write_whole(path, lambda f: f.write(content.getvalue()))


def _read_torchscript(path):
    files = _extra_files({KEY: ""})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.jit.load(path, _extra_files=files)
    return program, files[KEY]


def _write_pt2(model, images, path, metadata, opset):
    content = io.BytesIO()
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, content, extra_files={KEY: json.dumps(metadata)})
    write_whole(path, lambda f: f.write(content.getvalue()))


def _read_pt2(path):
    files = {KEY: ""}
    return torch.export.load(path, extra_files=files).module(), files[KEY]


def _write_safetensors(model, images, path, metadata, opset):
    export_weights(model, path, metadata)


class Format(NamedTuple):
    """A row of the table. write(folded model, images (2, 3, H, H) to trace it with, path, metadata, opset or None);
    read(path) gives (images -> logits, the metadata's text), None where the file is a checkpoint like others."""
    suffix: str
    write: Callable
    read: Optional[Callable]
    packages: Tuple[str, ...] = ()
    oldest_torch: Tuple[int, int] = (1, 5)
    instead: str = ""


FORMATS: Dict[str, Format] = {
    "onnx": Format(".onnx", _write_onnx, _read_onnx, ("onnx", "onnxruntime"), OLDEST_TORCH,
                   "for any batch size; every line reads the same checkpoints"),
    "torchscript": Format(".pt", _write_torchscript, _read_torchscript),
    "pt2": Format(".pt2", _write_pt2, _read_pt2, (), (2, 2), "--format torchscript does without"),
    "safetensors": Format(".safetensors", _write_safetensors, None, ("safetensors",)),
}


def need_format(name: str):
    """Raises UserError where this PyTorch cannot write the format."""
    row = FORMATS[name]
    if TORCH < row.oldest_torch:
        raise UserError("--format {} needs PyTorch {}.{} or newer; {}".format(name, *row.oldest_torch, row.instead)
                        if name != "onnx" else "--format onnx needs PyTorch 1.8 or newer, " + row.instead)


def _format_of(path):
    """The Format of an exported program, None for a checkpoint of weights."""
    suffix = os.path.splitext(path)[1].lower()
    row = next((row for row in FORMATS.values() if row.suffix == suffix and row.read is not None), None)
    if suffix == ".pt" and not is_torchscript(path):  # other people's checkpoints are named so, too
        return None
    return row


def read_program(path: str, flag: str) -> Optional[dict]:
    """What a checkpoint of an exported program holds: its metadata and, as "program", a Program. None for a file that
    is none.

    Raises UserError for a file that cannot be read, or for which a package is missing.
    """
    row = _format_of(path)
    if row is None:
        return None
    try:
        function, metadata = row.read(path)
        if isinstance(metadata, bytes):
            metadata = metadata.decode()
        return dict(json.loads(metadata) if metadata else {}, program=Program(function))
    except ImportError as error:
        raise UserError("{}: {} needs {}; pip install {}".format(flag, path, error.name, " ".join(row.packages)))
    except Exception as error:  # a damaged file can raise anything
        raise UserError("{}: {} cannot be read, it is damaged or another kind of file ({})".format(
            flag, path, " ".join(str(error).split())[:160] or type(error).__name__))
