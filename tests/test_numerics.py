"""How the process computes, and what it does with memory."""

import os
import platform
import subprocess
import sys

import pytest

from switch_bank.config import STRICT_PRODUCTS

FAULTS = """
import resource, torch
from switch_bank.numerics import set_numerics

set_numerics(torch.device("cpu"))
for _ in range(20):  # small tensors get in between: it takes a few until there is a gap that fits
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


PRODUCTS = """
import torch
from switch_bank.numerics import set_numerics

set_numerics(torch.device("cpu"))
g, x = torch.randn(2048, 384), torch.randn(2048, 128)
one, two = [], []
for threads, products in ((1, one), (2, two)):
    torch.set_num_threads(threads)
    products += [g.mT @ x, g @ torch.ones(384, 128), x.mT @ x[:, :16]]
print([torch.equal(a, b) for a, b in zip(one, two)])
"""


@pytest.mark.skipif(not STRICT_PRODUCTS, reason="elsewhere MKL may sum in another order on another number of threads")
def test_the_bits_of_a_product_do_not_depend_on_the_number_of_threads() -> None:
    unset = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    command = [sys.executable, "-c", PRODUCTS]
    same = subprocess.run(command, env=unset, capture_output=True, text=True, check=True).stdout
    assert same == "[True, True, True]\n"


SETTINGS = """
import torch
from switch_bank.numerics import set_numerics

set_numerics(torch.device("cuda"))
print(torch._inductor.config.triton.mix_order_reduction)
"""


def test_no_gpu_kernel_has_the_fusion_that_torch_2_11_fails_on() -> None:
    command = [sys.executable, "-c", SETTINGS]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"
