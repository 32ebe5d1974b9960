"""The four launch scripts from their command line: what ModelZoo's users see and find, and how mistakes end."""
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import commands
import pytest
import torch

from runtime.machine.processes import agree_on_timeouts

pytestmark = pytest.mark.once

TINY = ["--model=EvoLeViT_128S", "--input-size", "64"]
UNDISTILLED = ["--", "--distillation-type", "none", "--num_workers", "0"]


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a user has cloned, so that logs and results stay apart."""
    target = tmp_path / "repository"
    tracked = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=commands.ROOT,
                             stdout=subprocess.PIPE, universal_newlines=True, check=True).stdout.split("\n")
    for name in filter(None, tracked):
        if not name.startswith("test/unit/") and os.path.exists(os.path.join(commands.ROOT, name)):
            os.makedirs(os.path.dirname(str(target / name)), exist_ok=True)
            shutil.copy(os.path.join(commands.ROOT, name), str(target / name))
    return target


def launch(checkout, script, *arguments, **kwargs):
    """(exit code, standard output, standard error) of `bash test/SCRIPT.sh` in the checkout."""
    env = dict({"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}, **kwargs.pop("env", {}))
    cwd = kwargs.pop("cwd", checkout)
    path = os.path.relpath(str(checkout / "test" / (script + ".sh")), str(cwd))
    return commands.run(["bash", path] + list(arguments), cwd=cwd, env=env)


def fields(path):
    with open(str(path)) as f:
        return dict(line.rstrip("\n").split(" = ") for line in f)


def check_outputs(checkout, printed, kind, processes, batch_size, out):
    """Holds every field of the printed lines and of the case's log to the run's own summary."""
    with open(os.path.join(str(out), "summary.json")) as f:
        summary = json.load(f)
    assert (summary["processes"], summary["batch_size"]) == (processes, batch_size)
    folder = checkout / "test" / "output" / "0"
    case = "Evo-LeViT_bs{}_{}p_{}".format(batch_size, processes, kind)
    assert sorted(os.listdir(str(folder))) == sorted([case + ".log", "train_0.log"])
    got = fields(folder / (case + ".log"))
    assert list(got) == ["Network", "RankSize", "BatchSize", "DeviceType", "CaseName", "ActualFPS", "TrainingTime",
                         "TrainAccuracy", "ActualLoss", "E2ETrainingTime"]
    assert (got["Network"], got["RankSize"], got["BatchSize"]) == ("Evo-LeViT", str(processes), str(batch_size))
    assert (got["DeviceType"], got["CaseName"]) == (platform.machine(), case)
    assert float(got["ActualFPS"]) == pytest.approx(summary["images_per_s"], abs=0.01) and float(got["ActualFPS"]) > 0
    assert float(got["TrainingTime"]) == pytest.approx(
        1000 * batch_size * processes / float(got["ActualFPS"]), rel=0.01)
    assert float(got["TrainAccuracy"]) == pytest.approx(summary["best_acc1"], abs=1e-3)
    assert float(got["ActualLoss"]) == pytest.approx(summary["train_loss"], abs=1e-4)
    assert int(got["E2ETrainingTime"]) >= summary["seconds"] - 1
    assert "Final Performance images/sec : {}\n".format(got["ActualFPS"]) in printed
    assert "Final Train Accuracy : {}\n".format(got["TrainAccuracy"]) in printed
    assert "E2E Training Duration sec : {}\n".format(got["E2ETrainingTime"]) in printed
    with open(str(folder / "train_0.log")) as f:
        return summary, f.read()


def test_one_process_trains_to_the_end_from_the_folder_test(checkout, digit_folder, teacher):
    code, out, err = launch(
        checkout, "train_full_1P", "--data_path=" + digit_folder, "--epochs", "2", "--batch-size=32", *TINY +
        ["--", "--teacher-model", "regnety_002", "--teacher-path", teacher, "--stage-wise-epoch", "1"],
        cwd=checkout / "test")
    assert code == 0, out + err
    assert out.splitlines()[0] == "Device: cpu x 1, collectives by gloo (no NPU here)"
    summary, log = check_outputs(checkout, out, "acc", 1, 32, checkout / "save")
    assert summary["epochs"] == 2 and "Epoch 1 (stage-wise)" in log
    assert sorted(os.listdir(str(checkout / "save"))) == ["args.json", "best_checkpoint.pth", "checkpoint.previous.pth",
                                                          "checkpoint.pth", "index-train.npz", "index-val.npz",
                                                          "log.txt", "summary.json"]


@pytest.mark.slow
def test_one_process_measures_speed_and_keeps_an_earlier_run_aside(checkout, digit_folder):
    arguments = ["--data_path", os.path.relpath(digit_folder, str(checkout)), "--batch-size", "32", "--output_dir",
         "out"] + TINY + UNDISTILLED
    for run in (1, 2):
        code, out, err = launch(checkout, "train_performance_1P", *arguments)
        assert code == 0, out + err
        summary, _ = check_outputs(checkout, out, "perf", 1, 32, checkout / "out")
        assert summary["updates"] == 8
    assert "test/output/0.previous-1" in out
    assert (checkout / "test" / "output" / "0.previous-1" / "train_0.log").exists()
    assert (checkout / "out" / "previous-1" / "summary.json").exists()


@commands.slow_on_the_current_line
def test_eight_processes_measure_speed(checkout, digit_folder):
    code, out, err = launch(checkout, "train_performance_8P", "--data_path=" + digit_folder, "--batch-size=4", *TINY +
                            UNDISTILLED)
    assert code == 0, out + err
    assert out.splitlines()[0].startswith("Device: cpu x 8, collectives by gloo")
    summary, log = check_outputs(checkout, out, "perf", 8, 4, checkout / "save")
    assert summary["global_batch"] == 32 and summary["updates"] == 8


@pytest.mark.slow
def test_eight_processes_train_to_the_end(checkout, digit_folder):
    code, out, err = launch(checkout, "train_full_8P", "--data_path=" + digit_folder, "--batch-size=4", "--epochs=1",
                            *TINY + UNDISTILLED)
    assert code == 0, out + err
    check_outputs(checkout, out, "acc", 8, 4, checkout / "save")


@pytest.mark.skipif(not hasattr(torch.utils, "rename_privateuse1_backend"),
                    reason="this PyTorch has no extension points for a device of another package")
@pytest.mark.parametrize("script, processes", [
    pytest.param("train_full_1P", 1, marks=[pytest.mark.slow, pytest.mark.share]),
    pytest.param("train_performance_1P", 1, marks=pytest.mark.slow),
    pytest.param("train_full_8P", 8, marks=pytest.mark.slow),
    pytest.param("train_performance_8P", 8, marks=pytest.mark.slow)])
def test_the_scripts_run_on_the_npu_stand_in(checkout, digit_folder, script, processes):
    from test_npu import with_double
    batch_size = 32 // processes
    code, out, err = launch(checkout, script, "--data_path=" + digit_folder, "--epochs=1",
                            "--batch-size={}".format(batch_size), *TINY + UNDISTILLED, env=with_double(cards=processes))
    assert code == 0, out + err
    assert out.splitlines()[0] == "Device: npu x {}, collectives by hccl".format(processes)
    summary, log = check_outputs(checkout, out, "acc" if "full" in script else "perf", processes, batch_size,
                                 checkout / "save")
    assert summary["device"] == "npu" and summary["precision"] == "fp16 mixed (apex O1, loss scale 128.0)"


@pytest.mark.parametrize("arguments, sentence", [
    ([], "--data_path is missing"),
    (["--data_path=nowhere"], "--data_path: there is no folder nowhere"),
    (["--data_path"], "--data_path has no value"),
    (["--data_path=.", "--bach-size=3"], "unknown argument --bach-size"),
    (["--data_path=.", "stray"], "unknown argument stray"),
    (["--data_path=.", "--epochs=ten"], "--epochs ten is not a whole number"),
    (["--data_path=.", "--nproc=0"], "--nproc 0 starts no process"),
    (["--data_path=.", "--nnodes=2", "--master_addr=a"], "--node_rank is missing: with --nnodes=2 give each"),
    (["--data_path=.", "--nnodes=2", "--node_rank=1"], "--master_addr is missing"),
    (["--data_path=.", "--nnodes=2", "--node_rank=2", "--master_addr=a"], "--node_rank 2: the 2 machines are numbered"),
    (["--data_path=.", "--nnodes=2", "--node_rank=1", "--master_addr=no-such-host.invalid"],
     "--master_addr no-such-host.invalid: this machine knows no such address"),
    (["--data_path=.", "--master_port=99999"], "--master_port 99999 is no port; they go from 1 to 65535"),
    (["--data_path=.", "--nproc=00"], "--nproc 0 starts no process"),
    (["--data_path=.", "--epochs=0x10"], "--epochs 0x10 is not a whole number"),
    (["--data_path=.", "--batch-size=99999999999999999999"], "--batch_size 99999999999999999999 is too large a number"),
    (["--data_path=.", "--nnodes=02", "--node_rank=08", "--master_addr=a"], "--node_rank 8: the 2 machines are"),
    (["--data_path=.", "--master_port=0"], "--master_port 0 is no port"),
    (["--data_path=.", "--", "--output_dir", "elsewhere"], "give --output_dir before --"),
    (["--data_path=.", "--", "--output-dir=elsewhere"], "give --output-dir=elsewhere before --"),
    (["--data_path=.", "--", "--device", "cuda"], "--device cuda: no such device is available here"),
])
def test_a_mistake_ends_in_one_sentence_and_changes_nothing(checkout, arguments, sentence):
    before = sorted(str(path) for path in checkout.rglob("*") if "__pycache__" not in str(path))
    code, out, err = launch(checkout, "train_full_1P", *arguments)
    assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("error: ") and sentence in err
    assert sorted(str(path) for path in checkout.rglob("*") if "__pycache__" not in str(path)) == before


def test_numbers_may_begin_with_noughts_and_the_environment_names_no_machines(checkout):
    from test_npu import with_double
    env = dict(with_double(cards=1), nnodes="2", node_rank="1")
    code, out, err = launch(checkout, "train_performance_1P", "--data_path=.", "--nproc=08", "--nnodes=01", env=env)
    assert (code, out) == (2, "") and err.count("\n") == 1 and re.search(r"\b8\b", err)


def test_home_is_found_and_another_launchers_variables_are_not_taken(checkout, digit_folder, tmp_path):
    """The log shows what main.py was given; the teacher's file, which is missing, ends it soon."""
    os.symlink(digit_folder, str(tmp_path / "digits"))
    env = dict(HOME=str(tmp_path), RANK_ID="0", RANK_SIZE="8", DEVICE_ID="5")
    code, out, err = launch(checkout, "train_full_1P", "--data_path=~/digits", "--output_dir=~/out", "--batch-size=32",
                            *TINY, env=env)
    assert code == 2 and "--teacher-path: there is no file" in err, out + err
    assert not (checkout / "~").exists()


