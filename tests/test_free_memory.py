from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from compress_search import free_memory

HOLES = """
import numpy as np
from compress_search import free_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

# glibc takes blocks of this size from the system one by one until the first of them was freed.
np.ones(3 * 2**20)
blocks = [np.ones(2**20) for _ in range(80)]
del blocks[::2]
before = resident()
free_memory.give_back_free_memory()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's")
def test_holes_between_blocks_are_given_back():
    written = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert int(written.stdout) > 0.9 * 40 * 2**23


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_another_allocator_is_left_alone(monkeypatch, error):
    asked = []

    def library(name):
        asked.append(name)
        raise error

    monkeypatch.setattr(free_memory.ctypes, "CDLL", library)
    free_memory.give_back_free_memory()
    assert asked == [None]
