"""A run is a fact: killed, stopped, resumed, on any number of processes, it is the same run."""

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from switch_bank.checkpoint import load
from switch_bank.config import STRICT_PRODUCTS, parse
from switch_bank.distributed import World
from tests.runs import (
    EOD,
    ROOT,
    command,
    environment,
    losses,
    process_of_rank,
    records,
    running,
    tiny,
    train,
)

Finished = tuple[Path, subprocess.CompletedProcess[str]]
FIFTY = ["--run.steps", "50", "--run.val-at-steps", "10", "25"]
NOHUP = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
NOT_UNDER_NOHUP = [pytest.mark.slow, pytest.mark.skipif(NOHUP, reason="under nohup a run ignores SIGHUP")]


def assert_bit_identical(out: Path, finished: Finished) -> None:
    assert losses(out) == losses(finished[0])
    one, two = (load(folder / "checkpoint.pt")["model"] for folder in (finished[0], out))
    assert all(torch.equal(one[name], two[name]) for name in one)
    one, two = ([record["val_loss"] for record in records(folder, "val")] for folder in (finished[0], out))
    assert two == pytest.approx(one, abs=1e-12)  # sums of float64


def test_a_killed_run_goes_on_bit_identical_to_an_undisturbed_one(finished, shards, tmp_path):
    # With a validation at the step of the checkpoint, which is in the record once.
    options, out = [*tiny(shards), *FIFTY, "--run.checkpoint-every", "25"], tmp_path / "resumed"
    with running(options, out, until="step:30/") as run:
        run.kill()
    result = train([*options, "--run.resume"], out)
    assert result.returncode == 0, result.stderr
    assert "resumed at step 25" in result.stdout and "resumed 1 times" in result.stdout
    assert_bit_identical(out, finished)


@pytest.mark.slow
def test_killed_again_and_again_also_while_a_checkpoint_is_written(finished, shards, tmp_path):
    """With a checkpoint at every step, a kill at a random moment mostly finds one half written."""
    options, out = [*tiny(shards), *FIFTY, "--run.checkpoint-every", "1"], tmp_path / "resumed"
    generator, kills, resumed = random.Random(0), 3, []
    for _ in range(kills):
        with subprocess.Popen(
            command([*options, *resumed], out), stdout=subprocess.PIPE, text=True, env=environment(out)
        ) as run:
            assert run.stdout is not None
            steps = (line for line in run.stdout if line.startswith("step:") and "train_loss" in line)
            for _ in range(generator.randint(4, 10)):
                next(steps)
            with pytest.raises(subprocess.TimeoutExpired):
                run.wait(generator.uniform(0, 0.2))
            run.kill()
        resumed = ["--run.resume"]
    result = train([*options, "--run.resume"], out)
    assert result.returncode == 0, result.stderr
    assert f"resumed {kills} times" in result.stdout.splitlines()[-1]
    assert_bit_identical(out, finished)


