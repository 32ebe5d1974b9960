"""A network written in ONNX."""
import inspect
import io
import warnings

import torch
from torch import nn

# --- torch 1.5 writes ONNX that holds for one batch size. torch 2.9 on writes it in another way unless told
# otherwise, which needs further packages and the opset 18 or a newer one.
_OPTIONS = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
OLDEST_TORCH = (1, 8)  # for any batch size


def onnx_bytes(model: nn.Module, images: torch.Tensor, opset: int) -> bytes:
    """The eval-mode `model` in ONNX, traced with `images` (B, 3, H, W): "images" of any batch size -> "logits". Raises
    whatever the exporter raises for a network that it does not know."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python values that are fixed by tracing: token counts are meant to be
        torch.onnx.export(model, (images,), content, opset_version=opset, input_names=["images"],
             output_names=["logits"], dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}}, **_OPTIONS)
    return content.getvalue()
