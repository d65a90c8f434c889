"""Bad days: each ends in one clear line and a non-zero exit, and what was saved before goes on as if nothing had been.

docs/faults.md lists all faults and where they are tested.
"""

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from switch_bank.checkpoint import load, save
from switch_bank.data import write_shard
from tests.runs import ROOT, command, environment, losses, records, running, tiny, train

FIFTY = ["--run.steps", "50", "--run.val-at-steps", "10", "25"]


def assert_one_line(errors: str, *parts: str) -> None:
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    for part in parts:
        assert part in errors


def assert_goes_on_to_the_same_end(options: list[str], out: Path, finished: Path) -> None:
    result = train([*options, "--run.resume"], out)
    assert result.returncode == 0, result.stderr
    assert losses(out) == losses(finished)
    one, two = (load(folder / "checkpoint.pt")["model"] for folder in (finished, out))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def options(shards: Path) -> list[str]:
    return [*tiny(shards), *FIFTY]


@pytest.fixture
def at_40(finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> Path:
    """A run of 50 steps that was killed after its checkpoint of step 40."""
    out = tmp_path / "at 40"
    shutil.copytree(finished[0], out)
    (out / "checkpoint.pt.previous").rename(out / "checkpoint.pt")
    return out


def train_with_limit(options: list[str], out: Path, file_bytes: int) -> subprocess.CompletedProcess[str]:
    """A run none of whose files may become larger: the same errors as on a full disk, at a chosen place."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    return subprocess.run(command(options, out), capture_output=True, text=True, env=environment(out), preexec_fn=limit)


def test_a_disk_that_is_full_when_a_checkpoint_is_written(options: list[str], at_40: Path, finished) -> None:
    before = (at_40 / "checkpoint.pt").read_bytes()
    size = len(before) - 1000
    assert size - (at_40 / "log.txt").stat().st_size > 10_000  # room for the rest of the log, and none for a checkpoint
    result = train_with_limit([*options, "--run.resume", "--run.checkpoint-every", "3"], at_40, size)
    assert result.returncode == 1
    assert_one_line(result.stderr, f"{at_40 / 'checkpoint.pt'} cannot be written, File too large")
    assert (at_40 / "checkpoint.pt").read_bytes() == before and not (at_40 / "checkpoint.pt.tmp").exists()
    assert_goes_on_to_the_same_end(options, at_40, finished[0])


@pytest.mark.slow
def test_a_disk_that_is_full_when_a_line_of_the_log_is_written(options: list[str], at_40: Path, finished) -> None:
    undisturbed = at_40.with_name("undisturbed")
    shutil.copytree(at_40, undisturbed)
    assert train([*options, "--run.resume"], undisturbed).returncode == 0
    until_step_46 = (undisturbed / "log.txt").read_bytes().rindex(b"step:46/50 train_loss")
    result = train_with_limit([*options, "--run.resume"], at_40, until_step_46)
    assert result.returncode == 1
    assert_one_line(result.stderr, f"{at_40 / 'log.txt'} cannot be written, File too large")
    assert 40 < len(losses(at_40)) < 50
    assert_goes_on_to_the_same_end(options, at_40, finished[0])


@pytest.mark.slow
def test_a_full_disk_does_not_hide_that_a_number_is_not_finite(options: list[str], at_40: Path) -> None:
    state = load(at_40 / "checkpoint.pt")
    state["model"]["attention.0"][0, 3, 5] = torch.nan
    save(at_40 / "checkpoint.pt", state)
    result = train_with_limit([*options, "--run.resume"], at_40, state["log_sizes"]["log.txt"] + 30_000)
    assert result.returncode == 1
    assert_one_line(result.stderr, "step 40: not finite: the loss, ", f"{at_40 / 'nonfinite.pt'} cannot be written, ")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.4 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_small_disk_that_the_run_itself_fills(options: list[str], small_disk: Path, tmp_path: Path, finished) -> None:
    """There is room for the log and one checkpoint, not for a second one beside it."""
    out = small_disk / "run"
    result = train([*options, "--run.checkpoint-every", "20"], out)
    assert result.returncode == 1
    # The thread that saves fills the disk; whether it or the log meets the end first is a matter of time.
    assert_one_line(result.stderr, "cannot be written, No space left on device")
    written = result.stderr.removeprefix("error: ").split(" cannot be written", 1)[0]
    assert written in [str(out / name) for name in ("checkpoint.pt", "metrics.jsonl", "log.txt")]
    assert load(out / "checkpoint.pt")["step"] == 20
    shutil.copytree(out, tmp_path / "larger disk")
    assert_goes_on_to_the_same_end(options, tmp_path / "larger disk", finished[0])


@pytest.mark.parametrize(
    ("size", "message"),
    [(2000, "has changed since the run read it first"), pytest.param(None, "is no file", marks=pytest.mark.slow)],
)
def test_a_shard_that_is_cut_short_or_removed_while_the_run_reads_it(
    shards: Path, at_40: Path, tmp_path: Path, finished, size: int | None, message: str
) -> None:
    # The data of a resumed run is named as it was.
    files = sorted(shards.glob("train_*.bin"))
    kept = [shutil.copy2(file, tmp_path / file.name) for file in files]
    options = [*tiny(shards), *FIFTY]
    try:
        with running([*options, "--run.resume"], at_40, until="step:42/") as run:
            for file in files:
                file.unlink() if size is None else os.truncate(file, size)
            errors = run.communicate()[1]
    finally:
        for file, copy in zip(files, kept, strict=True):
            shutil.copy2(copy, file)
    assert run.returncode == 2
    assert_one_line(errors, str(shards), message)
    assert load(at_40 / "checkpoint.pt")["step"] == 40
    assert_goes_on_to_the_same_end(options, at_40, finished[0])


@pytest.mark.parametrize("folder", ["/proc/1/run", pytest.param("{file}/run", marks=pytest.mark.slow)])
def test_a_folder_that_cannot_be_written(options: list[str], tmp_path: Path, folder: str) -> None:
    file = tmp_path / "file"
    file.write_text("of somebody")
    out = folder.format(file=file)
    result = train(options, Path(out))
    assert result.returncode == 2
    assert_one_line(result.stderr, f"{out} cannot be written, ", "give another --run.out")
    assert file.read_text() == "of somebody"


JUMPING_CLOCK = """
import itertools, runpy, sys, time
jumps = itertools.cycle([0, 3e9, -1e9, 86_400, -7])
real, time_ns = time.time, time.time_ns
time.time = lambda: real() + next(jumps)
time.time_ns = lambda: time_ns() + int(next(jumps) * 1e9)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_wall_clock_that_jumps_changes_nothing(options: list[str], at_40: Path, finished) -> None:
    trainer = command([*options, "--run.resume"], at_40)[1:]
    run = [sys.executable, "-c", JUMPING_CLOCK, *trainer]
    result = subprocess.run(run, capture_output=True, text=True, env=environment(at_40), cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert losses(at_40) == losses(finished[0])
    times = [record["train_time_s"] for record in records(at_40, "train")]
    assert times == sorted(times) and times[-1] - times[0] < 3600


@pytest.mark.slow
def test_two_runs_that_begin_in_one_folder_at_the_same_time(options: list[str], tmp_path: Path, finished) -> None:
    out = tmp_path / "one for both"
    run = command(options, out)
    both = [
        subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(out))
        for _ in range(2)
    ]
    errors = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    assert_one_line("".join(errors), "holds a run already")
    assert losses(out) == losses(finished[0])


@pytest.mark.slow
def test_a_run_that_is_resumed_twice_at_the_same_time(options: list[str], at_40: Path, finished) -> None:
    with running([*options, "--run.resume"], at_40, until="step:42/") as first:
        second = train([*options, "--run.resume"], at_40)
        assert first.wait() == 0
    assert second.returncode == 2
    assert_one_line(second.stderr, f"another run is writing to {at_40}: wait for its end or give another --run.out")
    assert losses(at_40) == losses(finished[0])


def test_names_with_spaces_and_letters_of_any_language_on_a_terminal_that_knows_ascii_only(tmp_path: Path) -> None:
    """The data, the folder of the run and of the resumed one."""
    folder, out = tmp_path / "dä ta 日本 '$x' \u202f", tmp_path / "rün 🙂 (1)"
    folder.mkdir()
    for split in ("train", "val"):
        write_shard(folder / f"{split} 0.bin", torch.arange(30_000).remainder(250).numpy())
    options = [*tiny(folder), "--data.train", f"{folder}/train*.bin", "--data.val", f"{folder}/val*.bin"]
    for resumed in ([], ["--run.resume"]):
        result = subprocess.run(
            command([*options, "--run.steps", "2", *resumed], out), capture_output=True, text=True,
            env=environment(out) | {"PYTHONIOENCODING": "ascii"},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert str(out).encode("ascii", "backslashreplace").decode() in result.stdout.splitlines()[-1]
    log = (out / "log.txt").read_text(encoding="utf-8")
    assert f"({out})" in log.splitlines()[-1] and f"data {folder}/train 0.bin tokens 30000" in log


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_the_run(options: list[str], at_40: Path) -> None:
    good = load(at_40 / "checkpoint.pt")
    head, other = good["model"]["head"], at_40.parent / "other.txt"
    other.write_text("of somebody else")
    log = (at_40 / "log.txt").read_bytes()
    misfits = {
        "its model.head is another": {"model": good["model"] | {"head": head[:-1].clone()}},
        "its loads.train is another": {"loads": {"train": torch.zeros(3)}},
        "is of no step of the run": {"step": 51},
        "it is not whole": {"log_sizes": {"../other.txt": 0, "log.txt": 10**9, "metrics.jsonl": 0}},
    }
    for message, parts in misfits.items():
        save(at_40 / "checkpoint.pt", good | parts)
        result = train([*options, "--run.resume"], at_40)
        assert result.returncode == 2
        assert_one_line(result.stderr, message, "start a new run")
    assert other.read_text() == "of somebody else"
    assert (at_40 / "log.txt").read_bytes() == log


def test_a_run_does_not_go_on_with_other_data(options: list[str], shards: Path, at_40: Path, finished) -> None:
    file = sorted(shards.glob("train_*.bin"))[1]
    good, log = file.read_bytes(), (at_40 / "log.txt").read_bytes()
    try:
        file.write_bytes(good[:-4] + good[-2:] + good[-4:-2])
        result = train([*options, "--run.resume"], at_40)
    finally:
        file.write_bytes(good)
    assert result.returncode == 2
    assert_one_line(result.stderr, f"{file} is another than the run began with: put the old one back")
    assert (at_40 / "log.txt").read_bytes() == log
    assert_goes_on_to_the_same_end(options, at_40, finished[0])


def test_the_table_of_faults_names_tests_that_exist() -> None:
    named = re.findall(r"`(\w+\.py)::(\w+)`", (ROOT / "docs" / "faults.md").read_text())
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), test
