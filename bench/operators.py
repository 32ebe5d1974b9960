"""Which operators PyTorch hands to the device: each has to be launched, and on an NPU that is what decides."""
from collections import Counter
from typing import Callable, Dict, List

import torch

from runtime.errors import UserError
from runtime.learning.models import LAYER_WISE, NO_SELECTION, STAGE_WISE, set_mode

from .contenders import Training

try:
    from torch.utils._python_dispatch import TorchDispatchMode
except ImportError:  # before torch 2.0
    TorchDispatchMode = None

# They only describe or allocate memory: nothing is launched.
_FREE = frozenset("""
    _reshape_alias _unsafe_view alias as_strided chunk detach diagonal empty empty_like empty_strided expand is_pinned
    is_same_size lift_fresh new_empty new_empty_strided permute select slice split split_with_sizes squeeze t transpose
    unbind unfold unsqueeze view""".split())
_WAIT = "_local_scalar_dense"  # the host reads a value of the device


def count(function: Callable) -> Counter:
    """{name: number} of the operators that function() has run, backward passes included. One that takes a list of
    tensors (`_foreach_...`) counts once. Raises UserError where PyTorch is older than 2.0."""
    if TorchDispatchMode is None:
        raise UserError("operators: PyTorch 2.0 or newer is needed to count them")
    found = Counter()

    class Watch(TorchDispatchMode):
        """Sees whatever is dispatched while it is entered."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            namespace, name = func.name().split(".")[0].split("::")
            if namespace != "profiler" and name not in _FREE:
                found[name] += 1
            return func(*args, **(kwargs or {}))

    with Watch():
        function()
    return found


def count_parts(text: str, batch: int, size: int, device: torch.device) -> Dict[str, Counter]:
    """`count` of what the contender `text` of benchmark.py's train does: a training step in either mode, and inference.

    Raises UserError for one that is not the recipe's own step, or is compiled: those operators are the compiler's.
    """
    if {"plain", "compile"} & set(text.split(",")):
        raise UserError("contender {}: operators are those of the recipe's own step, not compiled".format(text))
    training = Training(text, batch, size, device)
    selection = NO_SELECTION if "dense" in text.split(",") else ""
    parts = {}
    for mode in (LAYER_WISE + selection, STAGE_WISE + selection):
        set_mode(training.model, mode)
        training.run()  # the first step also makes the optimiser's tensors
        parts["training step, " + mode] = count(training.run)
    training.model.eval()
    with torch.no_grad():
        parts["inference, " + STAGE_WISE + selection] = count(lambda: training.model(training.images))
    return parts


def rows(text: str, parts: Dict[str, Counter]) -> List[dict]:
    """The figures of `parts` as --json has them."""
    return [{"contender": text, "part": part, "operators": sum(found.values()), "host_waits": found[_WAIT],
             "list": dict(found.most_common())} for part, found in parts.items()]


def markdown(of_one: List[dict]) -> List[str]:
    """Lines of Markdown of one contender's `rows`: the sums, and the list."""
    lines = ["| {} | operators | host waits |".format(of_one[0]["contender"]), "|---|---|---|"]
    lines += ["| {part} | {operators} | {host_waits} |".format(**row) for row in of_one]
    lines += ["", "| operator | {} |".format(" | ".join(row["part"] for row in of_one)),
              "|---" * (1 + len(of_one)) + "|"]
    names = sorted({name for row in of_one for name in row["list"]}, key=lambda n: (-of_one[0]["list"].get(n, 0), n))
    return lines + ["| {} | {} |".format(name, " | ".join(str(row["list"].get(name, 0)) for row in of_one))
                    for name in names]
