"""torch.npu: the device module."""
import os

import torch

from .. import double
from . import amp  # noqa: F401

current_device = double.current_device
options = {}  # what set_option was given
jit_compile = []  # what set_compile_mode was given


def device_count():
    """The cards that the runtime shows: those of ASCEND_RT_VISIBLE_DEVICES, where it is set."""
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    return double.device_count() if visible is None else min(len(visible.split(",")), double.device_count())


def get_device_name(device=None):
    return "Ascend stand-in"


def is_available():
    return device_count() > 0


def set_device(device):
    double.set_device(device if isinstance(device, int) else torch.device(device).index or 0)


def synchronize(device=None):
    double.synchronize()


def max_memory_allocated(device=None):
    return double.max_memory_allocated()


def reset_peak_memory_stats(device=None):
    double.reset_peak_memory_stats()


def set_option(option):
    if not isinstance(option, dict):
        raise TypeError("npu option must be a dict.")
    options.update(option)


def set_compile_mode(jit_compile=False):
    globals()["jit_compile"].append(jit_compile)


def manual_seed_all(seed):
    """The double draws from the CPU's generator, which torch.manual_seed seeds."""


manual_seed = manual_seed_all


def get_rng_state(device="npu"):
    return torch.get_rng_state()


def set_rng_state(new_state, device="npu"):
    torch.set_rng_state(new_state)


def get_rng_state_all():
    return [torch.get_rng_state()]


def set_rng_state_all(new_states):
    torch.set_rng_state(new_states[0])


# torch 2.1 leaves the switches of autocast to the package of the device
autocast_state = {"enabled": False, "dtype": torch.float16}


def is_autocast_enabled():
    return autocast_state["enabled"]


def set_autocast_enabled(enabled):
    autocast_state["enabled"] = enabled
    double.set_autocast_enabled(enabled)


def get_autocast_dtype():
    return autocast_state["dtype"]


def set_autocast_dtype(dtype):
    autocast_state["dtype"] = dtype
    double.set_autocast_half(dtype is torch.float16)


def get_amp_supported_dtype():
    return [torch.float16, torch.bfloat16]


def _is_in_bad_fork():
    return False
