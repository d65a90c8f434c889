"""What our own kernels for attention are asked, whatever they run on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from switch_bank.ops.attention import attention, build_mask
from switch_bank.ops.spans import Spans
from tests.ops.test_attention import SCALE, random_documents

Results = dict[str, Tensor]
SHAPES = [
    pytest.param(dict(tokens=64, window=1000, batch=2), id="a-window-larger-than-the-slice"),
    pytest.param(dict(tokens=64, window=1000, mean_length=1e6), id="one-document"),
    pytest.param(dict(tokens=96, window=21, mean_length=1e6), id="a-window-that-crosses-blocks"),
    pytest.param(dict(tokens=96, window=32, mean_length=60.0, batch=2), id="documents-longer-than-the-window"),
    pytest.param(dict(tokens=64, window=1), id="a-window-of-one-token"),
    pytest.param(dict(tokens=64, window=9, mean_length=1.0, batch=2), id="documents-of-one-token"),
    pytest.param(dict(tokens=64, window=40, mean_length=4.0, width=32), id="short-documents-and-wider-heads"),
    pytest.param(dict(tokens=45, window=30, batch=2, heads=1), id="no-multiple-of-the-tiles"),
    pytest.param(dict(tokens=1, window=8), id="one-token"),
]


class Problem:
    """Documents, a window, and inputs as the model gives them: query and key are halves of one tensor."""

    def __init__(
        self, backend: str, device: str, tokens: int, window: int, mean_length: float = 20.0, batch: int = 1,
        heads: int = 2, width: int = 16, dtype: torch.dtype = torch.float32, document: Tensor | None = None,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(tokens + window)

        def random(heads: int) -> Tensor:
            values = torch.randn(batch, tokens, heads, width, generator=generator).to(dtype)
            return values.to(device).requires_grad_()

        self.document = (random_documents(batch, tokens, mean_length) if document is None else document).to(device)
        self.backend = backend
        self.window = torch.tensor(float(window), device=device)
        self.query_and_key, self.value, self.direction = random(2 * heads), random(heads), random(heads).detach()

    def inputs(self) -> list[Tensor]:
        return [*self.query_and_key.chunk(2, dim=2), self.value]

    def mask(self) -> Spans:
        return build_mask(self.backend, self.document, self.window)

    def attend(self, inputs: list[Tensor] | None = None) -> Tensor:
        return attention(self.backend, *(inputs or self.inputs()), self.mask(), SCALE)

    def with_gradients(self, result: Tensor) -> Results:
        """With the query's gradient before the key's."""
        loss = (result * self.direction).sum()
        of_query_and_key, of_value = torch.autograd.grad(loss, [self.query_and_key, self.value])
        return {"result": result.detach(), "query and key": of_query_and_key, "value": of_value}

    def expected(self) -> Results:
        """By the reference in float64, of the same inputs."""
        inputs = [x.double() for x in self.inputs()]
        mask = build_mask("reference", self.document, self.window)
        return self.with_gradients(attention("reference", *inputs, mask, SCALE))


def assert_equal(results: Results, expected: Results, tolerance: float = 1e-5) -> None:
    assert results.keys() == expected.keys()
    for name, value in results.items():
        wanted = expected[name].double()
        atol = tolerance * max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


class OwnKernels:
    """The tests: a class of a backend's own tests names its problems and inherits these."""

    problem: Callable[..., Problem]
    compiler = "inductor"
    compiled_is_off_by = 0.0  # at most

    @pytest.mark.parametrize("shape", SHAPES)
    def test_it_gives_the_values_and_gradients_of_the_reference(self, shape: dict[str, Any]) -> None:
        problem = self.problem(**shape)
        results = problem.with_gradients(problem.attend())
        assert results["result"].dtype == problem.value.dtype and results["result"].is_contiguous()
        assert_equal(results, problem.expected())

    def test_scores_of_any_size_give_no_infinity(self) -> None:
        problem = self.problem(tokens=48, window=20, mean_length=15.0)
        with torch.no_grad():
            problem.query_and_key *= 30  # exp of these scores is beyond float32
        assert_equal(problem.with_gradients(problem.attend()), problem.expected(), 1e-3)

    @pytest.mark.parametrize("layout", ["spread", "turned", "off-16-bytes", "any-stride-of-one-slice"])
    def test_no_input_need_be_contiguous(self, layout: str) -> None:
        problem = self.problem(tokens=40, window=30)
        expected = problem.expected()

        def laid_out(value: Tensor) -> Tensor:
            value = value.detach()
            if layout == "spread":
                apart = torch.full((*value.shape, 2), 1e6, device=value.device)
                apart[..., 0] = value
                value = apart[..., 0]
            elif layout == "turned":
                value = value.transpose(1, 2).contiguous().transpose(1, 2)
            elif layout == "off-16-bytes":
                value = torch.cat([value.new_zeros(1), value.flatten()])[1:].view(value.shape)
            else:
                value = value.as_strided(value.shape, (1, *value.stride()[1:]))
            return value.requires_grad_()

        for name in ("query_and_key", "value", "direction"):
            setattr(problem, name, laid_out(getattr(problem, name)))
        assert_equal(problem.with_gradients(problem.attend()), expected)

    @pytest.mark.parametrize("cut", [40, 48, 56])
    def test_no_later_token_changes_a_bit_of_an_earlier_ones_result(self, cut: int) -> None:
        index = torch.arange(80)
        results = []
        # Of the last one the first query block that holds the cut begins to see later than others.
        for later_starts in ((), (cut,), (cut, cut + 3), range(cut, 80)):
            starts = torch.tensor([0, 19, *later_starts])
            problem = self.problem(80, window=33, document=torch.searchsorted(starts, index, right=True)[None])
            with torch.no_grad():
                for x in (problem.query_and_key, problem.value):
                    x[:, cut:] *= len(starts)
            results.append(problem.attend()[:, :cut])
        for other in results[1:]:
            assert torch.equal(other, results[0])

    @pytest.mark.parametrize("hidden", [slice(0, 32), slice(32, 64)], ids=["earlier", "later"])
    def test_blocks_that_a_document_does_not_see_are_not_read(self, hidden: slice) -> None:
        problem = self.problem(64, window=100, document=(torch.arange(64) >= 32).long()[None])
        seen = slice(32, 64) if hidden.start == 0 else slice(0, 32)
        with torch.no_grad():
            for x in (problem.query_and_key, problem.value, problem.direction):
                x[:, hidden] = torch.nan
        for value in problem.with_gradients(problem.attend()).values():
            assert value[:, seen].isfinite().all() and value[:, hidden].isnan().all()

    def test_nor_are_those_that_a_window_hides(self) -> None:
        problem = self.problem(80, window=17, mean_length=1e6)
        with torch.no_grad():
            for x in (problem.query_and_key, problem.value, problem.direction):
                x[:, :16] = torch.nan
        for value in problem.with_gradients(problem.attend()).values():
            assert value[:, 48:].isfinite().all() and value[:, 16:32].isnan().any()

    def test_without_a_gradient_the_result_is_the_same(self) -> None:
        problem = self.problem(tokens=48, window=20)
        with torch.no_grad():
            result = problem.attend()
        assert not result.requires_grad and torch.equal(result, problem.attend())

    def test_compiled_and_computed_again_in_the_backward_it_is_the_same(self) -> None:
        problem = self.problem(tokens=48, window=20, mean_length=30.0)
        plain = problem.with_gradients(problem.attend())
        compiled = torch.compile(problem.attend, backend=self.compiler, fullgraph=True)
        again = checkpoint(problem.attend, use_reentrant=False, preserve_rng_state=False)
        both = checkpoint(compiled, use_reentrant=False, preserve_rng_state=False)
        for result in (compiled(), again, both):
            assert_equal(problem.with_gradients(result), plain, self.compiled_is_off_by)
