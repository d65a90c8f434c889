"""Runs the source in a log once more, for the first steps of the same schedule, and compares the losses."""

import glob
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from switch_bank.read_log import LOSS_LINE, TRAINER, Log, LogError

SAME_MACHINE = 0.0  # between losses to 4 decimals: on a CPU the same run has the same bits
# In nats. Sums in another order flip choices of experts: of nano's losses over the first 250 of 2000 steps, 0.028 was
# the largest change seen between float32 and bfloat16, and between groupings of slices; 0.0033 over the first 20.
OTHER_MACHINE = 0.05

Losses = dict[tuple[str, int], str]  # (kind, step) → loss as printed


def replay(log: Log, steps: int, train: str | None, val: str | None, yes: bool) -> int:
    """0 if the losses agree, 1 if they do not or the source does not run that far. Runs nothing unless `yes`.

    `train` and `val` replace the log's patterns of data files. The source goes to a new folder under runs/ and runs
    from there with all options of the log's configuration, on as many processes, until it has reported step `steps`.
    Raises LogError for what stands in the way of that.
    """
    part = log.parts()[0]
    losses = {(loss.kind, loss.step): loss.loss for p in log.parts() for loss in p.losses if loss.step <= steps}
    if not 1 <= steps <= part.config.schedule.steps:
        raise LogError(f"--steps {steps}: the run in {log.path} has {part.config.schedule.steps} steps")
    if not any(kind == "train" for kind, _ in losses):
        raise LogError(f"{log.path} has no training loss to compare within its first {steps} steps")
    folder = Path("runs") / f"replay-{time.strftime('%Y%m%d-%H%M%S')}"
    options = part.options | {
        "data.train": train or part.config.data.train, "data.val": val or part.config.data.val,
        "run.out": str(folder / "run"), "run.log_every": 1, "run.val_at_seconds": [], "run.checkpoint_every": 0,
        "run.val_at_steps": [step for kind, step in losses if kind == "val"], "run.resume": False, "run.profile": False,
    }  # fmt: skip
    own: dict[str, Any] = {"run.report": False, "run.track": "none"}
    options |= {name: value for name, value in own.items() if name in options}  # older sources do not know them
    for split in ("train", "val"):
        if not glob.glob(options[f"data.{split}"], recursive=True):
            raise LogError(f"no file matches {options[f'data.{split}']}: say with --data.{split} where the data lies")
    if not yes:
        raise LogError(f"this runs the code that is in {log.path}, with all your rights: read it, then give --yes")
    print(f"running the source that is in {log.path}, from {folder}", flush=True)
    found, exit_code = run_source(log, folder, options, losses)
    if missing := [step for kind, step in losses if (kind, step) not in found]:
        words = (folder / "stderr.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        why = f": {words[-1]} ({folder / 'stderr.txt'})" if words else ""
        print(f"not replayed: the run ended with exit code {exit_code} before it reported step {missing[0]}{why}")
        return 1
    wrong = list(disagreements(log, Log.read(folder / "run" / "log.txt"), losses, found))
    for line in wrong:
        print(f"does not agree: {line}")
    print(f"{log.path}: {'not ' if wrong else ''}replayed, in {folder}")
    return 1 if wrong else 0


def run_source(log: Log, folder: Path, options: dict[str, Any], wanted: Losses) -> tuple[Losses, int]:
    """The losses that the log's source reports until all `wanted` ones are there, and its exit code. What it prints
    is shown; its errors go to a file in `folder`."""
    processes = log.find(r"processes (\d{1,6}) on .*")
    if not processes:
        raise LogError(f"{log.path} does not say how many processes ran")
    folder.mkdir(parents=True)
    for name, text in log.source.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    launcher = []
    if processes[0][1] != "1":
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes[0][1]}"]
    command = [sys.executable, *launcher, str(folder / TRAINER), *command_line(options)]
    environment = dict(os.environ)
    if threads := log.find(r"threads (\d{1,6})"):  # it ran on a CPU: as many threads, and no GPU where there is one
        environment |= {"OMP_NUM_THREADS": threads[0][1], "CUDA_VISIBLE_DEVICES": ""}
    found: Losses = {}
    with (
        (folder / "stderr.txt").open("wb") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as run,
    ):
        assert run.stdout is not None
        for line in run.stdout:
            print(line, end="", flush=True)
            if m := LOSS_LINE.fullmatch(line.rstrip("\n")):
                found[m["kind"], int(m["step"])] = m["loss"]
            if found.keys() >= wanted.keys():
                run.terminate()  # torchrun takes its processes with it
                break
    return found, run.returncode


def command_line(options: dict[str, Any]) -> list[str]:
    """The trainer's arguments that give `options`, all of them, whatever the preset says."""
    arguments = [options["preset"]]
    for name, value in options.items():
        if isinstance(value, bool):
            group, _, option = name.partition(".")
            arguments.append(f"--{name}" if value else f"--{group}.no-{option}")
        elif isinstance(value, list):
            numbers = [number for item in value for number in (item if isinstance(item, list) else [item])]
            arguments += [f"--{name}", *map(str, numbers)]
        elif name != "preset":
            arguments.append(f"--{name}={value}")
    return arguments


def disagreements(log: Log, again: Log, losses: Losses, found: Losses) -> Iterator[str]:
    """Prints how near the losses are and how near they must be; yields what is not as it must be."""
    if again.source != log.source:
        yield f"the source that ran is not the log's: {TRAINER} did not import the switch_bank beside it"
    if shards(again) != shards(log):
        yield "the data that was read does not have the checksums of the log"

    tolerance, why = OTHER_MACHINE, "a GPU does not give the same bits twice"
    if other := sorted(conditions(log) - conditions(again)):
        why = f"the log's run had {'; '.join(other)}"
    elif not log.find(r"cuda \S+"):
        tolerance, why = SAME_MACHINE, "the same kind of CPU, versions and threads"
    gaps = {key: round(abs(float(found[key]) - float(loss)), 4) for key, loss in losses.items()}
    farthest = max(gaps, key=lambda key: gaps[key])
    train = sum(kind == "train" for kind, _ in gaps)
    print(
        f"{train} training and {len(gaps) - train} validation losses compared: largest difference "
        f"{gaps[farthest]:.4f}, at step {farthest[1]}; tolerance {tolerance:g}: {why}"
    )
    for (kind, step), gap in gaps.items():
        if gap > tolerance:
            yield f"{kind}_loss of step {step}: {losses[kind, step]} in the log, {found[kind, step]} in the replay"


def shards(log: Log) -> list[tuple[int, str]]:
    """Tokens and checksum of each data file, wherever it lay."""
    return list(dict.fromkeys((tokens, sha256) for _, tokens, sha256 in log.data()))


def conditions(log: Log) -> set[str]:
    """The lines on what the last digits of a loss depend on."""
    return {found[0] for found in log.find(r"(?:torch|triton|cuda|threads) \S+|processes .*|attention \S+, act.*")}
