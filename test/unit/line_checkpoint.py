"""For test_lines.py, run under each line: `write FILE` saves a checkpoint as main.py does; `read FILE LOGITS` loads one
as main.py does and saves the logits of fixed images, as text."""
import sys

import evo_vit  # noqa: F401  (before timm and torchvision)

# isort: split
import numpy as np
import torch
from reference import build, images

from runtime.keeping.checkpoint import load_checkpoint, save_checkpoint
from runtime.learning.models import build_model, load_weights


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
    load_weights(model, checkpoint.weights(), "EvoLeViT_128S", checkpoint.refuse)
    torch.optim.AdamW(model.parameters(), lr=1e-3).load_state_dict(checkpoint.content["optimizer"])
    with torch.no_grad():
        logits = model.eval()(images(64, batch=8).float())
    np.savetxt(logits_path, logits.numpy(), fmt="%.9e")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](*sys.argv[2:])
