"""The reference numbers in data/ and the weights they were made with (data/README.md)."""
import json
import os
import zlib

import evo_vit  # noqa: F401  (before timm and torchvision)

# isort: split
import numpy as np
import timm
import torch

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data")


def load_json(name):
    with open(os.path.join(DATA, name + ".json")) as f:
        return json.load(f)


def load_arrays(name):
    return np.load(os.path.join(DATA, name + ".npz"))


def draw(name, shape, gain=1.25, qk_gain=None):
    """The value of the tensor `name`; `qk_gain` is the gain of Evo-DeiT's queries and keys."""
    g = np.random.RandomState(zlib.crc32(name.encode("utf-8"))).standard_normal(shape)
    last = name.split(".")[-1]
    if ".bn." in name:
        return {"weight": 1 + 0.1 * g, "bias": 0.1 * g, "running_mean": 0.1 * g,
                "running_var": 1 + 0.1 * np.abs(g)}[last]
    if "norm" in name:
        return {"weight": 1 + 0.1 * g, "bias": 0.1 * g}[last]
    if last == "learn_tradeoff":
        return 0.3 * g
    if last in ("poss", "pos_embed", "cls_token"):
        return 0.2 * g
    if last == "bias":
        return 0.1 * g
    return (qk_gain if name.startswith("qks.") else gain) * g / np.sqrt(np.prod(shape[1:]))


@torch.no_grad()
def fill(model, gain=1.25, qk_gain=None):
    """Draws every tensor of `model` from its own name."""
    for tensors in (model.named_parameters(), model.named_buffers()):
        for name, tensor in tensors:
            if not name.endswith("num_batches_tracked"):
                tensor.copy_(torch.as_tensor(draw(name, tuple(tensor.shape), gain, qk_gain)))


def build(name, gain=1.25, qk_gain=None, **kwargs):
    """The named model in float64 with the reference weights, drop path off."""
    model = timm.create_model(name, distillation=True, drop_path_rate=0.0, **kwargs).double()
    model.set_distilled_training(True)
    fill(model, gain, qk_gain)
    return model


def images(size, batch=2, seed=20260):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((batch, 3, size, size)))


def relative_error(actual, expected):
    """Largest absolute difference over the largest absolute expected value."""
    actual, expected = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() / np.abs(expected).max()
