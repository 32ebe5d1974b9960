"""For test_npu.py, with the double on PYTHONPATH: compares compiled with plain models on a device, forwards and
backwards, and prints JSON: {model, mode: {"difference", "gradients", "graphs", "devices"}}.

python npu_compiled.py DEVICE
"""
import copy
import json
import sys

import evo_vit  # noqa: F401  (before timm and torchvision)

# isort: split
import torch
from reference import fill, images

from runtime.learning.models import build_model, set_mode
from runtime.machine.compiling import compile_module
from runtime.machine.devices import select_device


def main(device_name):
    torch.set_num_threads(1)
    device = select_device(device_name)
    import torchair
    report = {}
    for name in ("EvoLeViT_128S", "evo_deit_tiny_patch16_224"):
        for mode in ("layer-wise", "stage-wise"):
            plain = build_model(name, 10, 64, distillation=True).to(device).train()
            fill(plain, gain=1.0, qk_gain=1.0)
            set_mode(plain, mode)
            compiled = compile_module(copy.deepcopy(plain), device.type)
            # the last stage has a token an image: over two of them, batch norm turns rounding into a difference
            x = images(64, batch=8, seed=1).float().to(device)
            torchair.graphs.clear()
            outputs = []
            for model in (plain, compiled):
                logits = torch.stack(tuple(model(x)))
                logits.square().mean().backward()
                outputs.append((logits.detach().cpu(), torch.cat([p.grad.flatten().cpu() for p in model.parameters()
                                                                  if p.grad is not None])))
            (logits, gradients), (their_logits, their_gradients) = outputs
            report["{}, {}".format(name, mode)] = {
                "difference": (logits - their_logits).abs().max().item(),
                "gradients": ((gradients - their_gradients).norm() / gradients.norm()).item(),
                "graphs": len(torchair.graphs), "devices": sorted({d for g in torchair.graphs for d in g["devices"]}),
                "operators": len(torchair.graphs[0]["operators"])}
            torch._dynamo.reset()
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
