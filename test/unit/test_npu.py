"""The NPU's path, on a stand-in: a device that PyTorch dispatches to under the name npu (npu_double/).

The stand-in needs the device extension points of PyTorch 2.1 and newer, a C++ compiler and ninja.
"""
import functools
import json
import os
import shutil
import sys
import types

import commands
import pytest
import torch
import torch_npu_wheel
from torch_npu_wheel import base

from evo_vit import compat
from runtime.errors import UserError
from runtime.machine import compiling

HERE = os.path.dirname(os.path.abspath(__file__))
DOUBLE = os.path.join(HERE, "npu_double")
pytestmark = pytest.mark.skipif(not hasattr(torch.utils, "rename_privateuse1_backend"),
                                reason="this PyTorch has no extension points for a device of another package")

# the stand-in computes by PyTorch's CPU kernels
FP16 = compat.TORCH >= (2, 5)
needs_fp16 = pytest.mark.skipif(not FP16, reason="this PyTorch's CPU kernels, which the stand-in runs, know no fp16")


def with_double(cards=1):
    """Environment in which torch_npu and apex are the stand-ins, with so many cards."""
    return {"PYTHONPATH": DOUBLE, "NPU_DOUBLE_COUNT": str(cards), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module", autouse=True)
def built_double():
    """The extension is compiled once, before any test's time runs."""
    assert shutil.which("c++") or shutil.which("g++"), "the stand-in for the NPU needs a C++ compiler (g++)"
    code, out, err = commands.run([sys.executable, "-c", "import torch_npu"], env=with_double())
    assert code == 0, out + err


@functools.lru_cache(maxsize=None)
def steps(device, *arguments):
    """What npu_steps.py reports."""
    code, out, err = commands.helper("npu_steps", device, *arguments, env=with_double())
    assert code == 0, out + err
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def on_cpu():
    return steps("cpu", "none", "-", "-")


def listed_operators(version):
    """Names of the operators that torch_npu `version` supports, taken from its wheel."""
    with open(os.path.join(HERE, "data", "torch_npu_{}_operators.txt".format(version))) as f:
        return set(f.read().split())


def total(norms):
    return sum(norm ** 2 for norm in norms.values()) ** 0.5


def test_steps_on_the_npu_equal_those_on_the_cpu(on_cpu):
    npu = steps("npu", "none", "-", "-")
    assert npu["optimizer"] == "torch_npu.optim" and on_cpu["optimizer"].startswith("torch.optim")
    differences = [abs(a - b) for a, b in zip(npu["losses"], on_cpu["losses"])]
    # AdamW makes whole steps out of gradients that are rounding
    assert differences[0] < 2e-6 and max(differences) < 5e-5
    for step, (ours, theirs) in enumerate(zip(npu["gradients"], on_cpu["gradients"])):
        allowed = 1e-6 if step == 0 else 1e-4  # of the whole; later steps start from weights that differ by rounding
        assert set(ours) == set(theirs) and max(abs(ours[k] - theirs[k]) for k in ours) < allowed * total(theirs), step
    # where a gradient is nothing but rounding, AdamW still moves by the learning rate, in either direction
    noise = {k for k, norm in on_cpu["gradients"][0].items() if norm < 1e-6}
    weights = [report["weights"][0] for report in (npu, on_cpu)]
    assert len(noise) < len(weights[0]) / 4
    for k in weights[0]:
        assert abs(weights[0][k] - weights[1][k]) < (1e-3 if k in noise else 1e-5 * max(1, weights[1][k])), k


def test_a_step_reads_only_the_loss_and_uses_only_operators_that_torch_npu_supports():
    supported = listed_operators({(2, 1): "2.1.0", (2, 5): "2.5.1"}.get(compat.TORCH, "2.13.0"))
    assert len(supported) > 400
    for arguments, allowed in ((("none", "-", "-"), 1), (("native", "O1", "-"), 1), (("native", "O1", "dynamic"), 2),
                               (("apex", "O1", "-"), 1))[:None if FP16 else 1]:
        report = steps("npu", *arguments)
        print(arguments, "waits per step", report["syncs"], "operators:",
              " ".join(sorted(map(base, report["operators"]))))
        assert max(report["syncs"]) <= allowed and min(report["syncs"]) >= 1, arguments
        assert set(report["to_host"]) == {0}
        assert not {op for op in report["operators"] if base(op) not in supported}
        assert len(report["operators"]) > 30


def test_a_fused_optimizer_trains_the_tradeoffs_that_get_their_first_gradient_late(on_cpu):
    def moved(report, before, after):
        weights = report["weights"]
        return {name for name in weights[after] if name.endswith("learn_tradeoff")
                and weights[after][name] != weights[before][name]}

    npu = steps("npu", "none", "-", "-")
    # those of other blocks have gradients of 1e-11, mere rounding
    trained = {name for name, norm in on_cpu["gradients"][3].items() if name.endswith("learn_tradeoff") and norm > 1e-6}
    assert trained <= moved(npu, 2, 4) and trained <= moved(on_cpu, 2, 4) and len(trained) > 1
    assert moved(npu, 0, 2) == moved(on_cpu, 0, 2) == set()


@needs_fp16
@pytest.mark.parametrize("arguments, name, tolerance", [
    pytest.param(("native", "O1", "128"), "fp16 mixed (native O1, loss scale 128.0)", 5e-3, marks=pytest.mark.slow),
    (("apex", "O1", "128"), "fp16 mixed (apex O1, loss scale 128.0)", 5e-3),
])
def test_mixed_precision_agrees_with_float32_within_rounding(on_cpu, arguments, name, tolerance):
    report = steps("npu", *arguments)
    assert report["precision"] == name
    assert report["lr"] == on_cpu["lr"] and report["scales"] == [128.0] * 5
    for ours, theirs in zip(report["losses"], on_cpu["losses"]):
        assert abs(ours / theirs - 1) < tolerance
        assert ours != theirs  # it did compute in fp16
    assert abs(total(report["gradients"][4]) / total(on_cpu["gradients"][4]) - 1) < tolerance
    assert abs(total(report["weights"][4]) / total(on_cpu["weights"][4]) - 1) < 1e-4


@needs_fp16
@pytest.mark.slow
def test_apex_o2_agrees_with_float32_within_rounding(on_cpu):
    report = steps("npu", "apex", "O2", "128")
    assert report["precision"] == "fp16 mixed (apex O2, loss scale 128.0)"
    assert report["lr"] == on_cpu["lr"] and report["scales"] == [128.0] * 5
    assert abs(total(report["weights"][4]) / total(on_cpu["weights"][4]) - 1) < 1e-4
    # AdamW's first steps follow the signs of the gradients, which rounding turns where they are small: losses tell of
    # rounding alone at a learning rate that leaves the weights where they are
    resting = [steps(*(arguments + ("-", "1e-6")))["losses"] for arguments in
               (("npu", "apex", "O2", "128"), ("cpu", "none", "-", "-"))]
    for ours, theirs in zip(*resting):
        assert 0 < abs(ours / theirs - 1) < 5e-3


def test_bf16_on_the_cpu_agrees_with_float32_within_rounding(on_cpu):
    report = steps("cpu", "auto", "O1", "-")
    assert report["precision"] == "bf16 mixed (native O1)" and report["scales"] == [None] * 5
    for ours, theirs in zip(report["losses"], on_cpu["losses"]):
        assert 0 < abs(ours / theirs - 1) < 3e-2


@needs_fp16
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["native", "apex"])
def test_an_overflow_is_skipped_and_the_scale_halved(backend):
    report = steps("npu", backend, "O1", "dynamic", "1")
    weights, scales = report["weights"], report["scales"]
    # at 2 ** 16, where the scale starts, the first step overflows by itself; the second is made to
    assert weights[1] == weights[0] != weights[2] != weights[3]
    assert [scale / 2 ** 16 for scale in scales] == [0.5, 0.25, 0.25, 0.25, 0.25]
    assert report["losses"][1] > 1e29 and all(0 < loss < 100 for i, loss in enumerate(report["losses"]) if i != 1)


