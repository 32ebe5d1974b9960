"""For commands.py: a process that has imported main.py and runs its command line in forks of itself, so that a test
does not wait for the imports. Reads a JSON object a line: module, argv, cwd, env, timeout, out and err (files). Answers
with the exit code, or with nothing after `timeout` seconds.

It computes nothing itself: a fork of a process whose OpenMP threads run would hang.
"""
import importlib
import json
import os
import signal
import sys
import time
import traceback

import torch

import main  # noqa: F401  (what takes the time)


def run(request):
    """Runs the request, in the fork, and ends it."""
    code = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, name in ((1, request["out"]), (2, request["err"])):
            file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        if request["env"].get("OMP_NUM_THREADS"):
            torch.set_num_threads(int(request["env"]["OMP_NUM_THREADS"]))
        module = importlib.import_module(request["module"])
        sys.argv = [module.__file__] + request["argv"]
        module.main()
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 0 if stopped.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve():
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run(request)
        os.write(1, "{}\n".format(_wait(pid, request["timeout"])).encode())


def _wait(pid, timeout):
    """The exit code of the fork; after `timeout` seconds it is ended with all that it has started, and none is
    known."""
    end = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
        if time.monotonic() > end:
            for kill in (os.killpg, os.kill):
                try:
                    kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            os.waitpid(pid, 0)
            return ""
        time.sleep(0.02)


if __name__ == "__main__":
    serve()
