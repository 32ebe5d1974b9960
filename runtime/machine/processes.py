"""The processes of one run, started by torchrun, torch.distributed.launch, srun, mpirun or Huawei's launchers, or a
single one without a launcher."""
import collections
import os
import platform
import re
import sys
from datetime import timedelta
from typing import List, NamedTuple, Optional

import torch
import torch.distributed as dist

from ..errors import UserError
from . import versions
from .devices import BACKENDS


class World(NamedTuple):
    """This process's place among all of a run."""
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = ""  # whose variables say so, where that is not torchrun

    @property
    def is_main(self) -> bool:
        return self.rank == 0


class _Launcher(NamedTuple):
    """The environment variables by which a launcher tells a process its place; of several names the first that is
    set."""
    name: str
    rank: str
    size: List[str]
    local_rank: List[str]
    local_size: List[str]
    job: List[str] = []  # what tells two jobs on a machine apart


_LAUNCHERS = (
    _Launcher("torchrun", "RANK", ["WORLD_SIZE"], ["LOCAL_RANK"], ["LOCAL_WORLD_SIZE"]),
    _Launcher("mpirun (Open MPI)", "OMPI_COMM_WORLD_RANK", ["OMPI_COMM_WORLD_SIZE"], ["OMPI_COMM_WORLD_LOCAL_RANK"],
              ["OMPI_COMM_WORLD_LOCAL_SIZE"], ["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"]),
    _Launcher("srun (SLURM)", "SLURM_PROCID", ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"],
              ["SLURM_LOCALID"], ["SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE"],
              ["SLURM_JOB_ID", "SLURM_JOBID"]),
    _Launcher("mpirun (MPICH, Intel MPI)", "PMI_RANK", ["PMI_SIZE"], ["MPI_LOCALRANKID"], ["MPI_LOCALNRANKS"]),
    _Launcher("Huawei's RANK_ID and RANK_SIZE", "RANK_ID", ["RANK_SIZE"], ["DEVICE_ID"], []))
TORCHRUN = "torchrun --nproc_per_node=N main.py ..."
HUAWEI_CARDS = 8  # on a server, where nothing says how many processes it has


def _first(names):
    """The value of the first of these environment variables that is set, or None."""
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _launcher():
    """The _Launcher whose variables are set, or None. Raises UserError where half of them are."""
    for launcher in _LAUNCHERS:
        rank, size = os.environ.get(launcher.rank), _first(launcher.size)
        if rank and size:
            return launcher
        if rank or size and launcher.name == "torchrun" and size != "1":
            raise UserError("the environment has {} but not {}, so this process's place among the others is not known; "
                "start all of them with {}".format(*((launcher.rank, launcher.size[0]) if rank else (launcher.size[0],
                 launcher.rank)), TORCHRUN))
    return None


def speaker() -> str:
    """Who of a run's processes this is, in front of what it reports; nothing where there is one alone. The machine is
    named where there are several."""
    try:
        world = read_world()
    except UserError:
        return ""
    if world.size == 1:
        return ""
    machine = " on {}".format(platform.node()) if world.local_size < world.size else ""
    return "process {}{}: ".format(world.rank, machine)


def complain(text: str):
    """Prints `text` on standard error, after the speaker's name where a run has several processes."""
    print(speaker() + text, file=sys.stderr, flush=True)


def environment_rank() -> int:
    """This process's rank by the launcher's variables, 0 where they say nothing that makes sense."""
    for launcher in _LAUNCHERS:
        text = os.environ.get(launcher.rank)
        if text:
            return int(text) if text.isdecimal() else 0
    return 0


