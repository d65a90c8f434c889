"""Attention: every backend computes the same thing, and a query sees exactly what document and window allow."""

import importlib.util
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from switch_bank.ops import attention as ops
from switch_bank.ops import cpu_kernels
from switch_bank.ops.attention import BLOCK, _flash_mask, attention, build_mask, choose_backend

SCALE = 0.12
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
needs_flash = pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
# flex_attention without torch.compile warns that it is slow; here it is only asked for its values.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def random_documents(batch: int, tokens: int, mean_length: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(batch, tokens, generator=generator) < 1 / mean_length
    return starts.long().cumsum(1)


def random_inputs(batch: int, tokens: int, heads: int = 2, width: int = 16, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, tokens, heads, width, generator=generator) for _ in range(4)]


def visible(document: Tensor, window: int) -> Tensor:
    """[B, T, T]: what the definition lets query t (rows) see, pair by pair."""
    batch, tokens = document.shape
    seen = torch.zeros(batch, tokens, tokens, dtype=torch.bool)
    for row, line in enumerate(document.tolist()):
        for t in range(tokens):
            for j in range(max(0, t - window + 1), t + 1):
                seen[row, t, j] = line[t] == line[j]
    return seen


def by_definition(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """Softmax attention in float64 over the pairs of `seen` [B, T, T]."""
    scores = torch.einsum("bthd,bjhd->bhtj", query.double(), key.double()) * SCALE
    weights = torch.softmax(scores.masked_fill(~seen[:, None], -torch.inf), dim=-1)
    return torch.einsum("bhtj,bjhd->bthd", weights, value.double())


def run_with_gradients(backend: str, document: Tensor, window: int | Tensor) -> list[Tensor]:
    query, key, value, direction = random_inputs(*document.shape)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    result = attention(backend, query, key, value, build_mask(backend, document, window), SCALE)
    return [result, *torch.autograd.grad((result * direction).sum(), leaves)]


@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_a_backend_gives_the_values_and_gradients_of_the_definition(backend: str, as_tensor: bool) -> None:
    document, window = random_documents(2, 192, 40.0), 37
    query, key, value, direction = random_inputs(*document.shape)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    expected = by_definition(query, key, value, visible(document, window))
    gradients = torch.autograd.grad((expected * direction).sum(), leaves)
    results = run_with_gradients(backend, document, torch.tensor(float(window)) if as_tensor else window)
    for result, wanted in zip(results, [expected, *gradients], strict=True):
        torch.testing.assert_close(result.double(), wanted.double(), rtol=0, atol=2e-5)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000), mean_length=st.sampled_from([1.5, 20.0, 130.0, 1000.0]), window=st.integers(1, 400),
    as_tensor=st.booleans(),
)  # fmt: skip
def test_flex_and_sdpa_give_the_values_of_the_reference(
    seed: int, mean_length: float, window: int, as_tensor: bool
) -> None:
    # Values only: flex attention has no backward on a CPU; the gpu test below compares its gradients.
    document = random_documents(2, 256, mean_length, seed)
    query, key, value, _ = random_inputs(2, 256, seed=seed)
    given_window = torch.tensor(float(window)) if as_tensor else window
    expected = attention("reference", query, key, value, build_mask("reference", document, window), SCALE)
    for backend in ("flex", "sdpa"):
        result = attention(backend, query, key, value, build_mask(backend, document, given_window), SCALE)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "flex"])
@pytest.mark.parametrize("window", [1, 64, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK])
def test_a_window_of_w_tokens_reaches_the_token_w_minus_1_back_and_no_further(backend: str, window: int) -> None:
    document = torch.zeros(1, 3 * BLOCK, dtype=torch.long)
    query, key, _, _ = random_inputs(1, 3 * BLOCK, heads=1)
    # One-hot values: the result of query t is its row of attention weights.
    value = torch.eye(3 * BLOCK)[None, :, None]
    mask = build_mask(backend, document, torch.tensor(float(window)))
    weights = attention(backend, query, key, value, mask, SCALE)[0, :, 0]
    for t in (0, window - 1, window, BLOCK - 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, 3 * BLOCK - 1):
        first = max(0, t - window + 1)
        assert (weights[t, first : t + 1] > 0).all()
        assert (weights[t, :first] == 0).all() and (weights[t, t + 1 :] == 0).all()


@pytest.mark.parametrize("backend", ["reference", "sdpa", "flex"])
@pytest.mark.parametrize("start", [BLOCK - 1, BLOCK, BLOCK + 1])
def test_a_document_is_not_seen_from_the_next_one_also_at_a_block_edge(backend: str, start: int) -> None:
    document = (torch.arange(2 * BLOCK) >= start).long()[None]
    query, key, _, _ = random_inputs(1, 2 * BLOCK, heads=1)
    value = torch.eye(2 * BLOCK)[None, :, None]
    weights = attention(backend, query, key, value, build_mask(backend, document, 2 * BLOCK), SCALE)[0, :, 0]
    assert (weights[start:, :start] == 0).all()
    assert (weights[start, start] == 1) and (weights[-1, start:] > 0).all() and (weights[start - 1, :start] > 0).all()


