"""Says what is on pictures: class names and probabilities, as a table or as JSON."""
import json

from runtime import tool  # first: it makes torchvision importable on a CPU-only PyTorch
import torch

from datasets import build_transform
from runtime.gallery import batches, find_pictures, read_pictures, to_batch
from runtime.restore import add_checkpoint_flags, restore_model


def get_args_parser():
    parser = tool.Parser(prog="python predict.py", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("paths", nargs="+", metavar="PICTURE_OR_FOLDER")
    add_checkpoint_flags(add)
    add("--topk", type=tool.positive, default=5, metavar="N", help="classes to name for each picture")
    add("--batch-size", type=tool.positive, default=32)
    add("--json", action="store_true", help="one JSON object for each picture, in place of the table")
    return parser


@torch.no_grad()
def predict(restored, pictures, topk=5, batch_size=32):
    """Yields (name, [(class, probability), the most probable first]) of each runtime.gallery.Picture."""
    transform = build_transform(False, restored.data_set, restored.input_size)
    for batch in batches(pictures, batch_size):
        probabilities = restored.model(to_batch(batch, transform)).softmax(dim=1)
        values, places = probabilities.topk(min(topk, probabilities.shape[1]), dim=1)
        for picture, row, chosen in zip(batch, values.tolist(), places.tolist()):
            yield picture.name, [(restored.classes[place], value) for place, value in zip(chosen, row)]


def run(args):
    restored = restore_model(args.resume, args.model, args.input_size)
    paths = find_pictures(args.paths)
    width = max(len(path) for path in paths)
    for name, guesses in predict(restored, read_pictures(paths), args.topk, args.batch_size):
        if args.json:
            print(json.dumps({"picture": name, "classes": [{"name": n, "probability": p} for n, p in guesses]}))
        else:
            print("{:{}}  {}".format(name, width, "  ".join("{} {:6.2%}".format(*guess) for guess in guesses)))


def main(argv=None):
    tool.run(run, get_args_parser().parse_args(argv))


if __name__ == "__main__":
    main()