def test_the_scale_grows_again_after_steps_without_an_overflow():
    """The growth interval is PyTorch's, 2,000 steps; here it is set to two."""
    script = ("import evo_vit, torch, torch_npu; from runtime.machine.precision import build_precision\np = "
        "build_precision(torch.device('npu', 0), 'native', 'O1', 'dynamic'); p._scaler.set_growth_interval(2)\nw = "
        "torch.nn.Linear(4, 1).to('npu'); o = torch.optim.SGD(w.parameters(), 1e-3); scales = []\nfor factor in (1, "
        "1e38, 1, 1, 1, 1):\n    o.zero_grad(); p.backward(w(torch.ones(2, 4).to('npu')).sum() * factor, o); p.step(w, "
        "o)\n    scales.append(p.loss_scale / 2 ** 16)\nprint(scales)")
    code, out, err = commands.run([sys.executable, "-c", script], env=with_double())
    assert code == 0, err
    assert json.loads(out) == [1, 0.5, 0.5, 1, 1, 2]


@needs_fp16
def test_apex_is_called_as_ascend_documents_it():
    report = steps("npu", "auto", "-", "-")
    assert report["precision"].startswith("fp16 mixed (apex O1, loss scale 128")
    assert report["optimizer"] == "apex.optimizers"
    assert report["apex_calls"][0] == ["initialize", {"opt_level": "O1", "loss_scale": 128.0, "combine_grad": True}]
    assert [name for name, _ in report["apex_calls"][1:]] == ["scale_loss", "master_params"] * 5


