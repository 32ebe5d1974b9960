"""Which device the recipe runs on, and the few things that differ between npu, cuda and cpu."""
import random
import sys

import numpy as np
import torch

from .errors import UserError

BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}  # torch.distributed's name for each device's collectives


def _accelerator(kind):
    """The torch module of an accelerator (torch.npu, torch.cuda), or None where this machine has none."""
    if kind == "npu" and not hasattr(torch, "npu"):
        try:
            import torch_npu  # noqa: F401  (adds torch.npu)
        except ImportError:
            return None
    module = getattr(torch, kind, None)
    return module if module is not None and module.is_available() else None


def select_device(name, local_rank=0, local_world_size=1):
    """The torch.device for `name` (auto, npu, cuda or cpu), made current; auto takes the first of npu, cuda, cpu.

    Raises UserError where that device is not there, or this machine has fewer of them than processes.
    """
    if name == "auto":
        name = next(kind for kind in ("npu", "cuda", "cpu") if kind == "cpu" or _accelerator(kind))
    if name == "cpu":
        return torch.device("cpu")
    module = _accelerator(name)
    if module is None:
        raise UserError("--device {}: no such device is available here; use --device auto or cpu".format(name))
    if local_world_size > module.device_count():
        raise UserError("{} processes were started here but there are only {} {} devices; start one process a device"
                        .format(local_world_size, module.device_count(), name))
    device = torch.device(name, local_rank)
    module.set_device(device)
    return device


def synchronize(device):
    """Waits for all work queued on `device`."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def peak_memory_mb(device):
    """Peak memory so far in MiB: what PyTorch allocated on an accelerator, the process's resident set on CPU."""
    if device.type != "cpu":
        return getattr(torch, device.type).max_memory_allocated() / 2 ** 20
    import resource  # not on Windows, where this line is not reached by the supported launchers
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def seed_everything(seed):
    """Seeds Python, NumPy and PyTorch (every device)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def seed_worker(_):
    """A data loader's worker: NumPy and Python follow the seed that PyTorch gave this worker."""
    seed = torch.initial_seed() % 2 ** 32
    random.seed(seed)
    np.random.seed(seed)
