"""How things are timed here, and what the machine can do at most."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from switch_bank.config import Config, ConfigError, parse
from switch_bank.numerics import set_numerics
from switch_bank.ops.microbatches import linear
from switch_bank.run_log import cpu_name

FEWEST, MOST = 5, 200  # repetitions
HEAD_START = 40_000_000  # GPU clock cycles, some 20 ms: for the host to queue a call before the GPU begins it


def start_device() -> torch.device:
    """The GPU where there is one, and torch set up for it as the trainer does."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_numerics(device)
    torch._dynamo.config.recompile_limit = 256  # one function takes many shapes here
    return device


def preset_options(
    program: str, description: str, seconds: float, seconds_of: str, json_of: str
) -> tuple[argparse.Namespace, torch.device, Config]:
    """The command line of a benchmark of a whole preset: [PRESET] [--group.option VALUE ...] [--seconds S] [--json].
    The device is set up. Exits with code 2 where a value cannot work."""
    parser = argparse.ArgumentParser(
        prog=program, description=description, allow_abbrev=False,
        epilog="PRESET and --group.option VALUE are those of train_switch_bank.py.",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=seconds, help=f"{seconds_of}; at least 5 repetitions")
    parser.add_argument("--json", action="store_true", help=json_of)
    options, rest = parser.parse_known_args()
    device = start_device()
    try:
        config = parse(rest, default_preset="record" if device.type == "cuda" else "nano").check()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    return options, device, config


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's and how many threads work on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def random_like(shape: Sequence[int], device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal values: zeros would spare a GPU power, and so time."""
    return (scale * torch.randn(*shape, device=device)).to(dtype)


def call_time(function: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call. On a GPU it is the device's own time: the call is queued behind a short sleep, so that
    the host's work is not in it as long as it is shorter than that."""
    if device.type == "cuda":
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(HEAD_START)
        began.record()
        function()
        ended.record()
        torch.cuda.synchronize()
        return began.elapsed_time(ended)
    return wall_time(function, device)


def wall_time(function: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call on the wall clock, from a waiting device to a finished one."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def alternate(
    functions: dict[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    warm_up: int = 2,
    timer: Callable[[Callable[[], object], torch.device], float] = call_time,
) -> dict[str, list[float]]:
    """Milliseconds of every call, by name. The functions take turns, so that what disturbs the machine disturbs all
    alike, for `seconds`, at least 5 and at most 200 times each, after `warm_up` turns that do not count."""
    for _ in range(warm_up):
        for function in functions.values():
            timer(function, device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    for repetition in range(MOST):
        if repetition >= FEWEST and time.perf_counter() > end:
            break
        for name, function in functions.items():
            times[name].append(timer(function, device))
    return times


def quartiles(values: list[float]) -> list[float]:
    """First and third quartile: how far a median may be trusted."""
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [round(first, 4), round(third, 4)]


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of the best of some [size, size] matrix products: the most that this device does with this dtype."""
    a, b = (random_like((size, size), device, dtype) for _ in range(2))
    times = alternate({"matmul": lambda: a @ b}, device, seconds=1.0)["matmul"]
    return 2 * size**3 / (min(times) / 1000)


def memory_bandwidth(device: torch.device, megabytes: int) -> float:
    """Bytes/s, read and written together, of copies of an array of `megabytes`; take one far larger than the caches."""
    source = random_like((megabytes * 2**18,), device, torch.float32)
    target = torch.empty_like(source)
    times = alternate({"copy": lambda: target.copy_(source)}, device, seconds=1.0)["copy"]
    return 2 * source.numel() * source.element_size() / (min(times) / 1000)


def dense_ffn(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """The feed-forward that a bank layer is measured against. x [N, D]; w1 [F, D] and w2 [D, F] float32, or those per
    microbatch."""
    return linear(F.relu(linear(x, w1.to(x.dtype))).square(), w2.to(x.dtype))


def show(row: dict[str, Any], as_json: bool, text: str) -> None:
    """A measurement, as soon as it is there: an object a line, or for reading."""
    print(json.dumps(row) if as_json else text, flush=True)
