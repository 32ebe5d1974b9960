"""For test_distributed.py: python leave_often.py TIMES joins a process group of its own, shares weights and leaves, as
often as that."""
import os
import sys
import tempfile

import evo_vit  # noqa: F401  (before timm and torchvision)

# isort: split
import torch
import torch.distributed as dist

from runtime.machine.agreement import Agreement
from runtime.machine.processes import broadcast_weights, close_processes

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for i in range(int(sys.argv[1])):
            dist.init_process_group("gloo", init_method="file://" + os.path.join(folder, str(i)), world_size=1, rank=0)
            assert Agreement().total(3) == [3]
            broadcast_weights(torch.nn.Linear(1, 1))
            close_processes()
    print("left", sys.argv[1], "times")
