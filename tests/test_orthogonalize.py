"""`orthogonalize`: as orthogonal as Muon's own iteration in one iteration less, the limits of that, and never a NaN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from switch_bank.ops.orthogonalize import POLYNOMIALS, Variant, orthogonalize, orthogonalize_svd

KINDS = ("gaussian", "low_rank", "ill_conditioned", "zero_rows", "gradient_like")
LIMITS = ("dominated", "outlier_row")
SHAPES = ((64, 64), (64, 256), (256, 64), (4, 96, 80))
VARIANTS: tuple[Variant, ...] = ("turbo", "plain")


def with_spectrum(values: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random matrices [*shape] with the given singular values [min(rows, cols)]."""
    *lead, rows, cols = shape
    left = torch.linalg.qr(torch.randn(*lead, rows, len(values), generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(*lead, cols, len(values), generator=generator, dtype=torch.float64)).Q
    return (left * values) @ right.mT


def make(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """float64 matrices [*shape]. Turbo keeps up with plain on the kinds in KINDS, not on those in LIMITS."""
    generator = torch.Generator().manual_seed(seed)
    *lead, rows, cols = shape
    shorter = min(rows, cols)

    def gaussian(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    if kind == "gaussian":
        return gaussian(*shape)
    if kind == "low_rank":
        return gaussian(*lead, rows, shorter // 4) @ gaussian(*lead, shorter // 4, cols)
    if kind == "ill_conditioned":  # condition number 1e4, evenly spread over the decades
        return with_spectrum(torch.logspace(0, -4, shorter, dtype=torch.float64), shape, generator)
    if kind == "zero_rows":
        matrices = gaussian(*shape)
        matrices[..., :: rows // 8, :] = 0
        return matrices
    if kind == "outlier_row":  # one output, or token, with a gradient 1000 times that of the others
        matrices = make("gradient_like", shape, seed)
        matrices[..., 0, :] *= 1000
        return matrices
    if kind == "gradient_like":  # singular values as 1/i, rows scaled by Student's t with 3 degrees of freedom
        row_scales = (3 / gaussian(*lead, rows, 3).square().sum(-1, keepdim=True)).sqrt()
        spectrum = 1 / torch.arange(1, shorter + 1, dtype=torch.float64)
        return with_spectrum(spectrum, shape, generator) * row_scales
    assert kind == "dominated"  # the first direction holds more than 99.5 % of the energy
    spectrum = torch.full((shorter,), 0.005 / shorter, dtype=torch.float64).sqrt()
    spectrum[0] = 1
    return with_spectrum(spectrum * torch.logspace(0, -2, shorter, dtype=torch.float64), shape, generator)


def orthogonality_error(result: Tensor, matrices: Tensor) -> Tensor:
    """‖UUᵀ − I‖ in Frobenius norm over the ranks present in `matrices` [..., rows, cols]. Returns [...]."""
    tolerance = max(matrices.shape[-2:]) * torch.finfo(torch.float32).eps
    values = torch.linalg.svdvals(matrices.double())
    present = values > tolerance * values[..., :1]
    return ((torch.linalg.svdvals(result.double()).square() - 1) * present).norm(dim=-1)


def errors(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    matrices = make(kind, shape, seed)
    turbo, plain = (orthogonality_error(orthogonalize(matrices.to(dtype), variant), matrices) for variant in VARIANTS)
    return turbo, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_four_turbo_iterations_are_as_orthogonal_as_five_plain_ones(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    turbo, plain = (torch.stack(part) for part in zip(*(errors(kind, shape, dtype, s) for s in range(8)), strict=True))
    if kind == "gradient_like" and shape[-2] > shape[-1]:
        # Heavy tails on the longer side now and then make an outlier row, see LIMITS: promised for the whole, not each.
        turbo, plain = turbo.norm(), plain.norm()
    assert (turbo <= 1.02 * plain).all(), f"turbo {turbo}, plain {plain}"


LIMIT_CASES = [("dominated", shape) for shape in SHAPES] + [("outlier_row", (256, 64)), ("outlier_row", (4, 96, 80))]


@pytest.mark.xfail(strict=True, reason="weak directions grow 147-fold in four turbo iterations, 485-fold in five plain")
@pytest.mark.parametrize(("kind", "shape"), LIMIT_CASES, ids=str)
def test_turbo_keeps_up_where_one_direction_dominates(kind: str, shape: tuple[int, ...]) -> None:
    turbo, plain = errors(kind, shape, torch.float32, seed=0)
    assert (turbo <= 1.02 * plain).all(), f"turbo {turbo}, plain {plain}"


@pytest.mark.parametrize(("kind", "shape"), LIMIT_CASES, ids=str)
def test_turbo_is_at_most_twice_as_far_off_where_one_direction_dominates(kind: str, shape: tuple[int, ...]) -> None:
    turbo, plain = errors(kind, shape, torch.float32, seed=0)
    assert (turbo <= 2 * plain).all(), f"turbo {turbo}, plain {plain}"


def test_the_distances_to_the_polar_factor_are_shown_as_they_are() -> None:
    """Read the table with `pytest -s`. AOL scales rows, so its result has another polar factor than the input."""
    print(f"\n{'float32':32}{'|UU^T-I| turbo':>16}{'plain':>10}{'to polar: turbo':>18}{'plain':>10}{'|polar|':>10}")
    for kind in (*KINDS, *LIMITS):
        for shape in SHAPES[:3]:
            matrices = make(kind, shape, seed=0)
            polar = orthogonalize_svd(matrices.float()).double()
            results = [orthogonalize(matrices.float(), variant).double() for variant in VARIANTS]
            orthogonality = [orthogonality_error(result, matrices).item() for result in results]
            distance = [(result - polar).norm().item() for result in results]
            print(
                f"{kind + ' ' + str(shape):32}{orthogonality[0]:16.3f}{orthogonality[1]:10.3f}"
                f"{distance[0]:18.3f}{distance[1]:10.3f}{polar.norm().item():10.3f}"
            )
            assert all(0 <= value < 2 * polar.norm().item() for value in distance)


def naive(matrix: Tensor, variant: Variant) -> Tensor:
    """One matrix in float64, straight from the formulas: nothing reused, nothing rescaled, row by row."""
    x = (matrix.T if matrix.shape[0] > matrix.shape[1] else matrix).clone()
    if variant == "turbo":
        gram = x @ x.T
        for row in range(len(x)):
            total = gram[row].abs().sum()
            x[row] *= total**-0.5 if total > 0 else 0
    else:
        x /= x.norm()
    for a, b, c in POLYNOMIALS[variant]:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_each_matrix_by_the_formulas(kind: str, variant: Variant) -> None:
    for shape in ((3, 16, 24), (3, 24, 16), (3, 16, 16)):
        matrices = make(kind, shape, seed=0)
        expected = torch.stack([naive(matrix, variant) for matrix in matrices])
        torch.testing.assert_close(orthogonalize(matrices, variant), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_magnitude_gives_a_nan_or_changes_the_result(variant: Variant, dtype: torch.dtype) -> None:
    matrices = make("gaussian", (2, 6, 10), seed=0).to(dtype)
    expected = orthogonalize(matrices, variant)
    for exponent in (-100, -60, -1, 1, 60, 100, 124):
        torch.testing.assert_close(orthogonalize(matrices * 2.0**exponent, variant), expected, rtol=0, atol=0)
    for magnitude in (1e-30, 1e30):
        result = orthogonalize(matrices * magnitude, variant)
        torch.testing.assert_close(result.double(), expected.double(), rtol=0.05, atol=0.05)
    assert orthogonalize(matrices * 1e-39, variant).isfinite().all(), "denormal in bfloat16 and float32"


@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_gives_zero_also_beside_other_matrices(variant: Variant) -> None:
    matrices = torch.stack([torch.zeros(5, 8), torch.randn(5, 8), torch.zeros(5, 8)])
    result = orthogonalize(matrices, variant)
    assert (result[::2] == 0).all() and result[1].norm() > 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_very_different_size_give_no_nan(variant: Variant) -> None:
    """Rows of 1e-30 beside rows of 1: their products underflow, their scales must not explode."""
    matrices = torch.randn(4, 8, 40) * torch.logspace(0, -38, 8)[:, None]
    for dtype in (torch.bfloat16, torch.float32):
        values = torch.linalg.svdvals(orthogonalize(matrices.to(dtype), variant).float())
        assert (values < 1.3).all()


@settings(deadline=None, max_examples=50)
@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    rows=st.integers(1, 17),
    cols=st.integers(1, 17),
    exponent=st.integers(-37, 37),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    variant=st.sampled_from(VARIANTS),
    seed=st.integers(0, 1000),
)
def test_any_shape_comes_back_with_singular_values_of_about_one_at_most(
    lead: list[int], rows: int, cols: int, exponent: int, dtype: torch.dtype, variant: Variant, seed: int
) -> None:
    matrices = (make("gaussian", (*lead, rows, cols), seed) * 10.0**exponent).to(dtype)
    result = orthogonalize(matrices, variant)
    assert result.shape == matrices.shape and result.dtype == dtype
    values = torch.linalg.svdvals(result.double())
    assert (values < 1.3).all() and (values[..., 0] > 0.6).all()
    transposed = orthogonalize(matrices.mT, variant).mT
    if rows != cols:
        torch.testing.assert_close(transposed, result, rtol=0.02, atol=0.02)


def test_the_svd_reference_is_the_polar_factor_and_leaves_absent_ranks_out() -> None:
    matrices = make("low_rank", (3, 16, 24), seed=0)
    polar = orthogonalize_svd(matrices)
    values = torch.linalg.svdvals(polar)
    torch.testing.assert_close(values[:, :4], torch.ones(3, 4, dtype=torch.float64))
    assert (values[:, 4:] < 1e-10).all()
    stretch = matrices @ polar.mT  # X = S·Q with S symmetric positive semi-definite
    torch.testing.assert_close(stretch, stretch.mT)
    torch.testing.assert_close(stretch @ polar, matrices)


def test_what_it_cannot_take_is_said() -> None:
    with pytest.raises(ValueError, match=r"\[..., rows, cols\], got shape \(3,\)"):
        orthogonalize(torch.ones(3))
    with pytest.raises(ValueError, match="got torch.float16; cast first"):
        orthogonalize(torch.ones(3, 3, dtype=torch.float16))
    with pytest.raises(ValueError, match="unknown variant 'fast'; take one of 'turbo', 'plain'"):
        orthogonalize(torch.ones(3, 3), "fast")  # type: ignore[arg-type]
