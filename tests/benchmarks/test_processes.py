"""Several processes against one: they take the same steps, and what cannot be compared is refused."""

import json

import pytest
import torch

import benchmarks.processes
from tests.benchmarks.test_step import TINY


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_program_prints_one_object(program, threads, monkeypatch):
    threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    finished = program(benchmarks.processes, *TINY, "--seconds", "0", "--json")
    assert finished.exit_code == 0, finished.err
    row = json.loads(finished.out)
    assert (row["preset"], row["processes"], row["repetitions"]) == ("nano", 2, 5)
    assert row["speedup"] == row["one_process_step_ms"] / row["step_ms"]
    assert row["tokens_per_s"] == pytest.approx(1000 * 4 * 256 / row["step_ms"])


@pytest.mark.parametrize(
    ("number", "options", "message"),
    [(1, [], "at least 2"), (2, ["--data.slices-per-step", "3"], "multiple of the number of processes")],
)
def test_what_cannot_be_gets_one_clear_line(program, threads, number, options, message):
    threads(number)
    finished = program(benchmarks.processes, *TINY, *options)
    assert finished.exit_code == 2
    assert message in finished.err and finished.err.count("\n") == 1
