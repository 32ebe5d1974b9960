"""Says what is on pictures: class names and probabilities, as a table or as JSON."""
import json

from runtime import command  # first: it makes torchvision importable on a CPU-only PyTorch

# isort: split
import torch

from datasets import build_transform
from runtime.errors import RunFailed
from runtime.keeping.restore import add_checkpoint_flags, restore_evo
from runtime.pictures.gallery import batches, find_pictures, read_pictures, to_batch


def get_args_parser():
    parser = command.Parser(prog="python predict.py", description=__doc__)
    add = parser.add_argument
    add("paths", nargs="+", type=command.path, metavar="PICTURE_OR_FOLDER", help="picture files, and folders of them")
    add("--topk", type=command.positive, default=5, metavar="N", help="classes to name for each picture")
    add("--batch-size", type=command.positive, default=32, metavar="N", help="pictures at a time")
    add("--json", action="store_true", help="one JSON object for each picture, in place of the table")
    add_checkpoint_flags(parser, command.path, command.positive)
    return parser


@torch.no_grad()
def predict(restored, pictures, topk=5, batch_size=32):
    """Yields (name, [(class, probability), the most probable first]) of each gallery.Picture."""
    transform = build_transform(False, restored.data_set, restored.input_size)
    for batch in batches(pictures, batch_size):
        probabilities = restored.model(to_batch(batch, transform)).softmax(dim=1)
        if not torch.isfinite(probabilities).all():
            raise RunFailed(
                "the model's output is not finite for {} or a picture after it; its weights are damaged".format(
                batch[0].name))
        values, places = probabilities.topk(min(topk, probabilities.shape[1]), dim=1)
        for picture, row, chosen in zip(batch, values.tolist(), places.tolist()):
            yield picture.name, [(restored.classes[place], value) for place, value in zip(chosen, row)]


def run(args):
    restored = restore_evo(args.resume, args.model, args.input_size, average=args.eval_ema)
    paths = find_pictures(args.paths)
    width = max(len(path) for path in paths)
    for name, guesses in predict(restored, read_pictures(paths), args.topk, args.batch_size):
        if args.json:
            print(json.dumps({"picture": name, "classes": [{"name": n, "probability": p} for n, p in guesses]}))
        else:
            print("{:{}}  {}".format(name, width, "  ".join("{} {:6.2%}".format(*guess) for guess in guesses)))


def main(argv=None):
    command.run(run, get_args_parser().parse_args(argv))


if __name__ == "__main__":
    main()
