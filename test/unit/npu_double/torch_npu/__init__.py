"""Stands in for Ascend's torch_npu in tests: a device named `npu` whose memory is the host's (backend.cpp).

It offers the names that runtime/ uses of the real package, with their documented behaviour. What only the double has
is in `torch_npu.double`: counts of operators, copies and waits.
"""
import contextlib
import io
import os
import time

import torch

with contextlib.redirect_stderr(io.StringIO()):  # a CUDA build of PyTorch misses a card there
    import torch.utils.cpp_extension

torch.utils.rename_privateuse1_backend("npu")


def _forget_a_killed_build(name):
    """Its lock would be waited for without end."""
    lock = os.path.join(torch.utils.cpp_extension._get_build_directory(name, verbose=False), "lock")
    if os.path.exists(lock) and time.time() - os.path.getmtime(lock) > 600:
        os.remove(lock)


_forget_a_killed_build("npu_double_backend")
double = torch.utils.cpp_extension.load(
    "npu_double_backend", [os.path.join(os.path.dirname(os.path.abspath(__file__)), "backend.cpp")],
    extra_cflags=["-O1", "-Wno-deprecated-declarations"])

from . import npu, optim  # noqa: E402,F401

torch._register_device_module("npu", npu)
torch.utils.generate_methods_for_privateuse1_backend()


def _hccl(options, _):
    gloo = torch.distributed.ProcessGroupGloo(options.store, options.group_rank, options.group_size, options.timeout)
    return double.make_hccl(gloo, options.group_rank, options.group_size)


torch.distributed.Backend.register_backend("hccl", _hccl, extended_api=True, devices=["npu"])
