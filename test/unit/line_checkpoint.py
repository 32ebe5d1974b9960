"""For test_lines.py, run under each line: `write FILE` saves a checkpoint as main.py does; `read FILE LOGITS` loads one
as main.py does and saves the logits of fixed images, as text."""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import evo_vit  # noqa: E402,F401
import numpy as np  # noqa: E402
import torch  # noqa: E402

from reference import build, images  # noqa: E402
from runtime.checkpoint import load_checkpoint, load_weights, model_state, save_checkpoint  # noqa: E402
from runtime.models import build_model  # noqa: E402


def write(path):
    model = build("EvoLeViT_128S", gain=0.8, num_classes=10, img_size=64).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()(images(64).float())[0].sum().backward()
    optimizer.step()
    save_checkpoint({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3,
                     "args": {"model": "EvoLeViT_128S", "lr": 1e-3}}, path)


def read(path, logits_path):
    model = build_model("EvoLeViT_128S", 10, 64, distillation=True)
    checkpoint = load_checkpoint(path, "--resume")
    load_weights(model, model_state(checkpoint, path, "--resume"), "EvoLeViT_128S", path, "--resume")
    torch.optim.AdamW(model.parameters(), lr=1e-3).load_state_dict(checkpoint["optimizer"])
    with torch.no_grad():
        logits = model.eval()(images(64, batch=8).float())
    np.savetxt(logits_path, logits.numpy(), fmt="%.9e")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](*sys.argv[2:])
