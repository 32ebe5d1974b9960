"""For test_resume.py: python kill_and_resume.py FOLDER DATA PROCESSES KILLS SEED

Trains once to the end; then trains the same again and again, killed (SIGKILL, every process) KILLS times and resumed
after each: at random instants, every second time in the first half-written file after the instant. Prints as JSON how
many kills hit a half-written file, and which values of the ends differ.
"""
import json
import os
import random
import shutil
import signal
import socket
import sys
import time

import torch

import losses
import main  # (imported once; each life of a run is a fork of this process)

TIMES = ("seconds", "train_seconds", "train_images_per_s", "test_images_per_s", "peak_memory_mb", "waiting_for_data",
         "mfu")

_loss = losses.DistillationLoss.forward


def _sometimes_infinite(self, inputs, outputs, labels, taught=None):
    """The loss, infinite for a batch in four, by its labels."""
    loss = _loss(self, inputs, outputs, labels, taught)
    return loss * float("inf") if int(labels.argmax(1).sum()) % 4 == 1 else loss


def flags(data, out, processes):
    return ["--device", "cpu", "--data_path", data, "--input-size", "64", "--model", "EvoLeViT_128S", "--drop-path",
            "0.1", "--distillation-type", "none", "--batch-size", str(8 // processes), "--epochs", "3",
            "--stage-wise-epoch", "1", "--num_workers", "1" if processes == 1 else "0", "--model-ema-decay", "0.9",
            "--lr", "0.01", "--save-every-steps", "1", "--skip-nonfinite", "50", "--resume", "auto", "--output_dir",
            out, "--no-repeated-aug"]


def start(arguments, processes, log):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            os.setsid()
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            if processes > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                                  LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            code = 1
            try:
                torch.set_num_threads(1)
                main.main(arguments)
                code = 0
            except SystemExit as stopped:
                code = stopped.code or 0
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(pid)
    return children


def finish(children):
    codes = [os.waitpid(child, 0)[1] for child in children]
    assert not any(codes), codes


def kill(children):
    """Kills all that still run, with their data-loading workers; returns whether there were any."""
    alive = []
    for child in children:  # all are looked at before any is killed, since the others fail when one is gone
        done, status = os.waitpid(child, os.WNOHANG)
        assert done == 0 or status == 0, status
        if done == 0:
            alive.append(child)
    for child in alive:
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:  # it has not made its own group yet
            os.kill(child, signal.SIGKILL)
    for child in alive:
        os.waitpid(child, 0)
    return bool(alive)


def writes(out):
    """Whether a file of the run in `out` is half-written or not yet at its place."""
    return any(name.endswith(".partial") or name == "checkpoint.next.pth"
               for name in (os.listdir(out) if os.path.isdir(out) else []))


def stop_inside_a_write(children, out):
    """Stops (SIGSTOP) the process that writes in the middle of a write; returns early where one of the run's ends
    first."""
    writer = children[0]
    while not any(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) for child in children):
        if writes(out):
            os.kill(writer, signal.SIGSTOP)
            os.waitid(os.P_PID, writer, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if writes(out):  # it had not come to the write's end before it stopped
                return
            os.kill(writer, signal.SIGCONT)
        time.sleep(0.0005)


def differences(a, b, path=""):
    """Paths at which two nested values differ, tensors by every bit; times are passed over."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape)
        return [] if same and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes() else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [k for k in set(a) | set(b) if k not in TIMES + ("output_dir", "resume")]
        return [d for k in keys for d in differences(a.get(k), b.get(k), "{}/{}".format(path, k))]
    if isinstance(a, (list, tuple)):
        if type(a) is not type(b) or len(a) != len(b):
            return [path]
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, "{}/{}".format(path, i))]
    return [] if a == b else [path]


def ends(folder):
    """[checkpoint, best checkpoint, log] of a finished run."""
    with open(os.path.join(folder, "log.txt")) as f:
        log = [json.loads(line) for line in f]
    checkpoints = [torch.load(os.path.join(folder, name), map_location="cpu")
                   for name in ("checkpoint.pth", "best_checkpoint.pth")]
    for checkpoint in checkpoints:  # torch 1.5 names a parameter's state by the address it had
        optimizer = checkpoint["optimizer"]
        order = [p for group in optimizer["param_groups"] for p in group.pop("params")]
        optimizer["state"] = {order.index(p): state for p, state in optimizer["state"].items()}
    return checkpoints + [log]


def compare(out, whole):
    """differences(...) of two runs' ends, by a fork, so that this process stays without threads; `out` is removed."""
    result = out + ".json"
    pid = os.fork()
    if pid == 0:
        try:
            with open(result, "w") as f:
                json.dump(differences(ends(out), ends(whole), out), f)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    with open(result) as f:
        found = json.load(f)
    shutil.rmtree(out)
    return found


def run(folder, data, processes, kills, seed):
    draw = random.Random(seed)
    whole, log = os.path.join(folder, "whole"), os.path.join(folder, "log")
    began = time.time()
    finish(start(flags(data, whole, processes), processes, log))
    duration = time.time() - began
    killed = partial = runs = 0
    different = []
    while killed < kills:
        out = os.path.join(folder, "killed-{}".format(runs))
        runs += 1
        while True:
            children = start(flags(data, out, processes), processes, log)
            if killed == kills:
                finish(children)
                break
            time.sleep(draw.uniform(0.0, 0.6 * duration))
            if killed % 2:
                stop_inside_a_write(children, out)
            if not kill(children):
                break
            killed += 1
            partial += writes(out)
        different += compare(out, whole)
    with open(os.path.join(whole, "log.txt")) as f:
        entries = [json.loads(line) for line in f]
    with open(log) as f:
        left_out = f.read().count("Left out update")
    print(json.dumps({"killed": killed, "inside_a_write": partial, "runs": runs, "different": different[:20],
                      "epochs": len(entries), "damaged": [entry["damaged_images"] for entry in entries],
                      "left_out": left_out, "seconds": time.time() - began}))


if __name__ == "__main__":
    losses.DistillationLoss.forward = _sometimes_infinite
    run(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
