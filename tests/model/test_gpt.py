"""SwitchBankGPT: it is a language model, in every mode; its parts are wired as designed; it compiles once."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from switch_bank.config import STRICT_PRODUCTS, Config, presets
from switch_bank.distributed import Gradients, World, flat_gradients
from switch_bank.model.attention import rms_norm, rotary_tables, self_attention
from switch_bank.model.gpt import SwitchBankGPT
from switch_bank.ops.attention import build_mask
from switch_bank.ops.head import IGNORE
from switch_bank.optim.groups import QuantileClip, build_optimizers, in_backward_order, parameter_groups
from switch_bank.schedules import StepState, step_state

ConfigOf, ModelOf = Callable[..., Config], Callable[[Config], SwitchBankGPT]

EOD, VOCAB, TOKENS = 0, 97, 128  # the first two as config_of has them
SEED = torch.tensor(3)
EXACT: dict[str, Any] = dict(dtype="float64", attention_backend="reference", bank_backend="reference")


def late_state(config: Config) -> StepState:
    """A step at which all experts are active and the cap is high."""
    state = step_state(1000, config, "cpu")
    assert state.active_experts == config.model.experts
    return state


def random_tokens(batch: int, tokens: int = TOKENS, seed: int = 0, documents_at: tuple[int, ...] = (0, 37)) -> Tensor:
    """[B, T] without EOD but at `documents_at`."""
    drawn = torch.randint(1, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    drawn[:, list(documents_at)] = EOD
    return drawn


def gradients_of(model: SwitchBankGPT) -> dict[str, Tensor]:
    return {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}


def logits_of(model: SwitchBankGPT, tokens: Tensor, state: StepState, **options: Any) -> Tensor:
    hidden, _, _ = model.trunk(tokens, state, **options)
    return model.logits(hidden)


# --- Promise 1: the probability of token t+1 depends on tokens <= t only.


def gradients_at(model: SwitchBankGPT, tokens: Tensor, state: StepState, t: int) -> Tensor:
    """[T]: the largest gradient of the logits at t with respect to each token's embeddings, of all tables."""
    looked_up: list[Tensor] = []
    tables = [model.embedding, *model.value_embeddings]
    hooks = [table.register_forward_hook(lambda module, inputs, output: looked_up.append(output)) for table in tables]
    logits = logits_of(model, tokens, state)
    for hook in hooks:
        hook.remove()
    assert len(looked_up) == len(tables)
    direction = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(5)).to(logits.dtype)
    gradients = torch.autograd.grad((logits[0, t] * direction).sum(), looked_up)
    return torch.stack([gradient[0].abs().amax(-1) for gradient in gradients]).amax(0)


def largest_change_up_to(model: SwitchBankGPT, tokens: Tensor, state: StepState, t: int) -> float:
    """How much the logits up to t change when every token after t does, document boundaries included."""
    changed = tokens.clone()
    later = torch.randint(1, VOCAB, (tokens.shape[1] - t - 1,), generator=torch.Generator().manual_seed(7))
    changed[:, t + 1 :] = torch.where(later == tokens[0, t + 1 :], later % (VOCAB - 1) + 1, later)
    with torch.no_grad():
        before, after = logits_of(model, tokens, state), logits_of(model, changed, state)
    return float((before - after)[:, : t + 1].abs().max())


LANGUAGE_MODELS = [
    dict(forward_ema=forward, reverse_ema=reverse, score=score, top_k=top_k)
    for forward, reverse, score, top_k in itertools.product(
        (False, True), ("off", "causal"), ("softmax", "sigmoid"), (1, 2)
    )
] + [
    dict(reverse_ema="causal", reverse_normalized=False, forward_ema=True),
    dict(shared=False, adapter="lora", forward_ema=True),
    dict(always_on_expert=True, balance="bias", tied_layers=2),
    dict(experts=1),
    dict(layers=12, skip_attention=(11,), value_embeddings=2, ema_stride=4),
]


def readable(options: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in options.items())


