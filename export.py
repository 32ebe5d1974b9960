"""Writes a trained model for use elsewhere, batch norms folded, any batch size, and compares what was written with the
model on real pictures: validation pictures of its data set, those that are named, or parts of two photographs."""
import argparse
import copy
import os
from collections import Counter

from runtime import command  # first: it makes torchvision importable on a CPU-only PyTorch

# isort: split
import torch

from datasets import build_transform, crop_pct, validation_pictures
from runtime.errors import UserError
from runtime.keeping.checkpoint import without_hash
from runtime.keeping.exported import FORMATS, ONNX_OPSET, how_to_run, need_format
from runtime.keeping.restore import add_checkpoint_flags, open_trained, restore, restore_evo
from runtime.learning.models import LAYER_WISE, NO_SELECTION, set_mode
from runtime.pictures.gallery import find_pictures, photographs, read_pictures, to_batch

TOLERANCE = 1e-4  # of the logits, absolute, or relative to the largest where that is above 1
PICTURES, BATCH_SIZES = 32, (1, 5)  # what is compared


def get_args_parser():
    parser = command.Parser(prog="python export.py", description=__doc__)
    add = parser.add_argument
    add("--format", required=True, choices=tuple(FORMATS), help="what to write")
    add("--output", type=command.path, metavar="FILE", help="where (default: beside the checkpoint, under its name)")
    add("--opset", type=command.positive, metavar="N", help="ONNX operator set (default: {})".format(ONNX_OPSET))
    add("--layer-wise", action="store_true", help="select tokens in every block (default: as in its last epoch)")
    add("--check-on", nargs="+", type=command.path, default=[], metavar="PICTURE_OR_FOLDER",
        help="pictures to compare on " "(default: validation pictures of its data set, or parts of two photographs)")
    add_checkpoint_flags(parser, command.path, command.positive)
    return parser


# ------------------------------------------------------------------------------------------------- comparison

def pictures_to_compare(restored, paths):
    """(PICTURES pictures at most, what they are)."""
    if paths:
        return list(read_pictures(find_pictures(paths)[:PICTURES])), "named pictures"
    if restored.data_set == "DIGITS" or restored.data_path and os.path.isdir(restored.data_path):
        try:
            return list(validation_pictures(restored.data_set, restored.data_path, restored.inat_category,
                                            PICTURES)), "validation pictures of {}".format(restored.data_set)
        except UserError as error:  # the folder of that name is another one on this machine
            print("Note: {}; --check-on names other pictures".format(error))
    return list(photographs(PICTURES)), "parts of two photographs"


@torch.no_grad()
def compare(model, written, images):
    """(largest difference of the logits, the largest logit, images whose first choice differs) between `model` and what
    was written, over `images` (B, 3, H, H) in batches of every one of BATCH_SIZES."""
    expected = torch.cat([model(image) for image in images.split(8)])
    difference, other = 0.0, 0
    for size in BATCH_SIZES:
        actual = torch.cat([written(batch) for batch in images.split(size)])
        difference = max(difference, (actual - expected).abs().max().item())
        other = max(other, (actual.argmax(1) != expected.argmax(1)).sum().item())
    return difference, expected.abs().max().item(), other


def operators(path):
    """{operator: how often} of an ONNX file, and its opset."""
    import onnx
    graph = onnx.load(path)
    return Counter(node.op_type for node in graph.graph.node), graph.opset_import[0].version


def read_back(path):
    """The written file as a function of images."""
    return restore(open_trained(path, "--output")).model


def run(args):
    form = FORMATS[args.format]
    command.need("--format " + args.format, *form.packages)
    need_format(args.format)
    if args.opset and args.format != "onnx":
        raise UserError("--opset is for --format onnx; leave it out")
    restored = restore_evo(args.resume, args.model, args.input_size, average=args.eval_ema)
    model, mode = restored.model, restored.mode
    if args.layer_wise:
        mode = set_mode(model, LAYER_WISE + (NO_SELECTION if mode.endswith(NO_SELECTION) else ""))
    is_url = "://" in args.resume
    source = os.path.splitext(os.path.basename(args.resume) if is_url else args.resume)[0]
    output = args.output or without_hash(source) + form.suffix
    if not is_url and os.path.exists(output) and os.path.samefile(output, args.resume):
        raise UserError("--output {} is the checkpoint itself; name another file".format(output))
    if not output.endswith(form.suffix):
        raise UserError("--output {}: files of the format {} end in {}, by which they are read".format(
            output, args.format, form.suffix))
    if not os.path.isdir(os.path.dirname(os.path.abspath(output))):
        raise UserError("--output {}: there is no such folder".format(output))
    pictures, kind = pictures_to_compare(restored, args.check_on)
    if not pictures:
        raise UserError("there is no picture to compare on that can be read; name some with --check-on")
    images = to_batch(pictures, build_transform(False, restored.data_set, restored.input_size))

    folded = copy.deepcopy(model).requires_grad_(False).fuse()
    settings = argparse.Namespace(model=restored.name, input_size=restored.input_size, data_set=restored.data_set,
                                  inat_category=restored.inat_category, keep_ratio=getattr(model, "keep_ratio", None))
    metadata = how_to_run(settings, restored.classes, mode, crop_pct(restored.data_set, restored.input_size))
    example = images[:2] if len(images) > 1 else images.repeat(2, 1, 1, 1)
    try:
        form.write(folded, example, output, metadata, args.opset)
    except (ValueError, RuntimeError) as error:
        if not args.opset:
            raise
        raise UserError("--opset {}: this PyTorch cannot write it ({})".format(args.opset,
                        " ".join(str(error).split())[:200]))
    try:
        written = read_back(output)
    except UserError as error:
        os.replace(output, output + ".unreadable")
        raise UserError("{}what was written cannot be read again and now lies in {}.unreadable ({})".format(
            "--opset {}: ".format(args.opset) if args.opset else "", output, error))
    difference, largest, other = compare(model, written, images)
    print(
        "{}: {}, images (batch, 3, {s}, {s}) RGB, float32, normalised by ImageNet's statistics -> logits (batch, {})".
        format(output, restored.name, model.num_classes, s=restored.input_size))
    print(
        "Compared on {} {} in batches of {}: largest difference {:.2g} of logits up to {:.3g}, {} other first choices".
        format(len(images), kind, " and ".join(map(str, BATCH_SIZES)), difference, largest, other))
    if args.format == "onnx":
        counts, opset = operators(output)
        print("Opset {}; operators: {}".format(opset, " ".join("{}({})".format(*item)
            for item in sorted(counts.items()))))
    if not difference <= TOLERANCE * max(largest, 1):
        os.replace(output, output + ".differs")
        raise UserError(
            "what was written does not compute what the model does; it now lies in {}.differs".format(output))


def main(argv=None):
    command.run(run, get_args_parser().parse_args(argv))


if __name__ == "__main__":
    main()
