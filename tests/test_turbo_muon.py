"""TurboMuon: Muon's step for stacked matrices, idle experts left alone, the same weights on any number of processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from switch_bank.distributed import World
from switch_bank.ops.orthogonalize import Variant, orthogonalize
from switch_bank.optim.turbo_muon import TurboMuon

# Experts, attention, a matrix alone and a tall one: batches of 8, 5 and 1 matrices, so not all divide by two.
SHAPES = ((3, 48, 32), (4, 32, 32), (32, 48), (32, 32), (4, 32, 48), (20, 8))


def parameters(shapes: tuple[tuple[int, ...], ...] = SHAPES, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def give_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * 10.0**-step


def gradient(param: torch.nn.Parameter) -> Tensor:
    assert param.grad is not None
    return param.grad


def take_steps(optimizer: TurboMuon, params: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


@pytest.mark.parametrize("nesterov", [True, False])
def test_plain_is_torch_muon_bit_for_bit_on_two_dimensional_parameters(nesterov: bool) -> None:
    shapes = ((64, 64), (96, 48), (48, 96), (33, 7), (1, 5))
    ours, theirs = parameters(shapes), parameters(shapes)
    optimizer = TurboMuon(ours, lr=0.02, momentum=0.85, nesterov=nesterov, variant="plain")
    reference = torch.optim.Muon(
        theirs, lr=0.02, momentum=0.85, nesterov=nesterov, weight_decay=0, adjust_lr_fn="original"
    )
    for step in range(5):
        for params, stepper in ((ours, optimizer), (theirs, reference)):
            give_gradients(params, step)
            stepper.step()
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["turbo", "plain"])
def test_a_stacked_parameter_moves_as_its_matrices_would_alone(variant: Variant) -> None:
    stacked = parameters(((3, 48, 32), (4, 32, 32)))
    alone = [torch.nn.Parameter(matrix.detach().clone()) for param in stacked for matrix in param]
    together = TurboMuon(stacked, lr=0.02, variant=variant)
    apart = TurboMuon(alone, lr=0.02, variant=variant)
    for step in range(3):
        give_gradients(stacked, step)
        for matrix, grad in zip(alone, [grad for param in stacked for grad in gradient(param)], strict=True):
            matrix.grad = grad.clone()
        together.step()
        apart.step()
    for matrix, other in zip(alone, [matrix for param in stacked for matrix in param], strict=True):
        torch.testing.assert_close(matrix, other, rtol=0, atol=0)


def test_all_matrices_of_one_shape_go_through_one_call() -> None:
    calls: list[tuple[int, ...]] = []

    def recording(matrices: Tensor, variant: Variant) -> Tensor:
        calls.append(tuple(matrices.shape))
        assert matrices.dtype == torch.bfloat16
        return orthogonalize(matrices, variant)

    params = parameters()
    take_steps(TurboMuon(params, lr=0.02, orthogonalize=recording), params, range(1))
    assert sorted(calls) == [(1, 20, 8), (3, 48, 32), (5, 32, 32), (5, 32, 48)]


def test_a_tall_matrix_moves_further_by_the_root_of_its_aspect() -> None:
    tall, wide = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((64, 16), (16, 64)))
    tall.grad = torch.randn(64, 16)
    wide.grad = tall.grad.T.clone()
    TurboMuon([tall, wide], lr=0.1).step()
    torch.testing.assert_close(tall, 2 * wide.T)


def test_the_groups_own_lr_and_momentum_are_read_every_step() -> None:
    params = parameters(((8, 8), (8, 8)))
    before = [param.detach().clone() for param in params]
    optimizer = TurboMuon([{"params": params[:1], "lr": 0.0}, {"params": params[1:]}], lr=0.1, dtype=torch.float32)
    take_steps(optimizer, params, range(1))
    assert torch.equal(params[0], before[0]) and not torch.equal(params[1], before[1])
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.param_groups[0]["momentum"] = 0.0
    give_gradients(params, 1)
    optimizer.step()
    expected = before[0] - 0.1 * orthogonalize(gradient(params[0]))
    torch.testing.assert_close(params[0].detach(), expected)


def test_an_expert_without_gradient_stays_keeps_its_momentum_and_resumes() -> None:
    bank, alone = parameters(((4, 16, 12),)), parameters(((4, 16, 12),))
    optimizer, uninterrupted = TurboMuon(bank, lr=0.02), TurboMuon(alone, lr=0.02)
    take_steps(optimizer, bank, range(2))
    take_steps(uninterrupted, alone, range(2))
    weights, momentum = bank[0].detach().clone(), optimizer.state[bank[0]]["momentum_buffer"].clone()
    for step in range(10, 13):
        give_gradients(bank, step)
        gradient(bank[0])[2] = 0
        optimizer.step()
    assert torch.equal(bank[0][2], weights[2])
    assert torch.equal(optimizer.state[bank[0]]["momentum_buffer"][2], momentum[2])
    assert not (bank[0][[0, 1, 3]] == weights[[0, 1, 3]]).all(dim=(1, 2)).any()
    take_steps(optimizer, bank, range(2, 3))
    take_steps(uninterrupted, alone, range(2, 3))
    assert torch.equal(bank[0][2], alone[0][2])


def test_a_parameter_without_gradient_is_left_alone() -> None:
    params = parameters(((8, 8), (8, 8)))
    optimizer = TurboMuon(params, lr=0.02)
    take_steps(optimizer, params, range(1))
    weights, momentum = params[0].detach().clone(), optimizer.state[params[0]]["momentum_buffer"].clone()
    give_gradients(params, 1)
    params[0].grad = None
    optimizer.step()
    assert torch.equal(params[0], weights) and torch.equal(optimizer.state[params[0]]["momentum_buffer"], momentum)


def test_a_saved_state_takes_the_same_next_step(tmp_path: Path) -> None:
    params = parameters()
    optimizer = TurboMuon(params, lr=0.02)
    take_steps(optimizer, params, range(3))
    optimizer.param_groups[0]["lr"] = 0.01
    torch.save({"weights": params, "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    take_steps(optimizer, params, range(3, 5))

    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed = TurboMuon(saved["weights"], lr=0.02)
    resumed.load_state_dict(saved["optimizer"])
    take_steps(resumed, saved["weights"], range(3, 5))
    for param, other in zip(params, saved["weights"], strict=True):
        assert torch.equal(param, other)
        assert torch.equal(optimizer.state[param]["momentum_buffer"], resumed.state[other]["momentum_buffer"])


def test_a_step_in_two_parts_moves_parameters_in_the_second_only() -> None:
    params, whole = parameters(), parameters()
    optimizer, reference = TurboMuon(params, lr=0.02), TurboMuon(whole, lr=0.02)
    for step in range(3):
        before = [param.detach().clone() for param in params]
        give_gradients(params, step)
        give_gradients(whole, step)
        optimizer.start_step()
        assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
        optimizer.finish_step()
        reference.step()
        assert all(torch.equal(param, other) for param, other in zip(params, whole, strict=True))


def take_three_steps(world: World) -> dict[str, object]:
    counts: list[int] = []

    def counting(matrices: Tensor, variant: Variant) -> Tensor:
        counts.append(matrices.size(0))
        return orthogonalize(matrices, variant)

    result: dict[str, object] = {}
    for dtype in (torch.bfloat16, torch.float32):
        params = parameters()
        optimizer = TurboMuon(params, lr=0.02, dtype=dtype, orthogonalize=counting)
        take_steps(optimizer, params, range(3))
        result[str(dtype)] = [param.detach() for param in params]
        result[f"{dtype} momentum"] = [optimizer.state[param]["momentum_buffer"] for param in params]
    return result | {"counts": counts[:4]}


def test_two_processes_share_the_work_and_end_with_the_weights_of_one(on_processes: Callable[..., list[Any]]) -> None:
    results = on_processes(2, take_three_steps)
    for dtype in (torch.bfloat16, torch.float32):
        params = parameters()
        optimizer = TurboMuon(params, lr=0.02, dtype=dtype)
        take_steps(optimizer, params, range(3))
        for index, param in enumerate(params):
            for result in results:
                assert torch.equal(result[str(dtype)][index], param), f"{dtype}, parameter {index}"
                assert torch.equal(result[f"{dtype} momentum"][index], optimizer.state[param]["momentum_buffer"])
    for result in results:
        assert sorted(result["counts"]) == [1, 2, 3, 3], "half of 1, 3, 5 and 5 matrices, rounded up"


@settings(deadline=None, max_examples=30)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(
            lambda matrix: st.lists(st.integers(1, 3), max_size=2).map(lambda lead: (*lead, *matrix))
        ),
        min_size=1,
        max_size=4,
    ),
    variant=st.sampled_from(["turbo", "plain"]),
)
def test_any_shapes_take_a_finite_step(shapes: list[tuple[int, ...]], variant: Variant) -> None:
    params = parameters(tuple(shapes))
    before = [param.detach().clone() for param in params]
    take_steps(TurboMuon(params, lr=0.5, variant=variant), params, range(1))
    for param, old in zip(params, before, strict=True):
        rows, cols = param.shape[-2:]
        length = torch.linalg.matrix_norm(param.detach() - old, ord=2) / (0.5 * max(1, rows / cols) ** 0.5)
        assert ((length > 0.6) & (length < 1.3)).all()


def test_parameters_that_are_no_float32_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got torch.float32 of shape \(3,\); give this one to AdamW"):
        TurboMuon([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    with pytest.raises(ValueError, match="got torch.bfloat16"):
        TurboMuon([torch.nn.Parameter(torch.ones(3, 3, dtype=torch.bfloat16))], lr=0.1)
