"""How torch computes: the trainer, the audit and the benchmarks set it alike, each once."""

import torch


def set_numerics(device: torch.device) -> None:
    """On a CPU the same seed and number of processes give the same bits; a GPU multiplies float32 on tensor cores."""
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("high")
