"""The memory of one training step serves the next."""

import platform
import subprocess
import sys

import pytest

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_pages_are_not_fetched_again():
    done = subprocess.run(
        [sys.executable, "-c", PAGE_FAULTS], capture_output=True, text=True, check=True
    )
    untuned, tuned = map(int, done.stdout.split())
    assert tuned < 100
    assert untuned > 5 * tuned