def test_the_double_refuses_what_a_card_refuses():
    script = ("import torch, torch_npu\non, off = torch.randn(4, 4).to('npu'), torch.randn(4, 4)\nbad = [lambda: on + "
        "off, lambda: on @ off, lambda: torch.nn.Conv2d(4, 4, 1).to('npu')(torch.randn(1, 4, 2, 2)),\n       lambda: "
        "on.double(), lambda: on.nonzero(), lambda: on[on > 0],\n       lambda: on.t().gather(1, torch.zeros(4, 1, "
        "dtype=torch.int64).to('npu')), lambda: on.to('npu:1'),\n       lambda: torch.nn.functional."
        "scaled_dot_product_attention(*[torch.ones(1, 1, 4, n).to('npu') for n in (4, 4, 8)])]\n"
        "for call in bad:\n    try: call()\n    except "
        "(RuntimeError, NotImplementedError): print('refused')\nprint(on.device, (on * 2).sum().device, "
        "torch.equal((on @ on).cpu(), on.cpu() @ on.cpu()))")
    code, out, err = commands.run([sys.executable, "-c", script], env=with_double())
    assert code == 0, err
    assert out.split("\n")[:-1] == ["refused"] * 9 + ["npu:0 npu:0 True"]


def test_a_step_has_few_operators_to_launch(tmp_path):
    """PERFORMANCE.md, which other versions of PyTorch exceed by a few dozen."""
    code, out, err = commands.run(
        [sys.executable, commands.ROOT + "/benchmark.py", "operators", "--device", "npu", "--input-size", "64",
         "--batch-size", "4", "--json", tmp_path / "figures.json"], env=with_double())
    assert code == 0, out + err
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [row["host_waits"] for row in rows] == [1, 1, 0]
    assert all(row["operators"] <= limit for row, limit in zip(rows, (1620, 1380, 380))), out
    assert not any("scaled_dot_product" in name for row in rows for name in row["list"])


def test_a_report_is_named_by_the_card():
    code, out, err = commands.run([sys.executable, "-c", "import torch, torch_npu; from bench.report import "
        "machine_name; print(machine_name(torch.device('npu', 0)))"], env=with_double())
    assert (code, out) == (0, "Ascend stand-in\n"), err


SMALL = ["--num_workers", "1", "--input-size", "64", "--batch-size", "32", "--model", "EvoLeViT_128S"]


@needs_fp16
@pytest.mark.slow
def test_main_trains_resumes_and_evaluates_on_the_npu(digit_folder, teacher, tmp_path):
    out = tmp_path / "save"
    flags = ["--teacher-model", "regnety_002", "--teacher-path", teacher, "--data_path", digit_folder,
             "--stage-wise-epoch", 1, "--output_dir", out]
    printed = commands.succeed("--epochs", 2, *flags, small=SMALL, env=with_double())
    assert "Device: npu x 1, precision fp16 mixed (apex O1, loss scale 128.0)" in printed
    checkpoint = torch.load(str(out / "checkpoint.pth"), map_location="cpu", weights_only=True)
    assert checkpoint["amp_backend"] == "apex" and checkpoint["scaler"]["loss_scaler0"]["loss_scale"] == 128.0
    assert {t.device.type for t in checkpoint["model"].values()} == {"cpu"}
    resumed = commands.succeed("--epochs", 3, "--resume", out / "checkpoint.pth", "--amp-backend", "native", *flags,
                               small=SMALL, env=with_double())
    assert "Epoch 2 (stage-wise)" in resumed and "native O1" in resumed
    with open(str(out / "log.txt")) as f:
        last = json.loads(f.read().splitlines()[-1])
    assert last["loss_scale"] == 128.0 and last["peak_memory_mb"] > 1
    on_npu = commands.succeed("--eval", "--resume", out / "checkpoint.pth", small=[], env=with_double())
    on_cpu = commands.succeed("--eval", "--resume", out / "checkpoint.pth", small=["--device", "cpu"])
    assert "Device: npu" in on_npu and "Device: cpu" in on_cpu and "60 images" in on_npu
    losses = [float(text.split("loss ")[-1].split()[0]) for text in (on_npu, on_cpu)]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


