"""The kernel for single tokens, beside the operations that it stands for."""

import pytest
import torch
from torch import Tensor

from switch_bank.model.attention import Ring, attention_matrices, rotary_tables, self_attention
from switch_bank.ops import attention_cpu, cpu_kernels
from switch_bank.ops.attention import ring_mask

pytestmark = pytest.mark.skipif(not cpu_kernels.RUN, reason="needs AVX2, Linux and a C++ compiler")
WINDOW, TOKENS, EOD_AT = 12, 40, 20


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
    assert attention_cpu.takes(n)
    assert not attention_cpu.takes(n.bfloat16()) and not attention_cpu.takes(n.double())
    assert not attention_cpu.takes(torch.randn(2, 3, 8))