def read_world(local_rank: Optional[int] = None, world_size: Optional[int] = None) -> World:
    """The World that the launcher's environment describes; one process where there is no launcher.

    `local_rank` is the launcher's command-line form of it, for a launcher that does not set LOCAL_RANK.
    `world_size` is what the user asked for by flag, checked against the launcher.
    Raises UserError for an environment that does not fit together.
    """
    launcher = _launcher()
    if launcher is None:
        if world_size not in (None, 1):
            raise UserError("--world_size {0} needs a launcher: torchrun --nproc_per_node={0} main.py ..."
                            .format(world_size))
        return World()
    local_text, here_text = _first(launcher.local_rank), _first(launcher.local_size)
    try:
        rank, size = int(os.environ[launcher.rank]), int(_first(launcher.size))
        # SLURM writes 4(x2) for "4 on each of 2 machines"
        local_size = size if here_text is None else int(re.sub(r"\(x\d+\)$", "", here_text))
        if here_text is None and launcher.name.startswith("Huawei"):
            local_size = min(size, HUAWEI_CARDS)
        local = int(
            local_text) if local_text is not None else local_rank if local_rank is not None else rank % local_size
    except (ValueError, ZeroDivisionError) as error:
        raise UserError("the launcher's {}, {} and {} must be whole numbers: {}".format(
            launcher.rank, launcher.size[0], (launcher.local_rank + [""])[0], error))
    if world_size is not None and world_size not in (1, size):  # 1 is DeiT's default and stands for the launcher's
        raise UserError("--world_size {} does not match the {} processes that the launcher started; leave it out"
                        .format(world_size, size))
    if launcher.name.startswith("Huawei") and local_text is not None and not local < local_size:
        raise UserError("DEVICE_ID {} is not below {}, the processes on this machine by RANK_SIZE; number it from 0 on "
                        "every machine, and choose cards by ASCEND_RT_VISIBLE_DEVICES or --device_id".format(
                            local, local_size))
    if local_size < 1 or size % local_size or not 0 <= rank < size or not 0 <= local < local_size:
        raise UserError("a world of {} processes with {} on this machine (rank {}, local rank {}) does not divide: "
                        "start the same number on every machine".format(size, local_size, rank, local))
    return World(rank, size, local, local_size, "" if launcher.name == "torchrun" else launcher.name)


def _meeting_place(world):
    """(address, port) at which processes meet whose launcher does not say so."""
    if world.size == world.local_size:
        address = "127.0.0.1"
    else:
        nodes = _first(["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"])
        if nodes is None:
            raise UserError("{} does not say where its processes meet; set MASTER_ADDR to the first machine's address "
                "and MASTER_PORT to a free port, or use {}".format(world.launcher or "the launcher", TORCHRUN))
        # the first of node[03-05,09],other is node03
        address = re.sub(r"\[(\d+)[^\]]*\]", r"\1", re.match(r"[^\[,]+(\[[^\]]*\])?", nodes).group(0))
    job = next((_first(launcher.job) for launcher in _LAUNCHERS if _first(launcher.job)), "0")
    return address, 20000 + sum(job.encode()) * 7919 % 20000  # below the ports that systems hand out


