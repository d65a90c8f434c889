"""What a router sees, against plain loops over its formulas, and that no document's features know another's."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from switch_bank.config import ModelConfig
from switch_bank.model.features import (
    Documents,
    EmaSums,
    documents_of,
    emas_of,
    forward_ema,
    leaky_reverse_ema,
    reverse_ema,
)

EOD, WORD = 9, 5
CONFIG = ModelConfig(vocab_size=10, eod_token=EOD, width=8, heads=2)

# A slice: what is left of a document that began earlier (maybe nothing), then documents; empty ones are an EOD alone.
slices = st.tuples(st.integers(0, 150), st.lists(st.one_of(st.integers(0, 3), st.integers(0, 200)), max_size=5)).filter(
    lambda slice_: slice_[0] + len(slice_[1]) > 0
)
decays = st.sampled_from([0.01, 0.5, 0.85, 0.999])
precisions = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])


def tokens_of(slice_: tuple[int, list[int]]) -> Tensor:
    """[1, T] tokens: the rest of an earlier document, then an EOD and `length` words for each further one."""
    rest, lengths = slice_
    tokens = [WORD] * rest
    for length in lengths:
        tokens += [EOD] + [WORD] * length
    return torch.tensor([tokens])


def spans(tokens: Tensor) -> list[tuple[int, int]]:
    """The documents of one slice [T] as (start, end), end excluded."""
    starts = [t for t, token in enumerate(tokens.tolist()) if t == 0 or token == EOD]
    return list(zip(starts, [*starts[1:], len(tokens)], strict=True))


def hidden(tokens: Tensor, dtype: torch.dtype = torch.float64, width: int = 3) -> Tensor:
    return torch.randn(*tokens.shape, width, dtype=dtype, generator=torch.Generator().manual_seed(0))


def forward_by_hand(n: Tensor, tokens: Tensor, decay: float) -> Tensor:
    result = torch.zeros_like(n)
    for start, end in spans(tokens[0]):
        f = torch.zeros_like(n[0, 0])
        for t in range(start, end):
            f = decay * f + (1 - decay) * n[0, t]
            result[0, t] = f
    return result


def reverse_by_hand(n: Tensor, tokens: Tensor, decay: float, window: int, normalized: bool) -> Tensor:
    result = torch.zeros_like(n)
    for start, end in spans(tokens[0]):
        total, weights = torch.zeros_like(n[0, 0]), 0.0
        for t in range(start, end):
            if t - start < window:
                total = total + decay ** (t - start) * n[0, t]
                weights += decay ** (t - start)
            result[0, t] = total / weights if normalized else (1 - decay) * total
    return result


def leaky_by_hand(n: Tensor, tokens: Tensor, decay: float, window: int) -> Tensor:
    result = torch.zeros_like(n)
    for start, end in spans(tokens[0]):
        e = start + min(window, end - start)
        for t in range(start, end):
            if t < e:
                result[0, t] = (1 - decay) * torch.stack([decay ** (j - t) * n[0, j] for j in range(t, e)]).sum(0)
            else:
                result[0, t] = (1 - decay) * n[0, e - 1]
    return result


def assert_near(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert got.shape == wanted.shape
    assert (got.double() - wanted).abs().max().item() <= tolerance * max(1.0, wanted.abs().max().item())


# Documents


@given(slices)
def test_documents_and_positions_are_counted_from_each_start(slice_: tuple[int, list[int]]) -> None:
    tokens = tokens_of(slice_)
    document, position, *_ = documents_of(tokens, CONFIG)
    assert document.dtype == position.dtype == torch.int64
    for index, (start, end) in enumerate(spans(tokens[0])):
        assert position[0, start:end].tolist() == list(range(end - start))
        assert (document[0, start:end] - document[0, 0]).tolist() == [index] * (end - start)


@pytest.mark.parametrize("first", [WORD, EOD])
def test_the_first_token_of_a_slice_starts_a_document(first: int) -> None:
    tokens = torch.tensor([[first, WORD, WORD, EOD, WORD], [WORD, WORD, EOD, EOD, WORD]])
    document, position, *_ = documents_of(tokens, CONFIG)
    assert position.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 1]]
    assert (document - document[:, :1]).tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 2, 2]]


@given(slices, st.sampled_from([4, 8, 16]), st.integers(1, 100))
def test_flags_equal_their_definition(slice_: tuple[int, list[int]], bins: int, opening: int) -> None:
    config = ModelConfig(vocab_size=10, eod_token=EOD, position_bins=bins, opening_tokens=opening)  # type: ignore[arg-type]
    tokens = tokens_of(slice_)
    flags = documents_of(tokens, config).flags
    assert flags is not None and flags.dtype == torch.float32
    assert flags.shape == (*tokens.shape, config.flag_features)
    for start, end in spans(tokens[0]):
        for t in range(start, end):
            one_hot = [0.0] * bins
            one_hot[(t - start) % 128 // (128 // bins)] = 1.0
            follows = t > start and tokens[0, t - 1].item() == EOD
            expected = [float(tokens[0, t].item() == EOD), float(follows), float(t - start < opening), *one_hot]
            assert flags[0, t].tolist() == expected


def test_flags_can_be_left_out() -> None:
    config = ModelConfig(vocab_size=10, eod_token=EOD, flags=False)
    assert documents_of(torch.tensor([[EOD, WORD]]), config).flags is None


@given(slices, st.integers(1, 200))
def test_a_document_has_the_same_features_wherever_it_stands(slice_: tuple[int, list[int]], length: int) -> None:
    own = torch.tensor([[EOD] + [WORD] * length])
    # The neighbour before it may end in an empty document (EOD EOD), and the one after it may be empty too.
    before = torch.cat([tokens_of(slice_), torch.tensor([[EOD]])], dim=1)
    packed = torch.cat([before, own, torch.tensor([[EOD, EOD, WORD]])], dim=1)
    at = slice(before.shape[1], before.shape[1] + own.shape[1])
    alone, among = documents_of(own, CONFIG), documents_of(packed, CONFIG)
    assert alone.flags is not None and among.flags is not None
    assert torch.equal(among.position[:, at], alone.position)
    assert torch.equal(among.flags[:, at], alone.flags)

    n = hidden(packed)
    everything = ModelConfig(vocab_size=10, eod_token=EOD, forward_ema=True, reverse_ema="causal", reverse_window=50)
    for of_packed, of_own in zip(emas_of(among, everything), emas_of(alone, everything), strict=True):
        assert_near(of_packed(n)[:, at], of_own(n[:, at]), 1e-12)


# EMAs


@precisions
@given(slice_=slices, decay=decays)
def test_the_forward_ema_equals_its_recurrence(
    dtype: torch.dtype, tolerance: float, slice_: tuple[int, list[int]], decay: float
) -> None:
    tokens = tokens_of(slice_)
    n = hidden(tokens, dtype)
    got = forward_ema(n, documents_of(tokens, CONFIG), decay)
    assert got.dtype == dtype
    assert_near(got, forward_by_hand(n.double(), tokens, decay), tolerance)


@precisions
@pytest.mark.parametrize("normalized", [True, False])
@given(slice_=slices, decay=decays, window=st.integers(1, 200))
def test_the_reverse_ema_equals_its_sums(
    dtype: torch.dtype, tolerance: float, normalized: bool, slice_: tuple[int, list[int]], decay: float, window: int
) -> None:
    tokens = tokens_of(slice_)
    n = hidden(tokens, dtype)
    got = reverse_ema(n, documents_of(tokens, CONFIG), decay, window, normalized)
    assert got.dtype == dtype
    assert_near(got, reverse_by_hand(n.double(), tokens, decay, window, normalized), tolerance)


@precisions
@given(slice_=slices, decay=decays, window=st.integers(1, 200))
def test_the_leaky_reverse_ema_equals_its_sums(
    dtype: torch.dtype, tolerance: float, slice_: tuple[int, list[int]], decay: float, window: int
) -> None:
    tokens = tokens_of(slice_)
    n = hidden(tokens, dtype)
    got = leaky_reverse_ema(n, documents_of(tokens, CONFIG), decay, window)
    assert got.dtype == dtype
    assert_near(got, leaky_by_hand(n.double(), tokens, decay, window), tolerance)


def test_emas_of_half_precision_are_summed_in_float32() -> None:
    tokens = tokens_of((10, [40, 80]))
    documents = documents_of(tokens, CONFIG)
    n = hidden(tokens, torch.bfloat16)
    for ema in (
        forward_ema(n, documents, 0.85),
        reverse_ema(n, documents, 0.85, 384, True),
        leaky_reverse_ema(n, documents, 0.85, 384),
    ):
        assert ema.dtype == torch.float32
    assert torch.equal(forward_ema(n, documents, 0.85), forward_ema(n.float(), documents, 0.85))


def test_the_normalised_reverse_ema_of_a_constant_is_that_constant() -> None:
    tokens = tokens_of((3, [700, 0, 60]))
    constant = torch.full((*tokens.shape, 2), 3.0)
    for decay in (0.01, 0.85, 0.999):
        got = reverse_ema(constant, documents_of(tokens, CONFIG), decay, 384, normalized=True)
        torch.testing.assert_close(got, constant, rtol=1e-5, atol=0.0)


def test_past_its_window_the_reverse_ema_stays_what_it_was() -> None:
    tokens = tokens_of((0, [499]))
    got = reverse_ema(hidden(tokens), documents_of(tokens, CONFIG), 0.99, 100, normalized=True)
    assert_near(got[:, 100:], got[:, 99:100].expand(-1, 400, -1), 1e-12)


def reads(function_of_n: Tensor, n: Tensor, t: int) -> Tensor:
    """[T] bool: the tokens whose n the feature at t depends on."""
    (gradient,) = torch.autograd.grad(function_of_n[0, t].sum(), n, retain_graph=True)
    return (gradient[0] != 0).any(-1)


def causal_features(n: Tensor, documents: Documents) -> list[Tensor]:
    return [
        forward_ema(n, documents, 0.85),
        reverse_ema(n, documents, 0.85, 30, True),
        reverse_ema(n, documents, 0.85, 30, False),
    ]


@given(slices, st.data())
def test_causal_features_read_nothing_to_come_and_no_other_document(
    slice_: tuple[int, list[int]], data: st.DataObject
) -> None:
    tokens = tokens_of(slice_)
    documents = documents_of(tokens, CONFIG)
    t = data.draw(st.integers(0, tokens.shape[1] - 1))
    n = hidden(tokens).requires_grad_()
    index = torch.arange(tokens.shape[1])
    own = documents.document[0] == documents.document[0, t]
    opening = documents.position[0] < 30
    allowed = [own & (index <= t), own & opening & (index <= t), own & opening & (index <= t)]
    for feature, may_read in zip(causal_features(n, documents), allowed, strict=True):
        assert torch.equal(reads(feature, n, t), may_read)


def test_the_leaky_reverse_ema_reads_tokens_to_come_of_its_own_document_only() -> None:
    tokens = tokens_of((5, [40, 20]))
    documents = documents_of(tokens, CONFIG)
    n = hidden(tokens).requires_grad_()
    read = reads(leaky_reverse_ema(n, documents, 0.85, 30), n, 10)
    index = torch.arange(tokens.shape[1])
    # The second document spans tokens 5 to 45, its opening of 30 tokens ends at 34.
    assert torch.equal(read, (index >= 10) & (index < 35))


@pytest.mark.parametrize("normalized", [True, False])
@settings(max_examples=15)
@given(
    slice_=slices, decay=decays, window=st.integers(1, 200),
    pieces=st.just([1]) | st.lists(st.integers(1, 150), min_size=1),
)  # fmt: skip
def test_piece_by_piece_documents_and_features_are_those_of_the_slice(
    normalized: bool, slice_: tuple[int, list[int]], decay: float, window: int, pieces: list[int]
) -> None:
    config = ModelConfig(
        vocab_size=10, eod_token=EOD, forward_ema=True, forward_decay=decay, reverse_decay=decay, reverse_window=window,
        reverse_normalized=normalized,
    )  # fmt: skip
    tokens = tokens_of(slice_)
    n, whole = hidden(tokens), documents_of(tokens, config)
    features = [ema(n) for ema in emas_of(whole, config)]
    none = torch.zeros(1, 1, dtype=torch.int64)
    documents, past = Documents(none, none - 1, none.bool(), None), EmaSums(*torch.zeros(2, 1, 1, 3).double())
    lengths, first = itertools.cycle(pieces), 0
    while first < tokens.shape[1]:
        piece = slice(first, first + next(lengths))
        documents = documents_of(tokens[:, piece], config, documents)
        assert documents.flags is not None and whole.flags is not None
        assert torch.equal(documents.document, whole.document[:, piece])
        assert torch.equal(documents.position, whole.position[:, piece])
        assert torch.equal(documents.flags, whole.flags[:, piece])
        for ema, feature in zip(emas_of(documents, config, past), features, strict=True):
            assert_near(ema(n[:, piece]), feature[:, piece], 1e-12)
        first = piece.stop


def test_features_come_in_the_order_the_router_reads_them() -> None:
    tokens = tokens_of((5, [40]))
    documents, n = documents_of(tokens, CONFIG), hidden(tokens)

    def features(**options: object) -> list[Tensor]:
        return [ema(n) for ema in emas_of(documents, ModelConfig(reverse_window=7, **options))]  # type: ignore[arg-type]

    forward = forward_ema(n, documents, 0.85)
    assert features(reverse_ema="off") == []
    assert torch.equal(features(forward_ema=True, forward_decay=0.5)[0], forward_ema(n, documents, 0.5))
    both = features(forward_ema=True, reverse_decay=0.6)
    assert len(both) == 2
    assert torch.equal(both[0], forward)
    assert torch.equal(both[1], reverse_ema(n, documents, 0.6, 7, True))
    (unnormalised,) = features(reverse_normalized=False)
    assert torch.equal(unnormalised, reverse_ema(n, documents, 0.85, 7, False))
    (leaky,) = features(reverse_ema="leaky")
    assert torch.equal(leaky, leaky_reverse_ema(n, documents, 0.85, 7))
