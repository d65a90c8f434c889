"""Runs the trainer in several ways that differ in a few options, and puts what came of them into one table.

python -m experiments.ablations NAME [--steps N] [--seconds S] [--seeds N] [--out DIR] [--group.option VALUE ...]
"""

import argparse
import json
import math
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from switch_bank.balance.statistics import fair_multiples, spread

TRAINER = Path(__file__).resolve().parent.parent / "train_switch_bank.py"


class Ablation(NamedTuple):
    preset: str
    ways: dict[str, list[str]]  # name → options of the trainer


ABLATIONS = {
    "router_balance": Ablation(
        "lora_moe",
        {
            f"{score}, {balance}": ["--model.score", score, "--model.balance", balance]
            for score in ("softmax", "sigmoid")
            for balance in ("aux", "bias")
        },
    ),
    # At equal steps. The dense model's embedding rate is the best of the four settings of rates tried for it.
    "dense": Ablation(
        "nano",
        {
            "bank": [],
            "dense": ["--model.experts", "1", "--model.adapter", "none", "--optim.embedding-lr", "0.1"],
        },
    ),
}


class AblationError(RuntimeError):
    """A run that did not end well; the message says which one and what it said last."""


def train(name: str, options: list[str], folder: Path) -> None:
    """One run into a new folder; what it prints goes to the terminal too. Raises AblationError where it fails."""
    print(f"--- {name}", flush=True)
    command = [sys.executable, str(TRAINER), *options, "--run.out", str(folder)]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        said = result.stderr.strip().splitlines()
        raise AblationError(f"{name}: {said[-1] if said else f'exit code {result.returncode}'} ({shlex.join(command)})")


def figures(folder: Path) -> dict[str, float]:
    """What a finished run is compared by, from its last validation. Loads are of all picks; CV and max/min are means
    over the layers, the least used expert is the whole bank's."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    validation = [line for line in lines if line["kind"] == "val"][-1]
    found = {"val_loss": validation["val_loss"], "train_time_s": validation["train_time_s"]}
    routing = [line for line in lines if line["kind"] == "routing" and line["split"] == "val"]
    if routing:
        counts = np.array(routing[-1]["counts"], dtype=np.float64)[:, routing[-1]["active"]]
        of_layers, bank = spread(counts), counts.sum(0)
        found |= {"cv": float(of_layers.cv.mean()), "max_min": float(of_layers.max_min.mean())}
        found |= {"health": routing[-1]["health"], "least_used": float(fair_multiples(bank).min())}
    return found


def _without_infinity(run: dict[str, float]) -> dict[str, float | None]:
    """JSON has no infinity: null where an expert was never picked."""
    return {name: value if math.isfinite(value) else None for name, value in run.items()}


HEADER = ["", "val loss", "spread", "CV", "max/min", "health", "least used", "training, s"]


def table(results: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    """A row a way: means over its seeds; the spread of the loss is the largest less the smallest."""

    def mean(runs: list[dict[str, float]], name: str, form: str) -> str:
        return format(float(np.mean([run[name] for run in runs])), form) if name in runs[0] else "-"

    rows = [HEADER]
    for way, runs in results.items():
        losses = [run["val_loss"] for run in runs]
        row = [way, mean(runs, "val_loss", ".4f"), f"{max(losses) - min(losses):.4f}" if len(runs) > 1 else "-"]
        row += [mean(runs, "cv", ".1%"), mean(runs, "max_min", ".2f"), mean(runs, "health", ".2f")]
        rows.append([*row, mean(runs, "least_used", ".2f"), mean(runs, "train_time_s", ".0f")])
    return rows


def as_markdown(title: str, command: str, rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    note = (
        "Means over the seeds. Spread: largest less smallest validation loss. CV and max/min: of the picks in the "
        "last validation, mean over the layers. Health: of the routers, 0 to 1. Least used: the bank's least used "
        "expert, as a multiple of an even share."
    )
    return "\n".join([f"# {title}", "", f"`{command}`", "", *lines, "", note, ""])


def main(arguments: list[str]) -> int:
    """Trains every way on every seed, prints the table, writes it as NAME.json and NAME.md; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.ablations",
        description="Train in several ways and compare. Other options go to the trainer in all ways.",
    )
    parser.add_argument("name", choices=ABLATIONS, metavar="NAME", help=", ".join(ABLATIONS))
    parser.add_argument("--steps", type=int, metavar="N", help="length of each run (default: the preset's)")
    parser.add_argument("--seconds", type=float, metavar="S", help="length of each run on the training clock")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="each way runs with seeds 0..N-1 (default 1)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new folder (default: one under runs/)")
    given, others = parser.parse_known_args(arguments)
    if given.seeds < 1:
        parser.error("--seeds must be at least 1")
    out = given.out or Path("runs") / f"{given.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    ablation = ABLATIONS[given.name]
    length = [] if given.steps is None else ["--run.steps", str(given.steps)]
    length += [] if given.seconds is None else ["--run.seconds", str(given.seconds)]
    results: dict[str, list[dict[str, float]]] = {way: [] for way in ablation.ways}
    try:
        for seed in range(given.seeds):  # outermost: stopped early, every way has had as many seeds as the others
            for way, options in ablation.ways.items():
                folder = out / f"{way.replace(', ', '-')}-{seed}"
                every = [ablation.preset, *length, *others, *options, "--run.seed", str(seed)]
                train(f"{way}, seed {seed}", every, folder)
                results[way].append(figures(folder))
    except AblationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = shlex.join(["python", "-m", "experiments.ablations", *arguments])
    text = as_markdown(given.name, command, table(results))
    (out / f"{given.name}.md").write_text(text, encoding="utf-8")
    plain = {way: [_without_infinity(run) for run in runs] for way, runs in results.items()}
    saved: dict[str, Any] = {"command": command, "preset": ablation.preset, "ways": ablation.ways, "results": plain}
    (out / f"{given.name}.json").write_text(json.dumps(saved, indent=1, allow_nan=False), encoding="utf-8")
    print(f"\n{text}\n{out}: written", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
