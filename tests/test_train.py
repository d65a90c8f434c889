"""The run as a user starts it: it learns, logs, validates, and refuses what cannot work."""

import contextlib
import email
import json
import math
import os
import pty
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from switch_bank.checkpoint import load, save
from switch_bank.config import ConfigError, from_dict, presets
from switch_bank.data import Shards, validation_batches, write_shard
from switch_bank.distributed import World
from switch_bank.model.gpt import SwitchBankGPT
from switch_bank.schedules import step_state
from tests.runs import (
    EOD,
    ROOT,
    byte_documents,
    command,
    environment,
    losses,
    records,
    tiny,
    train,
)


def test_the_model_learns(finished):
    validation = [record["val_loss"] for record in records(finished[0], "val")]
    assert len(validation) == 3
    assert validation[0] > validation[1] > validation[2]
    assert validation[2] < math.log(257) - 1


def test_the_log_begins_with_the_source_of_the_trainer_and_holds_the_lines_that_speedrun_tools_parse(finished):
    text = (finished[0] / "log.txt").read_text()
    source = (ROOT / "train_switch_bank.py").read_text()
    assert text.startswith(f"===== train_switch_bank.py\n{source}")
    for file in (ROOT / "switch_bank").rglob("*.py"):
        assert f"===== {file.relative_to(ROOT).as_posix()}\n{file.read_text()}" in text
    lines = re.findall(r"^step:(\d+)/50 val_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms$", text, re.MULTILINE)
    assert lines == ["10", "25", "50"]
    assert "causal: yes" in text.splitlines()[-1]


def test_every_validation_reads_the_same_tokens_to_the_token(finished):
    assert {record["val_tokens"] for record in records(finished[0], "val")} == {20_001}


def test_the_final_loss_is_that_of_the_saved_weights_computed_plainly(finished, shards):
    saved = load(finished[0] / "checkpoint.pt")
    config = from_dict(saved["config"])
    model = SwitchBankGPT(config.model).eval()
    model.load_state_dict(saved["model"])
    val = Shards.open(f"{shards}/val_*.bin", 257)
    total = 0.0
    with torch.no_grad():
        for inputs, targets in validation_batches(val, 20_001, 512, 1, 0, 1, EOD, "cpu"):
            total += model(inputs, targets, step_state(50, config, "cpu")).token_losses.double().sum().item()
    assert total / 20_001 == pytest.approx(records(finished[0], "val")[-1]["val_loss"], abs=1e-6)


def test_a_terminal_shows_a_live_line_with_loss_clock_health_and_speed(shards, tmp_path):
    ours, theirs = pty.openpty()
    run = command([*tiny(shards), "--run.steps", "2"], tmp_path / "run")
    shown = b""
    with subprocess.Popen(run, stdout=theirs, env=environment(tmp_path / "run")) as process:
        os.close(theirs)
        with contextlib.suppress(OSError):  # what Linux says at the end of a terminal that was closed
            while piece := os.read(ours, 2**16):
                shown += piece
    os.close(ours)
    assert process.returncode == 0
    line = rb"step:2/2 train_loss:\d\.\d{4} train_time:\d+ms health:[01]\.\d\d [\d,]+ tokens/s, 0 s left"
    assert re.search(rb"\r\x1b\[K" + line, shown)


def test_a_run_without_a_terminal_goes_on_in_its_log(shards, tmp_path):
    run = command([*tiny(shards), "--run.steps", "2"], tmp_path / "run")
    closed = ["sh", "-c", '"$@" >&-', "sh", *run]
    result = subprocess.run(closed, stderr=subprocess.PIPE, text=True, env=environment(tmp_path / "run"))
    assert (result.returncode, result.stderr) == (0, "")
    assert "\nresult: val_loss " in (tmp_path / "run" / "log.txt").read_text()


def test_profiling_writes_a_trace(finished):
    assert json.loads((finished[0] / "trace.json").read_text())["traceEvents"]


def test_a_run_too_short_to_be_profiled_says_so(finished, shards, tmp_path):
    result = train([*tiny(shards), "--run.steps", "10", "--run.profile"], tmp_path / "short")
    assert result.returncode == 0, result.stderr
    assert "--run.profile traces steps 12 to 14 from here, and 10 are left: no whole trace\n" in result.stdout
    assert not (tmp_path / "short" / "trace.json").exists()
    assert "no whole trace" not in finished[1].stdout


