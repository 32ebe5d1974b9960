"""A run on several machines, which are network namespaces here, over links that delay and lose: whole, with one that
dies, is cut off, comes back, fills its disk."""
import errno
import json
import os
import re
import subprocess
import sys
import time

import commands
import pytest
import torch
from hosts import CAN, Hosts

pytestmark = [pytest.mark.slow, pytest.mark.once,
              pytest.mark.skipif(not CAN, reason="hosts.py needs Linux, root, the ip command and /dev/net/tun"),
              pytest.mark.skipif(not hasattr(torch.distributed, "run") and torch.__version__ < "1.9",
                                 reason="this PyTorch has no torchrun")]
RECIPE = commands.SMALL + ["--model", "EvoLeViT_128S", "--distillation-type", "none", "--batch-size", 8, "--epochs", 4,
                           "--stage-wise-epoch", 2, "--save-every-steps", 2, "--resume", "auto", "--dist-timeout", 0.5]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return commands.write_digits(tmp_path_factory.mktemp("digits"), classes=4, train=16, val=4)


def torchrun(hosts, host, nnodes, data, out, *more):
    """The command by which the machine `host` takes part in an elastic job; each has a folder of its own, or `out`."""
    return [sys.executable, "-m", "torch.distributed.run", "--nnodes", nnodes, "--nproc_per_node", 1, "--rdzv_backend",
            "c10d", "--rdzv_endpoint", hosts.address(0) + ":29400", "--rdzv_id", "job", "--rdzv_conf",
            "is_host={},join_timeout=90,last_call_timeout=5,timeout=90".format(int(host == 0)), "--local_addr",
            hosts.address(host), "--max_restarts", 3, commands.MAIN] + RECIPE + [
                "--data-path", data, "--output_dir", out] + list(more)


def wait(processes, seconds=400):
    end = time.monotonic() + seconds
    for process in processes:
        process.wait(timeout=max(end - time.monotonic(), 1))
    return [process.returncode for process in processes]


def wait_for(log, text, process, seconds=300):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if text in log.read_text():
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError("{!r} did not come\n{}".format(text, log.read_text()))


def weights(out):
    return torch.load(os.path.join(str(out), "checkpoint.pth"), map_location="cpu", weights_only=False)["model"]


def same(one, other, tolerance=0.0):
    differences = [(one[name].double() - other[name].double()).abs().max().item() for name in one]
    assert list(one) == list(other) and max(differences) <= tolerance, max(differences)
    return max(differences)


def epochs(out):
    with open(os.path.join(str(out), "log.txt")) as f:
        return [json.loads(line) for line in f]


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """Two machines with folders of their own, from start to end."""
    folder = tmp_path_factory.mktemp("whole")
    with Hosts(2) as hosts:
        runs = [hosts.start(host, torchrun(hosts, host, "2", data, folder / str(host)), commands.ROOT,
                            folder / "{}.log".format(host)) for host in range(2)]
        assert wait(runs) == [0, 0], "".join((folder / "{}.log".format(host)).read_text() for host in range(2))
    return folder


def test_two_machines_train_as_one_does(uninterrupted, data, tmp_path):
    """And each keeps what is needed to go on, since neither sees the other's folder."""
    commands.succeed(*RECIPE[len(commands.SMALL):], "--data-path", data, "--output_dir", tmp_path / "one",
                     launch=[sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port",
                             29433])
    same(weights(uninterrupted / "0"), weights(tmp_path / "one"))
    for name in ("checkpoint.pth", "log.txt", "args.json", "summary.json", "best_checkpoint.pth"):
        assert (uninterrupted / "1" / name).exists()
    same(weights(uninterrupted / "0"), weights(uninterrupted / "1"))


@pytest.fixture
def one_of_two(data, tmp_path):
    """(the machines, the logs, the first one's torchrun) of a job in which the second has died after the first epoch,
    for as many epochs as are asked for."""
    with Hosts(2) as hosts:
        def start(epochs):
            logs = [tmp_path / "{}.log".format(host) for host in range(2)]
            first, _ = (hosts.start(host, torchrun(hosts, host, "1:2", data, tmp_path / str(host), "--epochs", epochs),
                                    commands.ROOT, logs[host]) for host in range(2))
            wait_for(logs[0], "Epoch 0 ", first)
            hosts.kill(1)
            wait_for(logs[0], "Going on with 1 process in place of 2: --accum-steps 2 keeps the global batch of 16",
                     first)
            return hosts, logs, first
        yield start


