"""Checkpoint files, read without running anything that stands in them."""
import argparse
import inspect
import json
import pickle
import types
from typing import Dict, Set, Tuple

import numpy as np
import torch

_PLAIN = {("collections", "OrderedDict"), ("collections", "defaultdict"), ("torch", "Size"), ("torch", "device")}
_PLAIN |= {(module, name) for module in ("builtins", "__builtin__")
           for name in ("dict", "list", "set", "frozenset", "complex")}
_TENSORS = {("torch._utils", name) for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter",
                                                "_rebuild_parameter_with_state")}


class Unknown:
    """Stands where a file names a class or function of somebody's program. It takes whatever the file does to it and
    does nothing; so what lies beside the weights does no harm."""

    name = "an object"

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __call__(self, *args, **kwargs):
        return self

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    def extend(self, values):
        pass

    def add(self, value):
        pass


def _allowed():
    """{(module, name): object} that a checkpoint may name beyond tensors: DeiT's family pickles its arguments and
    NumPy scalars."""
    scalar = np.float64(0).__reduce__()[0]
    allowed = {("argparse", "Namespace"): argparse.Namespace, ("numpy", "dtype"): np.dtype,
               ("_codecs", "encode"): lambda text, _: text.encode("latin1")}  # a scalar's bytes, in protocol 2
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed[(module, "scalar")] = scalar
    for dtype in (np.float64, np.float32, np.int64, np.int32, np.bool_):
        cls = type(np.dtype(dtype))
        if cls is not np.dtype:  # NumPy 1.20 on: each dtype has a class
            allowed[(cls.__module__, cls.__name__)] = cls
    return allowed


_ALLOWED = _allowed()


def load_tensors(path: str) -> Tuple[object, Set[str]]:
    """(torch.load on the CPU of tensors, plain values and argparse.Namespace, names of what else the file holds, in
    whose places stand `Unknown` objects)."""
    unknown = set()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) in _ALLOWED:
                return _ALLOWED[(module, name)]
            storage = module in ("torch", "torch.storage") and name.endswith("Storage")
            dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
            if storage or dtype or (module, name) in _PLAIN or (module, name) in _TENSORS:
                return super().find_class(module, name)
            unknown.add("{}.{}".format(module, name))
            return type("Unknown", (Unknown,), {"name": "{}.{}".format(module, name)})

    restricted = types.ModuleType("restricted_pickle")
    restricted.Unpickler = Unpickler
    restricted.load = lambda f, **kwargs: Unpickler(f, **kwargs).load()
    restricted.UnpicklingError = pickle.UnpicklingError
    return torch.load(path, map_location="cpu", pickle_module=restricted, **_WHOLE), unknown


# --- torch 2.6 on asks its own restricted unpickler, which has no place for what it does not know, unless told
# otherwise; torch before 1.13 has none.
_WHOLE = {"weights_only": False} if "weights_only" in inspect.signature(torch.load).parameters else {}


# --- torch 1.5 lacks a device that safetensors' functions for PyTorch name; those for NumPy, on the other hand, know no
# bf16.
def _has_meta():
    try:
        torch.device("meta")
        return True
    except RuntimeError:
        return False


_FRAMEWORK = "pt" if _has_meta() else "np"


def load_safetensors(path: str) -> Dict:
    """{"model": {name: tensor}} and what stands in the metadata of a safetensors file; raises ImportError where that
    package is not installed."""
    from safetensors import safe_open
    convert = torch.from_numpy if _FRAMEWORK == "np" else lambda tensor: tensor
    with safe_open(path, _FRAMEWORK) as f:
        tensors, metadata = {name: convert(f.get_tensor(name)) for name in f.keys()}, f.metadata() or {}
    return dict(json.loads(metadata.get("evo_levit", "{}")), model=tensors)
