"""A run can be killed, asked to stop, or asked to save at any instant, and goes on as if nothing had happened."""
import json
import os
import signal
import subprocess
import sys
import time

import commands
import kill_and_resume
import pytest
import torch

FAST = ["--device", "cpu", "--num_workers", "0", "--input-size", "64", "--model", "EvoLeViT_128S",
    "--distillation-type", "none", "--no-repeated-aug", "--lr", "0.01", "--model-ema-decay", "0.9"]
MANY = [pytest.mark.slow, pytest.mark.once]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # the same number in every process whose results are compared


@pytest.fixture(scope="module")
def forty_digits(tmp_path_factory):
    return commands.write_digits(tmp_path_factory.mktemp("forty"), classes=10, train=4, val=2)


@pytest.fixture(scope="module")
def damaged_digits(tmp_path_factory):
    """Forty digits, and four files among them that cannot be decoded."""
    folder = commands.write_digits(tmp_path_factory.mktemp("damaged"), classes=10, train=4, val=2)
    for digit in (1, 4, 6, 9):
        with open(os.path.join(folder, "train", "digit{}".format(digit), "0-damaged.png"), "wb") as f:
            f.write(b"no picture")
    return folder


@pytest.mark.parametrize("processes, kills", [
    (1, 4), pytest.param(2, 4, marks=pytest.mark.slow),
    pytest.param(2, 25, marks=MANY), pytest.param(1, 25, marks=MANY)])
def test_a_run_killed_at_random_instants_ends_bit_for_bit_like_an_uninterrupted_one(
    processes, kills, damaged_digits, tmp_path):
    code, out, err = commands.helper("kill_and_resume", tmp_path, damaged_digits, processes, kills, 5,
                                     env={"OMP_NUM_THREADS": "1"}, timeout=1800)
    assert code == 0, out + err
    report = json.loads(out.splitlines()[-1])
    print(report)
    assert report["killed"] == kills and report["epochs"] == 3 and report["different"] == []
    assert report["damaged"][0] <= report["damaged"][1] <= report["damaged"][2] == 4 and report["left_out"] >= 2
    assert report["inside_a_write"] >= kills // 3  # half of them aim at one


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_on_shards_killed_at_random_instants_ends_like_an_uninterrupted_one(processes, damaged_digits, tmp_path):
    shards = tmp_path / "shards"
    code, out, err = commands.run([sys.executable, "-m", "runtime.pictures.shards", damaged_digits, shards])
    assert code == 0, err
    code, out, err = commands.helper("kill_and_resume", tmp_path, str(shards), processes, 25, 5,
                                     env={"OMP_NUM_THREADS": "1"}, timeout=1800)
    assert code == 0, out + err
    report = json.loads(out.splitlines()[-1])
    print(report)
    assert report["killed"] == 25 and report["epochs"] == 3 and report["different"] == []
    assert report["damaged"][2] == 4 and report["inside_a_write"] >= 8


def test_the_comparison_of_two_ends_sees_every_difference():
    one = {"a": torch.zeros(3), "b": [{"epoch": 1, "seconds": 5}], "c": 0.1}
    assert kill_and_resume.differences(one, {"a": torch.zeros(3), "b": [{"epoch": 1, "seconds": 6}], "c": 0.1}) == []
    # no smaller ones: a library that PyTorch 2.5 has compiled makes them 0 in all of its process
    assert kill_and_resume.differences(one, {"a": torch.tensor(
        [0, 0, 2e-38]), "b": [{"epoch": 2}], "c": 0.1 + 1e-16 * 2}) != []
    for other in (dict(one, a=torch.tensor([0, 0, 2e-38])), dict(one, a=torch.tensor([0, 0, -0.0])),
                  dict(one, b=[{"epoch": 2}]), dict(one, c=0.2), dict(one, d=1)):
        assert len(kill_and_resume.differences(one, other)) == 1