@needs_fp16
@pytest.mark.slow
def test_two_processes_train_over_hccl_and_stay_identical(digit_folder, tmp_path):
    script = ("import sys, torch, main\nmodel = main.main(sys.argv[2:])\nimport os; torch.save({k: p.detach().cpu() "
        "for k, p in model.named_parameters()}, sys.argv[1] + os.environ['RANK'])\n")
    (tmp_path / "keep.py").write_text("import sys; sys.path.insert(0, {!r})\n".format(commands.ROOT) + script)
    code, out, err = commands.run(
        commands.launchers(2)["torchrun"] + [tmp_path / "keep.py", tmp_path / "rank"] + SMALL[2:] +
        ["--num_workers", 0, "--distillation-type", "none", "--data_path", digit_folder, "--epochs", 2,
         "--stage-wise-epoch", 1, "--output_dir", tmp_path / "save"],
        env=dict(with_double(2), TORCH_DEVICE_BACKEND_AUTOLOAD="0"))
    assert code == 0, out + err
    assert "Device: npu x 2" in out
    first, second = (torch.load(str(tmp_path / "rank{}".format(rank)), weights_only=True) for rank in (0, 1))
    assert first and all(torch.equal(first[name], second[name]) for name in first)


def test_more_processes_than_cards_are_refused(digit_folder):
    code, out, err = commands.run([sys.executable, commands.MAIN, "--device", "npu", "--device_id", 1, "--data_path",
                                   digit_folder], env=with_double(1))
    assert (code, out) == (2, "")
    assert err == "error: there is 1 npu device here, too few for 1 process from card 1 on; start one process a card\n"


def test_torch_npu_that_does_not_load_is_named_once(digit_folder, tmp_path):
    """As on a machine without the toolkit: importing torch_npu fails for a library that is not there."""
    package = tmp_path / "torch_npu"
    package.mkdir()
    (package / "__init__.py").write_text(
        "raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')\n")
    env = {"PYTHONPATH": str(tmp_path)}
    flags = ["--distillation-type", "none", "--epochs", 1, "--max-steps", 1, "--data_path", digit_folder,
        "--output_dir", tmp_path / "save"]
    code, out, err = commands.run([sys.executable, commands.MAIN, "--device", "npu"] + SMALL + flags, env=env)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("error: --device npu: torch_npu does not load (libhccl.so") and "set_env.sh" in err
    auto = commands.succeed(*flags, small=SMALL, env=env)
    assert auto.startswith("Note: no NPU is used: torch_npu does not load (libhccl.so") and auto.count("libhccl") == 1
    assert "libhccl" not in commands.succeed("--device", "cpu", *flags, small=SMALL, env=env)


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("version, python", torch_npu_wheel.WHEELS)
def test_the_names_that_are_used_of_torch_npu_stand_in_its_wheels(version, python, tmp_path):
    wheel, read = torch_npu_wheel.download(tmp_path, version, python)
    assert torch_npu_wheel.missing(wheel, read) == []
    operators = torch_npu_wheel.supported_operators(read)
    assert listed_operators(version.rstrip(".*")) == operators if version in ("2.1.0.*", "2.5.1.*", "2.13.0") else (
        listed_operators("2.5.1") & listed_operators("2.13.0") <= operators)


