"""What the wheels of torch_npu say of themselves, read as text: they cannot be imported without the Ascend toolkit."""
import ast
import re
import subprocess
import sys
import zipfile

# the newest of each version, and a Python that it is built for
WHEELS = [("2.1.0.*", "3.8"), ("2.5.1.*", "3.9"), ("2.7.1.*", "3.10"), ("2.13.0", "3.11"), ("2.14.0", "3.11")]
_PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_28_x86_64")

# {file: [(function or class, its method or None, arguments that runtime/ gives it by name or by place)]}
_USED = {
    "npu/utils.py": [("set_device", None, ["device"]), ("synchronize", None, ["device"])],
    "npu/memory.py": [("max_memory_allocated", None, ["device"])],
    "npu/random.py": [("manual_seed_all", None, ["seed"])],
    "npu/npu_config.py": [("set_option", None, ["option"])],
    "npu/streams.py": [("Event", "record", ["self"]), ("Event", "synchronize", ["self"])],
    "npu/amp/grad_scaler.py": [
        ("GradScaler", "__init__", ["init_scale", "dynamic"]), ("GradScaler", "scale", ["outputs"]),
        ("GradScaler", "unscale_", ["optimizer"]), ("GradScaler", "step", ["optimizer"]),
        ("GradScaler", "update", ["new_scale"]), ("GradScaler", "state_dict", []),
        ("GradScaler", "load_state_dict", ["state_dict"])],
    "npu/amp/autocast_mode.py": [("autocast", "__init__", ["enabled", "dtype", "cache_enabled"])],
    "optim/npu_fused_adamw.py": [
        ("NpuFusedAdamW", "__init__", ["params", "lr", "betas", "eps", "weight_decay", "amsgrad"])],
}
# {file: what it says}; several files: one of them
_SAID = [
    (("npu/__init__.py",), ['"{}"'.format(name) for name in (
        "is_available", "device_count", "set_device", "set_option", "synchronize", "max_memory_allocated",
        "manual_seed_all", "Event")]),
    (("npu/amp/__init__.py",), ["autocast", "GradScaler"]),
    (("npu/npu_config.py",), ["ACL_OP_COMPILER_CACHE_MODE", "ACL_OP_COMPILER_CACHE_DIR"]),
    (("optim/npu_fused_optim_base.py",), ["is_fused_optimizer = True"]),
    (("optim/__init__.py",), ["from .npu_fused_adamw import NpuFusedAdamW"]),
    (("_init/registry/distributed.py", "__init__.py"), ['"hccl"']),
    (("_init/core/_exports.py", "__init__.py"), ["torch_npu.npu.amp"]),  # which makes torch.npu.amp
]


def download(folder, version, python):
    """(the opened wheel of torch_npu `version`, a function that gives the text of one of its files)."""
    platforms = [word for platform in _PLATFORMS for word in ("--platform", platform)]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest",
                    str(folder), "--python-version", python] + platforms + ["torch_npu==" + version], check=True,
                   timeout=900)
    wheel = zipfile.ZipFile(str(next(folder.glob("torch_npu-{}*.whl".format(version.rstrip(".*"))))))
    return wheel, lambda path: wheel.read(path).decode()


def _arguments(source, name, method):
    """Names of the arguments of a function or of a class's method; None where there is none."""
    nodes = [node for node in ast.parse(source).body if getattr(node, "name", None) == name]
    if method:
        nodes = [node for parent in nodes for node in parent.body if getattr(node, "name", None) == method]
    return [argument.arg for argument in nodes[0].args.args] if nodes else None


def missing(wheel, read):
    """What runtime/ uses of torch_npu and this wheel does not have, each as a text; [] for nothing."""
    files, found = set(wheel.namelist()), []
    for path, uses in _USED.items():
        for name, method, wanted in uses:
            given = _arguments(read("torch_npu/" + path), name, method) if "torch_npu/" + path in files else None
            if given is None or not set(wanted) <= set(given):
                found.append("{}: {} {} {} has {}".format(path, name, method or "", wanted, given))
    for paths, texts in _SAID:
        said = "".join(read("torch_npu/" + path) for path in paths if "torch_npu/" + path in files)
        found += ["{}: {}".format(paths[0], text) for text in texts if text not in said]
    return found


OPERATOR_FILES = ("torch_npu/csrc/aten/npu_native_functions.yaml",
                  "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml")


def base(operator):
    """add of add.out, add_.Tensor and add: torch_npu registers one form of an operator and PyTorch derives others."""
    return operator.split(".")[0].rstrip("_")


def supported_operators(read):
    """Base names of the operators listed as supported; `read(path)` gives the text of a file of the wheel."""
    names = set()
    for path in OPERATOR_FILES:
        section = None
        for line in read(path).splitlines():
            header = re.match(r"(\w+):", line)
            if header:
                section = header.group(1)
            entry = re.match(r"\s*-?\s*(?:func: )?(\w+)(?:\.\w+)?(?:\(.*)?$", line)
            if section == "supported" and entry and re.match(r"\s*(?:-|\s+func:)", line):
                names.add(base(entry.group(1)))
    return names
