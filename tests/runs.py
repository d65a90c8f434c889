"""What tests of whole runs share: train_switch_bank.py in processes of its own, as a user starts it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
EOD = 256


def byte_documents(files: list[Path], eod: int) -> np.ndarray:
    """The files' bytes as tokens, each file a document."""
    return np.concatenate([np.array([eod, *file.read_bytes()]) for file in files])


def tiny(shards: Path) -> list[str]:
    """Options of a run of seconds: a small model in float32, without compilation."""
    return [
        "nano", "--data.train", f"{shards}/train_*.bin", "--data.val", f"{shards}/val_*.bin",
        "--data.val-tokens", "20001", "--data.slice-tokens", "512", "--data.val-slice-tokens", "512",
        "--data.slices-per-step", "8", "--run.tokens-per-forward", "512", "--run.no-compile", "--run.log-every", "1",
        "--run.no-report",
        "--model.vocab-size", "257", "--model.eod-token", str(EOD), "--model.layers", "2", "--model.width", "32",
        "--model.value-embeddings", "1", "--model.heads", "2", "--model.experts", "4", "--model.expert-width", "64",
        "--model.dtype", "float32", "--optim.muon-dtype", "float32", "--model.window", "128",
        "--optim.muon-lr", "0.025", "--optim.embedding-lr", "0.3", "--optim.head-lr", "0.01",
        "--run.val-at-seconds",  # at none: what a run does must not depend on the machine's speed
    ]  # fmt: skip


def command(arguments: list[str], out: Path, processes: int = 0, restarts: int = 0) -> list[str]:
    """The command of a run, under torchrun where a number of processes is given."""
    start = [sys.executable]
    if processes:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        start += [f"--max-restarts={restarts}"]
    return [*start, str(ROOT / "train_switch_bank.py"), *arguments, "--run.out", str(out)]


def environment(out: Path, threads: int = 1) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), "PATH": "/usr/bin:/bin", "HOME": str(out.parent)}


def train(
    arguments: list[str], out: Path, processes: int = 0, threads: int = 1, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """A finished run, on so many threads a process."""
    run = command(arguments, out, processes, restarts)
    return subprocess.run(run, capture_output=True, text=True, env=environment(out, threads), timeout=3600)


def records(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


def losses(out: Path) -> list[float]:
    return [record["train_loss"] for record in records(out, "train")]


@contextmanager
def running(
    arguments: list[str], out: Path, until: str, processes: int = 0, restarts: int = 0
) -> Iterator[subprocess.Popen[str]]:
    """A run that has just printed a line that begins with `until`; at the end of the block it is waited for."""
    run = command(arguments, out, processes, restarts)
    with subprocess.Popen(
        run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(out)
    ) as process:
        assert process.stdout is not None
        if not any(line.startswith(until) for line in process.stdout):
            raise AssertionError(f"the run ended without {until!r}: {process.communicate()[1]}")
        yield process


def process_of_rank(launcher: subprocess.Popen[str], rank: int) -> int:
    """The process id of a rank that torchrun has started."""
    for process in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{process}/environ").read_text().split("\0"):
            return int(process)
    raise AssertionError(f"torchrun has no process of rank {rank}")
