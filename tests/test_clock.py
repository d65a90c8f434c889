"""The training clock counts what lies between start and stop, and nothing else."""

import itertools
import time

import pytest
import torch

from switch_bank.clock import TrainingClock

CPU = torch.device("cpu")


def test_a_clock_stands_until_it_is_started_and_after_it_is_stopped() -> None:
    clock = TrainingClock(CPU)
    time.sleep(0.002)
    assert clock.seconds == 0.0
    clock.start()
    first = clock.seconds
    time.sleep(0.002)
    second = clock.seconds
    assert 0 <= first < second
    clock.stop()
    stopped = clock.seconds
    time.sleep(0.002)
    assert clock.seconds == stopped >= second


def test_stretches_add_up_and_what_lies_between_them_does_not_count() -> None:
    clock, began = TrainingClock(CPU), time.perf_counter()
    readings = []
    for _ in range(3):
        clock.start()
        time.sleep(0.001)
        clock.stop()
        readings.append(clock.seconds)
        time.sleep(0.02)  # validation
    passed = time.perf_counter() - began
    assert 0.001 <= readings[0] < readings[1] < readings[2] == clock.seconds
    assert readings[2] <= passed - 3 * 0.02  # sleep lasts at least as long as it is asked to


def test_a_resumed_clock_goes_on_from_the_saved_reading() -> None:
    clock = TrainingClock(CPU, seconds=100.0)
    assert clock.seconds == 100.0
    clock.start()
    assert clock.seconds >= 100.0
    clock.stop()
    reading = clock.seconds
    clock.stop()  # once more changes nothing
    assert clock.seconds == reading > 100.0


def test_setting_the_machine_s_clock_does_not_move_it(monkeypatch: pytest.MonkeyPatch) -> None:
    by = time.get_clock_info("perf_counter")
    assert by.monotonic and not by.adjustable
    jumps = itertools.cycle([3e9, -1e9])
    for wall_clock in ("time", "time_ns"):
        monkeypatch.setattr(time, wall_clock, lambda: next(jumps))
    clock = TrainingClock(CPU)
    clock.start()
    readings = [clock.seconds for _ in range(100)]
    clock.stop()
    assert readings == sorted(readings) and 0 < clock.seconds < 3600
