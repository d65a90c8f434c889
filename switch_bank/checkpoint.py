"""A run's saved state: one file, whole or not there, whose checksum is read before anything else of it."""

import hashlib
import io
import math
import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch

MAGIC = b"switchbank checkpoint 1\n"
TENSORS_NEED = re.compile(r"torch \w+Storage|torch\._utils _rebuild_tensor_v2|collections OrderedDict")
PARTS = {
    "config": dict, "step": int, "seconds": float, "log_sizes": dict, "model": dict, "muon": dict, "adam": dict,
    "clip": dict, "picks": torch.Tensor, "readings": list, "times_resumed": int, "loads": dict, "data": list,
}  # fmt: skip


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message says why and what to do."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` (tensors, numbers, strings, dicts, lists) to `path`. The old one stays beside it as
    `<name>.previous`. Raises OSError, and leaves both as they are, where the new one cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        _write(temporary, state)
        if path.exists():
            _keep(path, path.with_name(path.name + ".previous"))
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)  # whose names, too, must outlast a loss of power
        os.fsync(folder)
        os.close(folder)
    except BaseException as error:
        temporary.unlink(missing_ok=True)  # a full disk gets its room back
        if isinstance(error, OSError):
            reason = f"{path} cannot be written, {error.strerror}: what was saved before it stays"
            raise OSError(f"{reason}; mend that and go on with --run.resume") from error
        raise


def _keep(path: Path, previous: Path) -> None:
    """Gives the file the name `previous`, and a second name first, so that `path` is there at any moment."""
    second_name = path.with_name(path.name + ".keep")
    second_name.unlink(missing_ok=True)
    try:
        os.link(path, second_name)
    except OSError:  # not every file system gives a file two names
        second_name = path
    os.replace(second_name, previous)


def _write(path: Path, state: dict[str, Any]) -> None:
    with open(path, "wb") as file:
        file.write(MAGIC + b"0" * 64 + b"\n")
        payload = _Hashing(file)
        try:
            torch.save(state, payload)  # type: ignore[arg-type]  # calls write and flush, no more
        except RuntimeError as error:
            raise payload.error or error from None
        file.seek(len(MAGIC))
        file.write(payload.sha256.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())


class _Hashing:
    """A binary file to write to that keeps the checksum of what was written, and what went wrong: torch does not."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


class Writer:
    """Saves in the background: the caller waits for the copy to host memory, and for an earlier save, no more.

    before: is called in the background before each save.
    """

    def __init__(self, before: Callable[[], None]) -> None:
        self._before = before
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def save(self, path: Path, state: dict[str, Any]) -> None:
        """Begins to save `state` as it is now; raises what went wrong with the one before."""
        self.wait()
        self._pending = self._thread.submit(self._save, path, copy_to_host(state))

    def _save(self, path: Path, state: dict[str, Any]) -> None:
        self._before()
        save(path, state)

    def wait(self) -> None:
        """Until nothing is being saved; raises what went wrong."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def load(path: Path) -> dict[str, Any]:
    """The state that `save` wrote to `path`, on the CPU: a dict with all PARTS. The file may come from a stranger.

    Raises CheckpointError, with the reason and what to do, if it is missing, unreadable, damaged or of another kind.
    """
    previous = path.with_name(path.name + ".previous")
    if previous.exists():
        advice = f"the one before it is {previous}; rename it to {path.name} to resume there"
    else:
        advice = "there is no older one, start a new run"
    if not os.path.lexists(path):
        raise CheckpointError(f"there is no checkpoint {path}: {advice}")
    if not os.path.isfile(path):  # a pipe would be waited for
        raise CheckpointError(f"{path} is no file: {advice}")
    try:
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise CheckpointError(f"{path} is not a SwitchBank checkpoint: {advice}")
            stated, sha256 = file.read(65), hashlib.sha256()
            while piece := file.read(1 << 20):
                sha256.update(piece)
            if sha256.hexdigest().encode() + b"\n" != stated:
                raise CheckpointError(f"{path} is damaged, its checksum does not agree: {advice}")
            file.seek(len(MAGIC) + 65)
            payload = file.read()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read, {error.strerror}: {advice}") from error
    try:
        state = _unpack(payload)
    except Exception as error:  # forged bytes make torch raise anything
        raise CheckpointError(f"{path} holds other things than tensors and plain values: {advice}") from error
    for part, kind in PARTS.items():
        if not isinstance(state, dict) or not isinstance(state.get(part), kind):
            raise CheckpointError(f"{path} is not the state of a run, it lacks {part!r}: {advice}")
    if not all(isinstance(at, int | float) and 0 <= at < math.inf for at in [state["seconds"], *state["readings"]]):
        raise CheckpointError(f"{path} is not the state of a run, its 'seconds' or 'readings' are none: {advice}")
    return state


def _unpack(payload: bytes) -> Any:
    """What torch.save packed. Calls nothing that `payload` names: torch reads it with `weights_only`. Nor does it fill
    the memory or take for ever: what unpacks to more than it was, or names more than tensors need, raises ValueError
    (torch's own list holds, for one, text codecs of quadratic time)."""
    with zipfile.ZipFile(io.BytesIO(payload)) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > len(payload):
            raise ValueError("packed entries")
        for entry in archive.infolist():
            if entry.filename.endswith(".pkl"):
                for operation, name, _ in pickletools.genops(archive.read(entry)):
                    if operation.name == "GLOBAL" and not TENSORS_NEED.fullmatch(str(name)):
                        raise ValueError(f"a pickle that names {name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a refusal is one line
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)


def require_like(saved: Any, own: Any, part: str) -> None:
    """Raises CheckpointError, and names the part, where `saved` is not built like `own`: nested dicts, lists and tuples
    with the same names, lengths and types, and tensors of the same shapes and dtypes. Only floats may be others."""
    if part.endswith(".state") and saved == {}:
        return  # an optimizer that has taken no step yet
    if isinstance(own, torch.Tensor):
        alike = isinstance(saved, torch.Tensor) and saved.device.type == "cpu" and saved.layout == own.layout
        alike = alike and (saved.shape, saved.dtype) == (own.shape, own.dtype)
    elif isinstance(own, dict):
        alike = isinstance(saved, dict) and saved.keys() == own.keys()
        inner = list(own)
    elif isinstance(own, list | tuple):
        alike = type(saved) is type(own) and len(saved) == len(own)
        inner = list(range(len(own)))
    else:
        alike = type(saved) is type(own) and (isinstance(own, float) or saved == own)
    if not alike:
        raise CheckpointError(f"the checkpoint does not fit this run, its {part} is another: start a new run")
    if isinstance(own, dict | list | tuple):
        for name in inner:
            require_like(saved[name], own[name], f"{part}.{name}")


def copy_to_host(state: Any) -> Any:
    """A copy of nested dicts and lists whose tensors are copies in host memory."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: copy_to_host(value) for key, value in state.items()}
    return [copy_to_host(value) for value in state] if isinstance(state, list) else state
