"""torch.compile, where this PyTorch has it."""
from contextlib import contextmanager

from torch import nn


# --- torch before 2.2 cannot compile a module in place.
def can_compile() -> bool:
    """Whether `compile_module` works."""
    return hasattr(nn.Module, "compile")


def compile_module(module: nn.Module, device_type: str, fullgraph: bool = True, frozen: bool = False) -> nn.Module:
    """Lets `module` be compiled when it is first called. frozen: its weights never change, and it is called within
    `frozen_weights` alone. Returns it.

    On a CPU the compiler leaves memory formats alone: the rearrangements that it adds cost more than they bring.
    """
    # with its weights built in, code for several batch sizes goes wrong (torch 2.13)
    module.compile(fullgraph=fullgraph, dynamic=False if frozen else None,
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
