"""A whole training step of a preset against its dense baseline: one expert, no router, no adapter.

python -m benchmarks.step [PRESET] [--group.option VALUE ...] [--seconds S] [--json]
"""

import itertools
import math
import multiprocessing
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.measure import (
    alternate,
    device_name,
    matmul_peak,
    preset_options,
    quartiles,
    show,
    start_device,
    wall_time,
)
from switch_bank import distributed, schedules
from switch_bank.config import Config, ModelConfig, compute_dtype
from switch_bank.cuda_graphs import CudaGraphs, directly
from switch_bank.data import Shards, TokenStream, write_shard
from switch_bank.model.features import documents_of
from switch_bank.model.gpt import SwitchBankGPT
from switch_bank.model.router import RoutingSums
from switch_bank.model.size import forward_flops, parts
from switch_bank.optim.groups import QuantileClip, build_optimizers, in_backward_order, parameter_groups, set_rates
from switch_bank.schedules import StepState

MEDIAN_DOCUMENT = 800  # tokens, as in FineWeb
STEPS_A_TURN = {"cpu": 1, "cuda": 3}  # so many are queued at once: between steps, a GPU waits for no host in training


class TrainingStep:
    """The model, its optimizers, and what train_switch_bank.py does with them in a step, in its order.

    tests/benchmarks/test_step.py holds the two to the same losses.
    """

    def __init__(self, config: Config, shards: Shards, world: distributed.World) -> None:
        data, run, self.device = config.data, config.run, world.device
        self.config = config
        microbatch_slices, self.microbatches = config.microbatch(world.size, world.device)
        self.slices_together = microbatch_slices * (self.microbatches or 1)
        self.stream = TokenStream(
            shards, data.slice_tokens, data.slices_per_step, world.rank, world.size, world.device, microbatch_slices
        )
        recorded = config.records_graphs(self.device)
        self.launch = CudaGraphs(self.device) if recorded else directly
        torch.manual_seed(run.seed)
        with self.device:
            self.model = SwitchBankGPT(config.model)
        if run.recompute:
            self.model.recompute_layers()
        backwards = data.slices_per_step // world.size // self.slices_together
        parameters = in_backward_order(self.model, self.microbatches)
        self.gradients = distributed.Gradients(parameters, backwards, overlap=not recorded)
        self.muon, self.adam = build_optimizers(self.model, config)
        routers = parameter_groups(self.model)["routers"]
        self.clip = QuantileClip(routers, config.optim.router_clip_quantile, config.optim.router_clip_history)
        self.picks = torch.zeros(config.model.layers, config.model.experts, device=self.device)
        self.seed = torch.tensor(run.seed, device=self.device)
        self.states = schedules.step_states(config, self.device)
        if run.compile:
            self.model.compile()

    def window(self, step: int) -> int | None:
        if self.model.attention_backend != "flash":
            return None
        return schedules.attention_window(step, self.config.schedule.steps, self.config.model.window)

    def forward_backward(
        self, noise: bool, window: int | None, tokens: Tensor, targets: Tensor, slices: Tensor, *state: Tensor
    ) -> Tensor:
        """Adds the gradients of some slices' losses to what is there. In one row, the sum of the losses and the sums of
        the slices' routing."""
        seed = self.seed if noise else None
        output = self.model(tokens, targets, StepState(*state), slices, seed, window, self.microbatches)
        self.gradients.backward(output.loss * (self.slices_together / self.config.data.slices_per_step))
        loss = output.token_losses.sum(dtype=torch.float64) / self.stream.step_tokens
        return torch.cat([loss.view(1), output.routing.flat()])

    def __call__(self, step: int) -> Tensor:
        """One update. The mean loss over all slices, on the device."""
        config, model, state = self.config, self.model, self.states[step]
        variant = schedules.gumbel_noise(step, config.schedule), self.window(step)
        inputs, targets = self.stream.batch(step)
        self.gradients.zero_()
        sums = torch.zeros((), dtype=torch.float64, device=self.device)
        own = (inputs, targets, self.stream.own_slices)
        for some in zip(*(part.split(self.slices_together) for part in own), strict=True):
            sums = sums + self.launch(variant, partial(self.forward_backward, *variant), *some, *state)
        self.gradients.wait()
        loss, routing_row = distributed.summed(sums).float().tensor_split([1])
        counts = RoutingSums.from_flat(routing_row, *self.picks.shape).counts
        if self.device.type == "cpu" and not bool(torch.isfinite(self.gradients.flat.sum() + loss)):
            raise ArithmeticError(f"step {step}: the loss or a gradient is not finite")
        self.clip.step()
        set_rates(self.muon, self.adam, step, config)
        self.muon.start_step()
        self.adam.step()
        self.muon.finish_step()
        self.picks.mul_(0.9).add_(counts)
        if model.routers is not None and config.model.balance == "bias":
            model.routers.update_balance_bias(counts, model.routers.active(state))
        return loss


