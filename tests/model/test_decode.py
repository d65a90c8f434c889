"""Decoding: fed token by token, a model gives the logits of the full forward, and its state does not grow."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from switch_bank.config import Config
from switch_bank.model.decode import Decoder, decode_logits
from switch_bank.model.gpt import SwitchBankGPT
from switch_bank.schedules import StepState, step_state

ConfigOf, ModelOf = Callable[..., Config], Callable[[Config], SwitchBankGPT]

EOD, VOCAB = 0, 97  # as config_of has them
EXACT: dict[str, Any] = dict(dtype="float64", attention_backend="reference")  # the bank's is the reference then too
LONG, SHORT, REVERSE = 40, 20, 30  # tokens of the attention windows and of the reverse EMA's
# Two streams: an empty document and one that outlives every window and a block of 128 positions; documents of one
# token and of a window's length, the first of them begun before the stream.
DOCUMENTS = ((0, 9, 10, 24), (13, 14, 14 + LONG, 150))
TOKENS = 160


def state_of(config: Config) -> StepState:
    """A step at which all experts are active, with windows shorter than the documents."""
    return step_state(1000, config, "cpu")._replace(window=torch.tensor(float(LONG)))


def streams(*documents_at: tuple[int, ...], seed: int = 0) -> Tensor:
    """[B, TOKENS] with an end-of-document token exactly where a document is said to start."""
    tokens = torch.randint(1, VOCAB, (len(documents_at), TOKENS), generator=torch.Generator().manual_seed(seed))
    for row, starts in zip(tokens, documents_at, strict=True):
        row[list(starts)] = EOD
    return tokens


@torch.no_grad()
def full_logits(model: SwitchBankGPT, tokens: Tensor, state: StepState) -> Tensor:
    hidden, _, _ = model.trunk(tokens, state)
    return model.logits(hidden)


def largest_difference(model: SwitchBankGPT, tokens: Tensor, state: StepState) -> float:
    return float((decode_logits(model, tokens, state) - full_logits(model, tokens, state)).abs().max())


CAUSAL = [
    dict(forward_ema=forward, reverse_ema=reverse, score=score, top_k=top_k)
    for forward, reverse, score, top_k in itertools.product(
        (False, True), ("off", "causal"), ("softmax", "sigmoid"), (1, 2)
    )
] + [
    dict(forward_ema=True, reverse_normalized=False, bank_backend="reference"),
    dict(adapter="none", flags=False),
    dict(adapter="lora", score="sigmoid", shared=False),
    dict(shared=False, tied_layers=2, balance="bias"),
    dict(experts=1),
    dict(experts=1, adapter="lora", always_on_expert=True),
    dict(always_on_expert=True, top_k=4, position_bins=16),
    dict(layers=13, skip_attention=(5, 11), value_embeddings=2, ema_stride=4, forward_ema=True),
    dict(layers=12, skip_attention=(), value_embeddings=0, tied_layers=3, ema_stride=1, reverse_decay=0.99),
]


def readable(options: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in options.items())


@pytest.mark.parametrize("options", CAUSAL, ids=readable)
def test_token_by_token_the_logits_are_those_of_the_full_forward(
    config_of: ConfigOf, model_of: ModelOf, options: dict[str, Any]
) -> None:
    config = config_of(**EXACT, reverse_window=REVERSE, **options)
    model, tokens = model_of(config).eval(), streams(*DOCUMENTS)
    if model.routers is not None:  # what a run leaves beside the parameters
        model.routers.balance_bias.normal_(generator=torch.Generator().manual_seed(2))
        model.routers.pruned[1] = config.model.top_k < 4
    assert largest_difference(model, tokens, state_of(config)) < 1e-9


@pytest.mark.parametrize("lengths", [(1, 30, 2, 1, 45, 81), (SHORT, LONG, 1, 1, 98), (TOKENS,)])
@pytest.mark.parametrize("options", CAUSAL, ids=readable)
def test_piece_by_piece_too(
    config_of: ConfigOf, model_of: ModelOf, options: dict[str, Any], lengths: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("switch_bank.model.decode.TOGETHER", 71)
    config = config_of(**EXACT, reverse_window=REVERSE, **options)
    model, tokens = model_of(config).eval(), streams(*DOCUMENTS)
    decoder, expected = Decoder(model, state_of(config), streams=2), full_logits(model, tokens, state_of(config))
    for piece, last in zip(tokens.split(lengths, dim=1), itertools.accumulate(lengths), strict=True):
        assert (decoder.read(piece) - expected[:, last - 1]).abs().max() < 1e-9


@pytest.mark.parametrize("value", [dict(active_experts=2.0), dict(temperature=0.4), dict(cap=0.3), dict(window=133.0)])
def test_the_state_of_the_step_reaches_the_decoder(
    config_of: ConfigOf, model_of: ModelOf, value: dict[str, float]
) -> None:
    config = config_of(**EXACT, reverse_window=REVERSE)
    model, tokens = model_of(config).eval(), streams(*DOCUMENTS)
    usual = state_of(config)
    state = usual._replace(**{name: torch.tensor(number) for name, number in value.items()})
    assert (full_logits(model, tokens, state) - full_logits(model, tokens, usual)).abs().max() > 1e-3
    assert largest_difference(model, tokens, state) < 1e-9


@pytest.mark.parametrize("bank_backend", ["auto", "grouped"])
@pytest.mark.parametrize("attention_backend", ["sdpa", "reference"])
def test_the_fast_kernels_agree_in_float32(
    config_of: ConfigOf, model_of: ModelOf, attention_backend: str, bank_backend: str
) -> None:
    options = dict(attention_backend=attention_backend, bank_backend=bank_backend, top_k=2, forward_ema=True)
    config = config_of(reverse_window=REVERSE, layers=4, **options)
    model, tokens = model_of(config).eval(), streams(*DOCUMENTS)
    assert largest_difference(model, tokens, state_of(config)) < 2e-4


def test_bfloat16_stays_close(config_of: ConfigOf, model_of: ModelOf) -> None:
    config = config_of(dtype="bfloat16", experts=1, reverse_window=REVERSE)  # no route that rounding might flip
    model, tokens = model_of(config).eval(), streams(*DOCUMENTS)
    decoded = decode_logits(model, tokens, state_of(config))
    assert decoded.dtype == torch.bfloat16
    exact = config_of(dtype="float32", experts=1, reverse_window=REVERSE)
    assert (decoded.float() - full_logits(model_of(exact).eval(), tokens, state_of(exact))).abs().mean() < 0.1


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_model_of_flex_attention_decodes(config_of: ConfigOf, model_of: ModelOf) -> None:
    config = config_of(attention_backend="flex", reverse_window=REVERSE)
    model, tokens = model_of(config).eval(), streams(*DOCUMENTS)[:, :128]  # flex takes whole blocks
    assert largest_difference(model, tokens, state_of(config)) < 2e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_decoding_on_a_gpu_agrees_in_float32(config_of: ConfigOf, model_of: ModelOf) -> None:
    config = config_of(attention_backend="flex", reverse_window=REVERSE, forward_ema=True)
    model, tokens = model_of(config).eval().cuda(), streams(*DOCUMENTS)[:, :128].cuda()
    state = StepState(*(value.cuda() for value in state_of(config)))
    assert largest_difference(model, tokens, state) < 1e-3


# --- What a decoder cannot know


@pytest.mark.parametrize("options", [{}, dict(top_k=2), dict(score="sigmoid", forward_ema=True)], ids=readable)
def test_a_model_that_reads_ahead_decodes_to_other_logits(
    config_of: ConfigOf, model_of: ModelOf, options: dict[str, Any]
) -> None:
    config = config_of(**EXACT, reverse_ema="leaky", reverse_window=REVERSE, **options)
    model, tokens = model_of(config).eval(), streams(*DOCUMENTS)
    assert largest_difference(model, tokens, state_of(config)) > 1e-3


def test_the_leaky_reverse_ema_is_decoded_as_if_the_document_ended_with_the_last_token(
    config_of: ConfigOf, model_of: ModelOf
) -> None:
    # Of one layer, so that no earlier token's values hold what it would have read ahead.
    config = config_of(**EXACT, layers=1, reverse_ema="leaky", reverse_window=REVERSE)
    model, tokens, state = model_of(config).eval(), streams(*DOCUMENTS)[:, :80], state_of(config)
    decoded = decode_logits(model, tokens, state)
    for t in range(80):
        known = full_logits(model, tokens[:, : t + 1], state)[:, -1]
        torch.testing.assert_close(decoded[:, t], known, rtol=0, atol=1e-9)
    assert torch.equal(Decoder(model, state, streams=2).read(tokens), decoded[:, -1])


# --- Documents and streams


def test_nothing_of_an_earlier_document_is_seen_after_its_end(config_of: ConfigOf, model_of: ModelOf) -> None:
    config = config_of(layers=13, skip_attention=(11,), forward_ema=True, ema_stride=4, reverse_window=REVERSE)
    model, state = model_of(config).eval(), state_of(config)
    one, other = streams((50,)), streams((0, 3, 50), seed=1)
    other[:, 50:] = one[:, 50:]
    # Not close but equal: what is masked counts exactly nothing.
    one, other = decode_logits(model, one, state), decode_logits(model, other, state)
    assert torch.equal(one[:, 50:], other[:, 50:]) and not torch.equal(one[:, 49], other[:, 49])


def test_a_stream_depends_on_no_other(config_of: ConfigOf, model_of: ModelOf) -> None:
    config = config_of(**EXACT, forward_ema=True, reverse_window=REVERSE)
    model, state, tokens = model_of(config).eval(), state_of(config), streams(*DOCUMENTS, (0,), (0, 80))[:, :100]
    together = decode_logits(model, tokens, state)
    for row in range(4):
        alone = decode_logits(model, tokens[row : row + 1], state)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-9)


def test_a_new_decoder_has_read_nothing(config_of: ConfigOf, model_of: ModelOf) -> None:
    config = config_of(forward_ema=True)
    model, tokens = model_of(config).eval(), streams((0,))[:, :20]
    assert torch.equal(decode_logits(model, tokens, state_of(config)), decode_logits(model, tokens, state_of(config)))


# --- Cost


class Operations(TorchDispatchMode):
    """Every operation of torch and the shapes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
        self.seen.append((str(operation), [tuple(tensor.shape) for tensor in tensors]))
        return operation(*args, **(kwargs or {}))


