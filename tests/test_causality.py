"""The checks of the audit: causal models pass all of them, every kind of fault is found by the check that is there for
it, and where nothing can be said they say so."""

import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from switch_bank import audit, causality
from switch_bank.causality import MARGIN, Comparison, ComputePath, Finding, Reading, Tolerances
from switch_bank.config import Config
from switch_bank.model import decode, features, gpt
from switch_bank.model.gpt import Output, SwitchBankGPT
from switch_bank.ops import attention
from switch_bank.schedules import step_state

ConfigOf = Callable[..., Config]
REAL = Tolerances(rerun=1e-4, recompute=1e-4, margin=1e-5)
ONE_LAYER: dict[str, Any] = dict(layers=1, value_embeddings=0, ema_stride=1)


def exact_path(config: Config, model: SwitchBankGPT | None = None) -> ComputePath:
    """The exact path of a model, or of a fresh one with random values."""
    if model is None:
        torch.manual_seed(0)
        model = SwitchBankGPT(config.model).eval()
        with audit.random_parameters(model, 0):
            return exact_path(config, model)
    return audit.exact_paths(model, step_state(config.schedule.steps, config, "cpu"))[0]


def checked(config: Config) -> dict[str, Finding]:
    """All four checks on the exact path."""
    path = exact_path(config)
    checks = causality.check_suffix, causality.check_gradients, causality.check_decode, causality.check_packing
    return {check.__name__.removeprefix("check_"): check(path) for check in checks}


def failed(config: Config) -> set[str]:
    return {name for name, finding in checked(config).items() if not finding.passed}


def distances(finding: Finding) -> list[int]:
    """How far ahead tokens read, as the finding tells it."""
    return [int(far) for far in re.findall(r"reads (?:at least |up to )?(\d+) ahead", finding.detail)]


# ---- models as they are ----------------------------------------------------------------------------------------------

CAUSAL: list[dict[str, Any]] = [
    {},
    dict(reverse_ema="off", flags=False),
    dict(reverse_ema="off", forward_ema=True, top_k=2),
    dict(forward_ema=True, score="sigmoid", adapter="lora", position_bins=16),
    dict(reverse_normalized=False, flags=False, top_k=2, score="sigmoid", adapter="none"),
    dict(shared=False, adapter="lora", top_k=2, position_bins=4),
    dict(always_on_expert=True, balance="bias", tied_layers=2, forward_ema=True),
    dict(experts=1),
    dict(experts=1, skip_attention=(0, 1, 2)),  # here no token reads another one
    dict(reverse_ema="off", skip_attention=(0, 1, 2)),  # and here none but the flags say what came before
    dict(layers=10, skip_attention=(5,), value_embeddings=2, ema_stride=4, width=16),
]
LEAKY: list[dict[str, Any]] = [
    {},
    dict(forward_ema=True, top_k=2, adapter="lora"),
    dict(score="sigmoid", flags=False, adapter="none"),
    dict(score="sigmoid", top_k=2, shared=False),
]


@pytest.mark.parametrize("options", CAUSAL, ids=str)
def test_a_causal_model_passes_every_check(config_of: ConfigOf, options: dict[str, Any]) -> None:
    findings = checked(config_of(**options))
    assert [name for name, finding in findings.items() if not finding.passed] == []
    assert not any(map(distances, findings.values()))
    assert "24 cuts" in findings["suffix"].detail and "exactly 0" in findings["gradients"].detail
    for name in ("suffix", "decode", "packing"):
        assert "tolerance 1e-09), the same routes required" in findings[name].detail


@pytest.mark.parametrize("options", LEAKY, ids=str)
def test_the_leaky_reverse_ema_fails_three_checks_that_say_where_and_how_far_it_reads(
    config_of: ConfigOf, options: dict[str, Any]
) -> None:
    findings = checked(config_of(reverse_ema="leaky", **options))
    for name in ("suffix", "gradients", "decode"):
        assert not findings[name].passed
        # It reads the document's first 48 tokens: 47 ahead of the first one, and no further.
        assert all(1 <= far <= 47 for far in distances(findings[name])) and distances(findings[name])
    assert "token 32 reads up to 47 ahead" in findings["gradients"].detail  # the long document begins there
    assert findings["packing"].passed  # it stays within the document


