"""Activations are bfloat16, but a router's product with them is float32."""

import pytest
import torch
from torch import Tensor

from switch_bank.ops.float32_linear import float32_linear, split

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
    ),
]


def test_a_float32_number_is_the_sum_of_its_three_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, generator=generator) * 10.0 ** torch.randint(-20, 20, (100_000,), generator=generator)
    high, middle, low = (part.double() for part in split(x))
    assert torch.equal(high + middle + low, x.double())
    assert all(part.dtype == torch.bfloat16 for part in split(x))


def float64_product(x: Tensor, weight: Tensor, direction: Tensor) -> list[Tensor]:
    leaves = [leaf.detach().double().requires_grad_() for leaf in (x, weight)]
    y = leaves[0] @ leaves[1].mT
    return [y, *torch.autograd.grad((y * direction.double()).sum(), leaves)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True])
def test_the_product_and_the_weights_gradient_are_as_exact_as_float32(compiled: bool, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, direction = (torch.randn(*shape, generator=generator) for shape in ((2, 96, 72), (5, 72), (2, 96, 5)))
    x, weight = x.bfloat16().to(device).requires_grad_(), weight.to(device).requires_grad_()
    direction = direction.to(device)
    function = torch.compile(float32_linear, fullgraph=True) if compiled else float32_linear
    y = function(x, weight)
    results = [y, *torch.autograd.grad((y * direction).sum(), (x, weight))]
    assert [result.dtype for result in results] == [torch.float32, torch.bfloat16, torch.float32]
    # bfloat16 weights would be off by 2e-3 of the largest value.
    for result, want, tolerance in zip(results, float64_product(x, weight, direction), (2e-6, 4e-3, 2e-6), strict=True):
        assert (result.double() - want).abs().max() <= tolerance * want.abs().max()
