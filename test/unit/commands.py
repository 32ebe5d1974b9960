"""main.py as its users run it, at a size that tests can afford, and real pictures to run it on."""
import atexit
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
MAIN = os.path.join(ROOT, "main.py")
UNIT = os.path.join(ROOT, "test", "unit")
SMALL = ["--device", "cpu", "--num_workers", "0", "--input-size", "64", "--batch-size", "32"]

# For what takes half a minute and behaves alike on all lines: CI runs the slow tests on the current line, and all
# others on all.
slow_on_the_current_line = pytest.mark.slow if hasattr(torch, "compile") else lambda test: test


# what may differ from this process's environment in a fork of the zygote, which has imported everything already
_IN_FORKS = {"OMP_NUM_THREADS", "TORCH_HOME", "no_proxy"}
_SCRIPTS = {os.path.join(ROOT, name + ".py"): name for name in ("main", "benchmark")}


class _Zygote:
    """Runs main.py and benchmark.py as commands (zygote.py); one for all tests."""

    process = None

    def run(self, module, argv, cwd, env, timeout):
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, os.path.join(UNIT, "zygote.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                universal_newlines=True, env=dict(env, PYTHONPATH=os.pathsep.join([ROOT, UNIT])))
            atexit.register(self.process.kill)
        with tempfile.TemporaryDirectory() as folder:
            out, err = (os.path.join(folder, name) for name in ("out", "err"))
            request = dict(module=module, argv=argv, cwd=cwd, env=env, timeout=timeout, out=out, err=err)
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline().strip()
            texts = [open(name, errors="replace").read() if os.path.exists(name) else "" for name in (out, err)]
        assert answer, "{} {} took more than {} seconds\n{}".format(module, argv, timeout, "".join(texts))
        return (int(answer),) + tuple(texts)


_zygote = _Zygote()


def run(command, cwd=ROOT, env=(), timeout=500):
    """(exit code, standard output, standard error) of a command, without a launcher's variables and what importing
    evo_vit set in its environment, with those of `env`."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCH_DEVICE_BACKEND_AUTOLOAD")
    base = {k: v for k, v in os.environ.items() if k not in ours}
    command, env = [str(word) for word in command], dict(env)
    # the compiler starts processes of its own, which do not go with a fork
    forks = command[0] == sys.executable and command[1] in _SCRIPTS and set(env) <= _IN_FORKS
    if forks and not any("compile" in word for word in command[2:]):
        return _zygote.run(_SCRIPTS[command[1]], command[2:], str(cwd), dict(base, **env), timeout)
    result = subprocess.run(command, cwd=str(cwd), env=dict(base, **env), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, universal_newlines=True, timeout=timeout)
    return result.returncode, result.stdout, result.stderr


def helper(name, *arguments, **kwargs):
    """run() of test/unit/NAME.py, a script that imports the project; `launch`: what starts it."""
    env = dict(kwargs.pop("env", {}))
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), ROOT, UNIT]))
    launch = kwargs.pop("launch", [sys.executable])
    return run(launch + [os.path.join(UNIT, name + ".py")] + list(arguments), env=env, **kwargs)


def succeed(*flags, **kwargs):
    """What `python main.py SMALL flags` prints, standard error included; it must succeed."""
    launch = kwargs.pop("launch", [sys.executable])
    small = kwargs.pop("small", SMALL)
    code, out, err = run(launch + [MAIN] + small + list(flags), **kwargs)
    assert code == 0, out + err
    return out + err


def free_port():
    """A port of this machine that no process listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launchers(processes):
    """{name: command prefix} of every launcher that this PyTorch has."""
    options = ["--nproc_per_node={}".format(processes), "--master_port={}".format(free_port())]
    found = {"launch": [sys.executable, "-m", "torch.distributed.launch"] + options}
    if importlib.util.find_spec("torch.distributed.run"):
        found["torchrun"] = [sys.executable, "-m", "torch.distributed.run"] + options
    else:
        found["launch --use_env"] = found["launch"] + ["--use_env"]
    return found


def copy_package(folder):
    """What `pip install .` builds from, copied to `folder`, so that the build leaves nothing in the repository."""
    shutil.copytree(os.path.join(ROOT, "evo_vit"), str(folder / "evo_vit"),
                    ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(os.path.join(ROOT, name), str(folder))
    return folder


def write_digits(folder, classes, train, val):
    """Writes scikit-learn's digits as PNGs to folder/train/CLASS and folder/val/CLASS; returns the folder's path."""
    from datasets import Digits
    for part, count in (("train", train), ("val", val)):
        written = [0] * 10
        for number, (image, label) in enumerate(Digits(part == "train").samples):
            if label < classes and written[label] < count:
                written[label] += 1
                target = os.path.join(str(folder), part, "digit{}".format(label))
                os.makedirs(target, exist_ok=True)
                image.resize((48, 48)).save(os.path.join(target, "{}.png".format(number)))
        assert written == [count] * classes + [0] * (10 - classes)
    return str(folder)


def photos_in(root):
    """(class folder, photograph) of each of scikit-learn's two, for train and val under `root`, as ImageNet lies."""
    from PIL import Image
    from sklearn.datasets import load_sample_images
    for part in ("train", "val"):
        for number, photo in enumerate(load_sample_images().images):
            folder = root / part / "class{}".format(number)
            folder.mkdir(parents=True)
            yield folder, Image.fromarray(photo)
