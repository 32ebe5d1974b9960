"""For test_files.py: python evaluate_shared.py PROCESSES prints [result of one process, result shared by so many]."""
import json
import os
import signal
import socket
import sys
from datetime import timedelta

import evo_vit  # noqa: F401  (before timm and torchvision)

# isort: split
import torch
from reference import build

from engine import evaluate
from runtime.machine.machine import Machine
from runtime.machine.processes import World, close_processes, init_processes
from runtime.pictures.batches import EvaluationView, collate
from samplers import ShardSampler


def result(rank, size):
    torch.set_num_threads(1)
    world = World(rank, size, rank, size)
    init_processes(world, torch.device("cpu"), timeout=timedelta(minutes=2))
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (61, 64, 64, 3), generator=generator, dtype=torch.uint8)
    data = [((image, []), label) for image, label in zip(pixels, torch.randint(0, 10, (61,), generator=generator))]
    view = EvaluationView(data, 64)
    sampler = ShardSampler(view, rank, size) if size > 1 else None
    loader = torch.utils.data.DataLoader(view, batch_size=7, sampler=sampler, collate_fn=collate)
    model = build("EvoLeViT_128S", gain=0.8, num_classes=10, img_size=64).float()
    stats = evaluate(model, loader, Machine(torch.device("cpu"), world), size > 1)
    close_processes()
    return stats


def main(processes):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]))
    children = []
    for rank in range(1, processes):
        pid = os.fork()
        if pid == 0:
            try:
                result(rank, processes)
            finally:
                os._exit(0)
        children.append(pid)
    try:
        together = result(0, processes)
    except BaseException:  # the port was taken meanwhile, say; the others would wait, and whoever reads their output
        for child in children:
            os.kill(child, signal.SIGKILL)
        raise
    for child in children:
        os.waitpid(child, 0)
    print(json.dumps([result(0, 1), together]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
