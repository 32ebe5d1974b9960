"""What the wheel of torch_npu 2.13.0 says of itself, read as text: it cannot be imported without the Ascend toolkit."""
import re

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
