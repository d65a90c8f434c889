"""An exported model on disk: config.json, and model.safetensors with the weights, the step that they were trained to
and a checksum. Other programs read these files too; they are safe to load from strangers."""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from switch_bank.config import Config, from_dict

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class ModelFolderError(ValueError):
    """A folder from which no model or tokenizer can be read; the message says which file, why and what to do."""


def write_folder(folder: Path, config: Config, weights: dict[str, Tensor], step: int) -> None:
    """Writes both files into `folder`. weights: the model's state_dict; step: how many steps they were trained for."""
    (folder / CONFIG).write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n", encoding="utf-8")
    metadata = {"format": "pt", "step": str(step), "sha256": _sha256(weights, str(step))}
    save_file(weights, folder / WEIGHTS, metadata)


def read_folder(folder: Path) -> tuple[Config, dict[str, Tensor], int]:
    """The configuration, weights (on the CPU) and step that `write_folder` wrote.

    Raises ModelFolderError for a file that is missing or damaged, and ConfigError for options that cannot work.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelFolderError(f"there is no {folder / name}: `python -m switch_bank export RUN DIR` makes one")
    try:
        config = from_dict(json.loads((folder / CONFIG).read_text(encoding="utf-8"))).check()
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelFolderError(f"{folder / CONFIG} is damaged, {error}: export the run again") from error
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelFolderError(f"{folder / WEIGHTS} is damaged, {error}: export the run again") from error
    step = metadata.get("step", "")
    if metadata.get("sha256") != _sha256(weights, step):
        raise ModelFolderError(f"{folder / WEIGHTS} is damaged, its checksum does not agree: export the run again")
    return config, weights, int(step)


def _sha256(weights: dict[str, Tensor], step: str) -> str:
    """Of the step, and of each tensor's name, type, shape and values."""
    digest = hashlib.sha256(step.encode())
    for name, value in sorted(weights.items()):
        value = value.contiguous()
        digest.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
