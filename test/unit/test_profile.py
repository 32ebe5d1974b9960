"""--profile: a trace, and the most expensive operators."""
import json
import re
import sys
from types import SimpleNamespace

import commands
import pytest
import torch

from evo_vit.compat import TORCH
from runtime.machine.profiling import Profile

RUN = ("--model", "EvoLeViT_128S", "--distillation-type", "none", "--batch-size", 8, "--epochs", 1)
needs_profiler = pytest.mark.skipif(TORCH < (2, 1), reason="--profile needs PyTorch 2.1")


@needs_profiler
def test_a_run_leaves_a_trace_and_a_table_of_ten_operators(digit_folder, tmp_path):
    out = commands.succeed(*RUN, "--profile", 2, "--max-steps", 8, "--data-path", digit_folder, "--output_dir",
                           tmp_path)
    with open(str(tmp_path / "profile" / "trace.json")) as f:
        events = json.load(f)["traceEvents"]
    names = [event.get("name") for event in events]
    assert len([name for name in names if re.match(r"ProfilerStep#\d+$", str(name))]) >= 2
    assert "aten::convolution" in names
    lines = out.splitlines()
    start = lines.index(" ms/update    calls  operator")
    rows = [line.split() for line in lines[start + 1:start + 11]]
    times = [float(row[0]) for row in rows]
    assert len(rows) == 10 and times == sorted(times, reverse=True) and times[0] > 0
    assert all("::" in row[2] for row in rows), rows
    assert lines[start + 11].startswith("Profile of 2 updates: {}".format(tmp_path / "profile"))


class Recorded:
    """What a profiler has recorded: events by name, each more expensive than the one before."""

    def __init__(self, names):
        self.events = [SimpleNamespace(key=name, count=1, self_cpu_time_total=1.0 + place)
                       for place, name in enumerate(names)]

    def export_chrome_trace(self, path):
        pass

    def key_averages(self):
        return self.events


@needs_profiler
def test_only_operators_stand_in_the_table(tmp_path):
    profile = Profile(1, torch.device("cpu"), str(tmp_path))
    profile._take(Recorded([
        "aten::mm", "c10d::allreduce_", "mkldnn::_linear_pointwise", "SliceBackward0", "ProfilerStep*",
        "autograd::engine::evaluate_function: AddmmBackward0", "torch::autograd::AccumulateGrad",
        "Torch-Compiled Region: 0/0", "Optimizer.step#AdamW.step", "enumerate(DataLoader)#_Iter.__next__",
        "ampere_sgemm_128x64_nn", "void at::native::elementwise_kernel<4>(int)"]))
    assert [name for name, _, _ in profile.table] == ["Torch-Compiled Region: 0/0", "mkldnn::_linear_pointwise",
                                                      "c10d::allreduce_", "aten::mm"]


@needs_profiler
def test_a_run_that_is_too_short_says_so(digit_folder, tmp_path):
    out = commands.succeed(*RUN, "--profile", 2, "--max-steps", 2, "--data-path", digit_folder, "--output_dir",
                           tmp_path)
    assert "Note: the run ended before --profile had 2 updates after the first 5" in out


@pytest.mark.once
def test_collectives_of_an_update_do_not_grow_with_the_processes(digit_folder, tmp_path):
    """Four processes make as many as two; that the host waits once, at any number, is in test_npu.py."""
    counts = {}
    for processes in (2, 4):
        out = tmp_path / str(processes)
        commands.succeed(*RUN, "--profile", 3, "--max-steps", 8, "--data-path", digit_folder, "--output_dir", out,
                         "--batch-size", 8 // processes, launch=list(commands.launchers(processes).values())[-1])
        with open(str(out / "profile" / "trace.json")) as f:
            names = [str(event.get("name")) for event in json.load(f)["traceEvents"] if event.get("ph") == "X"]
        counts[processes] = {name: names.count(name) / 3 for name in sorted(set(names))
                             if name.startswith("c10d::")}
    # one sum of how the loss is, and DDP's buckets: the first of at most 1 MiB, the others of 25
    assert counts[2] == counts[4] == {"c10d::allreduce_": 4}


@pytest.mark.skipif(TORCH >= (2, 1), reason="this PyTorch profiles")
def test_a_pytorch_without_one_ends_in_a_sentence(digit_folder, tmp_path):
    code, out, err = commands.run([sys.executable, commands.MAIN] + commands.SMALL + list(
        RUN + ("--profile", 2, "--data-path", digit_folder, "--output_dir", tmp_path)))
    assert (code, err) == (2, "error: --profile needs PyTorch 2.1 or newer\n")
