"""Random numbers as a function of where a run stands, so that a resumed run draws what the uninterrupted one drew.

No generator's state needs to be saved: each training image is augmented from a seed of its own, which does not depend
on which worker loads it, and each update (mixup, drop path) starts from a seed of its own.
"""
import hashlib
import random
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*numbers):
    """A 32-bit seed that is well mixed even where `numbers` (whole numbers) are close to one another."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest(), "little")


def seed_everything(seed):
    """Seeds Python, NumPy and PyTorch (every device)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if hasattr(torch, "npu"):
        torch.npu.manual_seed_all(seed)  # older PyTorch does not know of that device


def draw_from(seed):
    """From here on Python, NumPy and PyTorch's CPU generator draw from `seed`."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch the devices, too


@contextmanager
def drawing_from(seed):
    """Inside, Python, NumPy and PyTorch's CPU generator draw from `seed`; after it they go on as if nothing was."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    draw_from(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