def blocks_of(counts: Tensor, indices: Tensor) -> Tensor:
    """[B, rows, columns] bool: which blocks a flex table of counts [B, 1, rows] and indices lists."""
    listed = torch.arange(indices.shape[-1]) < counts[..., None]
    return torch.zeros_like(listed).scatter_(-1, indices.long(), listed)[:, 0]


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000), mean_length=st.sampled_from([20.0, 200.0, 600.0, 10000.0]),
    window=st.sampled_from([1, 2, 64, 127, 128, 129, 255, 256, 257, 300, 384, 385, 511]), as_tensor=st.booleans(),
)  # fmt: skip
def test_flex_skips_hidden_blocks_and_no_others(seed: int, mean_length: float, window: int, as_tensor: bool) -> None:
    # The eager form of flex_attention reads mask_mod only; compiled kernels also trust these tables.
    tokens = 4 * BLOCK
    document = random_documents(2, tokens, mean_length, seed)
    mask = build_mask("flex", document, torch.tensor(float(window)) if as_tensor else window)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
    seen = (distance >= 0) & (distance < window) & (document[:, :, None] == document[:, None, :])
    in_block = seen.view(2, 4, BLOCK, 4, BLOCK).any(dim=4).any(dim=2)
    assert torch.equal(blocks_of(mask.kv_num_blocks, mask.kv_indices), in_block)
    assert torch.equal(blocks_of(mask.q_num_blocks, mask.q_indices), in_block.mT)


@pytest.mark.parametrize("cut", [2 * BLOCK, 2 * BLOCK + 1, 3 * BLOCK - 1])
def test_no_later_token_decides_in_which_order_flex_sums_up_what_a_token_sees(cut: int) -> None:
    tokens, window, index = 4 * BLOCK, 3 * BLOCK, torch.arange(4 * BLOCK)
    one_document, cut_in_two = (build_mask("flex", (index >= start)[None].long(), window) for start in (tokens, cut))
    for mask in (one_document, cut_in_two):
        assert mask.full_kv_num_blocks is None  # kernels would take full blocks after the others
    for row in range(-(-cut // BLOCK)):  # blocks with a query before the cut
        walked = [mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]] for mask in (one_document, cut_in_two)]
        assert torch.equal(*walked) and len(walked[0]) == min(row + 1, 4)


def test_flex_refuses_slices_that_are_not_whole_blocks() -> None:
    with pytest.raises(ValueError, match="multiple of 128"):
        build_mask("flex", torch.zeros(1, 200, dtype=torch.long), 128)


def test_flash_gets_every_documents_start_in_a_shape_that_does_not_depend_on_the_documents() -> None:
    few, many = random_documents(2, 256, 200.0), random_documents(2, 256, 40.0)
    shapes = set()
    for document in (few, many):
        cumulative, window = _flash_mask(document, 100)
        starts = [t for t in range(512) if t % 256 == 0 or document.flatten()[t] != document.flatten()[t - 1]]
        assert cumulative[: len(starts)].tolist() == starts
        assert (cumulative[len(starts) :] == 512).all() and cumulative[-1] == 512 and window == 100
        shapes.add((cumulative.shape, cumulative.dtype))
    assert len(shapes) == 1 and shapes.pop()[1] == torch.int32
    with pytest.raises(TypeError, match="Python int"):
        _flash_mask(few, torch.tensor(100.0))


def test_flash_is_for_bfloat16_on_cuda_where_it_is_installed_and_else_what_auto_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu, cuda, float32, bfloat16 = torch.device("cpu"), torch.device("cuda"), torch.float32, torch.bfloat16
    for name in ("flash", "auto"):
        monkeypatch.setattr(ops, "FLASH_ATTN_INSTALLED", True)
        assert choose_backend(name, cuda, bfloat16, 80) == "flash"
        assert choose_backend(name, cuda, float32, 80) == "flex"
        assert choose_backend(name, cpu, bfloat16, 64) == "reference"
        monkeypatch.setattr(ops, "FLASH_ATTN_INSTALLED", False)
        assert choose_backend(name, cuda, bfloat16, 80) == "flex"


