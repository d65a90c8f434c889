"""How torch computes: the trainer, the audit and the benchmarks set it alike, each once."""

import ctypes
import os

import torch
import torch._inductor.config

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def set_numerics(device: torch.device) -> None:
    """On a CPU the same seed gives the same bits, and products of float32 by MKL do so on any number of threads. On any
    device, products of float32 are float32 throughout: the routers' choices ask for it. To be called before the
    process's first product."""
    if device.type == "cpu":
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # read by MKL at its first call
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        keep_freed_memory()
    torch.set_float32_matmul_precision("highest")
    # A fusion for GPUs that fails on the sums of the model's losses in torch 2.11, for 8 slices and 16 experts for one.
    torch._inductor.config.triton.mix_order_reduction = False


def keep_freed_memory() -> None:
    """glibc gives large tensors back to the system, which clears their pages before it hands them out again; from here
    on this process keeps them for its next tensors. Does nothing with another libc."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 2**26)