def dense_baseline(config: Config) -> Config:
    """An ordinary dense model: in each layer one feed-forward of its own, as wide as all experts that work on one
    token; no router, no adapter."""
    model = config.model
    width = model.expert_width * (model.top_k + model.always_on_expert)
    dense = replace(model, experts=1, shared=False, top_k=1, expert_width=width, always_on_expert=False, adapter="none")
    return replace(config, model=dense)


def write_random_shard(folder: Path, tokens: int, model: ModelConfig) -> Shards:
    """Random tokens in documents of random lengths, half of them above `MEDIAN_DOCUMENT`, as one shard in a new folder
    under `folder`: shards that are being read may not change."""
    random = np.random.default_rng(0)
    text = random.integers(model.vocab_size, size=tokens)
    lengths = np.exp(random.normal(math.log(MEDIAN_DOCUMENT), 1.0, size=1 + tokens // 64)).astype(int) + 2
    starts = np.concatenate([[0], np.cumsum(lengths)])
    text[starts[starts < tokens]] = model.eod_token
    own = tempfile.mkdtemp(dir=folder)
    write_shard(f"{own}/train_000000.bin", text)
    return Shards.open(f"{own}/train_*.bin", model.vocab_size)


@torch.no_grad()
def fill_zeros(model: SwitchBankGPT) -> None:
    """Random values for the matrices that start at zero: with them no product is of zeros alone."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            random = torch.randn_like(parameter) * parameter.shape[-1] ** -0.5
            parameter.copy_(torch.where(parameter == 0, random, parameter))


def last_steps(config: Config) -> range:
    """The last twentieth of the schedule: all experts at work, windows at their longest."""
    steps = config.schedule.steps
    return range(min(steps - 1, math.ceil(0.95 * steps)), steps)


def mean_visible_keys(step: TrainingStep) -> float:
    """Keys that a query sees, mean over the tokens of a step and over the attention layers: what causality, documents
    and windows leave."""
    config, first = step.config.model, last_steps(step.config)[0]
    window = int(step.states[first].window)
    behind = documents_of(step.stream.batch(first)[0], config).position + 1
    long, short = (behind.clamp(max=limit).double().mean().item() for limit in (window, window // 2))
    layers = [layer for layer in range(config.layers) if layer not in config.skip_attention]
    return sum(long if layer % 4 == 3 else short for layer in layers) / max(1, len(layers))


def flops_per_token(step: TrainingStep) -> float:
    """Of forward and backward: 6 for each weight of a matrix that works on the token, 12·D for each key that it sees in
    a layer. The optimizer's are left out, and so is what is computed twice."""
    return 3 * forward_flops(step.config.model, parts(step.model), mean_visible_keys(step))


def prepared(config: Config, folder: Path, world: distributed.World) -> TrainingStep:
    """The step on random documents, ready to be taken."""
    shards = write_random_shard(folder, 8 * config.data.slices_per_step * config.data.slice_tokens, config.model)
    step = TrainingStep(config, shards, world)
    fill_zeros(step.model)
    return step


def prepared_with_memory(config: Config, folder: Path, world: distributed.World) -> tuple[TrainingStep, float]:
    """The step, and the MB that training holds at most: on a GPU what torch took of its memory, on a CPU all of a
    process that does nothing else."""
    if world.device.type == "cpu":
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            megabytes = process.submit(peak_memory_of_process, config, folder).result()
        return prepared(config, folder, world), megabytes
    before = torch.cuda.memory_reserved()
    step = prepared(config, folder, world)
    step(last_steps(config)[-1])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()  # compiling and tuning held more than training does
    step(last_steps(config)[-1])
    return step, (torch.cuda.max_memory_reserved() - before) / 1e6


def peak_memory_of_process(config: Config, folder: Path) -> float:
    """MB that this process has held at most, after two steps."""
    start_device()
    world = distributed.start()
    step = prepared(config, folder, world)
    for at in last_steps(config)[:2]:
        step(at)
    dist.destroy_process_group()
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure(config: Config, world: distributed.World, seconds: float) -> dict[str, Any]:
    """The row: medians of whole steps in ms, the two models taking turns in this process."""
    device, tokens = world.device, config.data.slices_per_step * config.data.slice_tokens
    dtype = compute_dtype(config.model.dtype, device)
    configs = {"bank": config, "dense": dense_baseline(config).check()}
    with tempfile.TemporaryDirectory() as folder:
        steps, memory, functions = {}, {}, {}
        count = STEPS_A_TURN[device.type]

        def turns(step: TrainingStep) -> Callable[[], object]:
            at = itertools.cycle(last_steps(step.config))

            def turn() -> None:
                for _ in range(count):
                    step(next(at))

            return turn

        for name, own in configs.items():
            steps[name], memory[name] = prepared_with_memory(own, Path(folder), world)
            functions[name] = turns(steps[name])
            functions[name]()  # on a CPU it compiles
            once = wall_time(functions[name], device) / count
            # The row comes when all is measured: if time runs out before, this is what there is.
            print(f"{name}: {once:.1f} ms a step, seen once; {memory[name]:,.0f} MB", file=sys.stderr, flush=True)
        times = alternate(functions, device, seconds, warm_up=1, timer=wall_time)
        flops = {name: flops_per_token(step) for name, step in steps.items()}
    for name, step in steps.items():
        if not all(bool(torch.isfinite(parameter).all()) for parameter in step.model.parameters()):
            raise ArithmeticError(f"the {name} model's parameters are not finite: its times say nothing")
    milliseconds = {name: statistics.median(times[name]) / count for name in steps}
    speed = {name: 1000 * tokens / milliseconds[name] for name in steps}
    peak = matmul_peak(device, dtype, 8192 if device.type == "cuda" else 2048)
    model, data = config.model, config.data
    return {
        "device": device_name(device), "preset": config.preset, "dtype": str(dtype).removeprefix("torch."),
        "model": {
            "layers": model.layers, "width": model.width, "experts": model.experts, "top_k": model.top_k,
            "expert_width": model.expert_width, "slice_tokens": data.slice_tokens,
            "slices_per_step": data.slices_per_step,
        },
        "step_ms": milliseconds["bank"], "dense_step_ms": milliseconds["dense"],
        "ratio": milliseconds["bank"] / milliseconds["dense"],
        "step_quartiles_ms": [value / count for value in quartiles(times["bank"])],
        "dense_step_quartiles_ms": [value / count for value in quartiles(times["dense"])],
        "tokens_per_s": speed["bank"], "dense_tokens_per_s": speed["dense"],
        "peak_memory_mb": memory["bank"], "dense_peak_memory_mb": memory["dense"],
        "flops_per_token": flops["bank"], "dense_flops_per_token": flops["dense"], "matmul_flops_per_s": peak,
        "mfu": flops["bank"] * speed["bank"] / peak, "dense_mfu": flops["dense"] * speed["dense"] / peak,
        "repetitions": len(times["bank"]),
    }  # fmt: skip


def main() -> int:
    options, _, config = preset_options(
        "python -m benchmarks.step", __doc__.splitlines()[0], 20.0, "for both", "one object"
    )
    if config.run.steps is not None:
        config = config.with_steps(config.run.steps)
    row = measure(config, distributed.start(), options.seconds)
    dist.destroy_process_group()
    text = "\n".join(f"{name:<24}{value}" for name, value in row.items())
    show(row, options.json, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
