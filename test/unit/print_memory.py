"""For test_memory.py: `python print_memory.py CASE` prints figures of this process's memory, in MiB, as JSON."""
import json
import os
import resource
import sys

import torch

from runtime.machine import memory

BLOCK = 64  # MiB


def resident(field="Rss"):
    with open("/proc/self/smaps_rollup") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(field + ":")) / 1024


def addresses():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmSize")) / 1024


def touched():
    return torch.ones(BLOCK << 18)


def after_free():
    """How much more memory than before this process has when a block has come and gone."""
    before = resident()
    block = touched()
    del block
    return resident() - before


def in_a_fork(function):
    """What `function` returns in a fork of this process."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, json.dumps(function()).encode())
        os._exit(0)
    os.wait()
    return json.loads(os.read(read, 1000).decode())


def kept():
    memory.keep_freed_memory()
    found = {"after_free": after_free()}
    block = touched()
    found.update(huge=resident("AnonHugePages"), right=bool((block == 1).all()))
    del block
    before = resident()
    memory.give_back_freed()
    found["given_back"] = before - resident()
    again = touched()
    return dict(found, huge_again=resident("AnonHugePages"), right_again=bool((again == 1).all()))


def forked():
    """A fork while this process has nothing but freed memory to pass on, and one beside which it writes a block."""
    memory.keep_freed_memory()
    before = resident()
    for _ in range(2):
        after_free()
    held = resident() - before
    found = {"held": held, "inherited": in_a_fork(lambda: resident() - before), "in_fork": in_a_fork(after_free)}
    block, (read, write) = touched(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write)
        os.read(read, 1)  # until the other process ends it, or has ended
        os._exit(0)
    block.add_(1)  # copied, in small pages
    small = resident("AnonHugePages")
    memory.use_huge_pages()
    found["gained"] = resident("AnonHugePages") - small
    found["right"] = bool((block == 2).all())
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return found


def limited():
    size = int(addresses() + 4 * BLOCK) << 20
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))
    before = addresses()
    memory.keep_freed_memory()
    grown = addresses() - before
    memory.use_huge_pages()
    return {"grown": grown, "after_free": after_free()}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
