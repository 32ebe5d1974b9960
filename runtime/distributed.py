"""The processes of one run, started by torchrun or torch.distributed.launch, or a single one without a launcher."""
import copy
import os
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from evo_vit import compat

from .device import BACKENDS
from .errors import UserError


class World(NamedTuple):
    """This process's place among all of a run."""
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self):
        return self.rank == 0


def read_world(local_rank=None, world_size=None):
    """The World that the launcher's environment describes; one process where there is no launcher.

    `local_rank` is the launcher's command-line form of it, for a launcher that does not set LOCAL_RANK.
    `world_size` is what the user asked for by flag, checked against the launcher.
    Raises UserError for an environment that does not fit together.
    """
    env = os.environ
    if "RANK" not in env or "WORLD_SIZE" not in env:
        if world_size not in (None, 1):
            raise UserError("--world_size {0} needs a launcher: torchrun --nproc_per_node={0} main.py ..."
                            .format(world_size))
        return World()
    try:
        rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
        local_rank = int(env.get("LOCAL_RANK", rank if local_rank is None else local_rank))
        local_size = int(env.get("LOCAL_WORLD_SIZE", size))
    except ValueError as error:
        raise UserError("the launcher's RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {}".format(error))
    if world_size is not None and world_size not in (1, size):  # 1 is DeiT's default and stands for the launcher's
        raise UserError("--world_size {} does not match the {} processes that the launcher started; leave it out"
                        .format(world_size, size))
    if size % local_size or not 0 <= rank < size or not 0 <= local_rank < local_size:
        raise UserError("a world of {} processes with {} on this machine (rank {}, local rank {}) does not divide: "
                        "start the same number on every machine".format(size, local_size, rank, local_rank))
    return World(rank, size, local_rank, local_size)


def init_processes(world, device, dist_url="env://", timeout=timedelta(minutes=30)):
    """Joins the process group, with the back end that belongs to `device`; nothing for a single process.

    A collective that waits for longer than `timeout` ends the process.
    """
    if world.size > 1:
        dist.init_process_group(BACKENDS[device.type], init_method=dist_url, world_size=world.size, rank=world.rank,
                                timeout=timeout)


def close_processes():
    """Leaves the process group, if there is one."""
    if is_distributed():
        dist.destroy_process_group()


def is_distributed():
    return dist.is_available() and dist.is_initialized()


def barrier():
    """Waits for all processes."""
    if is_distributed():
        dist.barrier()


def sum_over_processes(values, device):
    """Sums a list of numbers over all processes; returns a list of floats."""
    if not is_distributed():
        return [float(value) for value in values]
    dtype = torch.float32 if device.type == "npu" else torch.float64  # an NPU has no float64
    total = torch.tensor(values, dtype=dtype, device=device)
    dist.all_reduce(total)
    return total.tolist()


def parameters_without_gradient(model, criterion, images, labels):
    """Names of the parameters that `criterion`, a losses.DistillationLoss, does not reach from `model` in its present mode;
    found on a copy, with `images` (B, 3, H, W) and their `labels`."""
    probe = copy.deepcopy(model).train()
    taught = None if criterion.alpha == 0 else torch.zeros(
        len(images), *([] if criterion.distillation_type != "soft" else [model.num_classes]),
        dtype=torch.int64 if criterion.distillation_type != "soft" else torch.float32, device=images.device)
    criterion(images, probe(images), labels, taught).backward()
    return [name for name, parameter in probe.named_parameters() if parameter.grad is None]


def parallelize(model, device, unused=(), gradient_views=True):
    """`model` with gradients that are averaged over all processes; the model itself where there is one process.

    unused: names of the parameters without a gradient, for which to wait would be in vain; where they change, the model is
    to be wrapped again. gradient_views: spare a copy of each gradient; not for an optimiser that puts its own tensors in
    their place.
    """
    if not is_distributed():
        return model
    return compat.data_parallel(model, list(unused), None if device.type == "cpu" else [device.index], gradient_views)


def broadcast_buffers(model):
    """Gives every process rank 0's batch-norm statistics: DDP runs without buffer broadcast, evaluation needs one
    model, and what is evaluated is what rank 0 saves."""
    if is_distributed():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
