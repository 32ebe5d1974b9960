"""Two processes, one process that accumulates, and one large batch train alike."""
import copy
import os
import subprocess
import sys

import torch
from timm.loss import SoftTargetCrossEntropy

from engine import train_step
from losses import DistillationLoss
from reference import build, images

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))


def launcher(processes, port):
    return [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node={}".format(processes),
            "--master_port={}".format(port)]


def free_port():
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_stay_identical_and_equal_one_that_averages_both_halves(tmp_path):
    script = os.path.join(HERE, "equivalence.py")
    # --use_env: where it is the default, the option is only accepted
    subprocess.run(launcher(2, free_port()) + ["--use_env", script, str(tmp_path / "two"), "1"], check=True, timeout=300)
    subprocess.run([sys.executable, script, str(tmp_path / "one"), "2"], check=True, timeout=300)
    a, b, one = (torch.load(str(tmp_path / name)) for name in ("two.0", "two.1", "one.0"))
    assert a and all(torch.equal(a[k], b[k]) for k in a)
    for key in one:
        assert (a[key] - one[key]).abs().max() <= 1e-6 * max(one[key].abs().max().item(), 1), key


def test_four_accumulated_batches_of_8_equal_one_of_32_in_eval_mode_batch_norm():
    model = build("EvoLeViT_128S", gain=1.0, num_classes=10, img_size=64)
    copies = [copy.deepcopy(model) for _ in range(2)]
    x, labels = images(64, batch=32), torch.arange(32) % 10
    soft = torch.nn.functional.one_hot(labels, 10).double()
    criterion = DistillationLoss(SoftTargetCrossEntropy(), lambda i: i[:, 0, 0, :10], "cls", 0.5, 1.0)
    losses = []
    for m, size in zip(copies, (32, 8)):
        m.train()
        for layer in m.modules():
            if isinstance(layer, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
                layer.eval()
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3)
        losses.append(train_step(m, criterion, list(zip(x.split(size), soft.split(size))), optimizer, 0.01))
    assert abs(losses[0] - losses[1]) < 1e-6
    moved = 0
    for before, a, b in zip(model.parameters(), copies[0].parameters(), copies[1].parameters()):
        assert (a - b).abs().max() < 1e-6
        moved += (a - before).abs().sum().item()
    assert moved > 0


def test_main_trains_and_evaluates_in_two_processes(tmp_path):
    out = str(tmp_path / "save")
    command = launcher(2, free_port()) + [
        os.path.join(ROOT, "main.py"), "--device", "cpu", "--data-set", "DIGITS", "--input-size", "64",
        "--model", "EvoLeViT_128S", "--distillation-type", "none", "--epochs", "1", "--batch-size", "64",
        "--num_workers", "0", "--output_dir", out]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True,
                            timeout=400)
    assert result.returncode == 0, result.stdout
    assert "Device: cpu x 2" in result.stdout and result.stdout.count("Model: ") == 1
    assert sorted(os.listdir(out)) == ["best_checkpoint.pth", "checkpoint.pth", "log.txt"]
