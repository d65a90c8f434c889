"""The bank's kernel for CPUs: what test_bank.py does not ask of every way to compute it."""

import pytest
import torch
from torch import Tensor

from switch_bank.ops import bank_cpu
from tests.ops.test_bank import Problem

pytestmark = pytest.mark.skipif(not bank_cpu.DTYPES, reason="needs AVX2, Linux and a C++ compiler")


def test_the_number_of_threads_changes_no_bit() -> None:
    """Nor that with 3 threads rows and weights' gradients are two passes, and with 1 and 2 an expert is one core's."""
    problem = Problem(tokens=700, experts=9, top_k=2, width=64, hidden=160, dtype=torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(problem.solve("cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


def test_layers_that_share_the_experts_add_up_their_gradients_once() -> None:
    problem = Problem(tokens=90, dtype=torch.float32)

    def gradients(shared: bool) -> tuple[Tensor, ...]:
        matrices = bank_cpu.arrange(problem.w1, problem.w2, torch.float32)
        x = problem.x
        for _ in range(3):
            own = matrices if shared else bank_cpu.arrange(problem.w1, problem.w2, torch.float32)
            scale, bias = problem.adapter.scale, problem.adapter.bias
            x = x + 0.1 * bank_cpu.expert_ffn(x, own, scale, bias, problem.experts, problem.gates)
        return torch.autograd.grad((x * problem.direction).sum(), [problem.w1, problem.w2, problem.x])

    for together, apart in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(9000, 2, 1), (37, 5, 2), (1, 3, 1), (130, 64, 3)])
def test_a_microbatch_gets_the_gradients_that_it_would_get_alone(
    dtype: torch.dtype, tokens: int, experts: int, top_k: int
) -> None:
    """Two of them through one call, and one by one; what reaches the experts, and rows, gates and adapters."""
    problem = Problem(tokens=2 * tokens, experts=experts, top_k=top_k, width=70, hidden=38, dtype=torch.float32)
    w1, w2 = problem.w1.detach().requires_grad_(), problem.w2.detach().requires_grad_()

    def gradients(at: slice, microbatches: int) -> tuple[Tensor, ...]:
        x, gates = (whole.detach()[at].to(dtype).requires_grad_() for whole in (problem.x, problem.gates))
        adapters = [part.detach().expand(microbatches, -1, -1) for part in problem.adapter[:2]]  # type: ignore[union-attr]
        scale, bias = (part.requires_grad_() for part in adapters)
        w1.grad_dtype = w2.grad_dtype = None
        matrices = bank_cpu.arrange(w1, w2, dtype, microbatches)
        y = bank_cpu.expert_ffn(x, matrices, scale, bias, problem.experts[at], gates)
        return torch.autograd.grad((y * problem.direction[at].to(dtype)).sum(), [w1, w2, scale, bias, x, gates])

    together = gradients(slice(0, 2 * tokens), 2)
    first, second = gradients(slice(0, tokens), 1), gradients(slice(tokens, 2 * tokens), 1)
    assert together[0].dtype == together[1].dtype == torch.float64
    for at, (both, one, two) in enumerate(zip(together, first, second, strict=True)):
        assert torch.equal(both, one + two if at < 2 else torch.cat([one, two])), at
    assert all(part.abs().sum() > 0 for part in together)


def test_a_second_backward_begins_with_zeros() -> None:
    problem = Problem(tokens=90, dtype=torch.float32)
    y = bank_cpu.expert_ffn(
        problem.x, bank_cpu.arrange(problem.w1, problem.w2, torch.float32), None, None, problem.experts, problem.gates
    )
    first, second = (torch.autograd.grad(y.sum(), [problem.w1, problem.w2], retain_graph=True) for _ in range(2))
    assert first[0].abs().sum() > 0 and all(map(torch.equal, first, second))


def test_without_a_gradient_nothing_is_kept_and_the_result_is_the_same() -> None:
    problem = Problem(tokens=90, dtype=torch.float32)
    with torch.no_grad():
        matrices = bank_cpu.arrange(problem.w1, problem.w2, torch.float32)
        y = bank_cpu.expert_ffn(
            problem.x, matrices, problem.adapter.scale, problem.adapter.bias, problem.experts, problem.gates
        )
    assert not y.requires_grad and torch.equal(y, problem.solve("cpu")["y"])


@pytest.mark.parametrize("dtype", bank_cpu.DTYPES)
def test_tensors_that_are_not_computed_get_the_shapes_of_those_that_are(dtype: torch.dtype) -> None:
    problem = Problem(tokens=50, top_k=2, dtype=torch.float32)
    ops = torch.ops.switch_bank
    w1, w2 = problem.w1.detach(), problem.w2.detach()
    x, gates = problem.x.detach().to(dtype), problem.gates.detach()
    scale = torch.ones(2, w1.shape[0], w1.shape[2])
    matrices = bank_cpu.arrange(w1, w2, dtype)
    kept = ops.bank_forward(x, problem.experts, gates, scale, scale, matrices.w1, matrices.w2, 2, True)[1]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.bank_arrange.default, (w1, dtype), test_utils=checks)
    for keep in (True, False):
        inputs = (x, problem.experts, gates, scale, scale, matrices.w1, matrices.w2, 2, keep)
        torch.library.opcheck(ops.bank_forward.default, inputs, test_utils=checks)
    for sums in (torch.float32, torch.float64):
        own = matrices.w1_backward, matrices.w2_backward, kept, 2, w1.new_zeros(w1.shape, dtype=sums)
        inputs = (x, x, problem.experts, gates, scale, scale, *own, w2.new_zeros(w2.shape, dtype=sums))
        torch.library.opcheck(ops.bank_backward.default, inputs, test_utils=checks)


def test_an_expert_that_is_none_is_refused() -> None:
    problem = Problem(dtype=torch.float32)
    problem.experts[3] = 5
    with pytest.raises(RuntimeError, match="expert 5 of 5"):
        problem.solve("cpu")
