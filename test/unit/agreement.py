"""python test/unit/agreement.py CHECKPOINT: on how many of DIGITS' validation pictures the first choice in bf16 is that in
float32, of a checkpoint that test/quickstart.sh made (save/best_checkpoint.pth)."""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import evo_vit  # noqa: E402,F401
import torch  # noqa: E402

from datasets import build_dataset, build_transform  # noqa: E402
from runtime.checkpoint import load_checkpoint, load_weights, model_state, saved_settings  # noqa: E402
from runtime.models import apply_token_schedule, build_model  # noqa: E402
from runtime.pictures import EvaluationView, collate, normalize  # noqa: E402
from runtime.precision import Precision, build_precision  # noqa: E402


@torch.no_grad()
def main(path):
    checkpoint = load_checkpoint(path, "CHECKPOINT")
    saved = saved_settings(checkpoint, path, "CHECKPOINT")
    state, size = model_state(checkpoint, path, "CHECKPOINT"), saved["input_size"]
    model = build_model(saved["model"], 10, size, distillation="head_dist.l.weight" in state).eval()
    load_weights(model, state, saved["model"], path, "CHECKPOINT")
    apply_token_schedule(model, saved["epoch"], saved["prune_warmup_epoch"], saved["stage_wise_epoch"])
    view = EvaluationView(build_dataset(False, "DIGITS", None, build_transform(False, "DIGITS", size))[0], size)
    loader = torch.utils.data.DataLoader(view, batch_size=32, collate_fn=collate)
    device, choices = torch.device("cpu"), []
    for precision in (Precision(), build_precision(device, "native")):
        with precision.autocast():
            choices.append(torch.cat([model(normalize(batch[0], device)).argmax(1) for batch in loader]))
    same = (choices[0] == choices[1]).sum().item()
    print("{} of {} pictures, {:.2f} %".format(same, len(view), 100.0 * same / len(view)))


if __name__ == "__main__":
    main(*sys.argv[1:])