@pytest.mark.slow
def test_a_run_that_is_stopped_as_asked_shows_no_figures(checkout, digit_folder):
    """Its processes get the signal, as a scheduler sends it, and not the script; summary.json is a finished run's."""
    finished = launch(checkout, "train_full_1P", "--data_path=" + digit_folder, "--batch-size=32", "--epochs=1",
                      *TINY + UNDISTILLED)
    assert finished[0] == 0 and (checkout / "save" / "summary.json").exists()
    process = started(checkout, digit_folder, "--resume", "auto")
    for pid in processes_of(checkout / "save"):
        os.kill(pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Stopped before its end, as a signal asked" in out, out + err
    assert "Final" not in out and not (checkout / "save" / "summary.json").exists()


def test_a_failed_training_ends_with_its_code_and_the_last_lines_of_the_log(checkout, digit_folder):
    code, out, err = launch(checkout, "train_full_1P", "--data_path=" + digit_folder, "--batch-size=32", *TINY)
    assert code == 2 and "Final" not in out
    assert "ended with exit code 2" in err and "--teacher-path: there is no file ./regnety_160-a5fe301d.pth" in err


@pytest.mark.parametrize("asked", [["--help"], ["-h"], ["--epochs=3", "--help"]])
def test_help_lists_the_arguments(checkout, asked):
    code, out, err = launch(checkout, "train_full_16P", *asked)
    assert (code, err) == (0, "") and out.startswith("usage: bash test/train_full_16P.sh --data_path=DIR")
    for argument in ("--data_path", "--nnodes", "--node_rank", "--master_addr", "--device_id", "-- FLAGS"):
        assert argument in out
    assert "set -" not in out


def test_what_ends_a_machines_training_is_said_beside_torchruns_own_report(checkout, digit_folder):
    arguments = ["--data_path=" + digit_folder, "--nnodes=2", "--nproc=1", "--batch-size=4", "--epochs=1",
                 "--master_addr=127.0.0.1", "--master_port={}".format(commands.free_port())] + TINY

    def machine(rank):
        return launch(checkout, "train_full_16P", "--node_rank={}".format(rank), *(
            arguments + UNDISTILLED + ["--lr", "1e-{}".format(rank + 3)]))
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(machine, (0, 1)))
    for rank, (code, out, err) in enumerate(ends):
        assert code == 2 and "Machine {} of 2; they wait for one another at 127.0.0.1".format(rank) in out
        assert "ended with exit code 2" in err and "--lr is 0.001 for process 0 and 0.0001 for process 1" in err
        assert "Traceback" not in err


