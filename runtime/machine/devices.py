"""Which device the recipe runs on, and the few things that differ between npu, cuda and cpu."""
import argparse
import importlib.util
import os
import sys
import time

import torch

from ..errors import UserError

BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}  # torch.distributed's name for each device's collectives

# which of a machine's cards a process sees; device numbers count these alone
VISIBLE = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}


def _load_npu():
    """(torch.npu or None, why it cannot be used or None). The torch 1.5 of an Ascend server has torch.npu built in;
    from 1.8 on importing torch_npu adds it."""
    if not hasattr(torch, "npu"):
        if importlib.util.find_spec("torch_npu") is None:
            return None, None
        try:
            import torch_npu  # noqa: F401
        except Exception as error:  # a missing toolkit shows as ImportError, RuntimeError or OSError, by version
            reason = str(error).strip().split("\n")[0]
            return None, "torch_npu does not load ({}); source the toolkit's set_env.sh first, for example " \
                         "source /usr/local/Ascend/ascend-toolkit/set_env.sh".format(reason[:200])
    if not torch.npu.is_available():
        return None, "torch_npu finds no card (npu-smi info shows what the driver sees)"
    return torch.npu, None


def _accelerator(kind):
    """(the torch module of an accelerator, None), or (None, why it cannot be used, where there is more to say)."""
    if kind == "npu":
        return _load_npu()
    return (torch.cuda, None) if torch.cuda.is_available() else (None, None)


def _use_npu(npu, device):
    """Makes the card current; compiled operators are kept in ACL_OP_COMPILER_CACHE_DIR, ./cache where it is not set."""
    npu.set_device(device)
    if hasattr(npu, "set_option"):
        npu.set_option({"ACL_OP_COMPILER_CACHE_MODE": os.environ.get("ACL_OP_COMPILER_CACHE_MODE", "enable"),
                        "ACL_OP_COMPILER_CACHE_DIR": os.environ.get("ACL_OP_COMPILER_CACHE_DIR", "./cache")})


def find_device(name):
    """(kind, its torch module or None for the CPU, a sentence to show or None) for `name`: auto, npu, cuda or cpu.

    auto takes the first of npu, cuda and cpu, and says why where an NPU's software is there but cannot be used.
    Raises UserError where the named device is not there.
    """
    notice = None
    for kind in ("npu", "cuda", "cpu") if name == "auto" else (name,):
        if kind == "cpu":
            return kind, None, notice
        module, reason = _accelerator(kind)
        if module is not None:
            return kind, module, notice
        if name != "auto":
            raise UserError("--device {}: {}".format(
                kind, reason or "no such device is available here; use --device auto or cpu"))
        notice = notice or reason and "no NPU is used: " + reason


def check_count(kind, module, processes, first):
    """Raises UserError where this machine has fewer cards than the processes need from card `first` on."""
    count = module.device_count()
    if first + processes > count:
        variable = VISIBLE[kind]
        shown = " ({} is {})".format(variable, os.environ[variable]) if os.environ.get(variable) else ""
        raise UserError("there {} {} {} device{} here{}, too few for {} process{} from card {} on; start one process a "
            "card".format("is" if count == 1 else "are", count, kind, "" if count == 1 else "s", shown, processes, ""
            if processes == 1 else "es", first))


def select_device(name, local_rank=0, local_world_size=1, first=0, say=print):
    """The torch.device for `name` (see find_device), made current: card `first` + `local_rank` of this machine.

    Raises UserError where that device is not there, or this machine has fewer of them than processes.
    """
    kind, module, notice = find_device(name)
    if notice:
        say("Note: " + notice)
    if kind == "cpu":
        return torch.device("cpu")
    check_count(kind, module, local_world_size, first)
    device = torch.device(kind, first + local_rank)
    if kind == "npu":
        _use_npu(module, device)
    else:
        module.set_device(device)
    return device


def synchronize(device):
    """Waits for all work queued on `device`."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def start_reading(value):
    """Starts to bring a tensor of one element to the host, and returns a function that waits for it and gives the
    number.

    On an accelerator the host then waits only for what was queued before this call, not for what comes after.
    """
    module = getattr(torch, value.device.type, None)
    if value.device.type == "cpu" or not hasattr(module, "Event"):
        return value.item
    # pinned once made: torch 2.1 cannot make it pinned for a device of another package
    host = torch.empty(value.shape, dtype=value.dtype).pin_memory()
    host.copy_(value, non_blocking=True)
    event = module.Event()
    event.record()

    def wait():
        event.synchronize()
        return host.item()
    return wait


class Stopwatch:
    """Adds up the time that the device needs between `start()` and `stop()`, as often as they are called; the host does
    not wait. `seconds()` is for when that work is known to be over."""

    def __init__(self, device: torch.device):
        self._event = None if device.type == "cpu" else getattr(getattr(torch, device.type), "Event", None)
        self._marks = []

    def _mark(self):
        if self._event is None:
            return time.perf_counter()
        event = self._event(enable_timing=True)
        event.record()
        return event

    def start(self):
        self._marks.append([self._mark()])

    def stop(self):
        self._marks[-1].append(self._mark())

    def seconds(self) -> float:
        if self._event is None:
            return sum(end - start for start, end in self._marks)
        return sum(start.elapsed_time(end) for start, end in self._marks) / 1000  # from milliseconds


def main(processes, first, flags):
    """`python -m runtime.machine.devices PROCESSES FIRST_CARD [main.py's flags]`: says in one line where a run would
    go."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--device", default="auto")
    name = parser.parse_known_args(flags)[0].device
    try:
        kind, module, notice = find_device(name)
        if module is not None:
            check_count(kind, module, processes, first)
    except UserError as error:
        print("error: {}".format(error), file=sys.stderr)
        return 2
    print("Device: {} x {}, collectives by {}{}".format(
        kind, processes, BACKENDS[kind], "" if kind == "npu" else " ({})".format(notice or "no NPU here")))
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
