"""How many threads a process of a CPU run computes with."""
import os

import torch


def _has_variable(process: int) -> bool:
    """Whether the process `process` was started with OMP_NUM_THREADS; True where that cannot be seen."""
    try:
        with open("/proc/{}/environ".format(process), "rb") as f:
            return b"OMP_NUM_THREADS=" in f.read()
    except OSError:
        return True


def _is_pytorchs_launcher(process: int) -> bool:
    try:
        with open("/proc/{}/cmdline".format(process), "rb") as f:
            words = f.read().split(b"\0")
    except OSError:
        return False
    return any(word.startswith(b"torch.distributed.") or os.path.basename(word) == b"torchrun" for word in words)


def _is_users() -> bool:
    """Whether the user has set OMP_NUM_THREADS; PyTorch's launchers set it to 1 where nobody has."""
    if "OMP_NUM_THREADS" not in os.environ:
        return False
    launcher = os.getppid()
    return os.environ["OMP_NUM_THREADS"] != "1" or not _is_pytorchs_launcher(launcher) or _has_variable(launcher)


def share_cores(processes: int):
    """Gives this process its share of the cores that it may use, as one of so many `processes` on the machine, unless
    the user has said how many threads by OMP_NUM_THREADS."""
    if processes > 1 and not _is_users():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(cores // processes, 1))
