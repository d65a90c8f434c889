"""A run's saved state: one file, whole or not there, whose checksum is read before anything else of it."""

import hashlib
import io
import os
import pickle
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch

MAGIC = b"switchbank checkpoint 1\n"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message says why and what to do."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` (tensors, numbers, strings, dicts, lists) to `path`. The old one stays beside it as
    `<name>.previous`. Raises OSError, and leaves both as they are, where the new one cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(MAGIC + b"0" * 64 + b"\n")
            payload = _Hashing(file)
            torch.save(state, payload)  # type: ignore[arg-type]  # calls write and flush, no more
            file.seek(len(MAGIC))
            file.write(payload.sha256.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk gets its room back
        raise
    if path.exists():
        # A second name for the old file first: `path` is there at any moment.
        second_name = path.with_name(path.name + ".keep")
        second_name.unlink(missing_ok=True)
        os.link(path, second_name)
        os.replace(second_name, path.with_name(path.name + ".previous"))
    os.replace(temporary, path)


class _Hashing:
    """A binary file to write to that keeps the checksum of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


class Writer:
    """Saves in the background: the caller waits for the copy to host memory, and for an earlier save, no more."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def save(self, path: Path, state: dict[str, Any]) -> None:
        """Begins to save `state` as it is now; raises what went wrong with the one before."""
        self.wait()
        self._pending = self._thread.submit(save, path, copy_to_host(state))

    def wait(self) -> None:
        """Until nothing is being saved; raises what went wrong."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def load(path: Path) -> dict[str, Any]:
    """The state saved at `path`, on the CPU. Raises CheckpointError if it is missing, damaged or of another kind.
    Nothing in the file can run code: torch loads it with `weights_only`."""
    previous = path.with_name(path.name + ".previous")
    if previous.exists():
        advice = f"the one before it is {previous}; rename it to {path.name} to resume there"
    else:
        advice = "start a new run, without --run.resume"
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}: {advice}")
    content = path.read_bytes()
    header = len(MAGIC) + 65
    if not content.startswith(MAGIC):
        raise CheckpointError(f"{path} is not a SwitchBank checkpoint: {advice}")
    if hashlib.sha256(content[header:]).hexdigest().encode() != content[len(MAGIC) : header - 1]:
        raise CheckpointError(f"{path} is damaged, its checksum does not agree: {advice}")
    try:
        return torch.load(io.BytesIO(content[header:]), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and plain values, and is not read: {advice}") from error


def copy_to_host(state: Any) -> Any:
    """A copy of nested dicts and lists whose tensors are copies in host memory."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: copy_to_host(value) for key, value in state.items()}
    return [copy_to_host(value) for value in state] if isinstance(state, list) else state
