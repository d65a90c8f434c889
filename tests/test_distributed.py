"""Processes: the first one's word holds for all, and different weights are noticed."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from switch_bank import distributed
from switch_bank.config import Config, parse
from switch_bank.distributed import World, flat_gradients, from_first, same_weights, summed, text_from_first
from switch_bank.model.gpt import SwitchBankGPT
from switch_bank.optim import turbo_muon
from switch_bank.optim.groups import in_backward_order
from switch_bank.schedules import step_state
from tests.runs import ROOT, tiny

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


# --- A step's gradients: sums that begin during the backward


def noting(events: list[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose calls are noted as `name`."""

    def noted(*arguments: Any, **options: Any) -> Any:
        events.append(name)
        return function(*arguments, **options)

    return noted


def losses_of(model: SwitchBankGPT, config: Config, rank: int) -> list[torch.Tensor]:
    """Two losses of a process, each on a slice of its own."""
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(config.model.vocab_size, (2, 1, 128), generator=generator)
    return [model(some, some, step_state(1000, config, "cpu")).loss for some in tokens]


def random_model(config: Config) -> SwitchBankGPT:
    torch.manual_seed(0)
    model = SwitchBankGPT(config.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


def a_step_of_two_backwards(world: World, config: Config) -> dict[str, Any]:
    plain, alone = random_model(config), []
    for loss in losses_of(plain, config, world.rank):
        plain.zero_grad()
        loss.backward()
        alone.append(torch.cat([p.grad.double().flatten() for p in in_backward_order(plain)]))  # type: ignore[union-attr]
    expected = summed(alone[0] + alone[1]).float()

    events: list[str] = []
    dist.all_reduce = noting(events, "begin", dist.all_reduce)
    results: dict[str, Any] = {}
    for bucket in (1, 5000, 10**9):  # numbers
        model = random_model(config)
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: events.append(name))
        distributed.BUCKET = bucket
        gradients = distributed.Gradients(in_backward_order(model), backwards=2)
        for _ in range(2):  # the second step finds the first one's numbers there
            events.clear()
            gradients.zero_()
            for loss in losses_of(model, config, world.rank):
                gradients.backward(loss)
                events.append("end")
            gradients.wait()
        equal = torch.equal(gradients.flat, expected) and bool(expected.any())
        results[f"{bucket}"] = {"equal": equal, "events": events.copy(), "buckets": len(gradients.buckets)}
    return results


def test_sums_over_processes_begin_during_the_last_backward_and_are_exact(
    config_of: Callable[..., Config], on_processes: Callable[..., list[Any]]
) -> None:
    config = config_of()
    results = on_processes(2, a_step_of_two_backwards, config)
    parameters = [name for name, _ in SwitchBankGPT(config.model).named_parameters()]
    for result in results:
        for bucket, found in result.items():
            assert found["equal"], f"rank {results.index(result)}, buckets of {bucket}"
            events = found["events"]
            first, last = events[: events.index("end")], events[events.index("end") + 1 : -1]
            assert events[-1] == "end" and "begin" not in first and sorted(first) == sorted(parameters)
            assert last.count("begin") == found["buckets"]
    # A parameter a bucket: the sum of each begins as soon as its gradient is there, in one order on all processes.
    events = results[0]["1"]["events"]
    last = events[events.index("end") + 1 : -1]
    assert last[1::2] == ["begin"] * len(parameters) and last[0] == "head" and last[-2] == "embedding.weight"
    assert 3 < results[0]["5000"]["buckets"] < len(parameters) and results[0][f"{10**9}"]["buckets"] == 1
    assert results[0] == results[1]


def steps_with_gaps(world: World) -> list[list[float]]:
    distributed.BUCKET = 1
    results = []
    for in_order in (True, False):
        first, unused, of_second, last = parameters = [nn.Parameter(torch.ones(2)) for _ in range(4)]
        gradients = distributed.Gradients(reversed(parameters) if in_order else parameters, backwards=1)
        for step in (1, 2):
            gradients.zero_()
            loss = step * first.sum() + (of_second.sum() if world.rank == 1 else 0) + 10 * step * last.sum()
            gradients.backward(loss)
            gradients.wait()
        results.append([float(parameter.grad.mean()) for parameter in parameters])  # type: ignore[union-attr]
    return results


