"""The summary of a trace counts every microsecond once."""

import json

import pytest
import torch

from benchmarks import trace
from benchmarks.trace import own_times, summary


def event(name: str, start: float, duration: float, category: str = "cpu_op", lane: int = 1) -> dict:
    return {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": lane, "ts": start, "dur": duration}


def test_an_operation_inside_another_is_not_counted_twice():
    events = [event("inner", 2, 3), event("outer", 0, 10), event("inner", 6, 1), event("outer", 10, 5)]
    assert own_times(events) == {"outer": (11, 2), "inner": (4, 2)}


def test_lanes_are_apart():
    assert own_times([event("a", 0, 10), event("b", 2, 3, lane=2)]) == {"a": (10, 1), "b": (3, 1)}


def test_where_a_gpu_worked_its_work_alone_counts():
    events = [event("aten::mm", 0, 100), event("gemm", 5, 50, "kernel"), event("copy", 60, 5, "gpu_memcpy")]
    assert own_times(events) == {"gemm": (50, 1), "copy": (5, 1)}


def test_a_real_trace_adds_up(program, tmp_path):
    with torch.profiler.profile() as profiler:
        torch.randn(64, 64) @ torch.randn(64, 64)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    rows = summary(tmp_path / "trace.json", 100)
    assert "aten::mm" in {row["name"] for row in rows}
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    own = {entry.key: entry.self_cpu_time_total for entry in profiler.key_averages()}
    for row in rows:
        assert row["ms"] == pytest.approx(own[row["name"]] / 1000, abs=0.01)
    finished = program(trace, str(tmp_path / "trace.json"), "--json")
    assert [json.loads(line) for line in finished.out.splitlines()] == rows[:30]


def test_a_missing_trace_gets_one_clear_line(program):
    finished = program(trace, "nowhere.json")
    assert finished.exit_code == 2
    assert finished.err == "error: nowhere.json: no such file; a run with --run.profile writes one\n"
