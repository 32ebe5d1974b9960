"""How the supported versions of PyTorch, torchvision and timm differ for the models: imports, names, tracing.

Import it before torchvision and timm: a CPU-only PyTorch cannot import them before the first entry below has run. Each
entry says which line needs it. What differs for a run stands in runtime/machine/versions.py.
"""
import os
import re
import sys

# --- current line: torch loads torch_npu by itself when imported, and fails with it on a machine without the Ascend
# toolkit. runtime/machine/devices.py imports torch_npu where an NPU is wanted.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import numpy  # noqa: E402
import PIL  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from .lines import LINES, combinations  # noqa: E402

__all__ = ["Hardswish", "LINES", "TORCH", "create_model", "feature_extractor", "get_pretrained_cfg_value",
           "is_exported", "is_traced", "register_model", "trunc_normal_", "untested_notice", "versions"]


def _numbers(version):
    """(1, 8) of "1.8.1+cu102" or "==1.8.*": the first two numbers of a version."""
    return tuple(int(part) for part in re.search(r"(\d+)\.(\d+)", version).groups())


def _refuse(package, version, wanted, why):
    raise ImportError("{} {} {}; install '{}{}'".format(package, version, why, package, wanted))


def _check_before_import():
    """Raises ImportError, one sentence, for a combination that is known not to import or to run."""
    if sys.version_info < (3, 7):
        raise ImportError("Python {}.{} is too old; use Python 3.7 to 3.13".format(*sys.version_info[:2]))
    if _numbers(torch.__version__) < (1, 5):
        _refuse("torch", torch.__version__, ">=1.5", "is too old")
    if _numbers(torch.__version__) < (2, 3) and _numbers(numpy.__version__) >= (2, 0):
        _refuse("numpy", numpy.__version__, _wanted("numpy"), "does not work with torch " + torch.__version__)


def _wanted(package):
    """What the tested combination nearest to the installed PyTorch wants of `package`."""
    at_most = [c for c in combinations() if _numbers(c["torch"]) <= _numbers(torch.__version__)]
    return (at_most or combinations())[-1 if at_most else 0][package]


_check_before_import()
TORCH = _numbers(torch.__version__)


# --- current line, CPU-only PyTorch: the published torchvision wheel registers shape functions for two of its own
# operators, which its compiled half, built for CUDA, could not define. Their schemas let the import go through.
def _import_torchvision():
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
        return library  # the schemas live as long as this object
    return None


try:
    _torchvision_schemas = _import_torchvision()
except Exception as error:  # an old or a new torchvision fails in as many ways as there are pairs
    if "PILLOW_VERSION" in str(error):
        _refuse("pillow", PIL.__version__, LINES["1.5"].pillow, "does not work with this torchvision")
    raise ImportError("torchvision does not import beside torch {} ({}); install 'torchvision{}'".format(
        torch.__version__, str(error).split("\n")[0], _wanted("torchvision")))

try:
    import timm
except Exception as error:
    raise ImportError("timm does not import beside torch {} ({}); install 'timm{}'".format(
        torch.__version__, str(error).split("\n")[0], _wanted("timm")))
if _numbers(timm.__version__) < (0, 4) or timm.__version__.startswith(("0.4.5", "0.4.9")):
    _refuse("timm", timm.__version__, ">=0.4.12", "is too old")


def versions():
    """{package: installed version} of what LINES speaks of."""
    import torchvision
    return {"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__,
            "pillow": PIL.__version__, "numpy": numpy.__version__}


def untested_notice():
    """One sentence where torch, torchvision and timm are not together those of a tested line, else None."""
    installed = versions()
    packages = ("torch", "torchvision", "timm")
    if any(all(_numbers(installed[p]) == _numbers(c[p]) for p in packages) for c in combinations()):
        return None
    lines = [line.accepted[0] for line in LINES.values()]
    return "torch {torch}, torchvision {torchvision} and timm {timm} are no tested combination; tested are {}".format(
        "; ".join(", ".join(p + line[p] for p in packages) for line in lines), **installed)


# --- timm 0.4.12 (lines 1.5 and 1.8) keeps its layers and registry elsewhere than timm 1.x.
try:
    from timm.layers import trunc_normal_
except ImportError:
    from timm.models.layers import trunc_normal_
try:
    from timm.models import get_pretrained_cfg_value, register_model
except ImportError:
    from timm.models.registry import get_model_default_value as get_pretrained_cfg_value
    from timm.models.registry import register_model

# --- timm 1.x warns where a model lives under a new name; timm 0.4.12 keeps the factory in timm.models as well.
from timm.models import create_model  # noqa: E402


# --- timm 0.4.12 has no wrapper for models that give their features themselves.
def feature_extractor(model, out_indices):
    """timm's features_only wrapper; raises RuntimeError where timm is too old for it."""
    try:
        from timm.models._features import FeatureGetterNet
    except ImportError:
        raise RuntimeError(
            "features_only needs timm 1.0 or newer; model.forward_intermediates(x) gives the same features")
    return FeatureGetterNet(model, out_indices=out_indices)


# --- torch 1.5 has no Hardswish module.
if hasattr(nn, "Hardswish"):
    Hardswish = nn.Hardswish
else:
    class Hardswish(nn.Module):
        """x * relu6(x + 3) / 6 (MobileNetV3), elementwise."""

        def forward(self, x):
            return x * nn.functional.relu6(x + 3) / 6


# --- torch before 2.0 has no torch.compiler, and knows tracing alone.
_compiler = getattr(torch, "compiler", None)
_is_exporting = getattr(_compiler, "is_exporting", lambda: False)
_is_compiling = getattr(_compiler, "is_compiling", lambda: False)


def is_exported():
    """Whether the running code is being written down for other machines."""
    return torch._C._get_tracing_state() is not None or _is_exporting()


def is_traced():
    """Whether the running code is being written down, for other machines or by the compiler."""
    return is_exported() or _is_compiling()
