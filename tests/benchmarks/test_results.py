"""gpu.sh leaves one JSON document of a fixed schema, whatever its steps do."""

import copy
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.results import SchemaError, check, step_record, table
from switch_bank.data import write_shard

ROOT = Path(__file__).resolve().parents[2]
FIRST_CALL = ["limits", "tests-symmetric", "step", "small"]
SECOND_CALL = [
    "bank-slice", "bank-eight-slices", "optimizer", "tests-triton", "tests", "torchrun", "bank-slice-grouped",
    "bank-eight-slices-grouped",
]  # fmt: skip
STEPS = ["shards", *FIRST_CALL, *SECOND_CALL]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """docs_gpt2.tar.xz with shards of random tokens."""
    folder = tmp_path_factory.mktemp("inputs")
    shards = folder / "docs_gpt2"
    shards.mkdir()
    random = np.random.default_rng(0)
    for name, tokens in ("docs_train_000001", 50_000), ("docs_val_000000", 70_000):
        text = random.integers(1, 512, size=tokens)
        text[::500] = 0
        write_shard(shards / f"{name}.bin", text)
    with tarfile.open(folder / "docs_gpt2.tar.xz", "w:xz") as archive:
        archive.add(shards, "docs_gpt2")
    return folder


def gpu_sh(inputs: Path, out: Path, python: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    environment = os.environ | {"SMALL_SHAPES": "1", "PYTHON": python, "CUDA_VISIBLE_DEVICES": ""}
    command = ["benchmarks/gpu.sh", str(inputs), str(out)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
    assert result.returncode == 0, result.stderr
    (file,) = out.glob("*.json")
    return result, json.loads(file.read_text())


def python_that(folder: Path, does: str) -> str:
    """A program in the place of Python that does something else, but for what gpu.sh itself asks of Python."""
    program = folder / "python"
    own = f'case "$*" in *benchmarks.results*|-c*) exec "{sys.executable}" "$@";; esac'
    program.write_text(f"#!/bin/sh\n{own}\n{does}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


@pytest.fixture(scope="module")
def broken(inputs, tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], dict]:
    """What gpu.sh writes where every step in Python fails."""
    folder = tmp_path_factory.mktemp("broken")
    python = python_that(folder, "echo '{\"half an object\"'; echo this Python is broken >&2; exit 3")
    return gpu_sh(inputs, folder / "results", python)


def test_steps_that_fail_stop_no_other_and_are_written_down_as_failed(broken):
    result, document = broken
    check(document)
    assert [step["name"] for step in document["steps"]] == STEPS
    for step in document["steps"]:
        assert step["status"] == "failed"
        assert step["exit_code"] == 3 and "this Python is broken" in step["tail"]
    assert document["bank"] == document["step"] == document["optimizer"] == document["runs"] == []
    assert "| small | failed |" in result.stdout


def test_the_logs_of_steps_that_fail_lie_beside_the_document(broken):
    document = Path(broken[0].stdout.splitlines()[0])
    with tarfile.open(document.parent / "logs.tgz") as logs:
        names = logs.getnames()
        assert logs.extractfile("./small.err").read() == b"this Python is broken\n"
    assert set(names) == {"./steps.tsv", *(f"./{step}.{stream}" for step in STEPS for stream in ("out", "err"))}


def test_the_steps_of_the_two_calls_are_all_and_those_before_small_leave_it_190_seconds():
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    for call in (FIRST_CALL, SECOND_CALL):
        assert f'#  STEPS="{" ".join(call)}"\n' in script
    limits = {name: int(limit) for name, limit in re.findall(r"^ *(?:\w+=\d+ )?step ([\w-]+) (\d+) ", script, re.M)}
    assert list(limits) == ["install", *STEPS]
    assert sum(limits[name] for name in ("install", "shards", *FIRST_CALL[:-1])) + 190 <= 520


def test_a_document_off_the_schema_is_refused_with_the_place(broken):
    good = broken[1]
    for change, where in [
        (lambda document: document.pop("device"), "results must be an object with exactly the keys device"),
        (lambda document: document.update(more=1), "results must be an object"),
        (lambda document: document["steps"][2].update(seconds="3"), r"results.steps\[2\].seconds is '3'"),
        (lambda document: document["steps"][1].update(seconds=float("nan")), r"results.steps\[1\].seconds is nan"),
        (lambda document: document.update(bank={}), "results.bank must be a list"),
    ]:
        document = copy.deepcopy(good)
        change(document)
        with pytest.raises(SchemaError, match=where):
            check(document)


def test_warnings_on_one_stream_hide_no_failure_on_the_other(tmp_path):
    (tmp_path / "tests.out").write_text(100 * "dots\n" + "FAILED tests/test_x.py\n")
    (tmp_path / "tests.err").write_text(100 * "a warning\n" + "the last one\n")
    tail = step_record(tmp_path, "tests", "1", "3", "pytest")["tail"].splitlines()
    assert tail == [*39 * ["dots"], "FAILED tests/test_x.py", *39 * ["a warning"], "the last one"]


def test_a_missing_archive_gets_one_clear_line(tmp_path):
    result = subprocess.run(["benchmarks/gpu.sh", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "INPUTS holds docs_gpt2.tar.xz" in result.stderr


def test_told_to_end_it_writes_down_what_it_has(inputs, tmp_path):
    python = python_that(tmp_path, f'case "$*" in *tests*) touch "{tmp_path}/there"; exec sleep 30;; esac')
    environment = os.environ | {"SMALL_SHAPES": "1", "PYTHON": python, "CUDA_VISIBLE_DEVICES": ""}
    command = ["benchmarks/gpu.sh", str(inputs), str(tmp_path / "results")]
    running = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    for _ in range(200):
        if (tmp_path / "there").exists():
            break
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGTERM)  # as `timeout` tells a script and all that it has started
    running.communicate(timeout=60)
    (file,) = (tmp_path / "results").glob("*.json")
    steps = {step["name"]: step["exit_code"] for step in json.loads(file.read_text())["steps"]}
    assert list(steps) == STEPS and steps["limits"] == 0
    assert steps["tests-symmetric"] != 0 and steps["step"] == steps["small"] == -1


@pytest.mark.slow
def test_every_step_of_gpu_sh_runs_on_a_cpu_at_small_shapes(inputs, tmp_path):
    result, document = gpu_sh(inputs, tmp_path / "results", sys.executable)
    check(document)
    assert document["small_shapes"]
    failed = {step["name"]: step["tail"] for step in document["steps"] if step["status"] != "passed"}
    assert failed == {}
    assert [step["name"] for step in document["steps"]] == STEPS
    assert [len(document[kind]) for kind in ("bank", "step", "optimizer", "limits")] == [8, 1, 4, 10]
    assert {row["shape"]["top_k"] for row in document["bank"]} == {1, 2}
    torchrun, small = sorted(document["runs"], key=lambda run: run["name"] == "small")
    for run in (torchrun, small):
        assert run["result"].startswith("result: val_loss") and run["warm_up_seconds"] > 0
    assert len(small["val"]) == 2  # at its clock reading, and at the end
    assert small["val"][0]["train_time_s"] == pytest.approx(1, abs=0.9)
    assert document["profile"] and document["profile"][0]["ms"] > 0
    assert table(document) in result.stdout
    assert [file.suffix for file in (tmp_path / "results").iterdir()] == [".json"]
