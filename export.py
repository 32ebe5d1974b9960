"""Writes a trained Evo-LeViT for use elsewhere, batch norms folded, any batch size, and compares what was written with the
model on real pictures: validation pictures of its data set, those that are named, or parts of two photographs."""
import copy
import io
import json
import os
from collections import Counter

from runtime import tool  # first: it makes torchvision importable on a CPU-only PyTorch
import torch

from datasets import build_transform, validation_pictures
from evo_vit import compat
from evo_vit.evo_levit import IMAGENET_MEAN, IMAGENET_STD
from runtime.checkpoint import export_weights, write_whole
from runtime.errors import UserError
from runtime.gallery import find_pictures, photographs, read_pictures, to_batch
from runtime.models import set_mode
from runtime.restore import add_checkpoint_flags, restore_model

SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt", "pt2": ".pt2", "safetensors": ".safetensors"}
PACKAGES = {"onnx": ("onnx", "onnxruntime"), "safetensors": ("safetensors",)}
TOLERANCE = 1e-4  # of the logits, absolute, or relative to the largest where that is above 1
PICTURES, BATCH_SIZES = 32, (1, 5)  # what is compared


def get_args_parser():
    parser = tool.Parser(prog="python export.py", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add_checkpoint_flags(add)
    add("--format", required=True, choices=tuple(SUFFIXES))
    add("--output", default=None, metavar="FILE", help="if not given beside the checkpoint, under its name")
    add("--layer-wise", action="store_true", help="select tokens in every block; if not given as in its last epoch")
    add("--check-on", nargs="+", default=[], metavar="PICTURE_OR_FOLDER", help="pictures to compare on")
    return parser


# ------------------------------------------------------------------------------------------------- formats
# Each writer takes (folded model, images (2, 3, H, H) to trace it with, path, metadata); each reader gives images -> logits.

def write_onnx(model, images, path, metadata):
    import onnx
    content = io.BytesIO()
    compat.export_onnx(model, images, content)
    graph = onnx.load_model_from_string(content.getvalue())
    onnx.helper.set_model_props(graph, {"evo_levit": metadata})
    onnx.checker.check_model(graph)
    write_whole(path, lambda f: f.write(graph.SerializeToString()))


def read_onnx(path):
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def operators(path):
    """{operator: how often} of an ONNX file, and its opset."""
    import onnx
    graph = onnx.load(path)
    return Counter(node.op_type for node in graph.graph.node), graph.opset_import[0].version


def write_torchscript(model, images, path, metadata):
    content = io.BytesIO()
    compat.save_torchscript(model, images, content, {"evo_levit": metadata})
    write_whole(path, lambda f: f.write(content.getvalue()))


def write_pt2(model, images, path, metadata):
    content = io.BytesIO()
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, content, extra_files={"evo_levit": metadata})
    write_whole(path, lambda f: f.write(content.getvalue()))


def write_safetensors(model, images, path, metadata):
    export_weights(model, path, json.loads(metadata))


def read_safetensors(path):
    return restore_model(path, flag="--output").model


WRITERS = {"onnx": write_onnx, "torchscript": write_torchscript, "pt2": write_pt2, "safetensors": write_safetensors}
READERS = {"onnx": read_onnx, "torchscript": compat.load_torchscript, "pt2": lambda path: torch.export.load(path).module(),
           "safetensors": read_safetensors}


# ------------------------------------------------------------------------------------------------- comparison

def pictures_to_compare(restored, paths):
    """(PICTURES pictures at most, what they are)."""
    if paths:
        return list(read_pictures(find_pictures(paths)[:PICTURES])), "named pictures"
    if restored.data_set == "DIGITS" or restored.data_path and os.path.isdir(restored.data_path):
        return list(validation_pictures(restored.data_set, restored.data_path, restored.inat_category, PICTURES)), \
            "validation pictures of {}".format(restored.data_set)
    return list(photographs(PICTURES)), "parts of two photographs"


@torch.no_grad()
def compare(model, written, images):
    """(largest difference of the logits, the largest logit, images whose first choice differs) between `model` and what was
    written, over `images` (B, 3, H, H) in batches of every one of BATCH_SIZES."""
    expected = torch.cat([model(image) for image in images.split(8)])
    difference, other = 0.0, 0
    for size in BATCH_SIZES:
        actual = torch.cat([written(batch) for batch in images.split(size)])
        difference = max(difference, (actual - expected).abs().max().item())
        other = max(other, (actual.argmax(1) != expected.argmax(1)).sum().item())
    return difference, expected.abs().max().item(), other


def run(args):
    tool.need("--format " + args.format, *PACKAGES.get(args.format, ()))
    if args.format == "pt2" and not compat.CAN_EXPORT_PT2:
        raise UserError("--format pt2 needs PyTorch 2.2 or newer; --format torchscript does without")
    if args.format == "onnx" and not compat.CAN_EXPORT_ONNX:
        raise UserError("--format onnx needs PyTorch 1.8 or newer, for any batch size; every line reads the same checkpoints")
    restored = restore_model(args.resume, args.model, args.input_size)
    model = restored.model
    if args.layer_wise:
        set_mode(model, stage_wise=False)
    source = os.path.basename(args.resume) if "://" in args.resume else args.resume
    output = args.output or os.path.splitext(source)[0] + SUFFIXES[args.format]
    if os.path.exists(output) and os.path.samefile(output, args.resume):
        raise UserError("--output {} is the checkpoint itself; name another file".format(output))
    pictures, kind = pictures_to_compare(restored, args.check_on)
    if not pictures:
        raise UserError("there is no picture to compare on that can be read; name some with --check-on")
    images = to_batch(pictures, build_transform(False, restored.data_set, restored.input_size))

    folded = copy.deepcopy(model).requires_grad_(False).fuse()
    metadata = json.dumps({
        "classes": restored.classes, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "epoch": 0, "args": {
            "model": restored.name, "input_size": restored.input_size, "data_set": restored.data_set,
            "inat_category": restored.inat_category, "stage_wise_epoch": 0 if model.stage_wise else 1,
            "prune_warmup_epoch": 0 if model.token_selection else 1}})  # an epoch 0 in the model's mode
    example = images[:2] if len(images) > 1 else images.repeat(2, 1, 1, 1)
    WRITERS[args.format](folded, example, output, metadata)
    difference, largest, other = compare(model, READERS[args.format](output), images)
    print("{}: {}, images (batch, 3, {s}, {s}) RGB, float32, normalised by ImageNet's statistics -> logits (batch, {})".format(
        output, restored.name, model.num_classes, s=restored.input_size))
    print("Compared on {} {} in batches of {}: largest difference {:.2g} of logits up to {:.3g}, {} other first choices".format(
        len(images), kind, " and ".join(map(str, BATCH_SIZES)), difference, largest, other))
    if args.format == "onnx":
        counts, opset = operators(output)
        print("Opset {}; operators: {}".format(opset, " ".join("{}({})".format(*item) for item in sorted(counts.items()))))
    if not difference <= TOLERANCE * max(largest, 1):
        os.replace(output, output + ".differs")
        raise UserError("what was written does not compute what the model does; it now lies in {}.differs".format(output))


def main(argv=None):
    tool.run(run, get_args_parser().parse_args(argv))


if __name__ == "__main__":
    main()