def processes_of(folder):
    """Process numbers of the main.py processes that write to `folder`."""
    found = []
    for number in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/{}/cmdline".format(number), "rb") as f:
                words = f.read().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "main.py" in words and str(folder) in words:
            found.append(int(number))
    return found


def started(checkout, digit_folder, *arguments):
    """A running script with two processes, once both have begun to train."""
    process = subprocess.Popen(["bash", "test/train_full_1P.sh", "--data_path=" + digit_folder, "--nproc", "2",
         "--batch-size=4", "--epochs=500",] + TINY + UNDISTILLED + list(arguments), cwd=str(checkout),
        env=dict(os.environ, PYTHON=sys.executable), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        universal_newlines=True, start_new_session=True)
    log = checkout / "test" / "output" / "0" / "train_0.log"
    end = time.time() + 120
    while time.time() < end and not (log.exists() and re.search(r"^Epoch: \[", log.read_text(), re.M)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    assert len(processes_of(checkout / "save")) == 2
    return process


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_others_down_within_a_minute(checkout, digit_folder):
    process = started(checkout, digit_folder)
    os.kill(processes_of(checkout / "save")[-1], signal.SIGKILL)
    start = time.time()
    out, err = process.communicate(timeout=60)
    assert time.time() - start < 60 and process.returncode not in (0, None)
    assert "training ended with exit code" in err and processes_of(checkout / "save") == []


@pytest.mark.slow
def test_ctrl_c_stops_all_ranks(checkout, digit_folder):
    process = started(checkout, digit_folder)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and re.search("stopped by a signal", err)
    assert "Stopped as asked; to go on: the same command with --resume auto" in err
    code, out, err = launch(checkout, "train_full_1P", "--data_path=" + digit_folder, "--nproc", "2", "--batch-size=4",
         "--epochs=1", *TINY + UNDISTILLED + ["--resume", "auto", "--epochs", "500", "--max-steps", "1"])
    assert code == 0, out + err
    assert "Resuming" in (checkout / "test" / "output" / "0" / "train_0.log").read_text()
    assert processes_of(checkout / "save") == []


def test_fix_timm_needs_timm_0_4_12(tmp_path):
    fake = tmp_path / "timm"
    fake.mkdir()
    (fake / "version.py").write_text("__{}__ = '0.9.16'\n".format("version"))
    for arguments, sentence in (([fake], "is timm 0.9.16"), ([tmp_path], "is no timm package")):
        code, out, err = commands.run(["bash", os.path.join(commands.ROOT, "fix_timm", "apply.sh")] + arguments)
        assert (code, out) == (2, "") and err.count("\n") == 1 and sentence in err


def environment(toolkit, python, **variables):
    """{name: value} after test/env_npu.sh, with a toolkit in that folder."""
    result = subprocess.run(["bash", "-euc", ". test/env_npu.sh; env"], cwd=commands.ROOT, check=True,
                            env=dict(PATH=os.environ["PATH"], HOME="/nowhere", ASCEND_TOOLKIT_HOME=str(toolkit),
                                     PYTHON=str(python), **variables),
                            stdout=subprocess.PIPE, universal_newlines=True)
    return dict(line.split("=", 1) for line in result.stdout.splitlines() if "=" in line)


@pytest.mark.once
def test_the_ascend_environment_is_set_where_the_user_has_not_set_it(tmp_path):
    (tmp_path / "set_env.sh").write_text("export TOOLKIT_WAS_HERE=1 $NOT_SET_ANYWHERE\n")
    for version, queue, affinity in (("1.8.1", "1", None), ("2.1.0", "2", "2"), ("2.9.0+cpu", "2", "2")):
        python = tmp_path / "python"
        python.write_text("#!/bin/sh\necho {}\n".format(version))
        python.chmod(0o755)
        found = environment(tmp_path, python)
        assert found["TOOLKIT_WAS_HERE"] == "1" and found["INF_NAN_MODE_ENABLE"] == "1"
        assert (found["TASK_QUEUE_ENABLE"], found.get("CPU_AFFINITY_CONF")) == (queue, affinity)
        assert not [name for name in found if name.endswith("_TIMEOUT")]
    own = {"TASK_QUEUE_ENABLE": "0", "CPU_AFFINITY_CONF": "1,npu0:0-3", "INF_NAN_MODE_ENABLE": "0",
           "PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:64", "ASCEND_GLOBAL_LOG_LEVEL": "1"}
    found = environment(tmp_path, python, **own)
    assert {name: found[name] for name in own} == own
    assert "TASK_QUEUE_ENABLE" not in environment(tmp_path / "nothing", python)


@pytest.mark.parametrize("minutes, own, expected", [
    (30, None, ("1800", "1800")), (0.1, None, ("68", "120")), (600, None, ("17340", "7200")),
    (30, "99", ("99", "99"))])
def test_hccl_gives_up_when_the_job_does(minutes, own, expected, monkeypatch):
    names = ("HCCL_EXEC_TIMEOUT", "HCCL_CONNECT_TIMEOUT")
    for name in names:
        monkeypatch.setenv(name, own or "")
        if own is None:
            monkeypatch.delenv(name)
    agree_on_timeouts(timedelta(minutes=minutes))
    assert tuple(os.environ[name] for name in names) == expected


def test_an_evaluation_shows_its_own_figures(checkout, digit_folder, student):
    shutil.copytree(student[0], str(checkout / "save"))
    code, out, err = launch(checkout, "train_full_1P", "--data_path=" + digit_folder, "--batch-size=32", "--model",
                            "EvoLeViT_128S", "--input-size=64", "--", "--eval")
    assert code == 0 and "Acc@1" in out and "Final" not in out, out + err


def test_a_second_run_does_not_take_the_logs_of_the_first(checkout, digit_folder):
    lock = checkout / "test" / "output" / "0.lock"
    (checkout / "test" / "output" / "0").mkdir(parents=True)
    (checkout / "test" / "output" / "0" / "train_0.log").write_text("of the first")
    for owner, apart in ((os.getpid(), True), (2 ** 22 + 1, False)):  # a process that runs, and none
        lock.write_text("{}\n".format(owner))
        code, out, err = launch(checkout, "train_full_1P", "--data_path=" + digit_folder, "--batch-size=32", *TINY)
        assert code == 2 and "--teacher-path" in err
        assert ("logs to test/output/0; this one's logs go to test/output/0." in out) == apart, out
        assert ("The logs of an earlier run now lie in test/output/0.previous-1" in out) == (not apart)
    assert not lock.exists()
