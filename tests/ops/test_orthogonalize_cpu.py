"""Orthogonalization on CPUs: the values of plain products, the same bits for a matrix wherever it stands."""

import pytest
import torch
from torch import Tensor

from switch_bank.ops import cpu_kernels, orthogonalize_cpu
from switch_bank.ops.orthogonalize import Variant, orthogonalize

pytestmark = pytest.mark.skipif(not cpu_kernels.RUN, reason="needs AVX2, Linux and a C++ compiler")
SHAPES = [
    (1, 1, 1),
    (2, 3, 5),
    (3, 5, 3),
    (2, 16, 64),
    (1, 33, 33),
    (3, 40, 17),
    (2, 130, 70),
    (2, 70, 130),
    (1, 256, 256),
]


def random(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("variant", ["turbo", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_gives_the_values_of_plain_products(shape: tuple[int, ...], variant: Variant) -> None:
    matrices = random(shape)
    expected = orthogonalize(matrices.double(), variant, "torch")
    for layout in (matrices, matrices.mT.contiguous().mT):
        result = orthogonalize(layout, variant, "cpu")
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=2e-5)


def test_a_matrix_has_the_same_bits_beside_others_and_on_any_number_of_threads() -> None:
    matrices = random((7, 48, 80))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            together = orthogonalize(matrices, "turbo", "cpu")
            if threads == 1:
                alone = torch.cat([orthogonalize(matrix[None], "turbo", "cpu") for matrix in matrices])
            assert torch.equal(together, alone)
    finally:
        torch.set_num_threads(before)


def test_what_an_earlier_call_left_in_memory_reaches_no_result() -> None:
    assert orthogonalize(torch.full((1, 100, 130), torch.nan), "turbo", "cpu").isnan().all()
    matrices = random((1, 33, 40))
    expected = orthogonalize(matrices.double(), "turbo", "torch")
    torch.testing.assert_close(orthogonalize(matrices, "turbo", "cpu").double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_polynomials_that_change_nothing_leave_the_matrix_at_norm_one(iterations: int) -> None:
    for x in (random((2, 20, 50)), random((2, 50, 20))):
        result = orthogonalize_cpu.orthogonalize(x, ((1.0, 0.0, 0.0),) * iterations, almost_orthogonal=False)
        torch.testing.assert_close(result, x / x.norm(dim=(-2, -1), keepdim=True))


def test_a_row_whose_products_underflow_counts_as_zero() -> None:
    matrix = torch.tensor([[1.0, 0, 0], [0, 3e-21, 0], [0, 0, 1]])  # 3e-21 squared has one digit left in float32
    for backend in ("torch", "cpu"):
        assert orthogonalize(matrix[:2], "turbo", backend)[1].eq(0).all()
        assert orthogonalize(matrix[:, :2], "turbo", backend)[:, 1].eq(0).all()


def test_it_is_for_small_matrices_in_float32() -> None:
    small, large = torch.zeros(3, 256, 256), torch.zeros(3, 257, 256)
    assert orthogonalize_cpu.takes(small) and not orthogonalize_cpu.takes(large)
    assert not orthogonalize_cpu.takes(small.double()) and not orthogonalize_cpu.takes(small.bfloat16())
    with pytest.raises(RuntimeError, match="orthogonalizes float32"):
        orthogonalize(small.double(), "turbo", "cpu")
