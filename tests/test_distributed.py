"""Processes: the first one's word holds for all, and different weights are noticed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from switch_bank.config import Config
from switch_bank.distributed import World, flat_gradients, from_first, same_weights, summed, text_from_first
from switch_bank.model.gpt import SwitchBankGPT

TEXTS = ["runs/nano-20250101-120000 äöü", "a text that is longer than that of the first process, by far"]


def on_one_of_two(world: World, config: Config) -> dict[str, Any]:
    torch.manual_seed(0)
    model = SwitchBankGPT(config.model)
    result: dict[str, Any] = {"from_first": from_first(1e9 / 3 + world.rank, world)}
    result["text"] = text_from_first(TEXTS[world.rank])
    result["sum"] = summed(torch.tensor([1.0, 10.0]) * (world.rank + 1)).tolist()
    gradients = flat_gradients(model.parameters())
    gradients += world.rank + 1
    summed(gradients)
    result["gradient"] = float(model.head.grad.min())  # type: ignore[union-attr]
    result["same"] = same_weights(model)
    # One bit of one value, on one process, in each kind of tensor.
    for name, value in model.state_dict().items():
        with torch.no_grad():
            own = value.clone()
            if world.rank == 1:
                number = value.view(-1)[-1:]
                number.copy_(~number if value.dtype == torch.bool else torch.nextafter(number, number + 1))
            result[f"changed {name}"] = same_weights(model)
            value.copy_(own)
    result["same again"] = same_weights(model)
    with torch.no_grad():
        model.head[0, 0] = float("nan")
    result["same with a NaN"] = same_weights(model)
    return result


def test_two_processes_agree(config_of: Callable[..., Config], on_processes: Callable[..., list[Any]]) -> None:
    results = on_processes(2, on_one_of_two, config_of())
    assert results[0] == results[1]
    result = results[0]
    assert result["from_first"] == 1e9 / 3 and result["text"] == TEXTS[0]
    assert result["sum"] == [3.0, 30.0] and result["gradient"] == 3.0
    assert result["same"] and result["same again"] and result["same with a NaN"]
    changed = [name for name in result if name.startswith("changed ")]
    assert len(changed) > 10 and any("pruned" in name for name in changed)
    assert not any(result[name] for name in changed)


def test_a_process_alone_needs_no_launcher(world: World) -> None:
    assert (world.rank, world.size) == (0, 1) == (dist.get_rank(), dist.get_world_size())
    assert from_first(0.1, world) == 0.1 and text_from_first(TEXTS[0]) == TEXTS[0]
    assert torch.equal(summed(torch.arange(3.0)), torch.arange(3.0))
    assert same_weights(nn.Linear(2, 2))


def test_gradients_are_views_of_one_tensor(config_of: Callable[..., Config], model_of: Callable) -> None:
    config = config_of(layers=1)
    model = model_of(config)
    parameters = list(model.parameters())
    flat = flat_gradients(parameters)
    assert flat.dtype == torch.float32 and flat.shape == (sum(p.numel() for p in parameters),) and not flat.any()
    for factor in (1.0, 2.0, 3.0):
        sum((factor * p.square()).sum() for p in parameters).backward()  # type: ignore[union-attr]
    # Three backwards add up, in place: 2·(1 + 2 + 3) times the parameter.
    expected = torch.cat([12 * p.detach().flatten() for p in parameters])
    torch.testing.assert_close(flat, expected)
    at = 0
    for parameter in parameters:
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape
        assert parameter.grad.data_ptr() == flat[at:].data_ptr()
        at += parameter.numel()
    flat.zero_()
    assert all(not p.grad.any() for p in parameters if p.grad is not None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_flat_gradients_lie_where_the_parameters_do() -> None:
    assert flat_gradients(nn.Linear(2, 2).cuda().parameters()).is_cuda
