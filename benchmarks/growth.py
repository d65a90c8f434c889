"""How tokens/s fall as experts, picks, tokens or layers grow, and what bounds them.

python -m benchmarks.growth [--preset nano] [--experts 1 8 64] [--layers] [--picture FILE.png] [--json]
"""

import argparse
import itertools
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.bank import DRAWN, SHAPES, BankLayer, routes
from benchmarks.limits import layer_bytes, layer_flops
from benchmarks.measure import alternate, device_name, matmul_peak, memory_bandwidth, show, start_device, wall_time
from benchmarks.step import flops_per_token, last_steps, prepared
from switch_bank import distributed
from switch_bank.config import Config, compute_dtype, presets

EXPERTS, TOP_K, LAYERS = (1, 2, 4, 8, 16, 32, 64, 128), (1, 2, 4, 8), (2, 4, 8, 16)
TOKEN_FACTORS = (0.25, 0.5, 1, 2, 4)  # of the preset's tokens
PLACES = {"experts": (0, 0), "top_k": (0, 1), "tokens": (1, 0), "layers": (1, 1)}  # in the picture


def row(varied: str, value: int, tokens: int, times: list[float], limits: dict[str, float]) -> dict[str, Any]:
    """A measurement: the median time, and the limit that comes closest to it, with the share of the time it explains.

    limits: milliseconds by name that the work takes at the least.
    """
    milliseconds = statistics.median(times)
    bound = max(limits, key=lambda name: limits[name])
    return {
        "varied": varied, "value": value, "tokens_per_s": 1000 * tokens / milliseconds, "ms": milliseconds,
        **{f"{name}_ms": limit for name, limit in limits.items()},
        "bound": bound, "share_of_bound": limits[bound] / milliseconds, "repetitions": len(times),
    }  # fmt: skip


def layer_row(
    varied: str, value: int, layer: BankLayer, peak: float, bandwidth: float, seconds: float
) -> dict[str, Any]:
    """Of a bank layer, forward and backward, with balanced routing."""
    shape, device = layer.shape, layer.device
    chosen = itertools.cycle([routes("balanced", shape, device) for _ in range(DRAWN)])

    def step() -> None:
        layer.step(next(chosen), layer.direction)

    times = alternate({"layer": step}, device, seconds, warm_up=DRAWN)["layer"]
    limits = {
        "arithmetic": 1000 * layer_flops(shape) / peak,
        "bytes": 1000 * layer_bytes(shape, layer.dtype.itemsize) / bandwidth,
    }
    return row(varied, value, shape.tokens, times, limits)


def step_row(config: Config, peak: float, seconds: float, world: distributed.World) -> dict[str, Any]:
    """Of a whole training step, by its layers; its bytes are not counted."""
    with tempfile.TemporaryDirectory() as folder:
        step = prepared(config, Path(folder), world)
        at = itertools.cycle(last_steps(config))

        def take_step() -> None:
            step(next(at))

        times = alternate({"step": take_step}, world.device, seconds, timer=wall_time)["step"]
        tokens = config.data.slices_per_step * config.data.slice_tokens
        limits = {"arithmetic": 1000 * flops_per_token(step) * tokens / peak}
    return row("layers", config.model.layers, tokens, times, limits)


def draw(rows: list[dict[str, Any]], title: str, file: str) -> None:
    """tokens/s over each number that was varied, and what the larger limit would allow."""
    import matplotlib.pyplot as plt  # of the extra "report": not everyone who measures draws

    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    for varied, place in PLACES.items():
        mine = [row for row in rows if row["varied"] == varied]
        values, speeds = [row["value"] for row in mine], [row["tokens_per_s"] for row in mine]
        ax = axes[place]
        ax.plot(values, speeds, "o-", label="measured")
        ax.plot(values, [row["tokens_per_s"] / row["share_of_bound"] for row in mine], ":", label="the larger limit")
        ax.set(xscale="log", xlabel=varied.replace("_", "-"), xticks=values, xticklabels=values)
        ax.set_ylim(bottom=0)
        ax.yaxis.set_major_formatter("{x:,.0f}")
        ax.set_ylabel("tokens/s, whole step" if varied == "layers" else "tokens/s, one bank layer")
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.suptitle(title)
    figure.savefig(file, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=SHAPES, default="nano", help="whose shape the others grow from")
    for option, values in (("experts", EXPERTS), ("top-k", TOP_K), ("layers", LAYERS)):
        parser.add_argument(f"--{option}", nargs="*", type=int, default=values)
    parser.add_argument(
        "--tokens", nargs="*", type=int, help="default: a quarter of the preset's to four times as many"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row; at least 5 repetitions")
    parser.add_argument("--no-compile", action="store_true", help="time the parts without torch.compile")
    parser.add_argument("--picture", metavar="FILE.png", help="also draw it")
    parser.add_argument("--json", action="store_true", help="an object a line")
    options = parser.parse_args()
    shape = SHAPES[options.preset][0]._replace(microbatches=1)
    token_counts: Sequence[int] = options.tokens
    if options.tokens is None:
        token_counts = [int(shape.tokens * factor) for factor in TOKEN_FACTORS]
    shapes = [("experts", value, shape._replace(experts=value)) for value in options.experts]
    shapes += [("top_k", value, shape._replace(top_k=value)) for value in options.top_k]
    shapes += [("tokens", value, shape._replace(tokens=value)) for value in token_counts]
    for _, _, each in shapes:
        if min(each) < 1 or each.top_k > each.experts:
            parser.error(f"{each}: every number must be at least 1, and top_k at most experts")
    if any(layers < 2 for layers in options.layers):
        parser.error(f"--layers {min(options.layers)}: at least 2, the two ends of value embeddings")
    device = start_device()
    torch.manual_seed(0)
    dtype = compute_dtype(presets[options.preset].model.dtype, device)
    peak = matmul_peak(device, dtype, 8192 if device.type == "cuda" else 2048)
    bandwidth = memory_bandwidth(device, 4096 if device.type == "cuda" else 512)
    common = {"device": device_name(device), "preset": options.preset, "dtype": str(dtype).removeprefix("torch.")}
    rows = []

    def add(measured: dict[str, Any]) -> None:
        rows.append(measured)
        text = f"{measured['varied']:<8}{measured['value']:>7}{measured['tokens_per_s']:>12,.0f} tokens/s"
        text += f"{measured['ms']:>10.2f} ms, of which {measured['bound']} {100 * measured['share_of_bound']:.0f}%"
        show(common | measured, options.json, text)

    for varied, value, each in shapes:
        layer = BankLayer(each, dtype, device, not options.no_compile)
        add(layer_row(varied, value, layer, peak, bandwidth, options.seconds))
    if options.layers:
        world = distributed.start()
        own = presets[options.preset]
        for layers in options.layers:
            model = replace(own.model, layers=layers, skip_attention=(), ema_stride=layers, value_embeddings=1)
            config = replace(own, model=model, run=replace(own.run, compile=not options.no_compile)).check()
            add(step_row(config, peak, options.seconds, world))
        dist.destroy_process_group()
    if options.picture:
        draw(rows, f"{common['preset']}, {common['dtype']}, {common['device']}", options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
