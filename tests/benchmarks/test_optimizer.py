"""The benchmark of optimizers gives all of them the same matrices, and measures their updates by their definition."""

import json
from dataclasses import replace

import pytest
import torch

import benchmarks.optimizer
from benchmarks.optimizer import (
    contenders,
    gradients,
    matrix_shapes,
    measure,
    orthogonality_error,
    plain_matmuls,
    set_gradients,
)
from benchmarks.results import SCHEMA, check
from switch_bank.config import presets
from switch_bank.ops.orthogonalize import orthogonalize

CPU = torch.device("cpu")


def test_the_matrices_of_record_are_those_that_muon_updates():
    shapes = matrix_shapes(presets["record"])
    assert sum(shape[:-2].numel() for shape in shapes) == 27 * 4 + 2 * 8  # q, k, v, o of 27 layers; 8 experts


def test_orthonormal_rows_have_no_error_and_zeros_have_that_of_the_identity():
    rows = torch.linalg.qr(torch.randn(12, 8, generator=torch.Generator().manual_seed(0)))[0].mT
    assert orthogonality_error(rows[None]) == pytest.approx(0, abs=1e-6)
    assert orthogonality_error(rows.mT[None]) == pytest.approx(0, abs=1e-6)
    assert orthogonality_error(torch.zeros(3, 4, 9)) == pytest.approx(4**0.5 / 4)


def test_plain_products_compute_what_the_kernels_compute():
    matrices = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(plain_matmuls(matrices, "plain"), orthogonalize(matrices, "plain"))


@pytest.mark.parametrize("shape", [(2, 24, 36), (2, 36, 24), (24, 24)])
def test_decaying_gradients_have_singular_values_that_fall_like_one_over_their_rank(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(gradients([torch.Size(shape)], "decaying", CPU)[0])
    torch.testing.assert_close(values, (1 / torch.arange(1, 25)).expand_as(values))


def test_the_three_forms_of_plain_muon_take_the_same_step(config_of):
    config = config_of()
    config = replace(config, optim=replace(config.optim, muon_dtype="float32"))
    shapes = matrix_shapes(config)
    torch.manual_seed(0)
    given = gradients(shapes, "gaussian", CPU)
    steps = {}
    for name, (parameters, muon) in contenders(shapes, config, CPU, lr=0.1, momentum=0.9).items():
        set_gradients(parameters, given)
        muon.step()
        steps[name] = torch.cat([parameter.detach().flatten() for parameter in parameters])
    torch.testing.assert_close(steps["plain"], steps["plain_matmuls"], atol=1e-5, rtol=1e-4)

    def off(name: str) -> float:
        return ((steps[name] - steps["plain"]).norm() / steps["plain"].norm()).item()

    assert off("torch_muon") < 0.02  # which works in bfloat16
    assert off("turbo") > 0.1


def test_every_optimizer_has_a_row_and_turbo_is_the_most_orthogonal_on_gaussian_gradients(config_of):
    torch.manual_seed(0)
    rows = {row["optimizer"]: row for row in measure(config_of(), CPU, seconds=0)}
    assert list(rows) == ["turbo", "plain", "plain_matmuls", "torch_muon"]
    for row in rows.values():
        check(row, SCHEMA["optimizer"][0])
        assert row["ratio"] == row["ms"] / rows["plain_matmuls"]["ms"]
        assert row["matrices"] == 3 * 4 + 2 * 4
    errors = {name: row["orthogonality_error"]["gaussian"] for name, row in rows.items()}
    assert 0 < errors["turbo"] < errors["plain"] < 0.1


def test_the_program_prints_an_object_a_line_and_refuses_what_cannot_be(program):
    small = ["--model.layers", "1", "--model.width", "32", "--model.value-embeddings", "1", "--model.experts", "2"]
    finished = program(benchmarks.optimizer, "nano", *small, "--seconds", "0", "--json")
    assert finished.exit_code == 0, finished.err
    assert len(finished.out.splitlines()) == 4
    for line in finished.out.splitlines():
        check(json.loads(line), SCHEMA["optimizer"][0])
    bad = program(benchmarks.optimizer, "nano", "--model.layers", "0")
    assert (bad.exit_code, bad.err) == (2, "error: model.layers is 0: it must be in 1..512\n")