def init_processes(world: World, device: torch.device, dist_url: str = "env://", timeout=timedelta(minutes=30)):
    """Joins the process group, with the back end that belongs to `device`; nothing for a single process.

    A collective that waits for longer than `timeout` ends the process. Raises UserError where the processes do not
    meet.
    """
    if world.size == 1:
        return
    if dist_url == "env://" and not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
        address, port = _meeting_place(world)
        os.environ.setdefault("MASTER_ADDR", address)
        os.environ.setdefault("MASTER_PORT", str(port))
    if device.type == "npu":
        agree_on_timeouts(timeout)
    try:
        dist.init_process_group(BACKENDS[device.type], init_method=dist_url, world_size=world.size, rank=world.rank,
                                timeout=timeout)
    except (RuntimeError, ValueError) as error:
        where = dist_url if dist_url != "env://" else "{}:{}".format(
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
        raise UserError("process {} of {} does not meet the others at {} within {:g} minutes ({}); are all of them "
            "started, with the same MASTER_ADDR and MASTER_PORT?".format(world.rank, world.size, where,
            timeout.total_seconds() / 60, str(error).split("\n")[0][:160]))


def agree_on_timeouts(timeout: timedelta):
    """Lets HCCL give up when `timeout` says so, unless the user has set its variables: as many seconds for a collective
    (HCCL_EXEC_TIMEOUT, at least the 68 that Atlas training cards round to, at most the 17,340 that they take), and for
    the first meeting what is allowed of it (HCCL_CONNECT_TIMEOUT, 120 to 7,200). CANN 8.5, environment variables."""
    seconds = int(timeout.total_seconds())
    os.environ.setdefault("HCCL_EXEC_TIMEOUT", str(min(max(seconds, 68), 17340)))
    os.environ.setdefault("HCCL_CONNECT_TIMEOUT", str(min(max(seconds, 120), 7200)))


# what gloo, NCCL and HCCL say, by version, when another process has died, is cut off, or is late
_LOST = re.compile(r"gloo|nccl|hccl|c10d|connection (closed|reset|refused)|timed? ?out|broken pipe|recvValue|socket",
                   re.IGNORECASE)


def lost(error: RuntimeError) -> bool:
    """Whether an error is PyTorch's for another process that does not answer."""
    kinds = tuple(getattr(dist, name) for name in ("DistError",) if hasattr(dist, name))
    return is_distributed() and (isinstance(error, kinds) or _LOST.search(str(error)) is not None)


# Leaving a group waits for gloo's threads without letting go of Python's lock, and such a thread needs that lock if it
# is the last to hold a tensor that Python has made. PyTorch 2.1 to 2.7 could stand still there, so the tensors of the
# latest collectives stay.
_latest = collections.deque(maxlen=8)


def all_reduce(tensor, **options):
    """torch.distributed.all_reduce, after which the group can be left at any time; so are the next two."""
    _latest.append(tensor)
    dist.all_reduce(tensor, **options)


def all_gather(tensors, tensor, **options):
    _latest.append((tensors, tensor))
    dist.all_gather(tensors, tensor, **options)


def broadcast(tensor, source, **options):
    _latest.append(tensor)
    dist.broadcast(tensor, source, **options)


def close_processes():
    """Leaves the process group, if there is one."""
    if is_distributed():
        dist.destroy_process_group()


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def machine_name() -> str:
    """What tells this machine from the others of a run, until it is started anew."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            return "{} {}".format(platform.node(), f.read().strip())
    except OSError:
        return platform.node()


def barrier():
    """Waits for all processes."""
    if is_distributed():
        dist.barrier()


def sum_over_processes(values, device: torch.device) -> List[float]:
    """Sums a list of numbers over all processes; returns a list of floats."""
    if not is_distributed():
        return [float(value) for value in values]
    dtype = torch.float32 if device.type == "npu" else torch.float64  # an NPU has no float64
    total = torch.tensor(values, dtype=dtype, device=device)
    all_reduce(total)
    return total.tolist()


def parallelize(model: torch.nn.Module, device: torch.device, unused=()) -> torch.nn.Module:
    """`model` with gradients that are averaged over all processes; the model itself where there is one process.

    unused: names of the parameters without a gradient, for which to wait would be in vain; where they change, the model
    is to be wrapped again.
    """
    if not is_distributed():
        return model
    # an NPU's fused optimiser puts its own tensors in the gradients' places, so there they are no views
    return versions.data_parallel(model, list(unused), None if device.type == "cpu" else [device.index],
        device.type != "npu")


def broadcast_weights(model: torch.nn.Module):
    """Gives every process rank 0's weights and statistics, to start from: each has drawn its own."""
    if is_distributed():
        for parameter in model.parameters():
            broadcast(parameter.detach(), 0)
        broadcast_buffers(model)


def broadcast_buffers(model: torch.nn.Module):
    """Gives every process rank 0's batch-norm statistics: DDP runs without buffer broadcast, evaluation needs one
    model, and what is evaluated is what rank 0 saves."""
    if is_distributed():
        for buffer in model.buffers():
            broadcast(buffer, 0)
