"""For test_npu.py, with the double on PYTHONPATH: trains a few steps by engine.Learner.update on a device and prints
JSON.

python npu_steps.py DEVICE AMP_BACKEND OPT_LEVEL LOSS_SCALE [OVERFLOW_STEP [LR]]      "-" for what is not given

Steps 0 to 2 run layer-wise, 3 and 4 stage-wise; a teacher labels the images. At OVERFLOW_STEP the loss is multiplied by
1e30, so that gradients in fp16 overflow while the loss does not.
"""
import json
import sys

import evo_vit  # noqa: F401  (before timm and torchvision)

# isort: split
import torch
from reference import fill, images
from timm.loss import SoftTargetCrossEntropy

from engine import Learner
from fix_timm.mixup import mixup_target
from flags import get_args_parser
from losses import DistillationLoss
from runtime.learning.average import ModelEma
from runtime.learning.models import apply_token_schedule, build_model
from runtime.learning.optimizer import build_optimizer
from runtime.machine.devices import select_device
from runtime.machine.machine import Machine
from runtime.machine.precision import build_precision, parse_loss_scale

STEPS, SWITCH, BATCH = 5, 3, 8


class Exploding:
    """The criterion, 1e30 times as large when told so."""

    def __init__(self, criterion):
        self.criterion = criterion
        self.factor = 1.0

        self.teach = criterion.teach

    def __call__(self, inputs, outputs, labels, taught):
        return self.criterion(inputs, outputs, labels, taught) * self.factor


def main(device_name, amp_backend, opt_level, loss_scale, overflow_step="-", lr="1e-4"):
    torch.set_num_threads(1)
    device = select_device(device_name)
    precision = build_precision(device, amp_backend, None if opt_level == "-" else opt_level,
                                None if loss_scale == "-" else parse_loss_scale(loss_scale))
    model, teacher = (build_model(name, 10, 64, distillation=distil) for name, distil in
                      (("EvoLeViT_128S", True), ("regnety_002", False)))
    fill(model, gain=1.0)
    fill(teacher, gain=1.0)
    model.to(device).train()
    teacher.to(device).eval().requires_grad_(False)
    args = get_args_parser().parse_args(["--lr", lr])
    optimizer = build_optimizer(args, model, device, precision.backend)
    model_ema = ModelEma(model, 0.9)
    model, optimizer = precision.prepare(model, optimizer, teacher)
    criterion = Exploding(DistillationLoss(SoftTargetCrossEntropy(), teacher, "cls", 0.5, 1.0))

    learner = Learner(model, criterion, optimizer, Machine(device, precision=precision), args.clip_grad, args.clip_mode,
         model_ema)

    double = sys.modules.get("torch_npu") and sys.modules["torch_npu"].double
    report = {"precision": precision.name, "optimizer": type(optimizer).__module__, "losses": [], "scales": [],
              "weights": [], "gradients": [], "syncs": [], "to_host": [], "operators": []}
    for step in range(STEPS):
        apply_token_schedule(model, step, 0, SWITCH)
        criterion.factor = 1e30 if str(step) == overflow_step else 1.0
        samples = images(64, batch=BATCH, seed=step).float().to(device)
        labels = mixup_target(torch.arange(BATCH).to(device), 10, 0.7, 0.1)
        if double:
            double.reset_counts()
        report["losses"].append(learner.update([(samples, labels, None)]))
        if double:
            counts = double.counts()
            report["syncs"].append(counts["syncs"])
            report["to_host"].append(counts["to_host"])
            report["operators"] = sorted(set(report["operators"]) | set(counts["operators"]))
        report["scales"].append(precision.loss_scale)
        report["weights"].append({name: p.detach().float().cpu().norm().item() for name, p in model.named_parameters()})
        report["gradients"].append({name: 0.0 if p.grad is None else p.grad.float().cpu().norm().item()
                                    for name, p in model.named_parameters()})
    report["lr"] = optimizer.param_groups[0]["lr"]
    report["ema"] = {name: p.float().cpu().norm().item() for name, p in model_ema.module.named_parameters()}
    apex = sys.modules.get("apex")
    report["apex_calls"] = apex.amp.calls if apex else []
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