def test_a_parameter_without_gradient_on_all_or_some_processes_holds_nothing_up(
    on_processes: Callable[..., list[Any]],
) -> None:
    """Nor does it matter if gradients come in another order than was said."""
    assert on_processes(2, steps_with_gaps) == [[[4.0, 0.0, 1.0, 40.0]] * 2] * 2


def gradients_of_many(world: World) -> torch.Tensor:
    """The sum of the same 16 random rows, a backward each, the processes taking turns; many orders of magnitude."""
    rows = torch.randn(16, 10_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 16)[:, None]
    parameter = nn.Parameter(torch.zeros(10_000))
    own = rows[world.rank :: world.size]
    gradients = distributed.Gradients([parameter], backwards=len(own))
    for row in own:
        gradients.backward((parameter * row).sum())
    gradients.wait()
    return gradients.flat


@pytest.mark.parametrize("backwards", [1, 2, 3])
def test_the_gradients_are_the_sum_of_those_of_the_backwards(world: World, backwards: int) -> None:
    parameter = nn.Parameter(torch.ones(5))
    gradients = distributed.Gradients([parameter], backwards)
    for step in (1, 2):
        gradients.zero_()
        for _ in range(backwards):
            gradients.backward(step * parameter.sum())
        gradients.wait()
        assert parameter.grad is not None and parameter.grad.tolist() == [step * backwards] * 5


def test_a_sum_has_the_same_bits_on_any_number_of_processes(world: World, on_processes: Callable[..., Any]) -> None:
    one = gradients_of_many(world)
    for processes in (2, 4, 8):
        assert all(torch.equal(sums, one) for sums in on_processes(processes, gradients_of_many))


def three_steps_of_the_trainer(world: World, arguments: list[str]) -> list[str]:
    """What begins and ends in a run, in order."""
    sys.path.insert(0, str(ROOT))
    import train_switch_bank as trainer

    events: list[str] = []

    class Noting(trainer.SwitchBankGPT):  # type: ignore[name-defined]
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.embedding.weight.register_post_accumulate_grad_hook(lambda _: events.append("backward ends"))

    trainer.SwitchBankGPT = Noting
    distributed.BUCKET = 1
    all_reduce = dist.all_reduce
    begin_sum = noting(events, "sum begins", all_reduce)
    dist.all_reduce = lambda *args, **options: (begin_sum if "async_op" in options else all_reduce)(*args, **options)
    dist.all_gather = noting(events, "gather begins", dist.all_gather)
    torch.optim.AdamW.step = noting(events, "AdamW", torch.optim.AdamW.step)  # type: ignore[method-assign]
    turbo_muon.wait_for = noting(events, "gather ends", turbo_muon.wait_for)
    trainer.main(parse(arguments, "nano"), world)
    return events


def test_the_trainer_computes_while_its_processes_exchange_gradients_and_updates(
    shards: Path, tmp_path: Path, on_processes: Callable[..., list[Any]]
) -> None:
    arguments = [*tiny(shards), "--run.steps", "3", "--data.val-tokens", "512", "--run.out", str(tmp_path / "run")]
    for events in on_processes(2, three_steps_of_the_trainer, arguments):
        end = len(events) - 1 - events[::-1].index("AdamW")
        begin = end - 1 - events[:end][::-1].index("AdamW")
        step = [event for event in events[begin + 1 :] if event != "gather ends"]
        shapes = step.count("gather begins")
        assert events[-shapes:] == ["gather ends"] * shapes and shapes == 3
        # Four slices of eight, one at a time; of the last one's gradients all but the embedding's are on their way.
        buckets = step.count("sum begins")
        before, last = buckets - 1, step.index("sum begins")
        assert step[:last] == ["backward ends"] * 3 and buckets > 10
        of_muon = ["gather begins"] * shapes
        assert step[last:] == ["sum begins"] * before + ["backward ends", "sum begins", *of_muon, "AdamW"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_flat_gradients_lie_where_the_parameters_do() -> None:
    assert flat_gradients(nn.Linear(2, 2).cuda().parameters()).is_cuda
