"""A CPU run keeps the memory that its tensors free, in huge pages where the system has them; a loader's workers do not
hold it, and limits on a process stay what they were."""
import json
import os
import platform
import resource
import sys

import commands
import pytest

from runtime.machine import memory

pytestmark = pytest.mark.skipif(memory._glibc() is None or not os.path.exists("/proc/self/smaps_rollup"),
                                reason="needs glibc, and Linux 4.14 or newer")
BLOCK = 64  # MiB, as in print_memory.py


needs_huge_pages = pytest.mark.skipif(
    not memory._may_reserve() or "[never]" in memory._read("/sys/kernel/mm/transparent_hugepage/enabled"),
    reason="this system gives no huge pages of 2 MB, or limits addresses")


def figures(case):
    code, out, err = commands.run([sys.executable, os.path.join(commands.UNIT, "print_memory.py"), case],
                                  env={"PYTHONPATH": commands.ROOT, "OMP_NUM_THREADS": "1"})
    assert code == 0, err
    return json.loads(out)


def test_freed_memory_stays_for_the_next_tensors():
    assert figures("kept")["after_free"] > 0.9 * BLOCK


def test_workers_inherit_no_freed_memory_and_keep_none():
    found = figures("forked")
    assert found["held"] > 0.9 * BLOCK and found["right"]
    assert found["inherited"] < 0.2 * BLOCK and found["in_fork"] < 0.1 * BLOCK


@needs_huge_pages
def test_tensors_lie_in_huge_pages():
    found = figures("kept")
    assert found["huge"] > 0.8 * BLOCK and found["right"]


@needs_huge_pages
def test_memory_shared_with_workers_comes_back_into_huge_pages():
    release = tuple(int(part) for part in platform.release().split(".")[:2])
    if release < (6, 1):
        pytest.skip("Linux before 6.1 does so in its own time")
    assert figures("forked")["gained"] > 0.8 * BLOCK


def test_limited_addresses_are_left_alone():
    found = figures("limited")
    assert found["grown"] < 8 and found["after_free"] > 0.9 * BLOCK


@pytest.mark.parametrize("path, text", [("hpage_pmd_size", "536870912"), ("hpage_pmd_size", None),
                                        ("overcommit_memory", "2"), ("overcommit_memory", None)])
def test_no_addresses_are_reserved_where_they_cost(path, text, monkeypatch):
    usual = {"hpage_pmd_size": "2097152", "overcommit_memory": "0"}
    monkeypatch.setattr("resource.getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    monkeypatch.setattr(memory, "_read", lambda name: usual[os.path.basename(name)])
    assert memory._may_reserve()
    monkeypatch.setitem(usual, path, text)
    assert not memory._may_reserve()
