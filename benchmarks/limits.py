"""The two limits of a bank layer on this machine: what its arithmetic takes at the measured peak of matrix products,
and what its bytes take at the measured bandwidth of memory.

python -m benchmarks.limits [--matrix-size N] [--megabytes N] [--json]
"""

import argparse
import sys
from typing import Any

import torch

from benchmarks.bank import SHAPES, Shape
from benchmarks.measure import device_name, matmul_peak, memory_bandwidth, show, start_device


def layer_flops(shape: Shape) -> float:
    """Of forward and backward: two matrices, each in three products of 2 FLOPs a weight and token."""
    return 12.0 * shape.tokens * shape.top_k * shape.width * shape.expert_width


def layer_bytes(shape: Shape, element: int) -> float:
    """What must pass between memory and caches if every tensor is read or written once wherever it is needed, and
    nothing else is: `element` bytes a value of activations, 4 of parameters and gradients.

    Input, output and their gradients: 5 passes, the input being read again for the gradient of the first matrix. Hidden
    values: written and read once before and once after relu², and read again in the backward; the same for their
    gradients: 8 passes. Weights: read in forward and backward; their gradients: written as `element`, read, and added
    to the float32 ones (one read, one write).
    """
    rows = shape.tokens * shape.top_k
    activations = 5 * shape.tokens * shape.width + 8 * rows * shape.expert_width
    weights = 2 * shape.experts * shape.width * shape.expert_width
    return activations * element + weights * (2 * 4 + 2 * element + 2 * 4)


def measure(device: torch.device, matrix_size: int, megabytes: int) -> list[dict[str, Any]]:
    """A row for each dtype and shape of benchmarks.bank, and for the dense feed-forward (one expert)."""
    bandwidth = memory_bandwidth(device, megabytes)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        peak = matmul_peak(device, dtype, matrix_size)
        for name, shapes in SHAPES.items():
            for shape in [shapes[0]._replace(experts=1), *shapes]:
                rows.append({
                    "device": device_name(device), "dtype": str(dtype).removeprefix("torch."), "preset": name,
                    "shape": shape._asdict(), "matmul_flops_per_s": peak, "memory_bytes_per_s": bandwidth,
                    "flops": layer_flops(shape), "bytes": layer_bytes(shape, dtype.itemsize),
                    "arithmetic_ms": 1000 * layer_flops(shape) / peak,
                    "bytes_ms": 1000 * layer_bytes(shape, dtype.itemsize) / bandwidth,
                })  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="an object a line")
    parser.add_argument("--matrix-size", type=int, help="of the products (default: 2048, on a GPU 8192)")
    parser.add_argument("--megabytes", type=int, help="of the array to copy (default: 512, on a GPU 4096)")
    options = parser.parse_args()
    device = start_device()
    size, megabytes = (8192, 4096) if device.type == "cuda" else (2048, 512)
    rows = measure(device, options.matrix_size or size, options.megabytes or megabytes)
    if not options.json:
        print(f"{rows[0]['device']}: memory {rows[0]['memory_bytes_per_s'] / 1e9:.1f} GB/s")
    for row in rows:
        text = f"{row['dtype']:<9}{row['preset']:<7} experts {row['shape']['experts']:<4}"
        text += f"arithmetic {row['arithmetic_ms']:8.2f} ms at {row['matmul_flops_per_s'] / 1e9:,.0f} GFLOP/s, "
        text += f"bytes {row['bytes_ms']:8.2f} ms ({row['bytes'] / 1e6:,.0f} MB)"
        show(row, options.json, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