@pytest.mark.parametrize("options", LANGUAGE_MODELS, ids=readable)
def test_no_token_can_be_read_before_its_turn(config_of: ConfigOf, model_of: ModelOf, options: dict[str, Any]) -> None:
    config = config_of(**EXACT, **options)
    model, state, tokens = model_of(config), late_state(config), random_tokens(1)
    for t in (10, 60):  # both early in a document, where a reverse EMA would read ahead
        gradients = gradients_at(model, tokens, state, t)
        start = 0 if t < 37 else 37
        assert (gradients[t + 1 :] == 0).all(), "the logits at t depend on a later token"
        assert (gradients[:start] == 0).all(), "the logits at t depend on another document"
        # Every earlier token of the document does matter (within the 64 tokens of a short window, over two layers).
        assert (gradients[start : t + 1] > 0).all()
        assert largest_change_up_to(model, tokens, state, t) < 1e-9


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"score": "sigmoid"}, {"forward_ema": True}], ids=readable)
def test_both_checks_find_the_leak_of_the_published_reverse_ema(
    config_of: ConfigOf, model_of: ModelOf, options: dict[str, Any]
) -> None:
    config = config_of(**EXACT, reverse_ema="leaky", **options)
    assert not config.model.causal
    model, state, tokens = model_of(config), late_state(config), random_tokens(1)
    for t in (10, 60):
        end = 37 if t < 37 else 37 + 48  # of the document, or of the opening that the reverse EMA reads
        gradients = gradients_at(model, tokens, state, t)
        assert (gradients[t + 1 : end] > 0).any() and (gradients[end:] == 0).all()
        assert largest_change_up_to(model, tokens, state, t) > 1e-6


def test_gumbel_noise_lets_no_token_be_read_before_its_turn(config_of: ConfigOf, model_of: ModelOf) -> None:
    config = config_of(**EXACT, forward_ema=True)
    model, state, tokens = model_of(config), late_state(config), random_tokens(1)
    changed = tokens.clone()
    changed[:, 61:] = random_tokens(1, seed=9)[:, 61:]
    slices = torch.tensor([5])
    with torch.no_grad():
        before, after = (logits_of(model, x, state, slices=slices, seed=SEED) for x in (tokens, changed))
    assert (before - after)[:, :61].abs().max() < 1e-9 and (before - after)[:, 61:].abs().max() > 1e-3


# --- Documents and slices


@pytest.mark.parametrize(
    "options",
    [
        dict(forward_ema=True, top_k=2),
        dict(reverse_normalized=False, score="sigmoid"),
        dict(adapter="lora", shared=False),
        dict(reverse_ema="leaky"),
        dict(experts=1),
    ],
    ids=readable,
)
def test_a_documents_logits_are_the_same_whatever_it_is_packed_with_and_wherever(
    config_of: ConfigOf, model_of: ModelOf, options: dict[str, Any]
) -> None:
    config = config_of(**EXACT, **options)
    model, state = model_of(config), late_state(config)
    document = random_tokens(1, 70, seed=1, documents_at=(0,))

    def packed_at(offset: int, tokens: int, seed: int, documents_at: tuple[int, ...] = ()) -> Tensor:
        around = random_tokens(1, tokens, seed=seed, documents_at=documents_at)
        around[:, offset : offset + 70] = document
        if offset + 70 < tokens:
            around[:, offset + 70] = EOD
        with torch.no_grad():
            return logits_of(model, around, state)[:, offset : offset + 70]

    alone = packed_at(0, 128, seed=2)
    for packed in (
        packed_at(0, 128, seed=3, documents_at=(90, 100)),  # other documents after it
        packed_at(58, 128, seed=4),  # after the rest of a document that began in the slice before
        packed_at(1, 128, seed=5),  # after a single token
        packed_at(31, 128, seed=6, documents_at=(0, 30)),  # after documents, the last of them empty
        packed_at(150, 256, seed=7, documents_at=(0, 99)),  # in a longer slice, over a block's edge
    ):
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-9)


