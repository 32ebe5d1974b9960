"""The one place that knows how the supported versions of PyTorch, torchvision and timm differ.

It lives here because the models, the lowest layer of the project, already need it: a CPU-only PyTorch cannot
import torchvision (and so timm) before the first entry below has run. Each entry says which line needs it.
"""
import os
import re
import sys
import warnings
from contextlib import contextmanager

# --- current line: torch loads torch_npu by itself when imported, and fails with it on a machine without the Ascend
# toolkit. runtime/device.py imports torch_npu where an NPU is wanted.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import numpy  # noqa: E402
import PIL  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

# The tested lines (test/run_tests.sh --line), in pip's words.
LINES = {
    "1.5": {"torch": "==1.5.*", "torchvision": "==0.2.2.post3", "timm": "==0.4.12", "pillow": ">=6.2,<7",
            "numpy": "<1.22"},
    "1.8": {"torch": "==1.8.*", "torchvision": "==0.9.1", "timm": "==0.4.12", "pillow": "<9.6", "numpy": "<1.24"},
    "current": {"torch": "==2.13.*", "torchvision": "==0.28.0", "timm": ">=1.0.31,<1.1", "pillow": "<13",
                "numpy": ">=1.26"},
}


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
    """What the tested line nearest to the installed PyTorch wants of `package`."""
    torch_version = _numbers(torch.__version__)
    line = "1.5" if torch_version < (1, 8) else "1.8" if torch_version < (2, 0) else "current"
    return LINES[line][package]


_check_before_import()


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
        _refuse("pillow", PIL.__version__, LINES["1.5"]["pillow"], "does not work with this torchvision")
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
    if any(all(_numbers(installed[p]) == _numbers(line[p]) for p in packages) for line in LINES.values()):
        return None
    return "torch {torch}, torchvision {torchvision} and timm {timm} are no tested combination; tested are {tested}".format(
        tested="; ".join(", ".join(p + line[p] for p in packages) for line in LINES.values()), **installed)


# --- timm 0.4.12 (lines 1.5 and 1.8) keeps its layers and registry elsewhere than timm 1.x.
try:
    from timm.layers import trunc_normal_
except ImportError:
    from timm.models.layers import trunc_normal_  # noqa: F401
try:
    from timm.models import get_pretrained_cfg_value, register_model
except ImportError:
    from timm.models.registry import get_model_default_value as get_pretrained_cfg_value
    from timm.models.registry import register_model  # noqa: F401

# --- timm 1.x warns where a model lives under a new name; timm 0.4.12 keeps the factory in timm.models as well.
from timm.models import create_model  # noqa: E402,F401

# --- timm 0.4.12 has no wrapper for models that give their features themselves.
def feature_extractor(model, out_indices):
    """timm's features_only wrapper; raises RuntimeError where timm is too old for it."""
    try:
        from timm.models._features import FeatureGetterNet
    except ImportError:
        raise RuntimeError("features_only needs timm 1.0 or newer; model.forward_intermediates(x) gives the same features")
    return FeatureGetterNet(model, out_indices=out_indices)


# --- torch 1.5 has no Hardswish module.
if hasattr(nn, "Hardswish"):
    Hardswish = nn.Hardswish
else:
    class Hardswish(nn.Module):
        """x * relu6(x + 3) / 6 (MobileNetV3), elementwise."""

        def forward(self, x):
            return x * nn.functional.relu6(x + 3) / 6


# --- torch before 1.9 cannot be asked for a stable sort, by which equal values fall the same way on every device.
def top_places(x, k):
    """Places of the k largest values of each row of x (B, N), largest first; of equal values the first comes first where
    PyTorch can do that, and in ONNX, whose TopK does so."""
    if torch.onnx.is_in_onnx_export():
        return x.topk(k, dim=1)[1]
    if _numbers(torch.__version__) >= (1, 9):
        return torch.sort(x, dim=1, descending=True, stable=True)[1][:, :k]
    return x.argsort(dim=1, descending=True)[:, :k]


# --- torch before 2.1 has no fused attention with a scale of one's own. On a CPU it is slower than the plain products for
# heads of such sizes (values twice as wide as keys), so it serves accelerators.
_fused_attention = nn.functional.scaled_dot_product_attention if _numbers(torch.__version__) >= (2, 1) else None


ATTENTION_CHUNK = 2 ** 21  # elements: attention matrices of 8 MB at a time stay in a CPU's caches


def _numel(q, k):
    """Elements of the attention matrices."""
    return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]


