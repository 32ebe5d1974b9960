"""Stands in for Ascend's torchair: a back end of torch.compile that takes whole graphs of static shapes.

Like the real one it lowers forward and backward graphs of ATen operators ahead of time. It keeps what it was given in
`graphs`, refuses what a graph on an NPU must not hold, and runs the rest as it is.
"""
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

# the host waits for a value, or the shape of the result hangs on the data
_FORBIDDEN = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2",
              "unique_dim", "unique_consecutive", "bincount", "_to_cpu"}
graphs = []  # {"operators": names, "device": kinds} of each, forward and backward


class CompilerConfig:
    """Options, none of which the double knows."""


def _take(module, example_inputs):
    operators, devices = [], set()
    for node in list(module.graph.nodes):
        value = node.meta.get("val")
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, torch.Tensor):
                devices.add(one.device.type)
                if not all(isinstance(size, int) for size in one.shape):
                    raise RuntimeError("{} has the shape {}: torchair compiles static shapes".format(node, one.shape))
        if node.op != "call_function":
            continue
        name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
        if name in _FORBIDDEN:
            raise RuntimeError("{} waits for the device or has a shape that hangs on the data".format(name))
        if name in ("_to_copy", "to") and node.kwargs.get("device") not in (None, torch.device("npu", 0)):
            raise RuntimeError("{} leaves the device".format(node))
        operators.append(name)
        if name == "gather":  # the device's compiler lays tensors out for its operators; the double's gather is strict
            with module.graph.inserting_before(node):
                node.replace_input_with(node.args[0], module.graph.call_method("contiguous", (node.args[0],)))
    module.recompile()
    graphs.append({"operators": operators, "devices": sorted(devices)})
    return make_boxed_func(module.forward)


def get_npu_backend(*, compiler_config=None, custom_decompositions={}):
    if not isinstance(compiler_config, CompilerConfig):
        raise TypeError("compiler_config must be a CompilerConfig")
    return aot_autograd(fw_compiler=_take, bw_compiler=_take, decompositions=custom_decompositions)