def test_a_slice_that_begins_inside_a_document_starts_there(config_of: ConfigOf, model_of: ModelOf) -> None:
    config = config_of(**EXACT, forward_ema=True)
    model, state = model_of(config), late_state(config)
    rest = random_tokens(1, 40, seed=1, documents_at=())
    slices = []
    for seed in (2, 3):
        tokens = random_tokens(1, seed=seed)
        tokens[:, :40], tokens[:, 40] = rest, EOD
        slices.append(logits_of(model, tokens, state)[:, :40])
    torch.testing.assert_close(slices[0], slices[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("scope", ["layer", "bank"])
@pytest.mark.parametrize("seed", [None, SEED])
def test_slices_go_through_together_as_they_would_one_by_one(
    config_of: ConfigOf, model_of: ModelOf, seed: Tensor | None, scope: str
) -> None:
    config = config_of(
        forward_ema=True, top_k=2, balance_scope=scope, z_loss_weight=0.01, cv_weight=0.3, entropy_weight=0.3
    )  # fmt: skip
    model, state = model_of(config), late_state(config)
    tokens = torch.cat([random_tokens(1, seed=row, documents_at=(11 * row,)) for row in range(4)])
    targets, slices = random_tokens(4, seed=9), torch.tensor([6, 1, 12, 0])
    together = model(tokens, targets, state, slices, seed)
    together.loss.backward()
    gradients = gradients_of(model)
    model.zero_grad()
    assert together.loss > together.cross_entropy + 1e-3
    one_by_one = [model(tokens[i : i + 1], targets[i : i + 1], state, slices[i : i + 1], seed) for i in range(4)]
    (torch.stack([output.loss for output in one_by_one]).mean()).backward()
    for name in ("loss", "cross_entropy"):
        mean = torch.stack([getattr(output, name) for output in one_by_one]).mean()
        torch.testing.assert_close(getattr(together, name), mean, rtol=1e-5, atol=1e-5)
    token_losses = torch.cat([output.token_losses for output in one_by_one])
    torch.testing.assert_close(together.token_losses, token_losses, rtol=1e-4, atol=1e-4)
    assert torch.equal(together.routing.counts, torch.stack([output.routing.counts for output in one_by_one]).sum(0))
    for name, want in gradients_of(model).items():
        assert (gradients[name] - want).abs().max() <= 1e-4 * want.abs().max(), name


@pytest.mark.parametrize(
    "options",
    [
        dict(forward_ema=True, top_k=2, z_loss_weight=0.01, cv_weight=0.3, entropy_weight=0.3),
        dict(adapter="none", score="sigmoid", shared=False),
        dict(adapter="lora", top_k=2),
        dict(always_on_expert=True, bank_backend="grouped", tied_layers=2),
        dict(layers=12, skip_attention=(11,), value_embeddings=2, ema_stride=4),
        dict(experts=1),
        dict(experts=1, adapter="lora", shared=False),
    ],
    ids=readable,
)
@pytest.mark.skipif(not STRICT_PRODUCTS, reason="elsewhere a product's rows may show in one another")
def test_gradients_do_not_show_how_many_microbatches_share_a_forward(
    world: World, config_of: ConfigOf, model_of: ModelOf, options: dict[str, Any]
) -> None:
    config = config_of(**options)
    model, state = model_of(config), late_state(config)
    tokens = torch.cat([random_tokens(1, seed=row, documents_at=(11 * row,)) for row in range(8)])
    targets, slices = random_tokens(8, seed=9), torch.arange(8)
    parameters = in_backward_order(model)

    def gradients_and_losses(together: int) -> tuple[Tensor, Tensor]:
        gradients = Gradients(parameters, backwards=4 // together)
        losses = []
        for at in torch.arange(8).split(2 * together):
            output = model(tokens[at], targets[at], state, slices[at], SEED, microbatches=together)
            gradients.backward(output.loss * together / 4)
            losses.append(output.token_losses)
        gradients.wait()
        return gradients.flat, torch.cat(losses)

    gradients, losses = gradients_and_losses(1)
    for together in (2, 4):
        others, other_losses = gradients_and_losses(together)
        assert torch.equal(losses, other_losses)
        differ = (gradients != others).split([parameter.numel() for parameter in parameters])
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        assert not [names[id(p)] for p, some in zip(parameters, differ, strict=True) if some.any()]
    model.zero_grad(set_to_none=True)
    for parameter in parameters:
        parameter.grad_dtype = torch.float32
    model(tokens, targets, state, slices, SEED).loss.backward()
    whole = torch.cat([parameter.grad.flatten() for parameter in parameters])  # type: ignore[union-attr]
    assert (whole - gradients).abs().max() <= 1e-4 * whole.abs().max()


def test_noise_is_drawn_for_the_slice_not_for_its_place_in_the_batch(config_of: ConfigOf, model_of: ModelOf) -> None:
    config = config_of()
    model, state, tokens = model_of(config), late_state(config), random_tokens(2)
    with torch.no_grad():
        outputs = model(tokens, tokens, state, torch.tensor([3, 8]), SEED).token_losses
        swapped = model(tokens.flip(0), tokens.flip(0), state, torch.tensor([8, 3]), SEED).token_losses
        other = model(tokens, tokens, state, torch.tensor([3, 9]), SEED).token_losses
        quiet = model(tokens, tokens, state).token_losses
    torch.testing.assert_close(outputs, swapped.flip(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs[0], other[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs[1], other[1], atol=1e-2) and not torch.allclose(outputs, quiet, atol=1e-2)


# --- Losses


def test_the_loss_is_the_mean_cross_entropy_of_the_targets_that_count(config_of: ConfigOf, model_of: ModelOf) -> None:
    config = config_of()
    model, state, tokens = model_of(config).eval(), late_state(config), random_tokens(2)
    targets = random_tokens(2, seed=1)
    targets[0, 5:9] = targets[1, 50:] = IGNORE
    with torch.no_grad():
        output = model(tokens, targets, state)
        log_probabilities = logits_of(model, tokens, state).log_softmax(-1)
    expected = -log_probabilities.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    counted = targets != IGNORE
    torch.testing.assert_close(output.token_losses[counted], expected[counted], rtol=1e-4, atol=1e-5)
    assert (output.token_losses[~counted] == 0).all()
    torch.testing.assert_close(output.cross_entropy, expected[counted].mean(), rtol=1e-5, atol=1e-5)
    assert torch.equal(output.loss, output.cross_entropy)  # no auxiliary loss in evaluation
    assert output.routing.counts.sum(1).tolist() == [float(counted.sum())] * config.model.layers
    assert output.margins.shape == tokens.shape and 0 <= output.margins.min() < output.margins.max() < torch.inf
    nothing = model(tokens, torch.full_like(tokens, IGNORE), state)
    assert nothing.cross_entropy == 0 and nothing.routing.counts.sum() == 0


def test_logits_are_softly_capped_at_fifteen(config_of: ConfigOf, model_of: ModelOf) -> None:
    config = config_of(**EXACT)
    model = model_of(config)
    hidden = 30 * torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = model.logits(hidden)
    z = rms_norm(hidden) @ model.head.double().T
    torch.testing.assert_close(logits, 15 * z / (z**2 + 225) ** 0.5)
    assert logits.shape == (4, 128) and 10 < logits.abs().max() < 15


@pytest.mark.parametrize("options", [dict(top_k=2, forward_ema=True), dict(experts=1)], ids=readable)
def test_recomputed_layers_keep_less_and_give_the_same_bits(
    config_of: ConfigOf, model_of: ModelOf, options: dict[str, Any]
) -> None:
    config = config_of(**options)
    state, tokens, slices = late_state(config), random_tokens(2), torch.tensor([3, 8])
    losses, gradients, kept = [], [], []
    for recompute in (False, True):
        model = model_of(config)
        if recompute:
            model.recompute_layers()
        storages: dict[int, int] = {}

        def keep(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(tokens, tokens, state, slices, SEED)
        kept.append(sum(storages.values()))
        output.loss.backward()
        losses.append(output.loss.detach())
        gradients.append(gradients_of(model))
    assert torch.equal(*losses) and kept[1] < 0.6 * kept[0]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_step_reads_no_number_back_from_the_device(config_of: ConfigOf, dtype: str) -> None:
    """A fake tensor has no numbers: to ask for one, or for a shape that hangs on one, raises."""
    config = config_of(dtype=dtype, forward_ema=True, top_k=2)
    with FakeTensorMode():
        state, tokens = step_state(1000, config, "cpu"), torch.zeros(2, TOKENS).long()
        model = SwitchBankGPT(config.model)
        with pytest.raises(DataDependentOutputException):
            state.step.item()
        flat_gradients(model.parameters())
        muon, adam = build_optimizers(model, config)
        clip = QuantileClip(parameter_groups(model)["routers"], quantile=0.1, history=5)
        output = model(tokens, tokens, state, torch.zeros(2).long(), torch.tensor(0))
        output.loss.backward()
        for update in (clip, muon, adam):
            update.step()
    assert isinstance(output.loss, FakeTensor) and isinstance(model.head.grad, FakeTensor)


# --- Wiring


def test_the_record_model_has_the_published_number_of_parameters_and_depth_is_cheap() -> None:
    model = presets["record"].model
    with torch.device("meta"):
        deep, shallow = SwitchBankGPT(model), SwitchBankGPT(replace(model, layers=16))
    count = sum(part.numel() for part in deep.parameters())
    assert count == 282_395_148
    assert count - sum(part.numel() for part in shallow.parameters()) == pytest.approx(38.9e6, abs=0.05e6)
    assert all(part.dtype == torch.float32 and part.is_meta for part in deep.parameters())


class Trace:
    """What went into and came out of each block's attention and bank, in order."""

    def __init__(self, model: SwitchBankGPT) -> None:
        self.attend: list[tuple[tuple[Any, ...], tuple[Tensor, Tensor]]] = []
        self.bank: list[tuple[tuple[Any, ...], Tensor]] = []
        attend = model.attend

        def traced(*inputs: Any) -> tuple[Tensor, Tensor]:
            self.attend.append((inputs, attend(*inputs)))
            return self.attend[-1][1]

        setattr(model, "attend", traced)  # noqa: B010  (a method cannot be assigned to by name for mypy)
        model.bank.register_forward_hook(lambda module, inputs, output: self.bank.append((inputs, output)))


@pytest.mark.parametrize(
    "options",
    [
        dict(layers=12, skip_attention=(6, 11), value_embeddings=2, tied_layers=1),
        dict(layers=11, skip_attention=(), value_embeddings=0, tied_layers=3),
        dict(layers=4, skip_attention=(0,), value_embeddings=2, tied_layers=2),
        dict(layers=1, skip_attention=(), value_embeddings=1, tied_layers=4),
    ],
    ids=readable,
)
def test_blocks_are_wired_as_designed(config_of: ConfigOf, model_of: ModelOf, options: dict[str, Any]) -> None:
    config = config_of(**EXACT, **options)
    model, tokens = model_of(config), random_tokens(1)
    trace, layers = Trace(model), config.model.layers
    state = late_state(config)._replace(window=torch.tensor(100.0))
    tables = config.model.value_embeddings
    with torch.no_grad():
        hidden, _, _ = model.trunk(tokens, state)
        x0 = x = rms_norm(model.embedding.weight[tokens].double())
        outputs: list[Tensor] = []
        for layer in range(layers):
            skip, keep, restart, *mix = model.scalars[layer].double()
            source = {9: 6, 10: 4, 11: 2}.get(layer)
            expected = keep * (x if source is None else x + skip * outputs[source]) + restart * x0
            inputs, (attended, n) = trace.attend[layer]
            if layer not in config.model.skip_attention:
                qkvo = model.attention[str(layer // config.model.tied_layers)]
                table = layer if layer < tables else layer - (layers - tables) if layer >= layers - tables else None
                value_embedding = None if table is None else model.value_embeddings[table].weight[tokens].double()
                rotary, mask = inputs[1].rotary, inputs[1].mask
                # Long windows on every fourth layer, half of it elsewhere; the second document has 91 tokens.
                assert (mask[0, 0, -1] == 0).sum() == (91 if layer % 4 == 3 else 50)
                attention = self_attention(
                    qkvo, rms_norm(expected), 2, rotary, value_embedding, torch.stack(mix), "reference", mask
                )
                assert attention.abs().max() > 0.1
                expected = expected + attention
            torch.testing.assert_close(attended, expected)
            (_, given, *_), output = trace.bank[layer]
            assert torch.equal(given, n)
            torch.testing.assert_close(n, rms_norm(expected))
            x = expected + output
            outputs.append(x)
        torch.testing.assert_close(hidden, x)


def test_self_attention_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, qkvo, embedding, mix = randn(1, 20, 32), randn(4, 32, 32), randn(1, 20, 32), randn(2)
    position = torch.tensor([*range(8), *range(12)])  # two documents
    document = torch.tensor([0] * 8 + [1] * 12)
    mask = build_mask("reference", document[None], 6)
    result = self_attention(
        qkvo, n, 2, rotary_tables(position[None], 16, torch.float64), embedding, mix, "reference", mask
    )  # fmt: skip

    def turned(x: Tensor, at: int) -> Tensor:
        """A head's vector of 16, normed; channels i and i + 8 turn together, the first four of these pairs at all."""
        x = x / x.square().mean().sqrt()
        pairs = torch.complex(x[:8], x[8:])
        angles = torch.tensor([at * 1024 ** (-i / 3) if i < 4 else 0.0 for i in range(8)], dtype=torch.float64)
        pairs = pairs * torch.exp(-1j * angles)
        return torch.cat([pairs.real, pairs.imag])

    heads = torch.zeros(20, 32, dtype=torch.float64)
    for head in range(2):
        own = slice(16 * head, 16 * head + 16)
        query, key, value = (n[0] @ qkvo[part].T[:, own] for part in range(3))
        value = mix[0] * value + mix[1] * embedding[0, :, own]
        for t in range(20):
            seen = [j for j in range(max(0, t - 5), t + 1) if document[j] == document[t]]
            scores = [0.12 * turned(query[t], int(position[t])) @ turned(key[j], int(position[j])) for j in seen]
            heads[t, own] = torch.softmax(torch.stack(scores), 0) @ value[seen]
    torch.testing.assert_close(result[0], heads @ qkvo[3].T)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(forward_ema=True, top_k=2),
        dict(reverse_ema="off", flags=False),
        dict(reverse_ema="leaky"),
        dict(adapter="lora", score="sigmoid"),
        dict(adapter="none", always_on_expert=True),
        dict(shared=False, top_k=2),
        dict(experts=1),
        dict(experts=1, adapter="lora"),
        dict(layers=12, skip_attention=(3, 11), value_embeddings=2, tied_layers=2),
        dict(balance="bias", z_loss_weight=0.1, ema_stride=1),
        dict(balance_scope="bank", position_bins=16),
    ],
    ids=readable,
)
def test_every_parameter_that_is_used_gets_a_gradient(
    config_of: ConfigOf, model_of: ModelOf, options: dict[str, Any]
) -> None:
    config = config_of(**options)
    model, state = model_of(config), late_state(config)
    tokens = torch.cat([random_tokens(3), random_tokens(3, seed=1, documents_at=(0,))])
    model(tokens, random_tokens(6, seed=2), state, torch.arange(6), SEED).loss.backward()
    layers, count = config.model.layers, config.model.value_embeddings
    for name, part in model.named_parameters():
        assert part.grad is not None and torch.isfinite(part.grad).all(), name
        if name.startswith("bank.adapters"):
            assert (part.grad.flatten(2).abs().amax(-1) > 0).all(), f"{name}: an adapter of a layer and expert has none"
        elif name == "scalars":
            with_attention = [layer for layer in range(layers) if layer not in config.model.skip_attention]
            expected = torch.zeros(layers, 5, dtype=torch.bool)
            expected[:, 1:3] = True
            expected[[layer for layer in (9, 10, 11) if layer < layers], 0] = True
            expected[with_attention, 3] = True
            with_table = [layer for layer in with_attention if layer < count or layer >= layers - count]
            expected[with_table, 4] = True
            assert torch.equal(part.grad != 0, expected)
        elif name == "routers.weight":
            assert (part.grad.abs().amax(-1) > 0).all(), "a router of a layer and expert has none"
            assert (part.grad.abs().amax((0, 1)) > 0).all(), "a router feature has none"
        elif "embedding" in name:
            seen = torch.zeros(part.shape[0], dtype=torch.bool)
            seen[tokens.flatten()] = True
            assert torch.equal(part.grad.abs().amax(-1) > 0, seen), name
        else:
            assert (part.grad.flatten(1).abs().amax(-1) > 0).all(), name


@pytest.mark.parametrize("adapter", ["none", "scale_bias", "lora"])
def test_an_inactive_expert_gets_exactly_zero_gradients(config_of: ConfigOf, model_of: ModelOf, adapter: str) -> None:
    config = config_of(adapter=adapter, top_k=3, z_loss_weight=0.1)
    model, tokens = model_of(config), random_tokens(2)
    state = late_state(config)._replace(active_experts=torch.tensor(2.0))
    output = model(tokens, tokens, state, torch.arange(2), SEED)
    output.loss.backward()
    assert (output.routing.counts[:, :2] == 256).all() and (output.routing.counts[:, 2:] == 0).all()
    assert model.routers is not None
    gradients = gradients_of(model)
    for name in ("bank.w1", "bank.w2"):
        assert (gradients[name][2:] == 0).all() and (gradients[name][:2] != 0).any(), name
    for name in [name for name in gradients if name.startswith(("bank.adapters", "routers"))]:
        assert (gradients[name][:, 2:] == 0).all() and (gradients[name][:, :2] != 0).any(), name


def test_one_expert_is_the_dense_model_without_a_router(config_of: ConfigOf, model_of: ModelOf) -> None:
    config = config_of(experts=1, adapter="none")
    model, tokens = model_of(config), random_tokens(2)
    assert model.routers is None and not any("router" in name for name, _ in model.named_parameters())
    output = model(tokens, tokens, late_state(config), torch.arange(2), SEED)
    assert torch.equal(output.loss, output.cross_entropy)
    trace = Trace(model)
    with torch.no_grad():
        model(tokens, tokens, late_state(config))
        for (_, n, *_), y in trace.bank:
            dense = F.relu(n @ model.bank.w1[0].T).square() @ model.bank.w2[0].T
            torch.testing.assert_close(y, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["grouped", "reference"])
def test_a_bank_of_128_experts_runs_and_uses_them(config_of: ConfigOf, model_of: ModelOf, backend: str) -> None:
    config = config_of(experts=128, top_k=2, bank_backend=backend, forward_ema=True)
    model, tokens = model_of(config), random_tokens(4)
    output = model(tokens, tokens, late_state(config), torch.arange(4), SEED)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert output.routing.counts.sum(1).tolist() == [1024.0] * 3 and (output.routing.counts > 0).sum() > 192


@pytest.mark.parametrize("stride", [1, 2, 3, 28])
def test_the_emas_of_a_group_are_of_its_first_layers_bank_input(
    config_of: ConfigOf, model_of: ModelOf, stride: int
) -> None:
    config = config_of(layers=4, ema_stride=stride, forward_ema=True, reverse_ema="off", flags=False, dtype="float64")
    model, state, tokens = model_of(config), late_state(config), random_tokens(1, documents_at=(0,))
    trace = Trace(model)
    assert model.routers is not None
    with torch.no_grad():
        _, routings, _ = model.trunk(tokens, state)
        for layer in range(4):
            n, source = (trace.bank[i][0][1][0] for i in (layer, layer // stride * stride))
            ema, features = torch.zeros(32, dtype=torch.float64), []
            for t in range(TOKENS):
                ema = config.model.forward_decay * ema + (1 - config.model.forward_decay) * source[t]
                features.append(torch.cat([n[t], ema]))
            expected = torch.stack(features) @ model.routers.weight[layer].double().T + model.routers.bias[layer]
            torch.testing.assert_close(routings[layer].logits[0], expected)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_fast_backends_give_the_loss_and_gradients_of_the_references(
    config_of: ConfigOf, model_of: ModelOf, score: str
) -> None:
    config = config_of(score=score, top_k=2, forward_ema=True)
    results = []
    for options in (dict(attention_backend="sdpa", bank_backend="grouped"), EXACT):
        own = replace(config, model=replace(config.model, **options))
        model, tokens = model_of(own), random_tokens(2)
        output = model(tokens, random_tokens(2, seed=1), late_state(own), torch.arange(2), SEED)
        output.loss.backward()
        results.append((output, gradients_of(model)))
    (fast, fast_gradients), (exact, exact_gradients) = results
    torch.testing.assert_close(fast.loss, exact.loss.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(fast.routing.counts, exact.routing.counts)
    for name, want in exact_gradients.items():
        assert (fast_gradients[name] - want).abs().max() <= 2e-3 * want.abs().max(), name


def test_bfloat16_activations_stay_close_to_float32(config_of: ConfigOf, model_of: ModelOf) -> None:
    losses = []
    for dtype in ("bfloat16", "float32"):
        config = config_of(dtype=dtype, forward_ema=True)
        tokens = random_tokens(4)
        output = model_of(config)(tokens, random_tokens(4, seed=1), late_state(config))
        assert output.loss.dtype == output.token_losses.dtype == torch.float32
        losses.append(float(output.cross_entropy))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


# --- Compilation


@pytest.fixture
def compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Counts the graphs that torch.compile makes, which run as they are: what is built of them is torch's affair."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    return counter


def every_value_changed(state: StepState) -> list[StepState]:
    changes = dict(step=8.0, active_experts=2.0, temperature=0.7, cap=3.0, window=64.0 * 3)
    return [state._replace(**{name: torch.tensor(value)}) for name, value in changes.items()]


@pytest.mark.parametrize(
    "options",
    [
        dict(forward_ema=True),
        dict(top_k=2, adapter="lora", score="sigmoid"),
        dict(experts=1),
        dict(balance="bias", balance_scope="bank", always_on_expert=True),
    ],
    ids=readable,
)
def test_training_compiles_without_a_break_and_a_new_step_compiles_nothing(
    config_of: ConfigOf, model_of: ModelOf, options: dict[str, Any], compiled_graphs: CompileCounterWithBackend
) -> None:
    config = config_of(**options)
    model, eager, state = model_of(config), model_of(config), late_state(config)
    model.compile()
    tokens, targets, slices, seed = random_tokens(2), random_tokens(2, seed=1), torch.arange(2), torch.tensor(1)
    losses, graphs = [], []
    for at in (state, *every_value_changed(state)):
        for either in (model, eager):
            either.zero_grad()
            output = either(tokens, targets, at, slices, seed)
            output.loss.backward()
            losses.append(output.loss.item())
        assert losses[-1] == pytest.approx(losses[-2], rel=1e-5)
        expected = gradients_of(eager)
        for name, gradient in gradients_of(model).items():
            assert (gradient - expected[name]).abs().max() <= 1e-3 * expected[name].abs().max(), name
        graphs.append(compiled_graphs.frame_count)
    others = random_tokens(2, seed=4, documents_at=(0, 1, 2, 64, 65, 120))
    model(others, targets, state, slices + 7, seed + 1).loss.backward()
    assert set(graphs) == {compiled_graphs.frame_count}
    # Each value did reach the model: only a dense model looks at none but the window.
    assert len({round(loss, 6) for loss in losses[::2]}) == (6 if config.model.experts > 1 else 2)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_evaluation_compiles_without_a_break_and_a_new_step_compiles_nothing(
    config_of: ConfigOf, model_of: ModelOf, backend: str, compiled_graphs: CompileCounterWithBackend
) -> None:
    # flex attention has no backward on a CPU, so that only this test runs it within the model.
    config = config_of(attention_backend=backend)
    model, eager, state = model_of(config).eval(), model_of(config).eval(), late_state(config)
    model.compile()
    graphs = []
    with torch.no_grad():
        for at in (state, *every_value_changed(state)):
            tokens, targets = random_tokens(2), random_tokens(2, seed=1)
            output, expected = model(tokens, targets, at), eager(tokens, targets, at)
            torch.testing.assert_close(output.token_losses, expected.token_losses, rtol=1e-4, atol=1e-4)
            graphs.append(compiled_graphs.frame_count)
    assert len(set(graphs)) == 1


def test_more_layers_are_not_more_graphs(
    config_of: ConfigOf, model_of: ModelOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for layers in (14, 18):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        # Value embeddings, U-net skips, a layer without attention: every kind of layer of the record preset.
        config = config_of(layers=layers, value_embeddings=2, skip_attention=(5,), ema_stride=18)
        model, state, tokens = model_of(config), late_state(config), random_tokens(1)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
            model.compile()
        model(tokens, tokens.clone(), state, torch.arange(1), SEED).loss.backward()
        with torch.no_grad():
            for shape in ((2, 128), (1, 256)):  # validation has slices of its own, the last of them shorter
                own = random_tokens(*shape)
                model.eval()(own, own.clone(), state)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]


def test_a_window_given_as_an_int_is_the_window_of_the_state(config_of: ConfigOf, model_of: ModelOf) -> None:
    config = config_of(layers=4)
    model, tokens = model_of(config), random_tokens(1, documents_at=(0,))
    state = late_state(config)._replace(window=torch.tensor(101.0))
    with torch.no_grad():
        of_state = logits_of(model, tokens, state)
        of_int = logits_of(model, tokens, state._replace(window=torch.tensor(64.0)), window=101)
        shorter = logits_of(model, tokens, state, window=64)
    assert torch.equal(of_state, of_int) and not torch.allclose(of_state, shorter, atol=1e-3)
