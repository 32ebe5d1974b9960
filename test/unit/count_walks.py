"""For test_index.py, under a launcher: each process opens the data set DATA and appends a line to FILE that says what
it found and how many class folders it searched itself."""
import os
import sys

import torch.distributed as dist

from datasets import build_dataset  # isort: skip
from runtime.errors import UserError
from runtime.machine import processes
from runtime.machine.agreement import Agreement
from runtime.pictures import folders
from runtime.pictures.index import Index

searched = []
find = folders._pictures
folders._pictures = lambda root, *rest: searched.append(root) or find(root, *rest)
local = [word for word in sys.argv[1:] if word.startswith(("--local_rank", "--local-rank"))]
data, file = [word for word in sys.argv[1:] if word not in local]
world = processes.read_world(int(local[0].split("=")[1]) if local else None)
dist.init_process_group("gloo", init_method="env://", world_size=world.size, rank=world.rank)
index = Index(None, Agreement().among_equal(processes.machine_name() + data))
try:
    text = "{} pictures".format(len(build_dataset(True, "IMNET", data, None, index=index)))
except UserError as error:
    text = str(error)
with open(file, "a") as f:
    f.write("rank {}: {}, {} folders searched\n".format(world.rank, text, len(searched)))
processes.barrier()
os._exit(0)