SLOW_PROFILER = """
import runpy, sys, time
from torch.profiler import profile

count, passed = time.perf_counter, [0.0]
time.perf_counter = lambda: count() + passed[0]

def slow(work):
    def works(*arguments):
        passed[0] += 1e6
        return work(*arguments)
    return works

for part in ("prepare_trace", "start_trace", "stop_trace", "export_chrome_trace"):
    setattr(profile, part, slow(getattr(profile, part)))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_profilers_own_work_is_not_on_the_training_clock(shards, tmp_path):
    python, *arguments = command([*tiny(shards), "--run.steps", "20", "--run.profile"], tmp_path / "run")
    run = [python, "-c", SLOW_PROFILER, *arguments]
    subprocess.run(run, env=environment(tmp_path / "run"), check=True, capture_output=True)
    assert (tmp_path / "run" / "trace.json").exists()
    assert records(tmp_path / "run", "train")[-1]["train_time_s"] < 1e6


def test_one_seed_gives_the_same_bits_twice(finished, shards, tmp_path):
    train([*tiny(shards), "--run.steps", "50"], tmp_path / "again")
    assert losses(tmp_path / "again") == losses(finished[0])
    one, two = (load(out / "checkpoint.pt")["model"] for out in (finished[0], tmp_path / "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_another_seed_gives_another_run(finished, shards, tmp_path):
    train([*tiny(shards), "--run.steps", "50", "--run.seed", "1"], tmp_path / "other")
    assert losses(tmp_path / "other") != losses(finished[0])


def test_slices_that_go_through_together_or_one_by_one_learn_the_same(shards, tmp_path):
    options = [*tiny(shards), "--run.steps", "20"]
    for tokens in ("512", "2048", "4096"):
        train([*options, "--run.tokens-per-forward", tokens], tmp_path / tokens)
    first, *others = (load(tmp_path / tokens / "checkpoint.pt")["model"] for tokens in ("512", "2048", "4096"))
    for other in others:
        assert all(torch.equal(other[name], weights) for name, weights in first.items())
    assert losses(tmp_path / "512") == losses(tmp_path / "2048") == losses(tmp_path / "4096")


def test_microbatches_of_one_slice_or_of_four_learn_the_same(shards, tmp_path):
    # At these rates margins grow soon, so that no rounding flips a route.
    options = [*tiny(shards), "--run.steps", "20", "--optim.router-lr", "0.01", "--optim.head-lr", "0.003"]
    options += ["--run.same-on-processes", "1"]
    for tokens in ("512", "2048"):
        train([*options, "--run.tokens-per-forward", tokens], tmp_path / tokens)
    assert losses(tmp_path / "512") == pytest.approx(losses(tmp_path / "2048"), abs=1e-4)


def test_the_clip_of_a_run_has_seen_the_gradients_of_its_routers(finished):
    norms = load(finished[0] / "checkpoint.pt")["clip"]["norms"]
    assert norms.isfinite().sum() > 40  # of 50 steps; where one expert is alone there is no gradient


def test_a_number_that_is_not_finite_stops_the_run_with_its_step_its_parts_and_a_saved_state(
    finished, shards, tmp_path
):
    state = load(finished[0] / "checkpoint.pt.previous")
    state["model"]["attention.0"][0, 3, 5] = math.nan
    shutil.copytree(finished[0], tmp_path / "blown")
    save(tmp_path / "blown" / "checkpoint.pt", state)
    result = train([*tiny(shards), "--run.steps", "50", "--run.resume"], tmp_path / "blown")
    assert result.returncode == 1
    assert "error: step 40: not finite: the loss, attention.0, the gradient of " in result.stderr
    assert load(tmp_path / "blown" / "nonfinite.pt")["step"] == 40


def test_weights_that_are_not_finite_are_neither_validated_nor_saved(finished, shards, tmp_path):
    out = tmp_path / "blown at the end"
    shutil.copytree(finished[0], out)
    state = load(out / "checkpoint.pt")
    state["model"]["attention.0"][0, 3, 5] = math.inf
    save(out / "checkpoint.pt", state)
    before = (out / "checkpoint.pt").read_bytes()
    result = train([*tiny(shards), "--run.steps", "50", "--run.resume"], out)
    assert result.returncode == 1
    assert result.stderr == f"error: step 50: not finite: attention.0; the state is saved in {out / 'nonfinite.pt'}\n"
    assert (out / "checkpoint.pt").read_bytes() == before
    assert [record["step"] for record in records(out, "val")] == [10, 25]


def test_a_run_that_crosses_every_change_compiles_nothing_after_the_warm_up(shards, tmp_path):
    """60 steps with experts starting, noise on and off, every window, rates, cap, freezing and pruning; validation."""
    options = [option for option in tiny(shards) if option != "--run.no-compile"]
    changes = [
        "--run.steps", "60", "--run.val-at-steps", "15", "30", "--model.layers", "1", "--model.window", "256",
        "--schedule.freeze-adapters-at", "1500", "--schedule.prune-at", "1600", "--schedule.prune-below", "0.9",
    ]  # fmt: skip
    result = train([*options, *changes], tmp_path / "compiled")
    assert result.returncode == 0, result.stderr
    before, after = re.findall(r"graphs compiled before step 0: (\d+), after it: (\d+)", result.stdout)[0]
    assert int(before) >= 6
    assert int(after) == 0


def test_a_leaky_run_says_so_in_its_name_and_in_its_result(shards, tmp_path):
    result = train([*tiny(shards), "--run.steps", "2", "--model.reverse-ema", "leaky"], tmp_path / "leaky")
    assert result.returncode == 0, result.stderr
    assert "name: nano-NOT-CAUSAL" in result.stdout
    assert "FAILED" in result.stdout
    assert "NOT CAUSAL" in result.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.train", "/nowhere/*.bin"], "no file matches /nowhere"),
        (["--model.vocab-size", "200", "--model.eod-token", "0"], "token"),
        (["--data.val-tokens", "100000000"], "hold"),
        (["--data.slice-tokens", "100"], "data.slice_tokens is 100: it must be a multiple of 128"),
        (["--model.top-k", "9"], "model.top_k is 9"),
        (["--data.no-repeat", "--run.steps", "100000"], "the training data lasts for"),
        (["--run.resume"], "there is no checkpoint"),
        (["--run.no-such-option", "1"], "no-such-option"),
        (["--run.timeout-seconds", "nan"], "run.timeout_seconds is nan"),
    ],
)
def test_bad_input_gets_one_clear_line_and_exit_code_2(shards, tmp_path, options, message):
    result = train([*tiny(shards), "--run.steps", "5", *options], tmp_path / "bad")
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "bad" / "log.txt").exists()


def refused(option, value, device):
    """Why no run begins with a kernel, asked for by name, on a device."""
    from train_switch_bank import main

    nano = presets["nano"]
    with pytest.raises(ConfigError, match=f"model.{option} is {value}: it must be ") as error:
        main(replace(nano, model=replace(nano.model, **{option: value})), World(0, 1, torch.device(device)))
    return str(error.value)


@pytest.mark.parametrize(
    "kernel",
    [
        ("bank_backend", "triton"),
        ("attention_backend", "flex"),
        ("attention_backend", "triton"),
        ("attention_backend", "flash"),
    ],
)
def test_kernels_that_need_a_gpu_are_refused_without_one(kernel):
    assert refused(*kernel, "cpu").endswith(" without a CUDA GPU")


def test_flash_attn_is_refused_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr("train_switch_bank.FLASH_ATTN_INSTALLED", False)
    assert refused("attention_backend", "flash", "cuda").endswith(" where flash-attn is not installed")


def test_attention_kernels_of_our_own_are_refused_where_triton_is_not_installed(monkeypatch):
    monkeypatch.setattr("switch_bank.ops.attention.TRITON_INSTALLED", False)
    assert "Triton is not installed" in refused("attention_backend", "triton", "cuda")


def test_processes_that_do_not_divide_the_slices_are_refused(shards, tmp_path):
    result = train([*tiny(shards), "--run.steps", "5", "--data.slices-per-step", "3"], tmp_path / "bad", processes=2)
    assert "data.slices_per_step is 3: it must be a multiple of the number of processes (2)" in result.stderr


def test_a_second_run_does_not_write_into_the_folder_of_the_first(finished, shards):
    before = (finished[0] / "log.txt").read_bytes()
    result = train([*tiny(shards), "--run.steps", "5"], finished[0])
    assert result.returncode == 2
    assert "holds a run already" in result.stderr
    assert (finished[0] / "log.txt").read_bytes() == before


@pytest.mark.slow
def test_the_record_configuration_takes_real_steps_on_a_cpu(tmp_path):
    """All 282,395,148 parameters, slices of 1,024 tokens: the loss falls, what should move moves, validation agrees."""
    eod, files = 50_256, sorted(Path(email.__file__).parent.glob("*.py"))
    write_shard(tmp_path / "train_0.bin", byte_documents(files, eod))
    write_shard(tmp_path / "val_0.bin", byte_documents(files, eod))
    options = [
        "record", "--data.train", f"{tmp_path}/train_*.bin", "--data.val", f"{tmp_path}/val_*.bin", "--run.steps", "6",
        "--data.slice-tokens", "1024", "--data.slices-per-step", "2", "--data.val-slice-tokens", "1024",
        "--data.val-tokens", "65536", "--run.tokens-per-forward", "2048", "--run.no-compile", "--run.log-every", "1",
        "--run.val-at-seconds", "100000",
    ]  # fmt: skip
    out = tmp_path / "record"
    result = train(options, out, threads=os.cpu_count() or 1)
    assert result.returncode == 0, result.stderr
    saved = load(out / "checkpoint.pt")
    config = from_dict(saved["config"])
    torch.manual_seed(0)
    model = SwitchBankGPT(config.model)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert sum(value.numel() for value in start.values()) == 282_395_148
    still = {name for name, value in start.items() if torch.equal(value, saved["model"][name])}
    assert still == set()
    model.load_state_dict(saved["model"])
    model.eval()
    total = 0.0
    with torch.no_grad():
        val = Shards.open(f"{tmp_path}/val_*.bin", 50_257)
        for inputs, targets in validation_batches(val, 65_536, 1024, 1, 0, 1, eod, "cpu"):
            total += model(inputs, targets, step_state(6, config, "cpu")).token_losses.double().sum().item()
    reported = records(out, "val")[-1]
    assert reported["val_tokens"] == 65_536
    assert reported["val_loss"] == pytest.approx(total / 65_536, abs=2e-3)  # in bfloat16 where that is fast
    assert reported["val_loss"] < math.log(50_257)
