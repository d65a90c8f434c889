"""What a run leaves behind while it runs: log.txt, which begins with its own source, metrics.jsonl and config.json."""

import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from io import FileIO
from pathlib import Path
from typing import Any, Literal

import torch

from switch_bank import tracking
from switch_bank.config import CPUINFO, Config, ConfigError, RunConfig

ROOT = Path(__file__).resolve().parent.parent
FILES = ("log.txt", "metrics.jsonl")  # a checkpoint says how long they were
SUFFIXES = (".py", ".cpp", ".h", ".css", ".js")  # of the files that are the source


def choose_folder(run: RunConfig, name: str) -> Path:
    """The folder of --run.out; by default a new one under runs/, or, to resume, the newest one of that name.

    Raises ConfigError where a new run would write over another one, or there is none to resume.
    """
    folder = Path(run.out) if run.out else Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if run.resume and not run.out:
        earlier = sorted(Path("runs").glob(f"{name}-2*/checkpoint.pt"))
        if not earlier:
            raise ConfigError(f"there is no run of {name} under runs/ to resume: name its folder with --run.out")
        folder = earlier[-1].parent
    if not run.resume and os.path.exists(folder / "log.txt"):
        if not os.path.exists(folder / "checkpoint.pt"):
            raise ConfigError(f"{folder} holds a run already, which has saved no state: give another --run.out")
        raise ConfigError(f"{folder} holds a run already: give --run.resume or another --run.out")
    return folder


class RunLog:
    """Writes on the first process and is silent on all others. Every line is in the file before the call returns.

    mode: "x" begins a new log, "w" begins one anew, "a" goes on with one, and leaves it as it is until `cut_back`.
    Raises ConfigError where the folder cannot be written, holds a run already or is being written by another one;
    writing raises OSError that names the file.
    """

    def __init__(self, folder: Path, is_first: bool, mode: Literal["x", "a", "w"] = "x") -> None:
        self.folder, self.is_first = folder, is_first
        self.terminal = is_first and sys.stdout.isatty()
        self._send: Callable[[str, dict[str, Any]], None] | None = None
        self._held: list[str] | None = [] if mode == "a" else None  # lines that wait for `cut_back`
        self._files = _open_alone(folder, "xb" if mode == "x" else "ab") if is_first else {}
        if mode == "w":
            self.cut_back(dict.fromkeys(FILES, 0))

    def line(self, text: str, console: bool = True) -> None:
        """A line, or several, of log.txt, and of the terminal too unless `console` is off."""
        if not self.is_first:
            return
        if self._held is not None:
            self._held.append(text)
        else:
            _write(self._files["log.txt"], text)
        if console:
            self._print(("\r\033[K" if self.terminal else "") + text + "\n")

    def metrics(self, kind: str, values: dict[str, Any]) -> None:
        """One object of metrics.jsonl: `kind` is train, val or routing."""
        if self.is_first:
            _write(self._files["metrics.jsonl"], json.dumps({"kind": kind} | values))
            if self._send is not None:
                try:
                    self._send(kind, values)
                except Exception as error:  # a tracker may raise anything, and holds only a copy: the run goes on
                    self._send = None
                    self.line(f"tracking stopped: {tracking.reason(error)}")

    def track(self, config: Config) -> None:
        """From here on, metrics go to the tracker of `config` too. Raises ConfigError where it does not start."""
        if not self.is_first:
            return
        try:
            self._send = tracking.start(self.folder, config)
        except Exception as error:  # a tracker may raise anything: no key, no network, a version that does not fit
            tracker = f"--run.track {config.run.track} does not start"
            raise ConfigError(f"{tracker}, {tracking.reason(error)}: mend that or leave it out") from error

    def progress(self, text: str) -> None:
        """A line that the next one replaces; on a terminal only."""
        if self.terminal:
            self._print(f"\r\033[K{text}")

    def _print(self, text: str) -> None:
        try:
            print(text, end="", flush=True)
        except OSError as error:  # closed, or sent to a file on a full disk: the log is the record, and goes on
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.line(f"nobody reads the terminal any more, {error.strerror}: from here on there is this log", False)

    def sizes(self) -> dict[str, int]:
        """Bytes written so far to each file: where a resumed run cuts them back to."""
        return {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}

    def sync(self) -> None:
        """Waits until all that was written would outlast a loss of power."""
        for file in self._files.values():
            os.fsync(file.fileno())

    def require_whole(self, sizes: dict[str, Any]) -> None:
        """Raises ConfigError if a file is shorter than it was at the checkpoint that says `sizes`."""
        for name, found in self.sizes().items():
            size = sizes.get(name)
            if type(size) is not int or not 0 <= size <= found:
                was = f"{self.folder / name} has {found} bytes and had {size} at the checkpoint: it is not whole"
                raise ConfigError(f"{was}; rename checkpoint.pt.previous to checkpoint.pt, or start a new run")

    def cut_back(self, sizes: dict[str, Any]) -> None:
        """Truncates the files to the sizes of a checkpoint, so that log and metrics are one record, and writes what was
        held. Raises ConfigError, and changes nothing, where `require_whole` does."""
        self.require_whole(sizes)
        for name, file in self._files.items():
            file.truncate(sizes[name])
        held, self._held = self._held or [], None
        for text in held:
            self.line(text, console=False)


