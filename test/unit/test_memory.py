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
    not memory._may_reserve(), reason="this system gives no huge pages of 2 MB, or limits addresses")


def figures(case):
    code, out, err = commands.run([sys.executable, os.path.join(commands.UNIT, "print_memory.py"), case],
                                  env={"PYTHONPATH": commands.ROOT, "OMP_NUM_THREADS": "1"})
    assert code == 0, err
    return json.loads(out)


def test_freed_memory_stays_for_the_next_tensors():
    assert figures("kept")["after_free"] > 0.9 * BLOCK


def test_freed_memory_is_given_back_on_demand():
    assert figures("kept")["given_back"] > 0.9 * BLOCK


def test_workers_inherit_no_freed_memory_and_keep_none():
    found = figures("forked")
    assert found["held"] > 0.9 * BLOCK and found["right"]
    assert found["inherited"] < 0.2 * BLOCK and found["in_fork"] < 0.1 * BLOCK


@needs_huge_pages
def test_tensors_lie_in_huge_pages():
    found = figures("kept")
    assert min(found["huge"], found["huge_again"]) > 0.8 * BLOCK and found["right"] and found["right_again"]


@needs_huge_pages
def test_memory_shared_with_workers_comes_back_into_huge_pages():
    release = tuple(int(part) for part in platform.release().split(".")[:2])
    if release < (6, 1):
        pytest.skip("Linux before 6.1 does so in its own time")
    assert figures("forked")["gained"] > 0.95 * BLOCK


def test_limited_addresses_are_left_alone():
    found = figures("limited")
    assert found["grown"] < 8 and found["after_free"] > 0.9 * BLOCK


@pytest.mark.parametrize("name, value", [
    ("hpage_pmd_size", "536870912"), ("hpage_pmd_size", None), ("enabled", "always madvise [never]"), ("enabled", None),
    ("overcommit_memory", "2"), ("overcommit_memory", None),
    (resource.RLIMIT_AS, 1 << 40), (resource.RLIMIT_DATA, 1 << 40)])
def test_no_addresses_are_reserved_where_they_cost(name, value, monkeypatch):
    system = {"hpage_pmd_size": "2097152", "enabled": "always [madvise] never", "overcommit_memory": "0",
              resource.RLIMIT_AS: resource.RLIM_INFINITY, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr("resource.getrlimit", lambda kind: (system[kind], resource.RLIM_INFINITY))
    monkeypatch.setattr(memory, "_read", lambda path: system[os.path.basename(path)])
    assert memory._may_reserve()
    monkeypatch.setitem(system, name, value)
    assert not memory._may_reserve()
