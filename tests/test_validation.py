"""Validation: the mean loss over exactly the first N tokens, the same on any number of processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from switch_bank.config import Config
from switch_bank.data import Shards, validation_batches, write_shard
from switch_bank.distributed import World
from switch_bank.model.gpt import SwitchBankGPT
from switch_bank.schedules import step_state
from switch_bank.validation import Validation, least_share, validate

SLICE = 128
ConfigOf, ModelOf = Callable[..., Config], Callable[[Config], SwitchBankGPT]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """One file of 2000 tokens in documents of some 50."""
    tokens = np.random.default_rng(0).integers(1, 97, 2000)
    tokens[np.random.default_rng(1).random(2000) < 0.02] = 0
    write_shard(tmp_path / "val.bin", tokens)
    return tmp_path / "val.bin"


def validated(
    world: World, shard: Path, model: SwitchBankGPT, config: Config, tokens: int, together: int
) -> Validation:
    shards = Shards.open(str(shard), config.model.vocab_size)
    batches = validation_batches(shards, tokens, SLICE, together, world.rank, world.size, 0, world.device)
    return validate(model.eval(), batches, step_state(config.schedule.steps, config, "cpu"), None)


def computed_plainly(shard: Path, model: SwitchBankGPT, config: Config, tokens: int) -> tuple[float, Tensor]:
    """The mean loss and each layer's and expert's picks: one slice after another, the last as short as it is."""
    text = torch.from_numpy(np.fromfile(shard, dtype="<u2", offset=1024).astype(np.int64))
    state, total = step_state(config.schedule.steps, config, "cpu"), 0.0
    picks = torch.zeros(config.model.layers, config.model.experts)
    with torch.no_grad():
        for start in range(0, tokens, SLICE):
            end = min(start + SLICE, tokens)
            hidden, routings, _ = model.trunk(text[None, start:end], state)
            losses = F.cross_entropy(model.logits(hidden)[0], text[start + 1 : end + 1], reduction="none")
            total += float(losses.double().sum())
            for layer, routing in enumerate(routings):
                picks[layer] += torch.bincount(routing.experts.flatten(), minlength=config.model.experts)
    return total / tokens, picks


# A multiple of the slice and of the batch, of neither, less than a slice, and all but the last token of the file.
@pytest.mark.parametrize("tokens", [1, 100, SLICE, 3 * SLICE, 3 * SLICE + 1, 1000, 1999])
@pytest.mark.parametrize("together", [1, 4])
def test_the_loss_is_the_mean_over_the_first_tokens_exactly(
    world: World, config_of: ConfigOf, model_of: ModelOf, shard: Path, tokens: int, together: int
) -> None:
    config = config_of(top_k=2)
    model = model_of(config).eval()
    validation = validated(world, shard, model, config, tokens, together)
    loss, picks = computed_plainly(shard, model, config, tokens)
    assert validation.tokens == tokens
    assert validation.loss == pytest.approx(loss, abs=1e-5)
    assert validation.routing.counts.sum(1).tolist() == [2.0 * tokens] * 3
    # A route that ties within rounding may differ.
    assert (validation.routing.counts - picks).abs().sum() <= 2 and validation.routing.counts.dtype == torch.float64


def test_the_last_target_counts_and_the_token_after_it_does_not(
    world: World, config_of: ConfigOf, model_of: ModelOf, shard: Path
) -> None:
    config, tokens = config_of(), 300
    model = model_of(config)
    text = np.fromfile(shard, dtype="<u2", offset=1024)
    losses = []
    for changed in (None, tokens + 1, tokens):
        other = text.copy()
        if changed is not None:
            other[changed] = other[changed] % 96 + 1
        write_shard(shard, other)
        losses.append(validated(world, shard, model, config, tokens, 2).loss)
    assert losses[0] == losses[1] != losses[2]


def test_how_many_slices_go_through_together_changes_nothing(
    world: World, config_of: ConfigOf, model_of: ModelOf, shard: Path
) -> None:
    config = config_of(dtype="float64", bank_backend="reference", attention_backend="reference")
    model = model_of(config)
    one, *others = (validated(world, shard, model, config, 1900, together) for together in (1, 3, 15, 40))
    for other in others:
        assert other.loss == pytest.approx(one.loss, abs=1e-7) and other.tokens == one.tokens
        assert torch.equal(other.routing.counts, one.routing.counts)


def share_of_process(world: World, *arguments: Any) -> dict[str, Any]:
    validation = validated(world, *arguments)
    return {"loss": validation.loss, "tokens": validation.tokens, "counts": validation.routing.counts}


def test_two_processes_report_the_loss_of_one(
    world: World, config_of: ConfigOf, model_of: ModelOf, shard: Path, on_processes: Callable[..., list[Any]]
) -> None:
    config, tokens = config_of(), 1900  # 15 slices, of which the second process gets 7 and filling
    model = model_of(config)
    alone = validated(world, shard, model, config, tokens, 4)
    for result in on_processes(2, share_of_process, shard, model, config, tokens, 4):
        assert result["loss"] == pytest.approx(alone.loss, abs=1e-6) and result["tokens"] == tokens
        assert (result["counts"] - alone.routing.counts).abs().sum() <= 2


def test_validation_leaves_no_trace_in_the_model(
    world: World, config_of: ConfigOf, model_of: ModelOf, shard: Path
) -> None:
    config = config_of(balance="bias")
    model = model_of(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    validated(world, shard, model, config, 500, 4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_least_share_is_that_of_the_least_used_active_expert_over_the_whole_bank() -> None:
    assert least_share(torch.tensor([[10.0, 10.0], [5.0, 5.0]]), torch.ones(2, dtype=torch.bool)) == 1.0
    # Of 80 picks on four experts 20 each are even; the third has 5.
    counts = torch.tensor([[40.0, 0, 5, 10, 0], [0.0, 10, 0, 15, 0]])
    assert least_share(counts, torch.arange(5) < 4) == 0.25
    assert least_share(counts, torch.arange(5) < 5) == 0.0
    assert least_share(torch.zeros(2, 4), torch.arange(4) < 4) == 1.0  # the dense model picks nothing
