"""How things are timed: taking turns, and by medians that can be trusted."""

import torch

from benchmarks.measure import FEWEST, alternate, call_time, device_name, matmul_peak, memory_bandwidth, quartiles

CPU = torch.device("cpu")


def test_functions_take_turns_and_warm_up_calls_do_not_count():
    calls: list[str] = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = alternate(functions, CPU, seconds=0, warm_up=3)
    assert calls == ["a", "b"] * (3 + FEWEST)
    assert {name: len(of) for name, of in times.items()} == {"a": FEWEST, "b": FEWEST}


def test_a_longer_time_gives_more_repetitions():
    assert len(alternate({"nothing": lambda: None}, CPU, seconds=0.01)["nothing"]) > FEWEST


def test_a_call_is_timed_in_milliseconds(monkeypatch):
    clock = iter([10.0, 10.25])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert call_time(lambda: None, CPU) == 250.0


def test_quartiles_are_those_of_the_values():
    assert quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == [2.0, 4.0]


def test_the_machines_limits_are_positive_and_its_name_says_how_many_threads_work():
    assert matmul_peak(CPU, torch.float32, 64) > 0
    assert memory_bandwidth(CPU, 1) > 0
    assert device_name(CPU).endswith(f"{torch.get_num_threads()} threads")