@pytest.mark.parametrize(
    ("number", "exit_code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), pytest.param(signal.SIGHUP, 129, marks=NOT_UNDER_NOHUP)],
)
def test_asked_to_stop_it_finishes_the_step_saves_and_says_how_to_go_on(finished, shards, tmp_path, number, exit_code):
    options, out = [*tiny(shards), *FIFTY], tmp_path / "stopped & saved"
    with running(options, out, until="step:20/") as run:
        run.send_signal(number)
        errors = run.communicate()[1]
    assert run.returncode == exit_code
    step = load(out / "checkpoint.pt")["step"]
    assert errors == (
        f"stopped by {number.name} before step {step} of 50, which is saved: "
        f"go on with the same command and --run.resume --run.out {shlex.quote(str(out))}\n"
    )
    assert 20 <= step < 50
    assert train([*options, "--run.resume"], out).returncode == 0
    assert_bit_identical(out, finished)


def test_asked_to_stop_before_its_first_step_it_says_so(shards, tmp_path):
    with running([*tiny(shards), *FIFTY], tmp_path / "stopped", until="compiled before step 0") as run:
        run.terminate()
        errors = run.communicate()[1]
    assert run.returncode == 143 and errors == "stopped before its first step: nothing new to save\n"


def test_a_resumed_run_makes_the_validations_it_is_asked_for_now_and_no_other_steps(finished, shards, tmp_path):
    out = tmp_path / "resumed"
    shutil.copytree(finished[0], out)
    (out / "checkpoint.pt.previous").rename(out / "checkpoint.pt")
    for option, value, was in (("steps", "60", 50), ("seed", "1", 0)):
        result = train([*tiny(shards), f"--run.{option}", value, "--run.resume"], out)
        assert result.returncode == 2
        assert f"error: run.{option} is {value} now and was {was} in the run to resume" in result.stderr
    soon = str(load(out / "checkpoint.pt")["seconds"] + 1e-3)
    result = train([*tiny(shards), *FIFTY, "--run.val-at-seconds", "1e-3", soon, "1e6", "--run.resume"], out)
    assert result.returncode == 0, result.stderr
    steps = [record["step"] for record in records(out, "val")]
    assert steps[:2] == [10, 25] and 40 < steps[2] < 50 and steps[3:] == [50]
    assert losses(out) == losses(finished[0])


@pytest.mark.parametrize(
    "processes", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_any_number_of_processes_takes_the_steps_of_one_to_the_bit(finished, shards, tmp_path, processes):
    out = tmp_path / "several"
    result = train([*tiny(shards), *FIFTY], out, processes=processes)
    assert result.returncode == 0, result.stderr
    assert_bit_identical(out, finished)


def nano(shards: Path) -> list[str]:
    """Options of a run of 50 steps of nano in float32, as it is but for its data."""
    return [
        "nano", "--data.train", f"{shards}/train_*.bin", "--data.val", f"{shards}/val_*.bin",
        "--data.val-tokens", "4096", "--model.vocab-size", "257", "--model.eod-token", str(EOD),
        "--model.dtype", "float32", "--optim.muon-dtype", "float32", "--run.steps", "50", "--run.val-at-seconds",
        "--run.val-at-steps", "25", "--run.log-every", "1", "--run.no-report",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not STRICT_PRODUCTS, reason="elsewhere MKL may sum in another order on another number of threads")
def test_nano_takes_the_same_steps_on_two_processes_as_on_two_threads(shards, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    finished = train(nano(shards), one, threads=2)
    assert finished.returncode == 0, finished.stderr
    assert train(nano(shards), two, processes=2).returncode == 0
    assert_bit_identical(two, (one, finished))


@pytest.mark.slow
def test_nano_takes_the_same_steps_on_up_to_eight_processes(shards, tmp_path):
    one = train(nano(shards), tmp_path / "one")
    assert one.returncode == 0, one.stderr
    for processes in (2, 4, 8):
        out = tmp_path / str(processes)
        assert train(nano(shards), out, processes).returncode == 0
        assert_bit_identical(out, (tmp_path / "one", one))


def test_a_run_of_two_processes_that_one_of_them_stopped_goes_on_with_one(finished, shards, tmp_path):
    options, out = [*tiny(shards), *FIFTY], tmp_path / "two"
    with running(options, out, until="step:20/", processes=2) as run:
        os.kill(process_of_rank(run, 1), signal.SIGTERM)
    assert 20 <= load(out / "checkpoint.pt")["step"] < 50
    assert train([*options, "--run.resume"], out).returncode == 0
    assert_bit_identical(out, finished)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_with_four(finished, shards, tmp_path):
    options, out = [*tiny(shards), *FIFTY, "--run.checkpoint-every", "20"], tmp_path / "two"
    with running(options, out, until="step:30/", processes=2) as run:
        run.terminate()
    assert train([*options, "--run.resume"], out, processes=4).returncode == 0
    assert_bit_identical(out, finished)


def test_a_process_that_dies_is_started_again_and_the_run_ends_as_if_nothing_had_happened(finished, shards, tmp_path):
    options, out = [*tiny(shards), *FIFTY, "--run.checkpoint-every", "10"], tmp_path / "restarted"
    with running(options, out, until="step:25/", processes=2, restarts=1) as run:
        os.kill(process_of_rank(run, 1), signal.SIGKILL)
        errors = run.communicate()[1]
    assert run.returncode == 0, errors
    assert "error: no answer from rank 1" in errors
    assert "resumed 1 times" in (out / "log.txt").read_text().splitlines()[-1]
    assert_bit_identical(out, finished)


@pytest.mark.slow
def test_a_process_that_dies_before_the_first_checkpoint_makes_the_run_begin_anew(finished, shards, tmp_path):
    options, out = [*tiny(shards), *FIFTY], tmp_path / "restarted"
    with running(options, out, until="step:5/", processes=2, restarts=1) as run:
        os.kill(process_of_rank(run, 0), signal.SIGKILL)
        errors = run.communicate()[1]
    assert run.returncode == 0, errors
    assert "resumed 0 times" in (out / "log.txt").read_text().splitlines()[-1]
    assert_bit_identical(out, finished)


@pytest.mark.parametrize("saved", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_that_torchrun_starts_again_leaves_the_run_of_somebody_else_alone(finished, shards, tmp_path, saved):
    out = tmp_path / "of somebody else"
    shutil.copytree(finished[0], out)
    if not saved:
        (out / "checkpoint.pt").unlink()
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    result = train([*tiny(shards), "--run.steps", "3"], out, processes=2, restarts=1)
    assert result.returncode == 1 and result.stderr.count(f"error: {out} holds a run") >= 2
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


@pytest.mark.slow
def test_a_hung_process_ends_the_run_within_the_timeout_and_is_named(shards, tmp_path):
    options = [*tiny(shards), *FIFTY, "--run.timeout-seconds", "5"]
    with running(options, tmp_path / "hung", until="step:25/", processes=2) as run:
        hung = process_of_rank(run, 1)
        os.kill(hung, signal.SIGSTOP)
        errors = run.communicate(timeout=120)[1]  # torchrun gives the hung one 30 s to end by itself
    assert run.returncode == 1
    assert "error: no answer from rank 1" in errors


@pytest.mark.slow
def test_a_process_that_answers_after_the_timeout_ends_the_run_too_and_is_named(shards, tmp_path):
    options = [*tiny(shards), *FIFTY, "--run.timeout-seconds", "5"]
    with running(options, tmp_path / "late", until="step:25/", processes=2) as run:
        late = process_of_rank(run, 1)
        os.kill(late, signal.SIGSTOP)
        time.sleep(6)
        os.kill(late, signal.SIGCONT)
        errors = run.communicate(timeout=120)[1]
    assert run.returncode == 1
    assert "error: no answer from rank 1" in errors


def test_a_process_that_the_others_do_not_join_ends_within_the_timeout(shards, tmp_path):
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    run = command([*tiny(shards), "--run.timeout-seconds", "1"], tmp_path / "alone")
    environment_alone = environment(tmp_path / "alone") | alone
    result = subprocess.run(run, capture_output=True, text=True, env=environment_alone, timeout=120)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: the processes did not all join: ")
    assert "Traceback" not in result.stderr


def with_a_weight_of_its_own(world: World, arguments: list[str]) -> str:
    """A whole run, in which the second process changes one bit of one weight before the first step."""
    sys.path.insert(0, str(ROOT))
    import train_switch_bank as trainer

    class Drifting(trainer.SwitchBankGPT):  # type: ignore[name-defined]
        def load_state_dict(self, *arguments: Any) -> Any:
            result = super().load_state_dict(*arguments)
            with torch.no_grad():
                self.embedding.weight[0, 0] += 1e-6 * world.rank
            return result

    trainer.SwitchBankGPT = Drifting
    with pytest.raises(trainer.VoidError) as error:
        trainer.main(parse(arguments, "nano"), world)
    return str(error.value)


def test_weights_that_differ_between_the_processes_stop_the_run(
    shards: Path, tmp_path: Path, on_processes: Callable[..., list[Any]]
) -> None:
    arguments = [*tiny(shards), *FIFTY, "--run.out", str(tmp_path / "drifting")]
    messages = on_processes(2, with_a_weight_of_its_own, arguments)
    assert messages == ["step 10: the weights differ between the processes; this run is void"] * 2
