"""python test/unit/agreement.py CHECKPOINT: on how many of DIGITS' validation pictures the first choice in bf16 is that in
float32, of a checkpoint that test/quickstart.sh made (save/best_checkpoint.pth)."""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from runtime import tool  # noqa: E402,F401  (first: it makes torchvision importable on a CPU-only PyTorch)
import torch  # noqa: E402

from datasets import build_dataset, build_transform  # noqa: E402
from runtime.pictures import EvaluationView, collate, normalize  # noqa: E402
from runtime.precision import Precision, build_precision  # noqa: E402
from runtime.restore import restore_model  # noqa: E402


@torch.no_grad()
def main(path):
    restored = restore_model(path, flag="CHECKPOINT")
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
    main(*sys.argv[1:])
