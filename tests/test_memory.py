"""The memory of one training step serves the next."""

import platform
import subprocess
import sys

import pytest
from packaging.version import Version

from vae_torch.machine import keep_memory

PAGE_FAULTS = """
import resource, torch
from vae_torch.machine import tune_cpu

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(12_000_000)  # 48 MB, 12,000 pages of 4 KB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
untuned = faults()
tune_cpu(1)
faults()
print(untuned, faults())
"""


NEW_GLIBC = platform.libc_ver()[0] == "glibc" and Version(platform.libc_ver()[1]) >= Version("2.35")


@pytest.mark.parametrize(
    ("largest", "set_to"),
    [
        (1 << 63, {"mmap": 256 << 20, "trim": 1 << 30}),
        (32 << 20, {"mmap": 32 << 20, "trim": 1 << 30}),  # glibc before 2.35, on 64 bits
        (512 << 10, {}),  # the same on 32 bits
    ],
)
def test_a_threshold_that_glibc_refuses_is_lowered_or_left(largest, set_to):
    had = {}

    def mallopt(parameter, size):  # glibc's do_set_mmap_threshold, M_MMAP_THRESHOLD is -3
        if parameter == -3 and size > largest:
            return 0
        had[{-3: "mmap", -1: "trim"}[parameter]] = size
        return 1

    keep_memory(mallopt)
    assert had == set_to


@pytest.mark.skipif(not NEW_GLIBC, reason="a setting of glibc 2.35")
def test_pages_are_not_fetched_again():
    done = subprocess.run(
        [sys.executable, "-c", PAGE_FAULTS], capture_output=True, text=True, check=True
    )
    untuned, tuned = map(int, done.stdout.split())
    assert tuned < 100
    assert untuned > 5 * tuned
