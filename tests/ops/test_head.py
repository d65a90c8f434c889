"""The head's losses and gradients, computed a few tokens at a time, are those of all logits at once."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from switch_bank.ops import head
from switch_bank.ops.head import IGNORE, chunked_head_losses, head_losses, soft_cap

VOCAB, WIDTH = 37, 12


def problem(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, D], head [V, D] float32 or float64, targets [N], every fifth of them ignored."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (5 * torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)).to(
        torch.promote_types(dtype, torch.float32)
    )
    targets = torch.randint(VOCAB, (tokens,), generator=generator)
    targets[::5] = IGNORE
    return x, weight.requires_grad_(), targets


def solve(function, x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    """The sum, the losses, and the gradients of x and the head for a sum that counts 0.3-fold."""
    total, losses = function(x, weight, targets)
    return total.detach(), losses, *torch.autograd.grad(0.3 * total, (x, weight))


def by_definition(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, for any dtype."""
    z = x.double() @ weight.double().T
    log_probabilities = F.log_softmax(15 * z / (z**2 + 225) ** 0.5, dim=-1)
    losses = -log_probabilities.gather(1, targets.clamp(min=0)[:, None])[:, 0] * (targets != IGNORE)
    return losses.sum(), losses.detach()


@pytest.mark.parametrize("logits_at_a_time", [1, VOCAB, 7 * VOCAB, 10**9])
@pytest.mark.parametrize("tokens", [1, 2, 23])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_definition(
    dtype: torch.dtype, tokens: int, logits_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_LOGITS", logits_at_a_time)
    x, weight, targets = problem(tokens, dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    expected = solve(by_definition, x, weight, targets)
    for function in (chunked_head_losses, head_losses):
        found = solve(function, x, weight, targets)
        for got, want in zip(found, expected, strict=True):
            assert (got.double() - want).abs().max() <= tolerance * want.abs().max().clamp(min=1e-3), function
        assert (found[1][targets == IGNORE] == 0).all() and (found[2][targets == IGNORE] == 0).all()
        assert found[1].dtype == weight.dtype and found[2].dtype == dtype and found[3].dtype == weight.dtype


@pytest.mark.parametrize("z", [-1e6, 1e6])
def test_a_whole_vocabulary_at_the_cap_is_summed_as_any_other(z: float) -> None:
    x, weight, targets = torch.ones(1, 1), torch.full((50_304, 1), z), torch.tensor([7])
    weight[7] = -z
    loss, _ = chunked_head_losses(x, weight, targets)
    torch.testing.assert_close(loss.double(), by_definition(x, weight, targets)[0], rtol=1e-6, atol=1e-6)


def test_where_no_target_counts_nothing_comes_out() -> None:
    x, weight, targets = problem(6, torch.float32)
    assert all((part == 0).all() for part in solve(chunked_head_losses, x, weight, torch.full_like(targets, IGNORE)))


def test_single_losses_carry_no_gradient() -> None:
    _, losses = chunked_head_losses(*problem(6, torch.float32))
    assert not losses.requires_grad


def test_compiled_it_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_LOGITS", 7 * VOCAB)
    x, weight, targets = problem(23, torch.float32)
    compiled = torch.compile(chunked_head_losses, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        solve(compiled, x, weight, targets), solve(chunked_head_losses, x, weight, targets), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("tokens", "fitting", "chunks"),
    [(1024, 400, 4 * [256]), (1024, 1024, [1024]), (1000, 400, [334, 334, 332]), (128 * 47, 4000, 2 * [64 * 47])],
)
def test_chunks_are_equal_and_of_whole_blocks_where_that_makes_at_most_twice_as_many(
    tokens: int, fitting: int, chunks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, of_chunk = [], head._losses_and_gradient
    monkeypatch.setattr(head, "CHUNK_LOGITS", fitting * VOCAB)
    monkeypatch.setattr(
        head, "_losses_and_gradient", lambda x, weight, targets: sizes.append(len(x)) or of_chunk(x, weight, targets)
    )
    chunked_head_losses(*problem(tokens, torch.float64))
    assert sizes == chunks


def test_the_cap_is_fifteen_and_next_to_nothing_is_changed() -> None:
    z = torch.tensor([0.0, 0.01, 1e4, -1e4], dtype=torch.float64)
    torch.testing.assert_close(
        soft_cap(z), torch.tensor([0.0, 0.01, 15.0, -15.0], dtype=torch.float64), rtol=2e-6, atol=0
    )
