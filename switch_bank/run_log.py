"""What a run leaves behind while it runs: log.txt, which begins with its own source, metrics.jsonl and config.json."""

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from switch_bank.config import Config, ConfigError, RunConfig

ROOT = Path(__file__).resolve().parent.parent
FILES = ("log.txt", "metrics.jsonl")  # a checkpoint says how long they were


def choose_folder(run: RunConfig, name: str, restarted: bool = False) -> Path:
    """The folder of --run.out; by default a new one under runs/, or, to resume, the newest one of that name.

    A run that torchrun has `restarted` goes on in its own folder, the newest one of its name.
    Raises ConfigError where a new run would write over another one, or there is none to resume.
    """
    folder = Path(run.out) if run.out else Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if (run.resume or restarted) and not run.out:
        earlier = sorted(Path("runs").glob(f"{name}-2*/{'checkpoint.pt' if run.resume else 'log.txt'}"))
        if run.resume and not earlier:
            raise ConfigError(f"there is no run of {name} under runs/ to resume: name its folder with --run.out")
        folder = earlier[-1].parent if earlier else folder
    if not run.resume and not restarted and (folder / "log.txt").exists():
        raise ConfigError(f"{folder} holds a run already: give --run.resume or another --run.out")
    return folder


class RunLog:
    """Writes on the first process and is silent on all others. Every line is in the file before the call returns."""

    def __init__(self, folder: Path, is_first: bool, mode: Literal["x", "a", "w"] = "x") -> None:
        self.folder, self.is_first = folder, is_first
        self.terminal = is_first and sys.stdout.isatty()
        if is_first:
            folder.mkdir(parents=True, exist_ok=True)
            self.text = open(folder / "log.txt", mode, encoding="utf-8")  # noqa: SIM115
            self.records = open(folder / "metrics.jsonl", mode, encoding="utf-8")  # noqa: SIM115

    def line(self, text: str, console: bool = True) -> None:
        """A line, or several, of log.txt, and of the terminal too unless `console` is off."""
        if not self.is_first:
            return
        if console:
            print(("\r\033[K" if self.terminal else "") + text, flush=True)
        self.text.write(text + "\n")
        self.text.flush()

    def metrics(self, kind: str, values: dict[str, Any]) -> None:
        """One object of metrics.jsonl: `kind` is train, val or routing."""
        if self.is_first:
            self.records.write(json.dumps({"kind": kind} | values) + "\n")
            self.records.flush()

    def progress(self, text: str) -> None:
        """A line that the next one replaces; on a terminal only."""
        if self.terminal:
            print(f"\r\033[K{text}", end="", flush=True)

    def sizes(self) -> dict[str, int]:
        """Bytes written so far to each file: where a resumed run cuts them back to."""
        if not self.is_first:
            return {}
        return dict(zip(FILES, (self.text.tell(), self.records.tell()), strict=True))


def cut_back(folder: Path, sizes: dict[str, Any]) -> None:
    """Truncates the folder's files to the sizes of a checkpoint, so that log and metrics are one record.

    Raises ConfigError, and changes nothing, if a file is shorter than it was then.
    """
    for name in FILES:
        path, size = folder / name, sizes.get(name)
        if type(size) is not int or size < 0:
            raise ConfigError(f"the checkpoint does not say how long {path} was: start a new run")
        found = os.path.getsize(path) if path.is_file() else 0
        if found < size:
            raise ConfigError(f"{path} has {found} bytes and had {size} at the checkpoint: it is not whole")
    for name in FILES:
        os.truncate(folder / name, sizes[name])


def write_config(folder: Path, config: Config) -> None:
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n", encoding="utf-8")


def source_files() -> dict[str, str]:
    """The text of the trainer and of every module of the package, by its path from the repository's root."""
    files = [ROOT / "train_switch_bank.py", *sorted((ROOT / "switch_bank").rglob("*.py"))]
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


def source() -> str:
    """The trainer and every module of the package, each under a line with its name."""
    return "\n".join(f"===== {name}\n{text}" for name, text in source_files().items())


def source_checksums() -> str:
    """A line for each file of `source`, with the sha256 of its text in UTF-8."""
    sums = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in source_files().items()}
    return "\n".join(f"source {name} sha256 {sha256}" for name, sha256 in sums.items())


def environment(device: torch.device, processes: int) -> str:
    """Versions and hardware, a line each."""
    packages = ["torch", "numpy", "triton", "flash-attn", "tyro"]
    lines = [f"python {platform.python_version()} on {platform.system()} {platform.release()}"]
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
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _output(command: list[str]) -> str:
    """What a program prints, or nothing where it is missing or fails: the log is not worth a run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
