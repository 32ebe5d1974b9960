"""A network in int8 on a CPU, by ONNX Runtime: convolutions and linear maps, calibrated on pictures it is to see."""
import hashlib
import logging
import os
import tempfile
import warnings
from contextlib import contextmanager
from typing import List

import numpy as np
import torch
from torch import nn

from ..errors import UserError
from ..machine.onnx_bytes import onnx_bytes

_OPSET = 13  # the oldest with a scale for each channel
_IR = 8  # the file format, which ONNX Runtime 1.10 and newer read
_VERSION = 2  # of what `quantize` makes of the same weights


class Quantized(nn.Module):
    """float32 images (B, 3, H, W) on the CPU -> logits (B, classes), by the int8 network of `quantize`.

    macs: multiply-adds of an image, which no layer inside shows.
    """

    def __init__(self, content: bytes, macs: int):
        super().__init__()
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the student's threads come next
        self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.macs = lambda images: macs * len(images)

    def forward(self, images):
        return torch.from_numpy(self.session.run(["logits"], {"images": images.contiguous().numpy()})[0])


def fingerprint(model: nn.Module, batches: List[torch.Tensor], exact: bool) -> str:
    """What tells the int8 network that `quantize` makes of the same arguments from another."""
    import onnxruntime
    digest = hashlib.sha256("{} {} {} {} {}".format(_VERSION, _OPSET, onnxruntime.__version__, _weights(exact),
                                                    model).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    for batch in batches:
        digest.update(batch.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def _quiet():
    """Without ONNX Runtime's advice."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)


def adds_exactly() -> bool:
    """Whether this processor's sums of unsigned times signed bytes are exact: with instructions for them they are, and
    fast; without, pairs of products overflow 16 bits."""
    import onnxruntime
    from onnx import TensorProto, helper
    sizes = {"x": (TensorProto.UINT8, [16, 64]), "weight": (TensorProto.INT8, [64, 16]),
             "sums": (TensorProto.INT32, [16, 16])}
    x, weight, sums = (helper.make_tensor_value_info(name, *size) for name, size in sizes.items())
    product = helper.make_node("MatMulInteger", ["x", "weight"], ["sums"])
    graph = helper.make_graph([product], "sums", [x, weight], [sums])
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
    session = onnxruntime.InferenceSession(content.SerializeToString(), providers=["CPUExecutionProvider"])
    found, = session.run(None, {"x": np.full((16, 64), 255, np.uint8), "weight": np.full((64, 16), -128, np.int8)})
    return bool((found == 64 * 255 * -128).all())


# --- where sums are not exact, weights have no sign, which takes longer; ONNX Runtime before 1.23 gives them one all
# the same (seen in 1.14 and 1.19), so there they have seven bits.
def _weights(exact) -> dict:
    """How weights are written in eight bits, as quantize_static's arguments."""
    import onnxruntime
    from onnxruntime.quantization import QuantType
    if exact:
        return dict(weight_type=QuantType.QInt8)
    if tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) < (1, 23):
        return dict(weight_type=QuantType.QInt8, reduce_range=True)
    return dict(weight_type=QuantType.QUInt8)


def _simplified(path: str, to: str) -> str:
    """Writes the network of one ONNX file into another without what nothing needs, as the detours by which equal biases
    are shared: a convolution whose bias takes one stays in float32. Returns `to`."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = to
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return to


def quantize(model: nn.Module, batches: List[torch.Tensor], exact: bool) -> bytes:
    """The eval-mode float32 `model` in int8, as ONNX. batches: pictures as it is to see them, (B, 3, H, W) each, from
    which the range of every activation is taken. exact: whether adds_exactly wherever it will run. Raises UserError
    where it cannot be written."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        """Gives the batches one by one."""

        def __init__(self):
            self.left = iter(batches)

        def get_next(self):
            return next(({"images": batch.contiguous().numpy()} for batch in self.left), None)

    with tempfile.TemporaryDirectory() as folder, _quiet():
        plain, simple, small = (os.path.join(folder, name) for name in ("float32.onnx", "simple.onnx", "int8.onnx"))
        try:
            with open(plain, "wb") as f:
                f.write(onnx_bytes(model, batches[0][:2], _OPSET))
            quantize_static(_simplified(plain, simple), small, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                            activation_type=QuantType.QUInt8, **_weights(exact))
        except Exception as error:  # whatever either raises for a network that it does not know
            raise UserError("--teacher-precision int8: the teacher cannot be written in int8 ({}); use bf16 or float32"
                            .format(" ".join(str(error).split())[:160] or type(error).__name__))
        with open(small, "rb") as f:
            return f.read()
