"""A microbatch's gradients do not show what else went through with it."""

import pytest
import torch
from torch import Tensor

from switch_bank.config import STRICT_PRODUCTS
from switch_bank.ops import head
from switch_bank.ops.head import chunked_head_losses
from switch_bank.ops.microbatches import linear, lookup, per_microbatch, scaled

M, TOKENS, WIDTH, ROWS = 4, 192, 24, 40


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_linear(weight: Tensor, at: slice) -> Tensor:
    return linear(random(M * TOKENS, WIDTH, seed=1)[at].view(-1, 64, WIDTH), weight).flatten(0, 1)


def of_lookup(weight: Tensor, at: slice) -> Tensor:
    tokens = torch.randint(ROWS, (M * TOKENS,), generator=torch.Generator().manual_seed(2))
    return lookup(tokens[at].view(-1, 64), weight).flatten(0, 1)


def of_scaled(weight: Tensor, at: slice) -> Tensor:
    return scaled(random(M * TOKENS, WIDTH, seed=3)[at].view(-1, 64, WIDTH), weight).flatten(0, 1)


def of_head(weight: Tensor, at: slice) -> Tensor:
    targets = torch.randint(ROWS, (M * TOKENS,), generator=torch.Generator().manual_seed(4))
    return chunked_head_losses(0.1 * random(M * TOKENS, WIDTH, seed=5)[at], weight, targets[at])[0].view(1, 1)


WEIGHTS = {of_linear: (ROWS, WIDTH), of_lookup: (ROWS, WIDTH), of_scaled: (), of_head: (ROWS, WIDTH)}


@pytest.mark.parametrize("function", WEIGHTS)
def test_values_and_gradients_are_those_of_the_weight_as_it_is(function) -> None:  # type: ignore[no-untyped-def]
    weight, everything = random(*WEIGHTS[function]).requires_grad_(), slice(None)
    y = function(weight, everything)
    direction = random(*y.shape, seed=6)
    (plain,) = torch.autograd.grad((y * direction).sum(), weight)
    apart = function(per_microbatch(weight, M), everything)
    (summed,) = torch.autograd.grad((apart * direction).sum(), weight)
    torch.testing.assert_close(apart, y)
    torch.testing.assert_close(summed, plain, rtol=1e-4, atol=1e-4)
    assert plain.abs().min() > 0 and per_microbatch(weight, None) is weight


@pytest.mark.skipif(not STRICT_PRODUCTS, reason="elsewhere a product's rows may show in one another")
@pytest.mark.parametrize("fitting", [100, 10**6])  # tokens whose logits the head holds at a time
@pytest.mark.parametrize("function", WEIGHTS)
def test_gradients_do_not_depend_on_what_goes_through_together(  # type: ignore[no-untyped-def]
    function, fitting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_LOGITS", fitting * ROWS)
    weight = random(*WEIGHTS[function]).requires_grad_()
    weight.grad_dtype = None
    direction = random(M * TOKENS, WIDTH if function in (of_lookup, of_scaled) else ROWS, seed=6)
    found = []
    for together in (1, 2, 4):
        weight.grad = torch.zeros_like(weight, dtype=torch.float64)
        for first in range(0, M, together):
            at = slice(first * TOKENS, (first + together) * TOKENS)
            y = function(per_microbatch(weight, together), at)
            (y * (direction[at] if len(y) > 1 else 1.0)).sum().backward()
        assert weight.grad.dtype == torch.float64
        found.append(weight.grad)
    # The sums of float64 may differ in their last digits, which rounding to float32 hides.
    assert found[0].abs().min() > 0
    assert all(torch.equal(grad.float(), found[0].float()) for grad in found)


def test_the_gradient_of_a_scalar_is_a_float64_sum_rounded_once() -> None:
    x, direction = (torch.randn(4, 256, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    x, scalar = x.requires_grad_(), torch.tensor(0.7, requires_grad=True)
    y = scaled(x, scalar)
    y.backward(direction)
    assert x.grad is not None and scalar.grad is not None
    assert torch.equal(y, 0.7 * x) and torch.equal(x.grad, 0.7 * direction)
    assert scalar.grad == (direction * x).double().sum().float() != (direction * x).sum()
