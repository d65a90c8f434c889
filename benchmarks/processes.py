"""Tokens/s of a preset's training step on several CPU processes of one thread each, against one such process.

python -m benchmarks.processes [PRESET] [--group.option VALUE ...] [--seconds S] [--json]
"""

import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.measure import alternate, device_name, preset_options, quartiles, show, start_device, wall_time
from benchmarks.step import last_steps, prepared
from switch_bank.config import Config, ConfigError
from switch_bank.distributed import World


def work(rank: int, processes: int, config: Config, folder: str, parent: Connection) -> None:
    """A process: a step for every True that the parent sends."""
    start_device()
    dist.init_process_group("gloo", init_method=f"file://{folder}/{processes}", rank=rank, world_size=processes)
    step = prepared(config, Path(folder), World(rank, processes, torch.device("cpu")))
    at = itertools.cycle(last_steps(config))
    while parent.recv():
        parent.send(step(next(at)).item())
    dist.destroy_process_group()


def started(processes: int, config: Config, folder: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Starts processes that work together. What makes them take a step, and what ends them."""
    context, members = mp.get_context("spawn"), list[tuple[SpawnProcess, Connection]]()
    for rank in range(processes):
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(rank, processes, config, folder, theirs), daemon=True)
        process.start()
        theirs.close()  # so that a process that dies is noticed here
        members.append((process, ours))

    def take_a_step() -> None:
        for _, pipe in members:
            pipe.send(True)
        losses = [pipe.recv() for _, pipe in members]
        if len(set(losses)) > 1:
            raise RuntimeError(f"the processes do not work together, their losses are {losses}")

    def end() -> None:
        for process, pipe in members:
            pipe.send(False)
            process.join()

    return take_a_step, end


def measure(config: Config, processes: int, seconds: float) -> dict[str, Any]:
    """The row: medians of whole steps, one process and several taking turns."""
    with tempfile.TemporaryDirectory() as folder:
        groups = {count: started(count, config, folder) for count in (1, processes)}
        steps: dict[str, Callable[[], object]] = {str(count): step for count, (step, _) in groups.items()}
        times = alternate(steps, torch.device("cpu"), seconds, warm_up=3, timer=wall_time)
        for _, end in groups.values():
            end()
    one, several = times["1"], times[str(processes)]
    tokens = config.data.slices_per_step * config.data.slice_tokens
    return {
        "device": device_name(torch.device("cpu")), "preset": config.preset, "processes": processes,
        "one_process_step_ms": statistics.median(one), "step_ms": statistics.median(several),
        "one_process_step_quartiles_ms": quartiles(one), "step_quartiles_ms": quartiles(several),
        "tokens_per_s": 1000 * tokens / statistics.median(several),
        "speedup": statistics.median(one) / statistics.median(several), "repetitions": len(several),
    }  # fmt: skip


def main() -> int:
    options, device, config = preset_options(
        "python -m benchmarks.processes", __doc__.splitlines()[0], 30.0, "for both", "one object"
    )
    processes = torch.get_num_threads()
    try:
        if device.type != "cpu" or processes < 2:
            raise ConfigError("this compares CPU processes: hide GPUs, and set OMP_NUM_THREADS to how many, at least 2")
        config.check(processes)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started
    row = measure(config, processes, options.seconds)
    show(row, options.json, "\n".join(f"{name:<32}{value}" for name, value in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
