"""Tracking: the numbers of metrics.jsonl arrive at the tracker under the same names."""

import json
import math
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from switch_bank.config import ConfigError, presets
from switch_bank.run_log import RunLog
from switch_bank.tracking import numbers, require
from tests.runs import records, tiny, train


def test_a_line_becomes_numbers_under_its_own_names() -> None:
    line = {
        "split": "val", "step": 7, "active": [0, 1], "counts": [[1, 2], [3, 4]], "load_cv": [0.5, 0.25],
        "max_min": [None, 2.0], "health": 0.9, "health_parts": {"usage": 1.0}, "feature_share": {"token": [0.1, 0.2]},
        "drift": None,
    }  # fmt: skip
    assert numbers("routing", line) == {
        "routing/val/load_cv/0": 0.5, "routing/val/load_cv/1": 0.25, "routing/val/max_min/1": 2.0,
        "routing/val/health": 0.9, "routing/val/health_parts/usage": 1.0,
        "routing/val/feature_share/token/0": 0.1, "routing/val/feature_share/token/1": 0.2,
    }  # fmt: skip
    assert numbers("train", {"step": 1, "train_loss": 2.0}) == {"train/train_loss": 2.0}


def test_tensorboard_holds_what_metrics_jsonl_holds(shards: Path, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    result = train([*tiny(shards), "--run.steps", "4", "--run.track", "tensorboard"], tmp_path / "run")
    assert result.returncode == 0, result.stderr
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    expected: dict[str, list[tuple[int, float]]] = {}
    for kind in ("train", "val", "routing"):
        for line in records(tmp_path / "run", kind):
            for name, number in numbers(kind, line).items():
                expected.setdefault(name, []).append((line["step"], number))
    assert len(expected["train/train_loss"]) == 4 and "routing/val/health" in expected
    assert set(events.Tags()["scalars"]) == set(expected)
    for name, values in expected.items():
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in values], name
        assert all(math.isclose(a, b, rel_tol=1e-6) for (_, a), (_, b) in zip(found, values, strict=True)), name


def test_a_tracker_that_is_not_installed_is_one_line_before_anything_is_made(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    require("none")
    with pytest.raises(ConfigError, match="^--run.track trackio needs a package that is not installed: pip install t"):
        require("trackio")
    monkeypatch.undo()
    missing = next((name for name in ("trackio", "wandb", "tensorboard") if find_spec(name) is None), None)
    if missing is None:
        pytest.skip("every tracker is installed here")
    result = train([*tiny(shards), "--run.track", missing], tmp_path / "run")
    assert result.returncode == 2 and not (tmp_path / "run").exists()
    assert (
        result.stderr == f"error: --run.track {missing} needs a package that is not installed: pip install {missing}\n"
    )


class Wandb(SimpleNamespace):
    """A stand-in for the package: it refuses to start without a key, and its fourth line."""

    def __init__(self, key: str) -> None:
        super().__init__(key=key, logged=[], finish=lambda: None)

    def init(self, **options: Any) -> None:
        if not self.key:
            raise RuntimeError("no key:\nlog in first")

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append(step)
        if len(self.logged) == 4:
            raise ConnectionError("the server\nis gone")


def test_a_tracker_that_fails_is_left_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_DIR", "")
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb("key"))
    log, nano = RunLog(tmp_path, is_first=True), presets["nano"]
    log.track(replace(nano, run=replace(nano.run, track="wandb")))
    for step in range(6):
        log.metrics("train", {"step": step, "train_loss": 2.0})
    assert wandb.logged == [0, 1, 2, 3]
    assert [line["step"] for line in records(tmp_path, "train")] == list(range(6))
    line = "tracking stopped: ConnectionError: the server is gone\n"
    assert (tmp_path / "log.txt").read_text() == line and capsys.readouterr().out == line


def test_a_tracker_that_does_not_start_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DIR", "")
    monkeypatch.setitem(sys.modules, "wandb", Wandb(""))
    nano = presets["nano"]
    with pytest.raises(ConfigError) as refused:
        RunLog(tmp_path, is_first=True).track(replace(nano, run=replace(nano.run, track="wandb")))
    reason = "RuntimeError: no key: log in first"
    assert str(refused.value) == f"--run.track wandb does not start, {reason}: mend that or leave it out"


def test_without_a_tracker_nothing_more_is_written(finished: tuple[Path, object]) -> None:
    assert not (finished[0] / "tensorboard").exists()
    assert json.loads((finished[0] / "config.json").read_text())["run"]["track"] == "none"