@pytest.mark.slow
def test_the_real_torch_npu_without_a_toolkit(digit_folder, tmp_path):
    """The wheel unpacked beside PyTorch leaves the CPU usable, is named where it is not used, and refused where it is
    asked for."""
    version, python = next(w for w in torch_npu_wheel.WHEELS if w[0].startswith("{}.{}.".format(*compat.TORCH)))
    wheel, _ = torch_npu_wheel.download(tmp_path, version, python)
    venv = tmp_path / "site"
    wheel.extractall(str(venv))
    env = {"PYTHONPATH": str(venv)}
    code, _, err = commands.run([sys.executable, "-c", "import torch"], env=env)
    if compat.TORCH >= (2, 5):
        assert code != 0 and "torch_npu" in err, "the wheel's auto-loading no longer makes `import torch` fail"
    flags = ["--distillation-type", "none", "--epochs", 1, "--max-steps", 1, "--data_path", digit_folder,
        "--output_dir", tmp_path / "save"]
    for device in ("cpu", "auto"):
        printed = commands.succeed("--device", device, *flags, small=SMALL, env=env)
        assert "Device: cpu x 1" in printed
        assert printed.count("no NPU is used: torch_npu does not load") == (device == "auto")
    code, out, err = commands.run([sys.executable, commands.MAIN, "--device", "npu"] + SMALL + flags, env=env)
    assert (code, out) == (2, "") and err.count("\n") == 1 and "set_env.sh" in err


@pytest.mark.slow
def test_compiled_models_are_whole_graphs_of_static_shapes_for_torchair():
    """One graph forwards and one backwards, in both modes of both families, with nothing in them that waits for the
    device; the stand-in of torchair refuses such graphs."""
    code, out, err = commands.helper("npu_compiled", "npu", env=with_double())
    assert code == 0, out + err
    report = json.loads(out.splitlines()[-1])
    print(report)
    assert len(report) == 4
    for case, found in report.items():
        assert found["graphs"] == 2 and found["devices"] == ["npu"] and found["operators"] > 100, (case, found)
        assert found["difference"] < 1e-5 and found["gradients"] < 1e-4, (case, found)


@pytest.mark.parametrize("version, modules, variable, expected", [
    ((2, 1), {"torchair"}, None, "torchair"),
    ((2, 6), {"torchair", "torch_npu._inductor", "triton"}, "mlir", "torchair"),
    ((2, 7), {"torchair", "torch_npu._inductor"}, None, "torchair"),
    ((2, 7), {"torchair", "torch_npu._inductor"}, "mlir", "inductor"),
    ((2, 9), {"torch_npu._inductor", "triton"}, None, "inductor"),
    ((2, 9), {"torch_npu._inductor"}, None, None),
    ((2, 1), set(), None, None)])
def test_the_compiler_of_an_npu_is_the_one_that_is_installed(version, modules, variable, expected, monkeypatch):
    monkeypatch.setattr(compiling, "TORCH", version)
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: name if name in modules else None)
    fake = types.SimpleNamespace(CompilerConfig=dict, get_npu_backend=lambda compiler_config: "torchair")
    monkeypatch.setitem(sys.modules, "torchair", fake)
    monkeypatch.delenv("TORCHINDUCTOR_NPU_BACKEND", raising=False)
    if variable:
        monkeypatch.setenv("TORCHINDUCTOR_NPU_BACKEND", variable)
    if expected is None:
        with pytest.raises(UserError, match="nothing here compiles for an NPU; install triton-ascend"):
            compiling._npu_backend()
    else:
        assert compiling._npu_backend() == expected


def test_the_cards_are_those_that_the_runtime_shows(tmp_path):
    command = [sys.executable, "-m", "runtime.machine.devices"]
    for visible, processes, first, code, sentence in (
            ("4,5", 2, 0, 0, "Device: npu x 2, collectives by hccl\n"),
            ("4,5", 2, 1, 2, "error: there are 2 npu devices here (ASCEND_RT_VISIBLE_DEVICES is 4,5), too few for 2 "
                             "processes from card 1 on; start one process a card\n"),
            ("7", 8, 0, 2, "error: there is 1 npu device here (ASCEND_RT_VISIBLE_DEVICES is 7), too few for 8 "
                           "processes from card 0 on; start one process a card\n")):
        found, out, err = commands.run(command + [str(processes), str(first)],
                                       env=dict(with_double(8), ASCEND_RT_VISIBLE_DEVICES=visible))
        assert (found, out + err) == (code, sentence)