@pytest.mark.slow
@pytest.mark.parametrize("reverse", ["off", "causal", "leaky"])
@pytest.mark.parametrize("adapter", ["none", "scale_bias", "lora"])
def test_every_combination_of_features_gets_its_verdict(config_of: ConfigOf, reverse: str, adapter: str) -> None:
    rest = itertools.product((False, True), (False, True), (1, 2), ("softmax", "sigmoid"))
    for forward, flags, top_k, score in rest:
        options = dict(forward_ema=forward, flags=flags, top_k=top_k, score=score, reverse_ema=reverse, adapter=adapter)
        wanted = {"suffix", "gradients", "decode"} if reverse == "leaky" else set()
        assert failed(config_of(**options)) == wanted, options


# ---- models made to be at fault --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 3])
def test_a_mask_that_is_one_token_off_is_found(
    config_of: ConfigOf, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    distance = attention._distance
    monkeypatch.setattr(attention, "_distance", lambda document: distance(document) + 1)
    findings = checked(config_of(layers=layers, value_embeddings=layers // 2))
    for name in ("suffix", "gradients", "decode"):
        assert not findings[name].passed
        assert all(1 <= far <= layers for far in distances(findings[name])) and distances(findings[name])
    assert set(distances(findings["gradients"])) == {layers}  # one more token in each layer


def test_a_model_that_asks_whether_the_document_ends_next_is_found(
    config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peeking(is_eod: Tensor, *others: Any) -> Tensor:
        return flags(F.pad(is_eod[:, 1:], (0, 1)), *others)

    flags = features._flags
    monkeypatch.setattr(features, "_flags", peeking)
    # The gradient cannot see it: a flag does not depend on embeddings.
    assert failed(config_of(**ONE_LAYER)) == {"suffix", "decode", "packing"}


def test_attention_that_ignores_documents_is_found(config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch) -> None:
    build_mask = gpt.build_mask
    monkeypatch.setattr(
        gpt, "build_mask", lambda b, document, window: build_mask(b, torch.zeros_like(document), window)
    )
    assert failed(config_of(**ONE_LAYER)) == {"decode", "packing"}  # it reads nothing ahead


def test_an_ema_that_runs_on_into_the_next_document_is_found(
    config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = features.document_scan
    monkeypatch.setattr(
        features, "document_scan", lambda x, decay, document: scan(x, decay, torch.zeros_like(document))
    )
    assert failed(config_of(**ONE_LAYER, forward_ema=True, reverse_ema="off")) == {"decode", "packing"}


def test_flags_that_count_from_the_start_of_the_slice_are_found(
    config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_slice(is_eod: Tensor, *others: Any) -> Tensor:
        *others, position, config = others
        return flags(is_eod, *others, torch.arange(position.shape[1]).expand_as(position), config)

    flags = features._flags
    monkeypatch.setattr(features, "_flags", of_slice)
    assert failed(config_of(**ONE_LAYER, reverse_ema="off")) == {"decode", "packing"}


# The decoder's own state, at each edge that it has to mind; the full forward is right.


def test_a_decoder_that_does_not_forget_at_a_document_start_is_found(
    config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan_step = features.scan_step
    monkeypatch.setattr(
        features, "scan_step", lambda x, decay, carry, goes_on: scan_step(x, decay, carry, torch.ones_like(goes_on))
    )
    for options in (dict(reverse_ema="off", forward_ema=True), {}):
        finding = causality.check_decode(exact_path(config_of(**ONE_LAYER, **options)))
        assert not finding.passed and not distances(finding)  # it is wrong, but reads nothing ahead
        assert "differ, in stream 0 token 16," in finding.detail  # where the second document begins


def test_a_decoder_that_remembers_too_long_or_too_short_is_found(
    config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_read = decode.nothing_read
    for change in (2, -2):  # tokens: of the half window, one
        monkeypatch.setattr(
            decode, "nothing_read", lambda model, window, n, c=change: nothing_read(model, window + c, n)
        )
        finding = causality.check_decode(exact_path(config_of(**ONE_LAYER, reverse_ema="off")))
        assert not finding.passed


# ---- what the checks are made of -------------------------------------------------------------------------------------


class Reader:
    """In a model's place: a token's loss is a number of its own for the token `ahead` of it, times `strength`."""

    def __init__(self, config: Config, ahead: int, strength: float = 1.0, margin: float = 1.0) -> None:
        self.config, self.head = config.model, torch.zeros(())
        self.ahead, self.strength, self.margin = ahead, strength, margin

    def __call__(self, tokens: Tensor, targets: Tensor, state: object, window: int | None = None) -> Output:
        losses = self.strength * tokens.roll(-self.ahead, dims=1).float()
        losses[:, tokens.shape[1] - self.ahead :] = 0.0
        nothing = torch.zeros(())
        return Output(nothing, nothing, losses, nothing, torch.full_like(losses, self.margin))


def suffix(config: Config, *reader: float, **options: float) -> Finding:
    state, model = step_state(config.schedule.steps, config, "cpu"), Reader(config, *reader, **options)  # type: ignore
    path = ComputePath("a reader", model, state, None, 8, 256, False, REAL)  # type: ignore[arg-type]
    return causality.check_suffix(path)


@pytest.mark.parametrize("ahead", [0, 1, 5, 200])
def test_the_suffix_check_sees_whoever_reads_ahead_and_no_one_else(config_of: ConfigOf, ahead: int) -> None:
    finding = suffix(config_of(), ahead)
    assert finding.passed == (ahead == 0)
    assert all(1 <= far <= ahead for far in distances(finding))
    assert bool(distances(finding)) == (ahead > 0)


def test_the_suffix_check_lets_pass_what_rounding_may_do_and_counts_it(config_of: ConfigOf) -> None:
    config = config_of()
    assert suffix(config, 1, strength=1e-7).passed
    assert not suffix(config, 1, strength=1e-3).passed
    # A route that may flip by rounding is an excuse, but one that is told.
    excused = suffix(config, 1, margin=MARGIN / 2)
    assert excused.passed and int(re.findall(r"(\d+) excused", excused.detail)[0]) > 0
    assert ", 0 excused" in suffix(config, 0).detail
    assert not suffix(config, 1, margin=2 * MARGIN).passed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_fail(config_of: ConfigOf, value: float) -> None:
    assert not suffix(config_of(), 0, strength=value).passed


def test_a_model_that_does_not_read_at_all_fails(config_of: ConfigOf) -> None:
    finding = suffix(config_of(), 0, strength=0.0)
    assert not finding.passed and "nothing can be said" in finding.detail


def test_a_fresh_model_whose_output_matrices_are_zero_proves_nothing(config_of: ConfigOf) -> None:
    config = config_of(reverse_ema="leaky")
    path = exact_path(config, SwitchBankGPT(config.model).eval())
    for check in (causality.check_suffix, causality.check_gradients, causality.check_decode):
        finding = check(path)
        assert not finding.passed and "nothing can be said" in finding.detail


def readings(differs: list[int], flips: list[int]) -> tuple[Reading, Reading]:
    """Two readings of 8 tokens in 2 layers that differ by 1 at some of them; the margin of layer 1 is small at some."""
    one = Reading(torch.zeros(1, 8, 3), torch.ones(1, 8, 2), torch.zeros(1, 8, 2, 1, dtype=torch.int64))
    values, margins = one.values.clone(), one.margins.clone()
    values[0, differs, 1], margins[0, flips, 1] = 1.0, 0.01
    return one._replace(margins=margins), one._replace(values=values)


DOCUMENT, EVERYWHERE = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]]), torch.ones(1, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("differs", "flips", "wrong"),
    [
        ([], [1], []),
        ([1], [], [1]),
        ([1], [1], []),
        ([1, 3], [1], []),  # the same document
        ([1, 5], [1], [5]),  # another one
        ([0, 1], [1], [0]),  # before the flip
        ([3], [1], [3]),  # the flip that could have been was none: it changed nothing itself
        ([4, 7], [4], []),
    ],
)
def test_only_a_flipped_route_excuses_and_only_what_follows_it_in_its_document(
    differs: list[int], flips: list[int], wrong: list[int]
) -> None:
    comparison = Comparison(0.5, margin=0.1)
    found = comparison.wrong(*readings(differs, flips), EVERYWHERE, DOCUMENT)
    assert found[0].nonzero().flatten().tolist() == wrong
    assert comparison.flipped == len(differs) - len(wrong) and comparison.compared == 8 - comparison.flipped
    # Where both went on the same routes, there is nothing to excuse.
    found = Comparison(0.5, margin=0.1).wrong(*readings(differs, flips), EVERYWHERE)
    assert found[0].nonzero().flatten().tolist() == differs


@pytest.mark.parametrize(
    ("layer", "margin", "wrong", "flipped"), [(1, 0.1, [], 1), (0, 0.1, [2], 0), (1, 0.001, [2], 0), (1, 0.0, [2], 0)]
)
def test_a_router_may_pick_otherwise_only_where_its_own_margin_is_small(
    layer: int, margin: float, wrong: list[int], flipped: int
) -> None:
    one, _ = readings([], flips=[2])
    routes = one.routes.clone()
    routes[0, 2, layer] = 1
    comparison = Comparison(0.5, margin)
    found = comparison.wrong(one, one._replace(routes=routes), EVERYWHERE)
    assert found[0].nonzero().flatten().tolist() == wrong and comparison.flipped == flipped


def test_margins_are_measured_by_the_routers_weights_which_rounding_grows_with(config_of: ConfigOf) -> None:
    path = exact_path(config_of(**ONE_LAYER))
    tokens = torch.arange(64).view(1, 64)
    assert path.model.routers is not None
    with torch.no_grad():
        path.model.routers.weight.mul_(3 / path.model.routers.weight.norm(dim=-1).amax())
        path.model.routers.bias.zero_()
        small = causality.read_logits(path, tokens, 1, 64).margins
        path.model.routers.weight.mul_(100)
        large = causality.read_logits(path, tokens, 1, 64).margins
    torch.testing.assert_close(small, large)


@pytest.mark.parametrize("options", [dict(top_k=2), dict(score="sigmoid"), dict(layers=1, experts=1)], ids=str)
def test_on_its_own_routes_a_model_says_the_same_and_on_others_it_does_not(
    config_of: ConfigOf, options: dict[str, Any]
) -> None:
    path = exact_path(config_of(**options))
    text = causality.random_documents(path.model.config, 2, 128, torch.device("cpu"), 0)
    with torch.no_grad():
        free = causality.read_logits(path, text, 2, 128)
        model, own = causality.on_routes(path, free.routes)
        held = causality.read_logits(path._replace(model=model), text, 2, 128)
        assert torch.equal(held.values, free.values) and torch.equal(held.routes, free.routes)
        assert torch.equal(causality._routes(own, free.routes), free.routes)
        model, own = causality.on_routes(path, (free.routes + 1) % path.model.config.experts)
        other = causality.read_logits(path._replace(model=model), text, 2, 128)
    if path.model.config.experts > 1:
        assert ((other.values - free.values).abs().amax(-1) > 1e-3).all()
        assert torch.equal(
            causality._routes(own, free.routes)[:, :, 0], free.routes[:, :, 0]
        )  # it would pick as before


@given(
    tokens=st.integers(128, 2000), window=st.integers(64, 2000), count=st.integers(4, 64), seed=st.integers(0, 99),
)  # fmt: skip
def test_cuts_leave_something_on_both_sides_and_lie_at_the_edges(
    config_of: ConfigOf, tokens: int, window: int, count: int, seed: int
) -> None:
    config = config_of().model
    cuts = causality.cut_points(config, tokens, window, count, seed)
    assert len(cuts) == count and all(0 < cut < tokens for cut in cuts)
    assert {1, tokens - 1, tokens // 16} <= set(cuts)
    start = tokens // 8  # of the long document
    if count >= 16:
        for length in (window // 2, window, config.reverse_window):
            edges = {start + length - 1, start + length}
            assert edges <= set(cuts) or max(edges) >= tokens


def test_a_slice_has_documents_of_all_lengths_and_the_long_one_crosses_every_edge(config_of: ConfigOf) -> None:
    config = config_of(reverse_window=384, opening_tokens=64)
    path = exact_path(config)
    text = causality.random_documents(config.model, 2, path.tokens, torch.device("cpu"), 3)
    assert text.shape == (2, 256) and text.min() == 0 and text.max() < 97
    for row in text:
        assert (row == 0).nonzero().flatten().tolist() == [16, 17, 32, 224]  # 16 is an empty document
    long_document = 224 - 32
    shrunk = path.model.config
    assert max(128, path.state.window, shrunk.reverse_window, shrunk.opening_tokens) < long_document
    assert torch.equal(text, causality.random_documents(config.model, 2, 256, torch.device("cpu"), 3))
    assert not torch.equal(text, causality.random_documents(config.model, 2, 256, torch.device("cpu"), 4))


def test_a_twin_has_the_models_own_parameters_and_the_checks_leave_it_alone(
    config_of: ConfigOf, model_of: Callable[[Config], SwitchBankGPT]
) -> None:
    config = config_of()
    model = model_of(config).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shorter = causality.twin(model, reverse_window=7)
    assert shorter.config == dataclasses.replace(config.model, reverse_window=7)
    assert shorter.head.data_ptr() == model.head.data_ptr()
    path = exact_path(config, model)
    assert path.model.head.dtype == torch.float64 and model.head.dtype == torch.float32
    for check in (causality.check_suffix, causality.check_gradients, causality.check_packing):
        check(path._replace(tokens=128))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not model.embedding._forward_hooks and not path.model.embedding._forward_hooks
