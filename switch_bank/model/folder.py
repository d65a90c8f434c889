"""An exported model on disk: config.json, and model.safetensors with the weights, the step that they were trained to
and a checksum. Nothing in these files can run code."""

import dataclasses
import hashlib
import json
import shutil
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
    options = json.dumps(dataclasses.asdict(config), indent=1) + "\n"
    (folder / CONFIG).write_text(options, encoding="utf-8")
    metadata = {"format": "pt", "step": str(step), "sha256": _sha256(options.encode(), str(step), weights)}
    save_file(weights, folder / WEIGHTS, metadata)
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors lets nobody but the owner read it


def read_folder(folder: Path) -> tuple[Config, dict[str, Tensor], int]:
    """The configuration, weights (on the CPU) and step that `write_folder` wrote.

    Raises ModelFolderError for a file that is missing or not as it was written, and ConfigError for options that
    cannot work.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelFolderError(f"there is no {folder / name}: `python -m switch_bank export RUN DIR` makes one")
    options = (folder / CONFIG).read_bytes()
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelFolderError(f"{folder / WEIGHTS} is damaged, {error}: export the run again") from error
    step = metadata.get("step", "")
    if metadata.get("sha256") != _sha256(options, step, weights):
        raise ModelFolderError(
            f"{folder / WEIGHTS} and {CONFIG} are not as they were written, their checksum does not agree: "
            "export the run again"
        )
    return from_dict(json.loads(options)).check(), weights, int(step)


def _sha256(options: bytes, step: str, weights: dict[str, Tensor]) -> str:
    """Of config.json, the step, and each tensor's name, type, shape and values."""
    digest = hashlib.sha256(options + step.encode())
    for name, value in sorted(weights.items()):
        digest.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
