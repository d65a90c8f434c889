"""The benchmark of a training step takes the trainer's step, counts its FLOPs, and has a fair dense baseline."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import benchmarks.step
from benchmarks.results import SCHEMA, check
from benchmarks.step import (
    MEDIAN_DOCUMENT,
    TrainingStep,
    dense_baseline,
    fill_zeros,
    flops_per_token,
    last_steps,
    mean_visible_keys,
    prepared_with_memory,
    write_random_shard,
)
from switch_bank import schedules
from switch_bank.config import Config, parse, presets
from switch_bank.model.gpt import SwitchBankGPT
from switch_bank.model.size import parts
from switch_bank.ops.attention import build_mask

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "nano", "--data.slice-tokens", "256", "--data.slices-per-step", "4", "--data.val-slice-tokens", "256",
    "--data.val-tokens", "512", "--run.tokens-per-forward", "512", "--run.no-compile", "--run.log-every", "1",
    "--model.vocab-size", "97", "--model.layers", "4", "--model.width", "32", "--model.value-embeddings", "1",
    "--model.experts", "4", "--model.expert-width", "32", "--model.window", "128", "--model.dtype", "float32",
    "--optim.muon-dtype", "float32", "--schedule.activation", "0", "1.0",
]  # fmt: skip


@pytest.fixture(scope="module")
def config() -> Config:
    return parse(TINY, default_preset="nano").check()


def test_its_losses_are_those_of_the_trainer(config, world, tmp_path):
    """Noise, clipping, rates, both optimizers: twenty steps lose what a run of the trainer loses."""
    shards = write_random_shard(tmp_path, 20_000, config.model)
    data = ["--data.train", shards.paths[0], "--data.val", shards.paths[0]]
    run = [sys.executable, "train_switch_bank.py", *TINY, *data, "--run.steps", "20", "--run.out", f"{tmp_path}/run"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(run, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=600)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    trained = [record["train_loss"] for line in lines if (record := json.loads(line))["kind"] == "train"]
    step = TrainingStep(config.with_steps(20), shards, world)
    losses = [step(at).item() for at in range(20)]
    assert losses == pytest.approx(trained, abs=1e-5)
    assert losses[-1] < losses[0] - 0.05


def test_the_dense_baseline_has_one_expert_of_the_size_that_works_on_a_token(config):
    several = replace(config, model=replace(config.model, top_k=2, always_on_expert=True))
    dense = dense_baseline(several).check()
    assert (dense.model.experts, dense.model.top_k, dense.model.adapter) == (1, 1, "none")
    assert dense.model.expert_width == 3 * 32 and not dense.model.always_on_expert
    models = [SwitchBankGPT(one.model) for one in (several, dense)]
    experts = [next(part.active for part in parts(model) if part.name == "experts") for model in models]
    assert experts[0] == experts[1]
    assert replace(dense, model=several.model) == several


def test_visible_keys_are_those_that_the_attention_mask_lets_through(config, world, tmp_path):
    step = TrainingStep(config, write_random_shard(tmp_path, 20_000, config.model), world)
    tokens = step.stream.batch(last_steps(config)[0])[0]
    document = (tokens == config.model.eod_token).cumsum(1)
    short, long = ((build_mask("reference", document, window) == 0).sum() / tokens.numel() for window in (64, 128))
    assert mean_visible_keys(step) == pytest.approx((3 * short.item() + long.item()) / 4, rel=1e-6)


def test_flops_are_six_a_weight_and_twelve_a_channel_of_each_key_that_is_seen(config, world, tmp_path):
    dense = dense_baseline(config)
    step = TrainingStep(dense, write_random_shard(tmp_path, 20_000, config.model), world)
    weights = 4 * (4 * 32 * 32 + 2 * 32 * 32) + 128 * 32  # attention, the expert, and the padded head
    attention = 12 * 32 * mean_visible_keys(step) * 4
    assert flops_per_token(step) == pytest.approx(6 * weights + attention)


@pytest.mark.parametrize("preset", presets)
def test_the_last_steps_have_all_experts_and_the_longest_window(preset):
    steps = last_steps(presets[preset])
    assert len(steps) >= 20
    config = replace(presets[preset], data=replace(presets[preset].data, slice_tokens=128))
    for at in (steps[0], steps[-1]):
        state = schedules.step_state(at, config, "cpu")
        assert (state.active_experts, state.window) == (config.model.experts, config.model.window)


def test_a_run_of_one_step_has_a_last_step(config):
    assert list(last_steps(config.with_steps(1))) == [0]


def test_random_documents_start_with_the_token_that_starts_documents_and_are_as_long_as_real_ones(tmp_path):
    model = presets["record"].model
    tokens = torch.from_numpy(write_random_shard(tmp_path, 2_000_000, model).read(0, 2_000_000).astype("int64"))
    starts = (tokens == model.eod_token).nonzero().flatten()
    assert starts[0] == 0
    assert starts.diff().median().item() == pytest.approx(MEDIAN_DOCUMENT, rel=0.1)
    assert len(tokens[:100_000].unique()) > 40_000


def test_no_matrix_of_a_prepared_model_is_zero_and_what_was_not_zero_stays(config):
    model = SwitchBankGPT(config.model)
    before = model.bank.w1.detach().clone()
    fill_zeros(model)
    for name, parameter in model.named_parameters():
        assert parameter.ndim == 1 or name == "routers.bias" or (parameter != 0).all(), name
    assert torch.equal(model.bank.w1, before)


def test_what_compiling_takes_is_not_in_a_gpus_peak_memory(config, world, tmp_path, monkeypatch):
    memory, peak, took = 1e6, [0.0], iter([900e6, 50e6])  # the first step compiles
    monkeypatch.setattr(benchmarks.step, "prepared", lambda *_: lambda at: peak.append(memory + next(took)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: memory)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", peak.clear)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: max(peak))
    gpu = world._replace(device=torch.device("cuda"))
    assert prepared_with_memory(config, tmp_path, gpu)[1] == 50


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_step_waits_for_the_gpu(dtype, world, tmp_path):
    """Uncompiled and not recorded, so that every operation is asked."""
    options = ("--run.no-cuda-graphs", "--model.dtype", dtype, "--optim.muon-dtype", dtype)
    config = parse([*TINY, *options], default_preset="nano").check()
    step = TrainingStep(config, write_random_shard(tmp_path, 20_000, config.model), world)
    step(0)  # what is done once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step(1)
        with pytest.raises(RuntimeError, match="synchroniz"):
            loss.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


def test_the_program_prints_one_object_whose_ratio_is_that_of_the_steps(program):
    finished = program(benchmarks.step, *TINY, "--seconds", "0", "--json")
    assert finished.exit_code == 0, finished.err
    row = json.loads(finished.out)
    check(row, SCHEMA["step"][0])
    assert row["ratio"] == row["step_ms"] / row["dense_step_ms"]
    assert row["tokens_per_s"] == pytest.approx(1000 * 4 * 256 / row["step_ms"])
    assert row["mfu"] == pytest.approx(row["flops_per_token"] * row["tokens_per_s"] / row["matmul_flops_per_s"])
    assert row["peak_memory_mb"] > 100 and row["dense_peak_memory_mb"] > 100
    assert row["model"]["experts"] == 4
    assert re.fullmatch(r"bank: [\d.]+ ms a step.* MB\ndense: [\d.]+ ms a step.* MB\n", finished.err)


def test_what_cannot_be_gets_one_clear_line(program):
    finished = program(benchmarks.step, "nano", "--model.top-k", "99")
    assert (finished.exit_code, finished.err) == (2, "error: model.top_k is 99: it must be in 1..64\n")
