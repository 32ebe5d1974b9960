"""Ten training steps in float64 on fixed images, for test_distributed.py: python equivalence.py OUT ACCUM_STEPS.

Each process of a launcher trains on its own part of every global batch of 32; OUT.RANK gets the parameters.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import evo_vit  # noqa: E402,F401
import timm  # noqa: E402
import torch  # noqa: E402

from datasets import build_train_sampler  # noqa: E402
from engine import train_one_epoch  # noqa: E402
from losses import DistillationLoss  # noqa: E402
from runtime.control import Agreement, Control, Signals  # noqa: E402
from runtime.device import select_device  # noqa: E402
from runtime.distributed import (close_processes, init_processes, parallelize, parameters_without_gradient,  # noqa: E402
                                 read_world)
from runtime.pictures import TrainingView, collate  # noqa: E402


def main(out, accum_steps):
    torch.set_num_threads(1)
    world = read_world()
    device = select_device("cpu")
    init_processes(world, device)
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (160, 64, 64, 3), generator=generator, dtype=torch.uint8)
    data = [((image, []), label) for image, label in zip(pixels, torch.randint(0, 10, (160,), generator=generator))]
    torch.manual_seed(0)
    model = timm.create_model("EvoLeViT_128S", num_classes=10, distillation=False, img_size=64).double()
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    sampler = build_train_sampler(data, 8, world.rank, world.size, accum_steps, repeated_aug=False)
    loader = torch.utils.data.DataLoader(TrainingView(data), batch_sampler=sampler, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    criterion = DistillationLoss(torch.nn.CrossEntropyLoss(), None, "none", 0, 1)
    for epoch in range(2):
        model.set_stage_wise(epoch == 1)
        model.set_learn_tradeoff(epoch == 1)
        unused = parameters_without_gradient(model, criterion, torch.zeros(2, 3, 64, 64), torch.zeros(2, dtype=torch.int64))
        parallel = parallelize(model, device, unused)
        sampler.set_epoch(epoch)
        train_one_epoch(parallel, criterion, loader, optimizer, device, epoch, Control(Agreement(), Signals()), accum_steps, clip_grad=0.01, world_size=world.size,
                        rank=world.rank, show=False)
    torch.save({k: p.detach() for k, p in model.named_parameters()}, "{}.{}".format(out, world.rank))
    close_processes()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