def test_a_machine_that_dies_is_made_up_for_by_accumulation(one_of_two, uninterrupted, tmp_path):
    _, logs, first = one_of_two(4)
    assert wait([first]) == [0], logs[0].read_text()
    text = logs[0].read_text()
    assert "Resuming " in text and "error: training stopped: another process of the run does not answer" in text
    log, whole = epochs(tmp_path / "0"), epochs(uninterrupted / "0")
    assert [entry["epoch"] for entry in log] == [0, 1, 2, 3] and log[0]["train_loss"] == whole[0]["train_loss"]
    for one, other in zip(log, whole):  # the same images in the same updates: the same losses but for rounding
        assert one["updates"] == other["updates"] and one["train_lr"] == other["train_lr"]
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=2e-3)
    # AdamW makes whole steps out of gradients that are rounding; batch norm's averages see each half of a batch
    learned = [{name: value for name, value in weights(out / "0").items()
                if "running" not in name and "num_b" not in name} for out in (tmp_path, uninterrupted)]
    print("largest difference of a weight", same(learned[0], learned[1], 1e-3))
    print([(one["train_loss"], other["train_loss"]) for one, other in zip(log, whole)])


def test_a_machine_that_comes_back_takes_its_share_again(one_of_two, data, tmp_path):
    hosts, logs, first = one_of_two(500)
    hosts.start(1, torchrun(hosts, 1, "1:2", data, tmp_path / "1", "--epochs", 500), commands.ROOT,
                tmp_path / "back.log")
    wait_for(logs[0], "Going on with 2 processes in place of 1: --accum-steps 1 keeps the global batch of 16", first)
    text = logs[0].read_text()
    wait_for(logs[0], "Epoch {} ".format(text.count(" (layer-wise): ") + text.count(" (stage-wise): ")), first)
    for host in range(2):
        assert (tmp_path / str(host) / "checkpoint.pth").exists()
    assert [entry["epoch"] for entry in epochs(tmp_path / "0")] == list(range(len(epochs(tmp_path / "0"))))


LOST = "error: training stopped: another process of the run does not answer"


def start_both(hosts, data, tmp_path, epochs, name=""):
    """([the Popen of either machine's process, which no torchrun starts anew], their logs)."""
    logs = [tmp_path / "{}{}.log".format(name, host) for host in range(2)]
    runs = [hosts.start(host, [sys.executable, commands.MAIN] + RECIPE + [
        "--epochs", epochs, "--data-path", data, "--output_dir", tmp_path / str(host)], commands.ROOT, logs[host],
        env=dict(RANK=str(host), LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="1", MASTER_ADDR=hosts.address(0),
                 MASTER_PORT="29400").items()) for host in range(2)]
    return runs, logs


def texts_after(fault, data, tmp_path, epochs=500):
    """What the two machines printed: fault(the machines) comes after the first epoch, and both have to end with exit
    code 1 within the timeout of half a minute, and time to end."""
    with Hosts(2) as hosts:
        runs, logs = start_both(hosts, data, tmp_path, epochs)
        wait_for(logs[0], "Epoch 0 ", runs[0])
        fault(hosts)
        start = time.monotonic()
        codes = wait(runs, 150)
        print("ended after {:.0f} s".format(time.monotonic() - start), codes)
        assert codes == [1, 1] and time.monotonic() - start < 90
    found = [log.read_text() for log in logs]
    assert not any("Traceback" in text for text in found), found
    return found


def test_a_machine_that_is_cut_off_ends_the_job_within_the_timeout(data, tmp_path):
    for text in texts_after(lambda hosts: hosts.cut(1), data, tmp_path):
        assert LOST in text, text


@pytest.fixture
def small_disk(tmp_path):
    """The second machine's output folder, a disk of its own that holds five checkpoints."""
    folder = tmp_path / "1"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600m", "tmpfs", str(folder)]).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_on_one_machine_ends_the_job_and_loses_nothing(small_disk, uninterrupted, data, tmp_path):
    """Then, with room again, both go on to the weights of a run without the fault, bit for bit."""
    def fill(hosts):
        with open(str(small_disk / "filler"), "wb", buffering=0) as f:
            try:
                while True:
                    f.write(bytes(2 ** 20))
            except OSError as error:
                assert error.errno == errno.ENOSPC

    first, second = texts_after(fill, data, tmp_path, epochs=4)
    assert LOST in first and re.search("error: training stopped: {}/.* could not be written .No space left".format(
        re.escape(str(small_disk))), second), second
    assert len(epochs(tmp_path / "0")) < 4
    (small_disk / "filler").unlink()
    with Hosts(2) as hosts:
        runs, logs = start_both(hosts, data, tmp_path, 4, "again")
        assert wait(runs) == [0, 0], [log.read_text() for log in logs]
    assert "Resuming " in logs[0].read_text()
    for host in range(2):
        same(weights(tmp_path / str(host)), weights(uninterrupted / "0"))