def test_our_kernels_are_for_cuda_where_triton_is_and_takes_the_heads_and_else_triton_is_what_auto_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu, cuda, float32, bfloat16 = torch.device("cpu"), torch.device("cuda"), torch.float32, torch.bfloat16
    monkeypatch.setattr(ops, "FLASH_ATTN_INSTALLED", False)
    for name in ("triton", "auto"):
        monkeypatch.setattr(ops, "TRITON_INSTALLED", True)
        for width in (16, 32, 64, 128):
            assert choose_backend(name, cuda, bfloat16, width) == choose_backend(name, cuda, float32, width) == "triton"
        for width in (8, 80, 96, 256):
            assert choose_backend(name, cuda, bfloat16, width) == "flex"
        assert choose_backend(name, cuda, torch.float64, 64) == "flex"
        assert choose_backend(name, cpu, bfloat16, 64) == "reference"
        monkeypatch.setattr(ops, "TRITON_INSTALLED", False)
        assert choose_backend(name, cuda, bfloat16, 128) == "flex"
    monkeypatch.setattr(ops, "TRITON_INSTALLED", True)
    assert choose_backend("flex", cuda, bfloat16, 128) == "flex"
    monkeypatch.setattr(ops, "FLASH_ATTN_INSTALLED", True)
    assert choose_backend("triton", cuda, bfloat16, 128) == "triton"
    assert choose_backend("auto", cuda, bfloat16, 128) == "flash"


@pytest.mark.parametrize("name", ["auto", "triton", "flash"])
def test_on_a_cpu_auto_is_our_kernel_where_it_runs_and_takes_the_dtype(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(cpu_kernels, "RUN", True)
    assert choose_backend(name, cpu, torch.float32, 20) == "cpu"
    assert choose_backend(name, cpu, torch.float64, 20) == "sdpa"
    assert choose_backend(name, cpu, torch.bfloat16, 20) == "reference"
    assert choose_backend("sdpa", cpu, torch.float32, 20) == "sdpa"
    monkeypatch.setattr(cpu_kernels, "RUN", False)
    assert choose_backend(name, cpu, torch.float32, 20) == "sdpa"


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000), tokens=st.sampled_from([1, 7, 64, 100]),
    mean_length=st.sampled_from([1.5, 20.0, 1000.0]), window=st.integers(1, 120), as_tensor=st.booleans(),
)  # fmt: skip
def test_spans_say_who_sees_whom_from_either_side(
    seed: int, tokens: int, mean_length: float, window: int, as_tensor: bool
) -> None:
    document, index = random_documents(2, tokens, mean_length, seed), torch.arange(tokens)
    spans = build_mask("triton", document, torch.tensor(float(window)) if as_tensor else window)
    seen = visible(document, window)
    query, key = index[:, None], index[None, :]
    assert torch.equal((key >= spans.first[..., None]) & (key <= query), seen)
    assert torch.equal((query >= key) & (query < spans.end[:, None]), seen)
    for side in spans:
        assert side.dtype == torch.int32 and side.shape == document.shape and (side.diff(dim=1) >= 0).all()


@pytest.mark.slow
def test_compiled_flex_on_a_cpu_gives_the_values_of_the_reference() -> None:
    document = random_documents(2, 4 * BLOCK, 150.0)
    query, key, value, _ = random_inputs(2, 4 * BLOCK)

    @torch.compile(fullgraph=True)
    def compiled(mask: Any) -> Tensor:
        return attention("flex", query, key, value, mask, SCALE)

    for window in (64, 200):
        expected = attention("reference", query, key, value, build_mask("reference", document, window), SCALE)
        result = compiled(build_mask("flex", document, torch.tensor(float(window))))
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("flex", marks=gpu),
        pytest.param("triton", marks=[*gpu, needs_triton]),
        pytest.param("flash", marks=[*gpu, needs_flash]),
    ],
)
@pytest.mark.parametrize("window", [BLOCK, 300])
def test_compiled_backends_on_a_gpu_give_the_values_and_gradients_of_the_reference(backend: str, window: int) -> None:
    device = torch.device("cuda")
    document = random_documents(2, 1024, 150.0).to(device)
    *inputs, direction = (x.to(device) for x in random_inputs(2, 1024, heads=2, width=64))

    @torch.compile(fullgraph=True)
    def compiled(query: Tensor, key: Tensor, value: Tensor, window: Tensor | int) -> Tensor:
        return attention(backend, query, key, value, build_mask(backend, document, window), SCALE)

    leaves = query, key, value = [x.bfloat16().requires_grad_() for x in inputs]
    given_window = window if backend == "flash" else torch.tensor(float(window), device=device)
    result = compiled(query, key, value, given_window)
    results = [result, *torch.autograd.grad((result.float() * direction).sum(), leaves)]
    exact = query, key, value = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = attention("reference", query, key, value, build_mask("reference", document, window), SCALE)
    wanted = [expected, *torch.autograd.grad((expected * direction).sum(), exact)]
    for got, want in zip(results, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0.03, atol=0.03)