def begin(out, data, *flags):
    """A run in the background, once it has begun its first epoch's updates."""
    process = subprocess.Popen([sys.executable, "-u", commands.MAIN] + FAST + ["--batch-size", "8", "--data_path", data,
         "--output_dir", str(out)] + [str(flag) for flag in flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
         universal_newlines=True, env=dict(os.environ, **ONE_THREAD))
    end = time.time() + 120
    while time.time() < end and not (out / "log.txt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(0.5)
    return process


@pytest.mark.once
def test_sigterm_saves_and_exits_with_0_and_the_run_goes_on_exactly(forty_digits, tmp_path):
    flags = ["--epochs", 7, "--stage-wise-epoch", 1]
    whole = begin(tmp_path / "whole", forty_digits, *flags)
    whole.communicate(timeout=200)
    assert whole.returncode == 0
    process = begin(tmp_path / "out", forty_digits, *flags)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Stopping: the state is saved after this batch" in err
    assert out.splitlines()[-1] == "Stopped as asked; to go on: the same command with --resume auto"
    stopped = torch.load(str(tmp_path / "out" / "checkpoint.pth"), map_location="cpu")
    assert stopped["epoch"] < 6
    code, printed, err = commands.run([sys.executable, commands.MAIN] + FAST + ["--batch-size", 8, "--data_path",
         forty_digits, "--output_dir", tmp_path / "out", "--resume", "auto"] + flags, env=ONE_THREAD)
    assert code == 0 and "Resuming " in printed, printed + err
    assert kill_and_resume.differences(*[kill_and_resume.ends(str(tmp_path / name)) for name in ("out", "whole")]) == []


@pytest.mark.once
@pytest.mark.parametrize("processes, evaluation", [(1, 1), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_sigterm_in_an_evaluation_loses_no_update_of_its_epoch(processes, evaluation, forty_digits, tmp_path):
    """An epoch has two evaluations, of the weights and of their average."""
    flags = FAST + ["--batch-size", 8, "--data_path", forty_digits, "--epochs", 3, "--stage-wise-epoch", 1]
    launch = [sys.executable] if processes == 1 else commands.launchers(processes)["torchrun"]
    code, out, err = commands.run(launch + [commands.MAIN] + flags + ["--output_dir", tmp_path / "whole"],
                                  env=ONE_THREAD)
    assert code == 0, err
    flags += ["--output_dir", tmp_path / "out"]
    code, out, err = commands.helper("stop_in_evaluation", processes - 1, evaluation, *flags, launch=launch,
                                     env=ONE_THREAD)
    assert code == 0 and "Stopped as asked" in out, out + err
    stopped = torch.load(str(tmp_path / "out" / "checkpoint.pth"), map_location="cpu")
    assert stopped["epoch"] == (evaluation - 1) // 2 - 1 and stopped["progress"]["images"] == 40 // (8 * processes) * (
        8 * processes)
    code, out, err = commands.run(launch + [commands.MAIN] + flags + ["--resume", "auto"], env=ONE_THREAD)
    assert code == 0 and "Resuming " in out, out + err
    assert kill_and_resume.differences(*[kill_and_resume.ends(str(tmp_path / name)) for name in ("out", "whole")]) == []


@pytest.mark.slow
@pytest.mark.once
def test_sigusr1_saves_and_goes_on(forty_digits, tmp_path):
    out = tmp_path / "out"
    process = begin(out, forty_digits, "--epochs", 5000, "--save-every-minutes", 1000)
    end = time.time() + 300
    while not (out / "checkpoint.pth").exists() and time.time() < end:
        time.sleep(0.1)
    epochs = len((out / "log.txt").read_text().splitlines())
    process.send_signal(signal.SIGUSR1)
    saved = None
    while saved is None and time.time() < end:  # a save inside an epoch holds its progress
        time.sleep(0.02)
        try:
            saved = torch.load(str(out / "checkpoint.pth"), map_location="cpu")["progress"]
        except FileNotFoundError:  # between the two renames
            pass
    assert saved is not None and saved["images"] % 8 == 0
    while len((out / "log.txt").read_text().splitlines()) < epochs + 2 and time.time() < end:
        time.sleep(0.1)
    assert process.poll() is None and len((out / "log.txt").read_text().splitlines()) >= epochs + 2
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Stopped as asked" in printed


def test_a_second_signal_stops_at_once_unless_it_is_the_first_passed_on(monkeypatch):
    from runtime.keeping import control
    exits, now = [], [100.0]
    monkeypatch.setattr(control.os, "_exit", exits.append)
    monkeypatch.setattr(control.time, "monotonic", lambda: now[0])
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with control.Signals() as signals:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as a shell starts its background jobs
            os.kill(os.getpid(), signal.SIGTERM)
            now[0] += 1
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.stop and exits == []
            now[0] += 5
            os.kill(os.getpid(), signal.SIGTERM)
            assert exits == [128 + signal.SIGTERM]
    finally:
        signal.signal(signal.SIGINT, handler)


def test_a_signal_to_a_loaders_worker_stops_nothing(capfd):
    """Ctrl-C reaches every process of the terminal's group; the first one ends its workers itself."""
    from runtime.keeping import control
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with control.Signals() as signals:
            worker = os.fork()
            if worker == 0:
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGINT)
                os._exit(1 if signals.stop else 0)
            assert os.waitpid(worker, 0)[1] == 0 and not capfd.readouterr().err
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.stop and "Stopping" in capfd.readouterr().err
    finally:
        signal.signal(signal.SIGINT, handler)


@pytest.mark.once
def test_a_damaged_newest_checkpoint_gives_way_to_the_older_one(forty_digits, tmp_path):
    flags = FAST + ["--batch-size", 8, "--data_path", forty_digits, "--output_dir", tmp_path]
    code, _, err = commands.run([sys.executable, commands.MAIN] + flags + ["--epochs", 3])
    assert code == 0, err
    assert torch.load(str(tmp_path / "checkpoint.previous.pth"), map_location="cpu")["epoch"] == 1
    expected = kill_and_resume.ends(str(tmp_path))
    path = tmp_path / "checkpoint.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    code, out, err = commands.run([sys.executable, commands.MAIN] + flags + ["--epochs", 3, "--resume", "auto"])
    assert code == 0, err
    assert "going on from the older" in out and "Resuming" in out and "epoch 2" in out
    assert kill_and_resume.differences(kill_and_resume.ends(str(tmp_path)), expected) == []
    code, out, err = commands.run([sys.executable, commands.MAIN] + flags + ["--epochs", 3, "--resume", "auto"])
    assert code == 0 and "has finished all 3 epochs" in out and kill_and_resume.differences(
        kill_and_resume.ends(str(tmp_path)), expected) == []
    for name in ("checkpoint.pth", "checkpoint.previous.pth"):
        (tmp_path / name).write_bytes(b"no checkpoint")
    code, out, err = commands.run([sys.executable, commands.MAIN] + flags + ["--epochs", 3, "--resume", "auto"])
    assert code == 2 and err.count("\n") == 1 and "cannot be read as a checkpoint" in err


def test_resume_auto_starts_where_there_is_nothing_yet(forty_digits, tmp_path):
    code, out, err = commands.run([sys.executable, commands.MAIN] + FAST + [
        "--batch-size", 8, "--data_path", forty_digits, "--output_dir", tmp_path, "--epochs", 1, "--resume", "auto"])
    assert code == 0 and "holds no checkpoint yet, so training starts" in out, err


@pytest.mark.once
def test_another_number_of_processes_goes_on_from_the_same_update(forty_digits, tmp_path):
    flags = FAST + ["--data_path", forty_digits, "--output_dir", tmp_path, "--save-every-steps", 1]
    code, out, err = commands.run([sys.executable, commands.MAIN] + flags + \
                                  ["--batch-size", 8, "--epochs", 2, "--max-steps", 3])
    assert code == 0, err
    os.remove(str(tmp_path / "checkpoint.pth"))  # the end of the run; what stays is the save after update 3
    assert torch.load(str(tmp_path / "checkpoint.previous.pth"))["progress"]["images"] == 24
    launch = list(commands.launchers(2).values())[0]
    code, out, err = commands.run(launch + [commands.MAIN] + flags + \
                                  ["--batch-size", 4, "--epochs", 1, "--resume", "auto"])
    assert code == 0, out + err
    assert "written by 1 processes, this run has 2: it sees the same images" in out and "image 24" in out


@pytest.mark.once
def test_a_loss_that_is_not_finite_stops_all_processes_and_names_the_files(forty_digits, tmp_path):
    launch = list(commands.launchers(2).values())[0]
    flags = FAST + ["--data_path", forty_digits, "--batch-size", 8,
        "--epochs", 30, "--warmup-epochs", 0, "--clip-grad", 0, "--lr", 1e30]
    code, out, err = commands.run(launch + [commands.MAIN] + flags + ["--output_dir", tmp_path / "out"])
    assert code != 0 and err.count("error: training stopped: the loss ") == 2, err
    assert "Traceback (most recent call last):\n  File \"{}\"".format(commands.MAIN) not in err
    for rank in (0, 1):
        with open(str(tmp_path / "out" / "nonfinite-{}.json".format(rank))) as f:
            report = json.load(f)
        assert report["lr"] > 1e20 and report["loss_scale"] is None and len(report["files"]) == 8
        assert all(os.path.exists(path) for path in report["files"])
    code, out, err = commands.run([sys.executable, commands.MAIN] + flags + ["--output_dir",
                                  tmp_path / "skip", "--max-steps", 6, "--skip-nonfinite", 100])
    assert code == 0 and "Left out update" in err


def test_a_report_that_cannot_be_written_is_no_traceback(tmp_path):
    """As on a full disk: the sentence on the loss stays."""
    from runtime.errors import NonFiniteLoss
    from runtime.keeping.output import explained
    error = NonFiniteLoss("the loss is inf")
    error.report = {"epoch": 1, "update": 2, "lr": 0.1, "loss_scale": None, "files": ["a.png"]}
    told = str(explained(error, str(tmp_path), 3))
    assert "the loss is inf in epoch 1, update 2" in told and "nonfinite-3.json names the files" in told
    assert json.loads((tmp_path / "nonfinite-3.json").read_text())["files"] == ["a.png"]
    told = str(explained(error, str(tmp_path / "none"), 0))
    assert "the loss is inf in epoch 1" in told and "could not be written" in told and "\n" not in told


@pytest.mark.slow
def test_a_stuck_process_ends_the_job_within_the_timeout(forty_digits, tmp_path):
    port = commands.free_port()
    processes = []
    for rank in range(2):
        env = dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                   MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
        processes.append(subprocess.Popen([sys.executable, commands.MAIN] + FAST + ["--batch-size", "4", "--data_path",
             forty_digits, "--epochs", "5000", "--dist-timeout", "0.1", "--output_dir", str(tmp_path / "out")], env=env,
             stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True))
    try:
        end = time.time() + 120
        while time.time() < end and not (tmp_path / "out" / "checkpoint.pth").exists():
            assert processes[0].poll() is None, processes[0].communicate()
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGSTOP)
        began = time.time()
        processes[0].communicate(timeout=90)
        assert processes[0].returncode != 0 and time.time() - began < 60
    finally:
        for process in processes:
            process.kill()
