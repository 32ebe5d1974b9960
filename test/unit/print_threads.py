"""For test_distributed.py: prints how many threads a process has that share_cores gives its share of eight cores."""
import os

import torch

from runtime.machine.threads import share_cores

if __name__ == "__main__":
    os.sched_getaffinity = lambda process: range(8)
    share_cores(int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))))
    print("threads:{}\n".format(torch.get_num_threads()), end="")
