"""Ten training steps in float64 on fixed images, for test_distributed.py: python equivalence.py OUT ACCUM_STEPS
DROP_PATH.

Each process of a launcher trains on its own part of every global batch of 32; OUT.RANK gets the parameters.
"""
import sys

import evo_vit  # noqa: F401  (before timm and torchvision)

# isort: split
import timm
import torch

from engine import Learner, train_one_epoch
from losses import DistillationLoss
from runtime.keeping.control import Control, Signals
from runtime.learning.models import parameters_without_gradient
from runtime.machine.agreement import Agreement
from runtime.machine.devices import select_device
from runtime.machine.machine import Machine
from runtime.machine.processes import close_processes, init_processes, read_world
from runtime.pictures.batches import TrainingView, collate
from samplers import Feed, build_train_sampler


def main(out, accum_steps, drop_path):
    torch.set_num_threads(1)
    world = read_world()
    device = select_device("cpu")
    init_processes(world, device)
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (160, 64, 64, 3), generator=generator, dtype=torch.uint8)
    data = [((image, []), label) for image, label in zip(pixels, torch.randint(0, 10, (160,), generator=generator))]
    torch.manual_seed(0)
    model = timm.create_model("EvoLeViT_128S", num_classes=10, distillation=False, img_size=64,
        drop_path_rate=drop_path).double()
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    sampler = build_train_sampler(data, 8, world.rank, world.size, accum_steps, repeated_aug=False)
    loader = torch.utils.data.DataLoader(TrainingView(data), batch_sampler=sampler, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    criterion = DistillationLoss(torch.nn.CrossEntropyLoss(), None, "none", 0, 1)
    learner = Learner(model, criterion, optimizer, Machine(device, world), clip_grad=0.01)
    feed = Feed(loader, sampler)
    for epoch in range(2):
        model.set_stage_wise(epoch == 1)
        model.set_learn_tradeoff(epoch == 1)
        unused = parameters_without_gradient(model, criterion, torch.zeros(2, 3, 64, 64), torch.zeros(2,
            dtype=torch.int64))
        learner.share(unused)
        train_one_epoch(learner, feed, epoch, Control(Agreement(), Signals()))
    torch.save({k: p.detach() for k, p in model.named_parameters()}, "{}.{}".format(out, world.rank))
    close_processes()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
