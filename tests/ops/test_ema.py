"""The document scan: equal to its definition on any documents, blind to the future and to other documents."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from switch_bank.ops.ema import CHUNK, document_scan, document_scan_reference

# Tiny documents beside ones that span several chunks of 64 tokens; the sum is seldom a multiple of 64.
document_lengths = st.lists(
    st.one_of(st.integers(1, 5), st.integers(1, 70), st.integers(60, 200)), min_size=1, max_size=6
)
decays = st.one_of(st.floats(0.01, 1.0), st.sampled_from([0.01, 0.85, 0.999, 1.0]))


def documents(*rows: list[int]) -> Tensor:
    """[B, T] document ids of slices whose documents have the given lengths; the last one fills its slice up."""
    tokens = max(sum(row) for row in rows)
    ids = [torch.repeat_interleave(torch.arange(1, len(row) + 1), torch.tensor(row)) for row in rows]
    return torch.stack([torch.nn.functional.pad(one, (0, tokens - len(one)), value=int(one[-1])) for one in ids])


def values(document: Tensor, width: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*document.shape, width, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def test_the_reference_is_the_sum_that_defines_it() -> None:
    document, decay = documents([3, 4], [7]), 0.7
    x = values(document)
    wanted = torch.zeros_like(x)
    for b in range(2):
        for t in range(7):
            for j in range(t + 1):
                if document[b, j] == document[b, t]:
                    wanted[b, t] += decay ** (t - j) * x[b, j]
    torch.testing.assert_close(document_scan_reference(x, decay, document), wanted, rtol=1e-14, atol=1e-14)


@given(document_lengths, document_lengths, decays, st.integers(0, 1000))
def test_the_scan_equals_its_definition(first: list[int], second: list[int], decay: float, seed: int) -> None:
    document = documents(first, second)
    x = values(document, seed=seed)
    wanted = document_scan_reference(x, decay, document)
    got = document_scan(x, decay, document)
    assert got.dtype == torch.float64 and got.shape == x.shape
    assert relative_error(got, wanted) < 1e-12
    single = document_scan(x.float(), decay, document)
    assert single.dtype == torch.float32
    assert relative_error(single.double(), wanted) < 3e-6


@pytest.mark.parametrize("tokens", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 5 * CHUNK + 17])
@pytest.mark.parametrize("decay", [0.01, 0.85, 1.0])
def test_one_document_of_any_length_is_summed_across_the_chunks(tokens: int, decay: float) -> None:
    document = torch.zeros(1, tokens, dtype=torch.int64)
    x = values(document)
    assert relative_error(document_scan(x, decay, document), document_scan_reference(x, decay, document)) < 1e-12


def test_document_ids_may_be_negative_and_leave_gaps() -> None:
    document = documents([30, 100, 70])
    x = values(document)
    assert torch.equal(document_scan(x, 0.9, 1000 * document - 5000), document_scan(x, 0.9, document))
    assert torch.equal(document_scan(x, 0.9, document.int()), document_scan(x, 0.9, document))


@given(document_lengths, decays)
def test_the_gradient_equals_that_of_the_definition(lengths: list[int], decay: float) -> None:
    document = documents(lengths)
    x, weight = values(document), values(document, seed=1)
    gradients = []
    for scan in (document_scan, document_scan_reference):
        leaf = x.clone().requires_grad_()
        (scan(leaf, decay, document) * weight).sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert relative_error(*gradients) < 1e-12


@given(document_lengths, decays, st.data())
def test_the_gradient_of_tokens_to_come_and_of_other_documents_is_exactly_zero(
    lengths: list[int], decay: float, data: st.DataObject
) -> None:
    document = documents(lengths)
    t = data.draw(st.integers(0, document.shape[1] - 1))
    x = values(document, dtype=torch.float32).requires_grad_()
    (gradient,) = torch.autograd.grad(document_scan(x, decay, document)[:, t].sum(), x)
    index = torch.arange(document.shape[1])
    read = (index <= t) & (document[0] == document[0, t])
    assert torch.count_nonzero(gradient[:, ~read]) == 0
    assert torch.all(gradient[:, t] == 1)


@given(document_lengths, st.data())
def test_a_token_to_come_changes_no_bit_of_what_was_read(lengths: list[int], data: st.DataObject) -> None:
    document = documents(lengths)
    t = data.draw(st.integers(0, document.shape[1] - 1))
    x = values(document, dtype=torch.float32)
    changed = x.clone()
    changed[:, t] += 1000
    before, after = document_scan(x, 0.9, document), document_scan(changed, 0.9, document)
    untouched = (torch.arange(document.shape[1]) < t) | (document[0] != document[0, t])
    assert torch.equal(before[:, untouched], after[:, untouched])
    assert not torch.equal(before[:, t], after[:, t])


@pytest.mark.parametrize("decay", [1e-30, 0.01, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_decays_underflow_to_zero_and_not_to_nan(decay: float, dtype: torch.dtype) -> None:
    # 0.01^64 is below float32's range, and 0.01^(64·8) below float64's.
    document = documents([700, 68])
    x = values(document, dtype=dtype).requires_grad_()
    y = document_scan(x, decay, document)
    y.square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(y).all() and torch.isfinite(x.grad).all()
    assert relative_error(y.detach(), document_scan_reference(x.detach(), decay, document)) < 1e-6


def test_a_long_sum_keeps_float32_accuracy_after_large_values() -> None:
    # A difference of running sums would leave the second document with the rounding error of the first one's size.
    document = documents([300, 20])
    x = values(document)
    x[:, :300] *= 1e8
    got = document_scan(x.float(), 1.0, document)[:, 300:].double()
    assert relative_error(got, document_scan_reference(x[:, 300:], 1.0, document[:, 300:])) < 1e-5
