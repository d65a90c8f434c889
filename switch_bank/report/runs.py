"""What a run has written so far, read for its report."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from switch_bank.config import Config, from_dict
from switch_bank.export import causal_verdict
from switch_bank.read_log import Log

NEEDED = {  # of each kind of line in metrics.jsonl
    "train": {"step", "train_time_s", "train_loss"},
    "val": {"step", "train_time_s", "val_loss", "val_tokens"},
    "routing": {"step", "split", "active", "counts", "health", "health_parts"},
}


class ReportError(ValueError):
    """What no report can be made of; the message says which file is wrong, and how, in one line."""


@dataclass(frozen=True)
class Run:
    name: str  # its folder's
    folder: Path
    config: Config
    causal: str  # what its log says
    train: list[dict[str, Any]]  # the lines of metrics.jsonl, by kind
    val: list[dict[str, Any]]
    routing: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Raises ReportError, ConfigError, LogError or OSError where a file is missing or damaged."""
        try:
            config = from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:  # no JSON, too deep, no UTF-8, or no configuration
            raise ReportError(f"{folder / 'config.json'} is not a run's configuration: {error}") from error
        log = folder / "log.txt"
        causal = causal_verdict(Log.read(log), config) if log.exists() else "there is no log.txt to say so"
        name = folder.resolve().name
        return cls(name, folder, config, causal, **_metrics(folder / "metrics.jsonl"))

    @property
    def step_tokens(self) -> int:
        return self.config.data.slices_per_step * self.config.data.slice_tokens

    @property
    def routed(self) -> list[dict[str, Any]]:
        """The routing lines of validation, or of training where there was no validation yet."""
        return [line for line in self.routing if line["split"] == "val"] or self.routing


def _metrics(path: Path) -> dict[str, list[dict[str, Any]]]:
    lines: dict[str, list[dict[str, Any]]] = {kind: [] for kind in NEEDED}
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ReportError(f"{path}, line {number} is not JSON: {error}; delete that line") from error
        kind = line.get("kind") if isinstance(line, dict) else None
        if kind not in NEEDED or not NEEDED[kind] <= line.keys():
            wanted = f"needs {', '.join(sorted(NEEDED[kind]))}" if kind in NEEDED else f"is none of {', '.join(NEEDED)}"
            raise ReportError(f"{path}, line {number}: its kind {kind!r} {wanted}; delete that line")
        lines[kind].append(line)
    if not lines["train"] and not lines["val"]:
        raise ReportError(f"{path} has no line of training or validation yet")
    return lines


def told_apart(runs: list[Run]) -> list[Run]:
    """The runs, under their whole paths where two folders have the same name."""
    if len({run.name for run in runs}) == len(runs):
        return runs
    return [dataclasses.replace(run, name=str(run.folder)) for run in runs]


def facts(runs: list[Run]) -> list[list[str]]:
    """A table of what the runs are and how they ended: a row a fact, a column a run, the facts' names first."""
    rows = [["", *(run.name for run in runs)]]
    for name in _facts_of(runs[0]):
        rows.append([name, *(_facts_of(run)[name] for run in runs)])
    options = [_options(run.config) for run in runs]
    for name in options[0]:
        values = [str(option[name]) for option in options]
        if len(set(values)) > 1:
            rows.append([f"--{name.replace('_', '-')}", *values])
    return rows


def _facts_of(run: Run) -> dict[str, str]:
    model, last = run.config.model, [*run.train, *run.val]
    steps, seconds = max(line["step"] for line in last), max(line["train_time_s"] for line in last)
    validation = run.val[-1] if run.val else None
    routing = run.routed[-1] if run.routed else None
    bank = "shared by all layers" if model.shared else "in each layer"
    return {
        "preset, seed": f"{run.config.preset}, {run.config.run.seed}",
        "causal": run.causal,
        "trained": f"{steps:,} of {run.config.schedule.steps:,} steps, {steps * run.step_tokens:,} tokens",
        "training clock": f"{seconds:,.1f} s",
        "validation loss": f"{validation['val_loss']:.4f} at step {validation['step']:,}" if validation else "none yet",
        "router health": f"{routing['health']:.2f} at step {routing['step']:,}" if routing else "it has no routers",
        "model": f"{model.layers} layers of width {model.width}; {model.experts} experts of width {model.expert_width} "
        f"{bank}, {model.top_k} a token",
        "routers": f"{model.score} scores, balance {model.balance}, adapters {model.adapter}",
    }


def _options(config: Config) -> dict[str, Any]:
    groups = dataclasses.asdict(config)
    del groups["preset"], groups["run"]  # which name the run and say how it is watched; seed and length are facts
    return {f"{group}.{name}": value for group, options in groups.items() for name, value in options.items()}
