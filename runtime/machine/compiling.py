"""torch.compile, where this PyTorch has it, by the compiler of each device."""
import importlib.util
import os
from contextlib import contextmanager

import torch
from torch import nn

from evo_vit.compat import TORCH

from ..errors import UserError


def can_compile() -> bool:
    """Whether `compile_module` works."""
    return TORCH >= (2, 1)


# --- torch before 2.2 compiles functions alone.
def _compile(module, **options):
    if hasattr(nn.Module, "compile"):
        module.compile(**options)
    else:
        module.forward = torch.compile(module.forward, **options)


def _npu_backend():
    """torch.compile's `backend` on an NPU: torch_npu's own for inductor, from 2.7 on, or torchair's.

    Raises UserError where neither is installed.
    """
    if TORCH >= (2, 7) and importlib.util.find_spec("torch_npu._inductor") is not None:
        # what writes its kernels: the variable names it, and unnamed it is Triton, a package of its own (triton-ascend)
        if os.environ.get("TORCHINDUCTOR_NPU_BACKEND") or importlib.util.find_spec("triton") is not None:
            return "inductor"
    if importlib.util.find_spec("torchair") is None:
        raise UserError("--compile: nothing here compiles for an NPU; install triton-ascend or set "
                        "TORCHINDUCTOR_NPU_BACKEND (torch_npu from 2.7.1 on), or install torchair (it comes with "
                        "torch_npu up to 2.6), or leave --compile out")
    import torchair  # after torch_npu, which devices.find_device has imported
    return torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())


def compile_module(module: nn.Module, device_type: str, fullgraph: bool = True, frozen: bool = False) -> nn.Module:
    """Lets `module` be compiled when it is first called. frozen: its weights never change, and it is called within
    `frozen_weights` alone. Returns it.

    On a CPU the compiler leaves memory formats alone: the rearrangements that it adds cost more than they bring. An
    NPU compiles static shapes alone. Raises UserError where nothing compiles for the device.
    """
    if device_type == "npu":
        _compile(module, fullgraph=fullgraph, dynamic=False, backend=_npu_backend())
        return module
    # with its weights built in, code for several batch sizes goes wrong (torch 2.13)
    _compile(module, fullgraph=fullgraph, dynamic=False if frozen else None,
             options={"layout_optimization": False} if device_type == "cpu" else None)
    return module


@contextmanager
def frozen_weights(device_type: str):
    """Within it, what is compiled for a CPU without gradients has its weights built in, packed for its products."""
    if device_type == "cpu" and can_compile():
        import torch._inductor.config as inductor
        with inductor.patch(freezing=True):  # as an option of torch.compile it comes too late and does nothing
            yield
    else:
        yield
