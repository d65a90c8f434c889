"""How the process computes, and what it does with memory."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from switch_bank.numerics import set_numerics

set_numerics(torch.device("cpu"))
for _ in range(3):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc keeps memory in its own way")
def test_the_memory_of_a_tensor_is_kept_for_the_next_one() -> None:
    faults = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    assert int(faults) < 10, "64 MB given back would be 16,384 pages, or 32 large ones"
