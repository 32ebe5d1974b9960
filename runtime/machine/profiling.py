"""Where the time of a few updates goes: a trace for Perfetto or MindStudio, and the most expensive operators."""
import csv
import os
import re
from collections import Counter
from contextlib import contextmanager
from typing import Optional

import torch

from evo_vit.compat import TORCH

from ..errors import UserError
from .machine import Machine

WARMUP = 5  # updates that are left out before
ROWS = 10  # operators of the table
# Beside operators ("aten::mm") PyTorch records its own steps, autograd's nodes ("SliceBackward0") and a card's kernels,
# whose time is that of their operators once more. What the compiler has made of many operators counts as one.
_OPERATOR = re.compile(r"(?!autograd::|torch::)\w+::\w+$|Torch-Compiled Region|## Call CompiledFxGraph")


def _npu_profiler():
    try:
        from torch_npu import profiler
    except ImportError:
        raise UserError("--profile: this torch_npu has no profiler")
    return profiler


def _total_time(event):
    """An operator's own time in microseconds, on the accelerator where it has one (torch before 2.5 called it CUDA)."""
    on_device = getattr(event, "self_device_time_total", getattr(event, "self_cuda_time_total", 0))
    return on_device or event.self_cpu_time_total


class Profile:
    """Records `updates` updates of a run on `device`, after WARMUP others, and writes what it found to `folder`.

    To be entered around the run; `step()` is called after every update. On an NPU the trace is torch_npu.profiler's
    folder, which holds trace_view.json; elsewhere it is trace.json. Raises UserError where this PyTorch cannot.
    """

    def __init__(self, updates: int, device: torch.device, folder: str):
        self.updates = updates
        self.device = device
        self.folder = folder
        self._before = set(os.listdir(folder)) if os.path.isdir(folder) else set()  # another run's
        self.table = None  # (operator, calls, microseconds) of the most expensive ones, when the recording is over
        self._profiler = self._build()

    def _build(self):
        if self.device.type == "npu":
            profiler = _npu_profiler()
            activities, ready = [profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU], self._take_npu
        elif TORCH >= (2, 1):
            profiler = torch.profiler
            activities, ready = [profiler.ProfilerActivity.CPU], self._take
            if self.device.type == "cuda":
                activities.append(profiler.ProfilerActivity.CUDA)
        else:
            raise UserError("--profile needs PyTorch 2.1 or newer")
        schedule = profiler.schedule(wait=WARMUP - 1, warmup=1, active=self.updates, repeat=1)
        return profiler.profile(activities=activities, schedule=schedule, on_trace_ready=ready)

    def _take(self, profiler):
        os.makedirs(self.folder, exist_ok=True)
        profiler.export_chrome_trace(os.path.join(self.folder, "trace.json"))
        events = [event for event in profiler.key_averages() if _OPERATOR.match(event.key)]
        events.sort(key=_total_time, reverse=True)
        self.table = [(event.key, event.count, _total_time(event)) for event in events[:ROWS]]

    def _take_npu(self, profiler):
        _npu_profiler().tensorboard_trace_handler(self.folder)(profiler)
        calls, times = Counter(), Counter()
        paths = [os.path.join(self.folder, name, "ASCEND_PROFILER_OUTPUT", "kernel_details.csv")
                 for name in sorted(set(os.listdir(self.folder)) - self._before)]
        for path in filter(os.path.isfile, paths):
            with open(path, newline="") as f:
                for row in csv.DictReader(f):
                    calls[row["Type"]] += 1
                    times[row["Type"]] += float(row["Duration(us)"])
        self.table = [(name, calls[name], time) for name, time in times.most_common(ROWS)]

    def __enter__(self):
        self._profiler.__enter__()
        return self

    def __exit__(self, *error):
        self._profiler.__exit__(*error)

    def step(self):
        """An update is over."""
        self._profiler.step()

    def report(self) -> str:
        """The table, in lines, or why there is none."""
        if not self.table:
            return "Note: the run ended before --profile had {} updates after the first {}".format(self.updates, WARMUP)
        lines = ["{:>10} {:>8}  operator".format("ms/update", "calls")]
        lines += ["{:>10.3f} {:>8.1f}  {}".format(time / 1000 / self.updates, calls / self.updates, name)
                  for name, calls, time in self.table]
        return "\n".join(lines + ["Profile of {} updates: {} (ui.perfetto.dev, MindStudio Insight)".format(
            self.updates, self.folder)])


@contextmanager
def profiled(updates: Optional[int], machine: Machine, output_dir: str):
    """The first process's entered Profile of so many updates, whose report is printed at the end; None for no updates
    and in other processes."""
    if not updates or not machine.world.is_main:
        yield None
        return
    with Profile(updates, machine.device, os.path.join(output_dir, "profile")) as profile:
        yield profile
    machine.say(profile.report())
