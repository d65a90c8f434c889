"""The kernels of attention for CPUs, beside the operations that they stand for."""

from functools import partial

import pytest
import torch
from torch import Tensor

from switch_bank.model.attention import Ring, attention_matrices, rotary_tables, self_attention
from switch_bank.ops import attention_cpu, cpu_kernels
from switch_bank.ops.attention import ring_mask
from tests.ops import attention_problem
from tests.ops.attention_problem import OwnKernels, assert_equal
from tests.ops.test_attention import SCALE

pytestmark = pytest.mark.skipif(not cpu_kernels.RUN, reason="needs AVX2, Linux and a C++ compiler")
WINDOW, TOKENS, EOD_AT = 12, 40, 20
Problem = partial(attention_problem.Problem, "cpu", "cpu")


class TestSlices(OwnKernels):
    problem = staticmethod(Problem)

    @pytest.mark.parametrize("width", [1, 8, 20, 64, 130])
    def test_heads_may_have_any_width(self, width: int) -> None:
        problem = Problem(tokens=70, window=40, heads=3, width=width)
        assert_equal(problem.with_gradients(problem.attend()), problem.expected())

    def test_of_longer_slices_too_it_gives_the_values_and_gradients_of_the_reference(self) -> None:
        problem = Problem(tokens=300, window=128, mean_length=200.0, batch=2, width=64)
        assert_equal(problem.with_gradients(problem.attend()), problem.expected())

    @pytest.mark.parametrize("before", [1, 7, 33])
    def test_a_document_has_the_same_bits_wherever_it_is_packed(self, before: int) -> None:
        packed = Problem(tokens=before + 61, window=30, document=(torch.arange(before + 61) >= before).long()[None])
        alone = Problem(tokens=61, window=30, document=torch.zeros(1, 61, dtype=torch.long))
        inputs = [part[:, before:] for part in packed.inputs()]
        assert torch.equal(packed.attend()[:, before:], alone.attend(inputs))

    def test_what_an_earlier_call_left_in_memory_reaches_no_result(self) -> None:
        before = Problem(tokens=96, window=96, width=32)
        with torch.no_grad():
            for x in (before.query_and_key, before.value, before.direction):
                x.fill_(torch.nan)
        before.with_gradients(before.attend())
        problem = Problem(tokens=45, window=30, width=20)
        assert_equal(problem.with_gradients(problem.attend()), problem.expected())

    def test_the_number_of_threads_changes_no_bit(self) -> None:
        problem = Problem(tokens=90, window=40, batch=3)
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(problem.with_gradients(problem.attend()))
        finally:
            torch.set_num_threads(before)
        for name, value in results[0].items():
            assert torch.equal(value, results[1][name]) and torch.equal(value, results[2][name])

    def test_torch_is_told_the_truth_about_the_operators(self) -> None:
        problem = Problem(tokens=20, window=12, batch=2)
        inputs, mask, y = problem.inputs(), problem.mask(), problem.attend()  # which registers them
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        forward, backward = torch.ops.switch_bank.attend_slices, torch.ops.switch_bank.attend_slices_backward
        torch.library.opcheck(forward.default, (*inputs, *mask, SCALE), test_utils=tests)
        inputs = [x.detach() for x in inputs]
        logsumexp = forward(*inputs, *mask, SCALE)[1]
        arguments = (problem.direction, *inputs, *mask, y.detach(), logsumexp, SCALE)
        torch.library.opcheck(backward.default, arguments, test_utils=tests)

    def test_what_is_no_float32_is_refused(self) -> None:
        with pytest.raises(RuntimeError, match="takes float32, not Double"):
            Problem(tokens=20, window=12, dtype=torch.float64).attend()


# ---- one token of each stream --------------------------------------------------------------------------------------


def attended(backend: str, streams: int, heads: int, head_dim: int, embeds: bool = True) -> tuple[Tensor, Ring]:
    """What a layer makes of tokens that come one by one, [streams, TOKENS, D]: across the end of its ring, and where a
    document starts, in each stream somewhere else. And the ring after them."""
    width, generator = heads * head_dim, torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    qkvo = 2 * attention_matrices(width).detach()
    qkvo[3] = qkvo[0].flip(0)
    if head_dim > 512:  # a query like its key: a score whose exponential is no float32
        qkvo[1] = qkvo[0]
    n = torch.randn(streams, TOKENS, width, generator=generator)
    embedding = torch.randn(streams, TOKENS, width, generator=generator)
    start = EOD_AT + torch.arange(streams)[:, None]
    index = torch.arange(TOKENS)
    position = torch.where(index < start, index, index - start)
    mix = torch.tensor([0.7, -0.4])
    ring = Ring(torch.zeros(streams, WINDOW, heads, head_dim), torch.zeros(streams, WINDOW, heads, head_dim))
    results = []
    for t in range(TOKENS):
        now = slice(t, t + 1)
        rotary = rotary_tables(position[:, now], head_dim, torch.float32)
        mask = ring_mask(position[:, now], t, WINDOW)
        value_embedding = embedding[:, now] if embeds else None
        results.append(self_attention(qkvo, n[:, now], heads, rotary, value_embedding, mix, backend, mask, ring))
    return torch.cat(results, dim=1), ring


@pytest.mark.parametrize("streams, heads, head_dim", [(1, 1, 4), (1, 2, 128), (3, 3, 20), (2, 5, 64), (1, 1, 1024)])
@pytest.mark.parametrize("embeds", [True, False])
def test_a_token_attends_as_it_does_in_plain_operations(streams: int, heads: int, head_dim: int, embeds: bool) -> None:
    y, ring = attended("sdpa", streams, heads, head_dim, embeds)
    plain, plain_ring = attended("reference", streams, heads, head_dim, embeds)
    assert plain.std() > 0.1 and ring.tokens_read == TOKENS
    torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ring.keys, plain_ring.keys, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ring.values, plain_ring.values, rtol=1e-5, atol=1e-5)


def test_the_number_of_threads_changes_no_bit() -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(attended("sdpa", streams=2, heads=3, head_dim=64)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_what_is_no_float32_goes_through_plain_operations() -> None:
    n = torch.randn(2, 1, 8)
    assert attention_cpu.takes_token(n)
    assert not attention_cpu.takes_token(n.bfloat16()) and not attention_cpu.takes_token(n.double())
    assert not attention_cpu.takes_token(torch.randn(2, 3, 8))