def tensors_of(decoder: Decoder) -> list[Tensor]:
    past = decoder.past
    rings = [(ring.keys, ring.values) for ring in past.rings.values()]
    parts = [*past.documents, rings, *past.sums]
    return [leaf for leaf in torch.utils._pytree.tree_leaves(parts) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize(
    "options", [dict(forward_ema=True, top_k=2), dict(experts=1), dict(shared=False, adapter="lora")], ids=readable
)
def test_a_token_costs_at_most_what_it_does_with_full_windows_and_waits_for_no_device(
    config_of: ConfigOf, model_of: ModelOf, options: dict[str, Any]
) -> None:
    config = config_of(**options)
    decoder, tokens = Decoder(model_of(config).eval(), state_of(config)), streams((0,))
    logs = {}
    for t, column in enumerate(tokens.split(1, dim=1)):
        with Operations() if t in (1, LONG - 1, TOKENS - 1) else contextlib.nullcontext(Operations()) as operations:
            decoder.read(column)
        logs[t] = operations.seen
    early, full, last = logs[1], logs[LONG - 1], logs[TOKENS - 1]
    assert len(full) > 100 and full == last
    for (name, shapes), (name_later, shapes_later) in zip(early, full, strict=True):
        assert name == name_later or (name, name_later) == ("aten.slice.Tensor", "aten.alias.default")
        assert all(math.prod(own) <= math.prod(later) for own, later in zip(shapes, shapes_later, strict=True))
    # Reading a value on the host, or a shape that depends on values, is what waits.
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique")
    assert not [name for name, _ in full if any(wait in name for wait in waits)]


def test_the_state_is_bounded_by_the_windows(config_of: ConfigOf, model_of: ModelOf) -> None:
    config = config_of(layers=9, skip_attention=(4,), forward_ema=True, ema_stride=4)
    decoder, tokens = Decoder(model_of(config).eval(), state_of(config), streams=2), streams(*DOCUMENTS)
    sizes = []
    for column in tokens.split(1, dim=1):
        decoder.read(column)
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(decoder)))
    assert set(sizes[1:]) == {sizes[-1]}
    lengths = {layer: ring.keys.shape[1] for layer, ring in decoder.past.rings.items()}
    assert lengths == {layer: LONG if layer % 4 == 3 else SHORT for layer in range(9) if layer != 4}
    keys_and_values = 2 * 2 * (2 * LONG + 6 * SHORT) * 32 * 4  # bytes: 2 streams, 2 long and 6 short layers, width 32
    channels = sum(
        min(config.model.width, config.model.experts * layers) for layers in (4, 4, 1)
    )  # of the groups' EMAs
    sums = 2 * 2 * channels * 4
    assert keys_and_values + sums <= sizes[-1] < keys_and_values + sums + 500


def test_decoding_compiles_nothing_and_shares_the_weights(
    config_of: ConfigOf, model_of: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    config = config_of()
    model, tokens, state = model_of(config).eval(), streams((0,))[:, :20], state_of(config)
    expected = decode_logits(model, tokens, state)
    model.compile()
    assert torch.equal(decode_logits(model, tokens, state), expected) and counter.frame_count == 0
    with torch.no_grad():
        model.head.mul_(2)
    assert not torch.equal(decode_logits(model, tokens, state), expected)
    tables = [table.weight for table in (model.embedding, *model.value_embeddings)]
    model.begin(tokens, tables, state, None, None)
    assert counter.frame_count == 1  # the model itself is still compiled
