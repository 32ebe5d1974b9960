"""Which precision a run gets, and which wishes are refused."""
import sys
import types

import pytest
import torch

import announce
from runtime.errors import UserError
from runtime.machine import precision
from runtime.machine.precision import build_precision, parse_loss_scale

CPU = torch.device("cpu")
CARD = types.SimpleNamespace(type="cuda")  # nothing is computed on it


@pytest.fixture(params=["with apex", "without apex"])
def apex(request, monkeypatch):
    amp = types.SimpleNamespace() if request.param == "with apex" else None
    monkeypatch.setattr(precision, "_import_apex", lambda: amp)
    return amp


def test_a_cpu_computes_in_float32_unless_asked():
    for arguments in ((), ("auto", "O0"), ("none",), ("native", "O0")):
        chosen = build_precision(CPU, *arguments)
        assert (chosen.name, chosen.backend, chosen.state_dict()) == ("float32", "none", {})


@pytest.mark.skipif(not hasattr(torch, "autocast"), reason="this PyTorch has no bf16 on a CPU")
def test_a_cpu_computes_in_bf16_when_asked():
    for arguments in (("auto", "O1"), ("native",), ("native", "O1")):
        with build_precision(CPU, *arguments).autocast():
            assert (torch.randn(2, 2) @ torch.randn(2, 2)).dtype == torch.bfloat16
            assert torch.randn(2, 2).softmax(1).dtype == torch.float32


@pytest.mark.parametrize("dtype, in_bf16, named", [
    (torch.bfloat16, 5e9, True), (torch.bfloat16, 140e9, False), (None, 70e9, False)])
def test_a_format_that_is_slower_than_float32_is_named(dtype, in_bf16, named, monkeypatch):
    rates = {torch.bfloat16: in_bf16, None: 70e9}
    monkeypatch.setattr(announce, "measure_matmul_rate", lambda device, dtype=None: rates[dtype])
    said = []
    machine = types.SimpleNamespace(device=CPU, say=said.append, precision=types.SimpleNamespace(
        dtype=dtype, name="bf16 mixed (native O1)"))
    assert announce.measure_rate(machine) == rates[dtype]
    assert said == ["Note: this processor has no fast bf16: its matrix products reach 5 GFLOP/s, those in float32 70; "
                    "--opt-level O0 trains in float32"] * named


@pytest.mark.skipif(hasattr(torch, "autocast"), reason="this PyTorch has bf16 on a CPU")
def test_an_old_torch_says_that_it_has_no_bf16_on_a_cpu():
    with pytest.raises(UserError, match="no mixed precision of its own on the cpu"):
        build_precision(CPU, "auto", "O1")


@pytest.mark.parametrize("device, arguments, sentence", [
    (CPU, ("auto", "O2"), "--opt-level O2 needs an NPU or a CUDA device"),
    (CPU, ("apex",), "--amp-backend apex needs an NPU or a CUDA device"),
    (CPU, ("none", "O1"), "--amp-backend none computes in float32 and --opt-level O1 does not"),
    (CPU, ("auto", None, 128.0), "--loss-scale has no use in float32"),
    (CPU, ("auto", "O1", 128.0), "--loss-scale has no use in bf16"),
    (CARD, ("native", "O2"), "O2 is apex's; use --opt-level O1, or install apex and add --amp-backend apex"),
    (CARD, ("auto", "O0", "dynamic"), "--loss-scale has no use in float32"),
])
def test_what_does_not_go_together_is_refused(device, arguments, sentence, apex):
    with pytest.raises(UserError, match=sentence):
        build_precision(device, *arguments)


def test_apex_is_used_where_it_is_asked_for_and_refused_where_it_is_missing(apex):
    if apex is None:
        with pytest.raises(UserError, match="apex is not installed here; install NVIDIA's apex"):
            build_precision(CARD, "apex")
        with pytest.raises(UserError, match="O2 is apex's; use --opt-level O1"):
            build_precision(CARD, "auto", "O2")
    else:
        for level in ("O1", "O2"):
            chosen = build_precision(CARD, "apex", level, 64.0)
            assert (chosen.backend, chosen.name) == ("apex", "fp16 mixed (apex {}, loss scale 64.0)".format(level))


def test_an_npu_takes_apex_if_it_is_installed_and_else_its_own(apex, monkeypatch):
    npu = types.SimpleNamespace(type="npu")
    scalers = []
    amp = types.SimpleNamespace(autocast=object, GradScaler=lambda **options: scalers.append(options) or object())
    monkeypatch.setattr(torch, "npu", types.SimpleNamespace(amp=amp), raising=False)
    for scale, expected in ((None, 128.0), ("dynamic", "dynamic"), (64.0, 64.0)):
        chosen = build_precision(npu, "auto", None, scale)
        assert chosen.backend == ("native" if apex is None else "apex")
        assert "loss scale {}".format(expected) in chosen.name
    if apex is None:
        assert scalers == [{"init_scale": 128.0, "dynamic": False}, {"dynamic": True},
                           {"init_scale": 64.0, "dynamic": False}]


def test_the_torch_1_5_of_a_server_needs_apex(monkeypatch):
    """Its torch.npu has no amp."""
    monkeypatch.setattr(torch, "npu", types.SimpleNamespace(), raising=False)
    monkeypatch.setattr(precision, "_import_apex", lambda: None)
    with pytest.raises(UserError,
            match="no mixed precision of its own on the npu; install apex, or use --opt-level O0"):
        build_precision(types.SimpleNamespace(type="npu"))


@pytest.mark.parametrize("text", ["0", "-1", "fast", "inf", "nan"])
def test_a_loss_scale_is_dynamic_or_a_positive_number(text):
    assert parse_loss_scale("dynamic") == "dynamic" and parse_loss_scale("128") == 128.0
    with pytest.raises(ValueError):
        parse_loss_scale(text)


def test_nvidias_apex_is_not_asked_for_combine_grad():
    calls = []

    def initialize(models, optimizers=None, opt_level="O1", loss_scale=None, verbosity=1):
        calls.append((opt_level, loss_scale))
        return models if optimizers is None else (models, optimizers)

    chosen = precision.ApexPrecision(types.SimpleNamespace(initialize=initialize), "O1", 128.0)
    assert chosen.prepare("model", "optimizer", "teacher") == ("model", "optimizer")
    assert chosen.prepare("model") == ("model", None) and calls == [("O1", 128.0)] * 2
    assert "apex" not in sys.modules
