"""The head's kernel for CPUs: the definition's values at odd shapes, and bits that nothing else in a call reaches."""

import pytest
import torch
from torch import Tensor

from switch_bank.ops import cpu_kernels, head_cpu
from switch_bank.ops.head import CAP, IGNORE, head_losses

pytestmark = pytest.mark.skipif(not cpu_kernels.RUN, reason="needs AVX2, Linux and a C++ compiler")


def problem(tokens: int, width: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, D], weight [V, D], targets [N], every fifth of them ignored."""
    generator = torch.Generator().manual_seed(tokens + width + vocab)
    x, weight = (torch.randn(rows, width, generator=generator) for rows in (tokens, vocab))
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[::5] = IGNORE
    return x, 3 * weight, targets


def solve(x: Tensor, weight: Tensor, targets: Tensor, microbatches: int = 1, gradients: bool = True) -> list[Tensor]:
    return list(head_cpu.losses_and_gradients(x, weight, targets, microbatches, CAP, IGNORE, gradients))


@pytest.mark.parametrize(
    ("tokens", "width", "vocab"),
    [(1, 1, 1), (2, 3, 5), (7, 64, 1), (65, 5, 33), (130, 17, 250), (300, 128, 2048), (600, 4, 16_001), (3, 896, 640)],
)
def test_values_and_gradients_are_those_of_the_definition(tokens: int, width: int, vocab: int) -> None:
    x, weight, targets = problem(tokens, width, vocab)
    exact = [part.double().requires_grad_() for part in (x, weight)]
    total, losses = head_losses(*exact, targets)
    wanted = [losses, *torch.autograd.grad(total, exact)]
    found = solve(x, weight, targets)
    for got, want in zip(found, [wanted[0], wanted[1], wanted[2][None]], strict=True):
        assert (got.double() - want).abs().max() <= 2e-5 * want.abs().max().clamp(min=1)
    assert (found[0][::5] == 0).all() and (found[1][::5] == 0).all()


def test_microbatches_have_gradients_of_their_own() -> None:
    x, weight, targets = problem(3 * 70, 20, 90)
    together = solve(x, weight, targets, microbatches=3)
    for m, part in enumerate(torch.arange(3 * 70).chunk(3)):
        alone = solve(x[part], weight, targets[part])
        assert torch.equal(together[0][part], alone[0]) and torch.equal(together[1][part], alone[1])
        assert torch.equal(together[2][m], alone[2][0])


def test_a_token_has_the_same_bits_whatever_is_beside_it() -> None:
    x, weight, targets = problem(200, 32, 300)
    losses, gradients, _ = solve(x, weight, targets)
    for first, end in ((0, 200), (1, 2), (3, 68), (63, 66), (100, 200)):
        own = solve(x[first:end], weight, targets[first:end])
        assert torch.equal(own[0], losses[first:end]) and torch.equal(own[1], gradients[first:end])
    others = torch.where(torch.arange(200)[:, None] == 77, x, 100 * x.flip(0))
    assert torch.equal(solve(others, weight, targets)[0][77], losses[77])


def test_any_number_of_threads_gives_the_same_bits() -> None:
    x, weight, targets = problem(500, 24, 1000)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(solve(x, weight, targets, microbatches=2))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


def test_without_gradients_the_losses_are_the_same() -> None:
    x, weight, targets = problem(130, 16, 70)
    losses, *nothing = solve(x, weight, targets, gradients=False)
    assert torch.equal(losses, solve(x, weight, targets)[0]) and all(part.numel() == 0 for part in nothing)


def test_what_an_earlier_call_left_in_memory_reaches_no_result() -> None:
    x, weight, targets = problem(67, 19, 45)
    before = solve(x, weight, targets)
    *larger, larger_targets = problem(200, 64, 500)
    assert solve(*(torch.full_like(part, torch.nan) for part in larger), larger_targets)[2].isnan().all()
    assert all(torch.equal(*pair) for pair in zip(solve(x, weight, targets), before, strict=True))


def test_strided_inputs_are_as_good_as_others() -> None:
    x, weight, targets = problem(40, 12, 30)
    strided = solve(x.mT.contiguous().mT, weight.mT.contiguous().mT, targets.repeat_interleave(2)[::2])
    assert all(torch.equal(*pair) for pair in zip(strided, solve(x, weight, targets), strict=True))


@pytest.mark.parametrize("target", [-1, 30])
def test_a_target_outside_of_the_vocabulary_is_refused(target: int) -> None:
    x, weight, targets = problem(4, 12, 30)
    targets[1] = target
    with pytest.raises(RuntimeError, match=f"target {target} of 30"):
        solve(x, weight, targets)


def test_tokens_that_are_no_whole_microbatches_are_refused() -> None:
    with pytest.raises(RuntimeError, match="4 tokens are no 3 microbatches"):
        solve(*problem(4, 12, 30), microbatches=3)


def test_it_is_for_float32() -> None:
    x = problem(4, 12, 30)[0]
    assert head_cpu.takes(x) and not head_cpu.takes(x.double()) and not head_cpu.takes(x.bfloat16())
    with pytest.raises(RuntimeError, match="takes float32"):
        solve(x.double(), *problem(4, 12, 30)[1:])
