"""python -m bench.agreement CHECKPOINT: on how many of DIGITS' validation pictures the first choice in bf16 is that in
float32, of a checkpoint that test/quickstart.sh made (save/best_checkpoint.pth)."""
from runtime import command  # (first: it makes torchvision importable on a CPU-only PyTorch)

# isort: split
import torch

from datasets import build_dataset, build_transform
from runtime.keeping.restore import restore_evo
from runtime.machine.images import normalize
from runtime.machine.precision import Precision, build_precision
from runtime.pictures.batches import EvaluationView, collate


@torch.no_grad()
def main(path):
    restored = restore_evo(path, flag="CHECKPOINT")
    dataset = build_dataset(False, "DIGITS", None, build_transform(False, "DIGITS", restored.input_size))
    view = EvaluationView(dataset, restored.input_size)
    loader = torch.utils.data.DataLoader(view, batch_size=32, collate_fn=collate)
    device, choices = torch.device("cpu"), []
    for precision in (Precision(), build_precision(device, "native")):
        with precision.autocast():
            choices.append(torch.cat([restored.model(normalize(batch[0], device)).argmax(1) for batch in loader]))
    same = (choices[0] == choices[1]).sum().item()
    print("{} of {} pictures, {:.2f} %".format(same, len(view), 100.0 * same / len(view)))


if __name__ == "__main__":
    parser = command.Parser(prog="python -m bench.agreement", description=__doc__)
    parser.add_argument("checkpoint", type=command.path, metavar="CHECKPOINT", help="of a model that was trained on "
        "DIGITS")
    command.run(lambda args: main(args.checkpoint), parser.parse_args())
