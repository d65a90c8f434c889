"""An analysis as PNG pictures, drawn by matplotlib (the extra `report`), which only this module imports."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from switch_bank.balance.analysis import Balance
from switch_bank.balance.counts import Counts
from switch_bank.balance.statistics import Floats, fair_multiples, spread

COLOURS = "PuOr_r"  # blue-purple below, orange above: the colour-blind can tell them apart
ACROSS = 4  # small pictures side by side


def write_pngs(folder: Path, balance: Balance, counts: Counts) -> list[Path]:
    """Writes into the folder, which is made if need be, and returns what it wrote: for each part loads_PART.png
    (layers x experts), rows_PART.png (experts x rows, a picture a layer) and cv_PART.png (CV over the rows, a line a
    layer), and with train and val train_against_val.png (the difference of the profiles)."""
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Figure] = {}
    for name, part in counts.parts.items():
        loads = np.stack([layer.fair_multiples for layer in balance.parts[name].layers])
        title = f"{name}: load, as multiples of the fair load"
        figures[f"loads_{name}"] = _layers_by_experts(loads, counts, title, TwoSlopeNorm(1, 0, 2))
        figures[f"rows_{name}"] = _rows(part.counts, counts, title)
        figures[f"cv_{name}"] = _cv_lines(part.counts, counts, f"{name}: CV of the loads in each row")
    if balance.comparison is not None:
        differences = 100 * np.stack([layer.differences for layer in balance.comparison])
        most = max(1e-9, float(np.abs(differences).max()))
        title = "validation minus train: share of the picks, percentage points"
        norm = TwoSlopeNorm(0, -most, most)
        figures["train_against_val"] = _layers_by_experts(differences, counts, title, norm)
    written = []
    for name, figure in figures.items():
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1])
    return written


def _layers_by_experts(values: Floats, counts: Counts, title: str, norm: TwoSlopeNorm) -> Figure:
    layers, experts = values.shape
    figure = Figure(figsize=(min(30, 4 + 0.45 * experts), min(30, 2 + 0.35 * layers)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap=COLOURS, norm=norm, aspect="auto")
    axes.set(title=title, xlabel="expert", ylabel="layer")
    axes.set_xticks(range(experts), [str(expert) for expert in counts.experts])
    axes.set_yticks(range(layers), [str(layer) for layer in counts.layers])
    figure.colorbar(image, extend="max" if values.max() > norm.vmax else "neither")
    return figure


def _rows(counts_of_part: np.ndarray, counts: Counts, title: str) -> Figure:
    """counts_of_part: [R, L, E]."""
    loads = fair_multiples(counts_of_part)
    down = -(-len(counts.layers) // ACROSS)
    figure = Figure(figsize=(3.2 * ACROSS, 1 + 2.4 * down), layout="constrained")
    every = figure.subplots(down, ACROSS, squeeze=False).flatten()
    for axes in every[len(counts.layers) :]:
        axes.axis("off")
    for axes, at in zip(every, range(len(counts.layers)), strict=False):
        image = axes.imshow(
            loads[:, at].T,
            cmap=COLOURS,
            norm=TwoSlopeNorm(1, 0, 2),
            aspect="auto",
            interpolation="nearest",
            extent=(0.5, len(loads) + 0.5, len(counts.experts) - 0.5, -0.5),  # rows are numbered from 1
        )
        axes.set(title=f"layer {counts.layers[at]}", xlabel="row", ylabel="expert")
        if len(counts.experts) <= 16:
            axes.set_yticks(range(len(counts.experts)), [str(expert) for expert in counts.experts])
    figure.colorbar(image, ax=list(every), extend="max" if loads.max() > 2 else "neither")
    figure.suptitle(title)
    return figure


def _cv_lines(counts_of_part: np.ndarray, counts: Counts, title: str) -> Figure:
    """counts_of_part: [R, L, E]."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    cv = spread(counts_of_part).cv
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(counts.layers)))
    for at, layer in enumerate(counts.layers):
        axes.plot(np.arange(1, len(cv) + 1), 100 * cv[:, at], color=colours[at], marker=".", label=f"layer {layer}")
    axes.set(title=title, xlabel="row", ylabel="CV over the experts, %")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside right upper", fontsize="small", ncols=1 + len(counts.layers) // 24)
    return figure
