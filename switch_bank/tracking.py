"""--run.track: the numbers of metrics.jsonl, under the same names, sent to a tracker while the run runs."""

import atexit
import dataclasses
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from switch_bank.config import Config, ConfigError

PROJECT = "switch-bank"


def require(tracker: str) -> None:
    """Raises ConfigError if the package that `tracker` needs is not installed."""
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise ConfigError(f"--run.track {tracker} needs a package that is not installed: pip install {tracker}")


def start(folder: Path, config: Config) -> Callable[[str, dict[str, Any]], None] | None:
    """What sends a line of metrics, given its kind and values, to the tracker of `config`; None for "none"."""
    tracker = config.run.track
    if tracker == "none":
        return None
    if tracker == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter  # only here: it imports tensorboard

        writer = SummaryWriter(str(folder / "tensorboard"))

        def send(kind: str, values: dict[str, Any]) -> None:
            for name, number in numbers(kind, values).items():
                writer.add_scalar(name, number, values["step"])
            writer.flush()

        return send
    os.environ.setdefault("WANDB_DIR", str(folder))
    module = importlib.import_module(tracker)  # trackio has wandb's own interface
    module.init(project=PROJECT, name=folder.name, config=dataclasses.asdict(config))
    atexit.register(module.finish)
    return lambda kind, values: module.log(numbers(kind, values), step=values["step"])


def reason(error: Exception) -> str:
    """What a tracker raised, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def numbers(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """The single numbers of a line, as KIND/NAME, KIND/NAME/PART or, for lists over the layers, KIND/NAME/LAYER; those
    of routing lines with the split after the kind. Lists over layers and experts stay in metrics.jsonl."""
    found: dict[str, float] = {}

    def gather(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for part, item in value.items():
                gather(f"{name}/{part}", item)
        elif isinstance(value, list):
            for layer, item in enumerate(value):
                if not isinstance(item, list):
                    gather(f"{name}/{layer}", item)
        elif isinstance(value, int | float):
            found[name] = value

    prefix = f"{kind}/{values['split']}" if "split" in values else kind
    for name, value in values.items():
        if name not in ("step", "split", "active"):
            gather(f"{prefix}/{name}", value)
    return found