def _is_exported():
    """Whether the running code is being written down for other machines."""
    compiler = getattr(torch, "compiler", None)
    return torch._C._get_tracing_state() is not None or hasattr(compiler, "is_exporting") and compiler.is_exporting()


def _is_traced():
    compiler = getattr(torch, "compiler", None)
    return _is_exported() or hasattr(compiler, "is_compiling") and compiler.is_compiling()


def _attention_in_chunks(q, k, v):
    """`attention` with q scaled already, a few heads of a few images at a time."""
    B, heads = q.shape[:2]
    chunk = max(ATTENTION_CHUNK // (q.shape[2] * k.shape[2]), 1)
    x, class_attn = [], []
    for part_q, part_k, part_v in zip(*(t.flatten(0, 1).split(chunk) for t in (q, k.transpose(-2, -1), v))):
        attn = torch.bmm(part_q, part_k).softmax(dim=-1)
        x.append(torch.bmm(attn, part_v))
        class_attn.append(attn[:, 0])
    return torch.cat(x).view(B, heads, -1, v.shape[-1]), torch.cat(class_attn).view(B, heads, -1).mean(dim=1)


def attention(q, k, v, scale):
    """Scaled dot-product attention, and what the class token, at place 0, pays every token.

    q (B, heads, Q, key), k (B, heads, T, key), v (B, heads, T, value) -> (B, heads, Q, value), (B, T) averaged over heads.
    """
    if _fused_attention is None or q.device.type == "cpu":
        if q.device.type == "cpu" and not _is_traced() and _numel(q, k) > 2 * ATTENTION_CHUNK:
            return _attention_in_chunks(q * scale, k, v)
        attn = (q * scale @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, heads, Q, T)
        return attn @ v, attn[:, :, 0].mean(dim=1)
    class_attn = (q[:, :, :1] * scale @ k.transpose(-2, -1)).softmax(dim=-1)  # one row of what the fused kernel hides
    return _fused_attention(q, k, v, scale=scale), class_attn[:, :, 0].mean(dim=1)


# --- On AMD's CPUs the library behind PyTorch's float32 matrix products keeps to AVX2, while the one behind its convolutions
# uses AVX-512 where there is such: twice as fast there. Older PyTorch has other convolutions.
def _is_amd_cpu():
    try:
        with open("/proc/cpuinfo") as f:
            return "AuthenticAMD" in f.read()
    except OSError:
        return False


_LINEAR_BY_CONVOLUTION = _numbers(torch.__version__) >= (2, 4) and torch.backends.mkldnn.is_available() and _is_amd_cpu()


def linear(x, weight, bias=None):
    """torch.nn.functional.linear, (..., C_in) -> (..., C_out), as a 1x1 convolution where that is faster."""
    by_convolution = _LINEAR_BY_CONVOLUTION and x.device.type == "cpu" and x.dtype is torch.float32
    if not by_convolution or torch.is_autocast_enabled("cpu") or _is_exported():
        return nn.functional.linear(x, weight, bias)
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, C_in, rows, 1), channels last
    y = nn.functional.conv2d(rows, weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(x.shape[:-1] + weight.shape[:1])


# --- torch before 2.5 has no allow-list for what torch.load may build, so a restricted unpickler does the same.
def _safe_globals():
    """{(module, name): object} that a checkpoint may name beyond tensors: DeiT's family pickles its arguments and
    NumPy scalars."""
    import argparse

    import numpy as np
    scalar = np.float64(0).__reduce__()[0]
    allowed = {("argparse", "Namespace"): argparse.Namespace, ("numpy", "dtype"): np.dtype}
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed[(module, "scalar")] = scalar
    for dtype in (np.float64, np.float32, np.int64):
        cls = type(np.dtype(dtype))
        if cls is not np.dtype:  # NumPy 1.20 on: each dtype has a class
            allowed[(cls.__module__, cls.__name__)] = cls
    return allowed


def load_tensors(path):
    """torch.load on the CPU that builds tensors, plain values and argparse.Namespace, and refuses all else."""
    allowed = _safe_globals()
    if hasattr(torch.serialization, "safe_globals"):
        named = [(obj, "{}.{}".format(*name)) for name, obj in allowed.items()]
        with torch.serialization.safe_globals(named), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is odd about a file; what cannot be read raises
            return torch.load(path, map_location="cpu", weights_only=True)

    import pickle
    import types

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) in allowed:
                return allowed[(module, name)]
            plain = (module, name) in (("collections", "OrderedDict"), ("torch", "Size"), ("torch", "device"))
            tensor = module == "torch" and name.endswith("Storage") or (
                module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"))
            if plain or tensor:
                return super().find_class(module, name)
            raise pickle.UnpicklingError("it wants to run {}.{}".format(module, name))

    restricted = types.ModuleType("restricted_pickle")
    restricted.Unpickler = Unpickler
    restricted.load = lambda f, **kwargs: Unpickler(f, **kwargs).load()
    return torch.load(path, map_location="cpu", pickle_module=restricted)


# --- line 1.8: timm 0.4.12 still hands torchvision an interpolation by its number, of which torchvision warns.
warnings.filterwarnings("ignore", message="Argument interpolation should be of type InterpolationMode")


# --- torchvision 0.9 on names interpolations by an enum, older ones by Pillow's number.
def interpolation(name):
    """torchvision's value for the interpolation `name` (bicubic, bilinear, nearest)."""
    import torchvision.transforms as transforms
    if hasattr(transforms, "InterpolationMode"):
        return transforms.InterpolationMode(name)
    from PIL import Image
    return getattr(Image, name.upper())


# --- torch before 1.7 has no persistent data-loader workers.
def persistent_workers(num_workers):
    """Keyword arguments for a DataLoader that keeps its `num_workers` workers from epoch to epoch."""
    import inspect
    known = "persistent_workers" in inspect.signature(torch.utils.data.DataLoader.__init__).parameters
    return {"persistent_workers": True} if known and num_workers > 0 else {}


# --- current line: DistributedDataParallel's `broadcast_buffers` has a new name, and warns under the old one. PyTorch before
# 2.0 cannot be told reliably which parameters to leave alone, and looks for those without a gradient in every step.
def data_parallel(model, unused, device_ids, gradient_views):
    """`model` in a DistributedDataParallel that leaves its buffers alone, and the parameters named in `unused`, which have
    no gradient in any step. gradient_views: gradients lie in the buckets that are sent."""
    import inspect
    kind = torch.nn.parallel.DistributedDataParallel
    known = inspect.signature(kind.__init__).parameters
    options = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    if _numbers(torch.__version__) >= (2, 0):
        kind._set_params_and_buffers_to_ignore_for_model(model, unused)
        options["gradient_as_bucket_view"] = gradient_views
    else:
        options["find_unused_parameters"] = True
    return kind(model, device_ids=device_ids, **options)


# --- torch 1.5 has no autocast and no gradient scaler; torch before 1.10 has them for CUDA alone (and the vendor's NPU
# module its own); torch before 2.3 keeps the scaler in torch.cuda.amp.
def has_autocast(device_type):
    """Whether this PyTorch has mixed precision of its own on that device: autocast and, but for CPUs, a scaler."""
    if device_type == "cpu":
        return hasattr(torch, "autocast")
    amp = getattr(getattr(torch, device_type), "amp", None)
    return hasattr(amp, "autocast") and hasattr(amp, "GradScaler")


def autocast(device_type, dtype):
    """Context of mixed precision in `dtype`; older PyTorch knows fp16 alone."""
    if device_type == "npu":
        return torch.npu.amp.autocast(**({} if dtype is torch.float16 else {"dtype": dtype}))
    if hasattr(torch, "autocast"):
        return torch.autocast(device_type, dtype=dtype)
    return torch.cuda.amp.autocast()


def grad_scaler(device_type, fixed_scale=None):
    """A gradient scaler that adapts its scale; with `fixed_scale` it starts there, and torch_npu's stays there."""
    options = {} if fixed_scale is None else {"init_scale": fixed_scale}
    if device_type == "npu":
        return torch.npu.amp.GradScaler(dynamic=fixed_scale is None, **options)
    if hasattr(torch, "amp") and hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(device_type, **options)
    return torch.cuda.amp.GradScaler(**options)


# --- torch before 1.9 has no inference mode.
inference_mode = getattr(torch, "inference_mode", torch.no_grad)


# --- torch before 2.0 has no reliable operators on lists of tensors.
HAS_FOREACH = _numbers(torch.__version__) >= (2, 0)


def lerp_(starts, ends, weight):
    """starts += weight * (ends - starts), in place, for two lists of tensors."""
    if HAS_FOREACH:
        torch._foreach_lerp_(starts, ends, weight)
    else:
        for start, end in zip(starts, ends):
            start.lerp_(end, weight)


# --- torch before 2.4 has a fused AdamW for CUDA at most.
def fused_adamw(device_type):
    """Keyword arguments for a torch.optim.AdamW that updates all parameters in one kernel, where there is such a one."""
    known = device_type in ("cpu", "cuda") and _numbers(torch.__version__) >= (2, 4)
    return {"fused": True} if known else {}


# --- torch before 2.2 cannot compile a module in place.
def can_compile():
    """Whether `compile_module` works."""
    return hasattr(nn.Module, "compile")


def compile_module(module, device_type, fullgraph=True, frozen=False):
    """Lets `module` be compiled when it is first called. frozen: its weights never change, and it is called within
    `frozen_weights` alone. Returns it.

    On a CPU the compiler leaves memory formats alone: the rearrangements that it adds cost more than they bring.
    """
    # with its weights built in, code for several batch sizes goes wrong (torch 2.13)
    module.compile(fullgraph=fullgraph, dynamic=False if frozen else None,
                   options={"layout_optimization": False} if device_type == "cpu" else None)
    return module


@contextmanager
def frozen_weights(device_type):
    """Within it, what is compiled for a CPU without gradients has its weights built in, packed for its products."""
    if device_type == "cpu" and can_compile():
        import torch._inductor.config as inductor
        with inductor.patch(freezing=True):  # as an option of torch.compile it comes too late and does nothing
            yield
    else:
        yield


# --- channels-last is slower before torch 2.0 on a CPU, and an NPU has a format of its own.
def prefers_channels_last(device_type):
    """Whether convolutions are faster with images and weights in channels-last memory format."""
    return device_type in ("cpu", "cuda") and _numbers(torch.__version__) >= (2, 0)


# --- torch 1.5 writes its older file format unless told otherwise; the newer one carries checksums.
def save(checkpoint, file):
    """torch.save in the zip format, which every line reads."""
    torch.save(checkpoint, file, _use_new_zipfile_serialization=True)


# --- torch 1.5 has no torch.hub.get_dir().
def hub_dir():
    """Folder of what PyTorch's hub has downloaded ($TORCH_HOME/hub)."""
    if hasattr(torch.hub, "get_dir"):
        return torch.hub.get_dir()
    home = os.environ.get("TORCH_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "torch"))
    return os.path.join(os.path.expanduser(home), "hub")


# --- torch 1.5 lacks a device that safetensors' functions for PyTorch name; those for NumPy, on the other hand, know no bf16.
def load_safetensors(path):
    """({name: tensor}, {metadata}) of a safetensors file; raises ImportError where that package is not installed."""
    from safetensors import safe_open
    try:
        torch.device("meta")
        framework, convert = "pt", lambda tensor: tensor
    except RuntimeError:
        framework, convert = "np", torch.from_numpy
    with safe_open(path, framework) as f:
        return {name: convert(f.get_tensor(name)) for name in f.keys()}, f.metadata() or {}


# --- torch 1.5 writes ONNX that holds for one batch size. torch 2.9 on writes it in another way unless told
# otherwise, which needs further packages and the opset 18 or a newer one.
CAN_EXPORT_ONNX = _numbers(torch.__version__) >= (1, 8)
CAN_EXPORT_PT2 = _numbers(torch.__version__) >= (2, 2)
ONNX_OPSET = 11  # the oldest that has the operators: converters know it best


def export_onnx(model, images, file):
    """Writes `model`, in eval mode, to `file` as ONNX from `images` (B, 3, H, H) to `logits`, for any batch size B."""
    import inspect
    options = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python values that are fixed by tracing: token counts are meant to be
        torch.onnx.export(model, (images,), file, opset_version=ONNX_OPSET, input_names=["images"], output_names=["logits"],
                          dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}}, **options)


# --- torch 1.5 keeps further files in a map of its own, and cannot freeze.
def save_torchscript(model, images, file, extra_files):
    """Writes `model`, in eval mode and traced with `images`, to `file` as TorchScript, with {name: text} beside it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what tracing fixes, and that newer PyTorch prefers pt2
        traced = torch.jit.trace(model, images)
        if hasattr(torch.jit, "freeze"):
            traced = torch.jit.freeze(traced)
        else:
            files = torch._C.ExtraFilesMap()
            for name, content in extra_files.items():
                files[name] = content
            extra_files = files
        torch.jit.save(traced, file, _extra_files=extra_files)


def load_torchscript(path):
    """torch.jit.load, without the word that newer PyTorch prefers pt2."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(path)