def _open_alone(folder: Path, mode: str) -> dict[str, FileIO]:
    """The FILES of the folder, unbuffered, for this process alone: until it ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = {name: FileIO(folder / name, mode) for name in FILES}
        fcntl.flock(files["log.txt"], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"another run is writing to {folder}: wait for its end or give another --run.out") from error
    except OSError as error:
        if isinstance(error, FileExistsError) and folder.is_dir():
            raise ConfigError(f"{folder} holds a run already: give --run.resume or another --run.out") from error
        raise ConfigError(f"{folder} cannot be written, {error.strerror}: give another --run.out") from error
    return files


def _write(file: FileIO, text: str) -> None:
    rest = memoryview(f"{text}\n".encode(errors="backslashreplace"))
    try:
        while rest:  # a disk that becomes full takes a part first
            rest = rest[file.write(rest) :]
    except OSError as error:
        reason = f"{os.fspath(file.name)} cannot be written, {error.strerror}: what was saved before it stays"
        raise OSError(f"{reason}; mend that and go on with --run.resume") from error


def write_config(folder: Path, config: Config) -> None:
    with FileIO(folder / "config.json", "wb") as file:
        _write(file, json.dumps(dataclasses.asdict(config), indent=1))


def source_files() -> dict[str, str]:
    """The text of the trainer and of every file of the package, by its path from the repository's root."""
    package = [file for file in (ROOT / "switch_bank").rglob("*") if file.suffix in SUFFIXES]
    files = [ROOT / "train_switch_bank.py", *sorted(package)]
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


def source() -> str:
    """The trainer and every file of the package, each under a line with its name."""
    return "\n".join(f"===== {name}\n{text}" for name, text in source_files().items())


def source_checksums() -> str:
    """A line for each file of `source`, with the sha256 of its text in UTF-8."""
    sums = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in source_files().items()}
    return "\n".join(f"source {name} sha256 {sha256}" for name, sha256 in sums.items())


def environment(device: torch.device, processes: int) -> str:
    """Versions and hardware, a line each."""
    packages = ["numpy", "triton", "flash-attn", "tyro"]
    lines = [f"python {platform.python_version()} on {platform.system()} {platform.release()}"]
    lines.append(f"torch {torch.__version__}")  # with its build, which the package's version may lack
    lines += [f"{name} {version}" for name in packages if (version := _version(name))]
    lines.append(f"cuda {torch.version.cuda}" if device.type == "cuda" else f"threads {torch.get_num_threads()}")
    lines.append(f"processes {processes} on {os.cpu_count()} CPU cores ({cpu_name()})")
    if device.type == "cuda":
        lines += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        lines.append(_output(["nvidia-smi"]))
    if commit := _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"]):
        changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
        lines.append(f"commit {commit}{' with uncommitted changes' if changed else ''}")
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name, as the system gives it."""
    for line in CPUINFO.splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _output(command: list[str]) -> str:
    """What a program prints, or nothing where it is missing or fails: the log is not worth a run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
