"""The benchmark of one bank layer times what it says, and only a bank that is right."""

import json
import math

import pytest
import torch
from torch import Tensor

from benchmarks import bank
from benchmarks.bank import BankLayer, DenseLayer, Shape, WrongError, largest_error, measure, routes
from benchmarks.results import SCHEMA, check
from switch_bank.ops.bank_cpu import DTYPES

CPU = torch.device("cpu")
SHAPE = Shape(tokens=96, width=16, expert_width=32, experts=4, top_k=2)


@pytest.fixture
def layer() -> BankLayer:
    """Not compiled; compiled, it runs in the test of gpu.sh."""
    torch.manual_seed(0)
    return BankLayer(SHAPE, torch.float32, CPU, compile=False)


def test_a_token_goes_to_different_experts_and_balanced_loads_are_even_up_to_chance():
    torch.manual_seed(0)
    shape = Shape(tokens=8000, width=1, expert_width=1, experts=8, top_k=2)
    chosen = routes("balanced", shape, CPU)
    assert chosen.shape == (1, 8000, 2)
    assert not (chosen[..., 0] == chosen[..., 1]).any()
    loads = chosen.flatten().bincount(minlength=8) / chosen.numel()
    assert loads.sub(1 / 8).abs().max() < 0.01


def test_skewed_routing_sends_half_of_the_tokens_to_one_expert():
    torch.manual_seed(0)
    chosen = routes("skewed", Shape(tokens=8000, width=1, expert_width=1, experts=64, top_k=1), CPU)
    loads = chosen.flatten().bincount(minlength=64) / 8000
    assert loads[0].item() == pytest.approx(0.5 + 0.5 / 64, abs=0.02)
    assert loads[1:].max() < 0.02


def test_two_routings_are_not_alike():
    torch.manual_seed(0)
    assert not torch.equal(routes("balanced", SHAPE, CPU), routes("balanced", SHAPE, CPU))


def test_no_input_is_zero_and_every_parameter_gets_a_gradient(layer):
    for value in (layer.n, layer.gates, layer.direction, layer.gate_direction, *layer.bank.parameters()):
        assert (value != 0).float().mean() > 0.99
    layer.step(routes("balanced", SHAPE, CPU), layer.direction)
    layer.router_step()
    for name, parameter in [*layer.bank.named_parameters(), *layer.routers.named_parameters()]:
        assert layer.sums.of[parameter].abs().sum() > 0, name
    assert layer.n.grad.abs().sum() > 0 and layer.gates.grad.abs().sum() > 0


def test_the_dense_layer_is_as_wide_as_the_experts_that_work_on_a_token(layer):
    dense = DenseLayer(layer)
    assert dense.w1.shape == (SHAPE.top_k * SHAPE.expert_width, SHAPE.width)
    dense.step()
    assert all(total.abs().sum() > 0 for total in dense.sums.of.values()) and layer.n.grad.abs().sum() > 0


def test_a_bank_that_is_right_passes(layer):
    assert largest_error(layer, routes("skewed", SHAPE, CPU)) < 1e-5


@pytest.mark.parametrize("wrong", ["output", "gradient of w1", "gradient of the scale"])
def test_a_bank_that_is_wrong_is_not_timed(layer, wrong):
    right = layer.step

    def step(chosen: Tensor, direction: Tensor) -> Tensor:
        y = right(chosen, direction)
        if wrong == "output":
            return y * 1.001
        parameter = layer.bank.w1 if wrong == "gradient of w1" else layer.bank.adapters["scale"]
        layer.sums.of[parameter][0] *= 1.01
        return y

    layer.step = step
    with pytest.raises(WrongError, match="off its reference"):
        largest_error(layer, routes("skewed", SHAPE, CPU))


def test_gradients_by_microbatch_are_right_too(layer):
    by_microbatch = BankLayer(SHAPE._replace(microbatches=3), torch.float32, CPU, compile=False)
    assert largest_error(by_microbatch, routes("skewed", SHAPE, CPU)) < 1e-5
    DenseLayer(by_microbatch).step()
    assert {total.dtype for total in by_microbatch.sums.of.values()} == {torch.float64}
    assert {total.dtype for total in layer.sums.of.values()} == {torch.float32}


def test_the_ratio_is_the_banks_time_over_the_dense_one(layer):
    row = measure(layer, DenseLayer(layer), "balanced", error=0.0, seconds=0)
    check(row, SCHEMA["bank"][0])
    assert row["ratio"] == row["bank_ms"] / row["dense_ms"]
    assert row["shape"] == SHAPE._asdict() and row["backend"] == ("cpu" if torch.float32 in DTYPES else "grouped")
    for name in ("dense", "bank"):
        first, third = row[f"{name}_quartiles_ms"]
        assert first <= round(row[f"{name}_ms"], 4) <= third


def test_the_program_prints_an_object_a_line_for_each_dtype_and_routing(program):
    shape = ["--tokens", "128", "--width", "32", "--expert-width", "32", "--experts", "4"]
    finished = program(bank, "--presets", "nano", *shape, "--seconds", "0", "--no-compile", "--json")
    assert finished.exit_code == 0, finished.err
    rows = [json.loads(line) for line in finished.out.splitlines()]
    wanted = [(dtype, routing) for dtype in ("float32", "bfloat16") for routing in ("balanced", "skewed")]
    assert [(row["dtype"], row["routing"]) for row in rows] == wanted
    for row in rows:
        check(row, SCHEMA["bank"][0])
        assert math.isclose(row["ratio"], row["bank_ms"] / row["dense_ms"])


def test_a_profile_names_what_dense_and_bank_spend_their_time_on(program):
    options = ["--tokens", "128", "--dtypes", "float32", "--routings", "skewed", "--seconds", "0", "--no-compile"]
    finished = program(bank, "--presets", "nano", *options, "--profile")
    assert finished.err.count("Self CPU time total") == 2
    kernel = "bank_forward" if torch.float32 in DTYPES else "grouped_mm"
    assert "aten::bmm" in finished.err and f"switch_bank::{kernel}" in finished.err
    assert "float32" in finished.out and "ratio" in finished.out


def test_the_backend_that_is_asked_for_is_measured(program):
    options = ["--tokens", "128", "--experts", "2", "--dtypes", "float32", "--routings", "skewed", "--seconds", "0"]
    finished = program(bank, "--presets", "nano", *options, "--no-compile", "--json", "--backend", "reference")
    assert json.loads(finished.out)["backend"] == "reference"


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is no GPU")
def test_kernels_that_need_a_gpu_are_refused_without_one(program):
    finished = program(bank, "--backend", "triton")
    assert finished.exit_code == 2
    assert "--backend triton takes a CUDA GPU" in finished.err


def test_a_shape_that_cannot_be_gets_one_clear_line(program):
    finished = program(bank, "--experts", "2", "--top-k", "3")
    assert finished.exit_code == 2
    assert "top_k at most experts" in finished.err
