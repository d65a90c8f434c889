"""Products and scaling in Triton: torch's values, symmetric ones to the bit, and few registers on a Hopper GPU.

Values are tested by tests with pytest.mark.gpu: see tests/ops/triton_kernels.py.
"""

from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from switch_bank.ops.orthogonalize import Variant, orthogonalize
from switch_bank.ops.orthogonalize_triton import (
    BAND,
    STAGES,
    STEP,
    TILE,
    WARPS,
    add_product,
    gram,
    polynomial,
    scaled,
    sums_of_products,
    symmetric_product,
)
from tests.ops.triton_kernels import (
    DEVICE,
    TRITON_VERSION,
    Compiled,
    compile_for_hopper,
    compiles,
    run_interpreted,
    runs_kernels,
)

SMALL = dict(tile=16, step=16)
every_shape = pytest.mark.parametrize("shape", [(1, 1), (1, 40), (7, 16), (32, 32), (75, 37)], ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def assert_product(result: Tensor, expected: Tensor) -> None:
    """Symmetric to the bit, and `expected`, float64, up to the rounding of the result's dtype (of TF32 on a GPU)."""
    assert torch.equal(result, result.mT)
    tolerance = 2**-8 if result.dtype == torch.bfloat16 else 2**-9 if DEVICE == "cuda" else 2**-20
    error, largest = (result.double() - expected).abs().amax(), expected.abs().amax()
    assert error <= tolerance * largest, f"off by {error:.3g} where {largest:.3g} is the largest value"


def assert_two_programs_run(compiled: Compiled) -> None:
    assert compiled.spilled == 0
    assert "wgmma.mma_async" in compiled.ptx and "cp.async" in compiled.ptx
    if TRITON_VERSION.startswith("3.6."):
        assert compiled.registers <= 128 and compiled.shared <= 227 * 1024 // 2


@compiles
def test_the_values_are_right_in_the_interpreter() -> None:
    run_interpreted(__file__)


@compiles
@pytest.mark.parametrize("along", ["rows", "columns"])
@pytest.mark.parametrize("add", [False, True])
def test_a_hopper_gpu_spills_no_register_and_runs_two_programs_a_multiprocessor(
    add: bool, along: str, tmp_path: Path
) -> None:
    """Two of 8 warps with at most 128 registers a thread, in 227 KB of shared memory, as Triton 3.6 compiles it."""
    strides = dict(x_row="i32", x_col=1) if along == "rows" else dict(x_row=1, x_col="i32")
    compiled = compile_for_hopper(
        symmetric_product, tmp_path, dict(num_warps=WARPS, num_stages=STAGES), x_ptr="*bf16", out_ptr="*bf16",
        rows="i32", cols="i32", x_matrix="i32", **strides, ratio="fp32", c="fp32",
        ADD=add, TILE=TILE, STEP=STEP, BAND=BAND,
    )  # fmt: skip
    print(f"symmetric_product, ADD={add}, contiguous along {along}: {compiled}")
    assert_two_programs_run(compiled)


@compiles
def test_so_do_the_sums_of_products(tmp_path: Path) -> None:
    compiled = compile_for_hopper(
        sums_of_products, tmp_path, dict(num_warps=WARPS, num_stages=STAGES), x_ptr="*bf16", left_ptr="*bf16",
        right_ptr="*bf16", out_ptr="*bf16", rows="i32", cols="i32", depth="i32", a="fp32", TILE=TILE, STEP=STEP,
    )  # fmt: skip
    print(f"sums_of_products: {compiled}")
    assert_two_programs_run(compiled)


class TestProducts:
    pytestmark = runs_kernels

    @every_shape
    @every_dtype
    def test_gram_is_the_product_with_the_transpose(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        x = draw(2, *shape, dtype=dtype)
        assert_product(gram(x, **SMALL), x.double() @ x.double().mT)

    @every_dtype
    def test_gram_takes_matrices_that_are_not_contiguous(self, dtype: torch.dtype) -> None:
        x = draw(2, 19, 35, dtype=dtype)
        expected = x.double() @ x.double().mT
        apart = torch.full((2, 2, 20, 37), 1e6, device=x.device, dtype=dtype)
        view = apart[:, 1, 1:, 1:-1].copy_(x)
        for matrices in (view, x.mT.contiguous().mT, x.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
            assert_product(gram(matrices, **SMALL), expected)

    @every_shape
    @every_dtype
    def test_the_polynomial_is_the_sum_of_matrix_and_square(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        x = draw(2, shape[0], shape[0], dtype=dtype)
        a = x + x.mT
        assert_product(polynomial(a, -6.0, 2.5, **SMALL), -6 * a.double() + 2.5 * a.double() @ a.double())

    def test_the_polynomial_takes_matrices_that_are_not_contiguous(self) -> None:
        x = draw(2, 19, 19, dtype=torch.float32)
        a = torch.full((2, 21, 22), 1e6, device=x.device)[:, 1:20, 2:21].copy_(x + x.mT)
        assert_product(polynomial(a, 6.0, -0.5, **SMALL), 6 * a.double() - 0.5 * a.double() @ a.double())

    def test_the_polynomial_is_symmetric_to_the_bit_where_the_matrix_is_symmetric_up_to_rounding(self) -> None:
        x = draw(1, 40, 40, dtype=torch.bfloat16)
        a = (x + x.mT) * (1 + 2**-7 * (draw(1, 40, 40, dtype=torch.bfloat16) > 0))
        assert not torch.equal(a, a.mT)
        result = polynomial(a, -6.0, 2.5, **SMALL)
        assert torch.equal(result, result.mT)

    def test_zero_gives_zero_beside_other_matrices(self) -> None:
        x = draw(3, 20, 24, dtype=torch.bfloat16)
        x[1] = 0
        product = gram(x, **SMALL)
        assert (product[1] == 0).all() and (polynomial(product, 2.0, 3.0, **SMALL)[1] == 0).all()
        assert (product[[0, 2]] != 0).any()

    def test_the_trainers_tiles_give_the_values_at_more_than_one_band_of_them(self) -> None:
        x = draw(1, TILE * 5 + 3, TILE * 5 + 70, dtype=torch.bfloat16)
        product = gram(x)
        assert_product(product, x.double() @ x.double().mT)
        a = (product / product.abs().amax()).to(torch.bfloat16)
        assert_product(polynomial(a, -6.0, 2.0), -6 * a.double() + 2 * a.double() @ a.double())

    @every_shape
    @every_dtype
    def test_a_product_is_added_to_the_matrix(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        rows, cols = shape
        x, left, right = (
            draw(2, rows, cols, dtype=dtype),
            draw(2, rows, 21, dtype=dtype),
            draw(2, 21, cols, dtype=dtype),
        )
        spread = left.mT.contiguous().mT  # need not be contiguous
        expected = -1.5 * x.double() + left.double() @ right.double()
        error = (add_product(x, spread, right, -1.5, **SMALL).double() - expected).abs().amax()
        assert (
            error
            <= (2**-8 if dtype == torch.bfloat16 else 2**-9 if DEVICE == "cuda" else 2**-20) * expected.abs().amax()
        )

    @every_shape
    @every_dtype
    def test_scaling_rounds_once(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        x, rows, columns = (
            draw(2, *shape, dtype=dtype),
            draw(2, shape[0], 1, dtype=torch.float32),
            draw(2, 1, shape[1], dtype=torch.float32),
        )
        of_matrix = torch.tensor([0.5, 3.0], device=x.device).view(2, 1, 1)
        wide = x.float()
        assert torch.equal(scaled(x, rows, columns), (wide * rows * columns).to(dtype))
        assert torch.equal(scaled(x, rows), (wide * rows).to(dtype))
        assert torch.equal(scaled(x.mT.contiguous().mT, columns), (wide * columns).to(dtype))
        assert torch.equal(scaled(x, of_matrix), (wide * of_matrix).to(dtype))


class TestOrthogonalize:
    pytestmark = runs_kernels

    @pytest.mark.parametrize("shape", [(1, 5), (3, 40, 72), (2, 72, 40), (2, 2, 33, 33)], ids=str)
    @pytest.mark.parametrize("variant", get_args(Variant))
    def test_it_is_torchs_result_up_to_bfloat16(self, variant: Variant, shape: tuple[int, ...]) -> None:
        matrices = draw(*shape, dtype=torch.bfloat16)
        wanted = orthogonalize(matrices, variant, "torch").float()
        exact = orthogonalize(matrices.double(), variant)
        result = orthogonalize(matrices, variant, "triton")
        assert result.shape == matrices.shape and result.dtype == torch.bfloat16
        torch.testing.assert_close(result.float(), wanted, rtol=0.05, atol=0.05)
        assert (result - exact).norm() <= 1.2 * (wanted - exact).norm() + 0.01

    @pytest.mark.parametrize("magnitude", [2.0**-130, 1e-30, 1e30, 2.0**126])
    @pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
    def test_the_magnitude_of_a_matrix_does_not_show(self, shape: tuple[int, int], magnitude: float) -> None:
        matrix = (draw(1, *shape, dtype=torch.float32) / 4).to(torch.bfloat16)
        own = (matrix.double() * magnitude).to(torch.bfloat16)  # a denormal number has lost digits
        result, expected = (orthogonalize(x, "turbo", "triton").float() for x in (own, matrix))
        assert result.isfinite().all()
        torch.testing.assert_close(result, expected, rtol=0, atol=0.02 if magnitude > 1e-35 else 0.2)

    @pytest.mark.parametrize("variant", get_args(Variant))
    def test_zero_stays_zero(self, variant: Variant) -> None:
        matrices = draw(3, 20, 30, dtype=torch.bfloat16)
        matrices[1] = 0
        result = orthogonalize(matrices, variant, "triton")
        assert (result[1] == 0).all() and result.isfinite().all() and result[0].norm() > 1
