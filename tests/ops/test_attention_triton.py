"""Attention in Triton: the reference's values and gradients, no token's bits from later ones, no register spilled.

Values are tested by tests with pytest.mark.gpu: see tests/ops/triton_kernels.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from switch_bank.ops import attention_triton
from switch_bank.ops.attention import attention, build_mask
from tests.ops.test_attention import SCALE, random_documents
from tests.ops.triton_kernels import DEVICE, INTERPRETED, compile_for_hopper, compiles, run_interpreted, runs_kernels

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}
KERNELS = {
    "attend_queries": attention_triton.FORWARD, "query_gradients": attention_triton.QUERY_GRADIENTS,
    "key_gradients": attention_triton.KEY_GRADIENTS,
}  # fmt: skip
TYPES = {
    "first_ptr": "*i32", "end_ptr": "*i32", "logsumexp_ptr": "*fp32", "delta_ptr": "*fp32", "tokens": "i32",
    "heads": "i32", "scale": "fp32", "log2_scale": "fp32",
}  # fmt: skip
Results = dict[str, Tensor]


@compiles
def test_the_values_are_right_in_the_interpreter() -> None:
    run_interpreted(__file__)


@compiles
@pytest.mark.parametrize("name", KERNELS)
def test_a_hopper_gpu_spills_no_register_and_runs_two_programs_a_multiprocessor(name: str, tmp_path: Path) -> None:
    kernel, sizes = getattr(attention_triton, name), KERNELS[name]
    tiles = {side: sizes[side] for side in ("QUERIES", "KEYS")}
    launch = {option: value for option, value in sizes.items() if option not in tiles}

    def kind(parameter: str) -> str:
        side = "KEYS" if parameter.startswith(("key", "value")) else "QUERIES"
        return f"tensordesc<bf16[1, {tiles[side]}, 128]>" if parameter.endswith("_desc") else TYPES[parameter]

    types = {parameter: kind(parameter) for parameter in kernel.arg_names if parameter not in tiles}
    compiled = compile_for_hopper(kernel, tmp_path, launch, **types, **tiles)
    print(f"{name}: {compiled}")
    assert compiled.spilled == 0 and compiled.shared <= 227 * 1024 // 2
    assert compiled.registers * 32 * sizes["num_warps"] <= 65536 // 2
    assert "wgmma.mma_async" in compiled.ptx and "cp.async.bulk.tensor" in compiled.ptx


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of 16; where nothing but this process's memory is used, new memory is NaN."""
    for sizes in KERNELS.values():
        monkeypatch.setitem(sizes, "QUERIES", 16)
        monkeypatch.setitem(sizes, "KEYS", 16)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(INTERPRETED)
    yield
    torch.use_deterministic_algorithms(False)


class Problem:
    """Documents, a window, and inputs as the model gives them: query and key are halves of one tensor."""

    def __init__(
        self, tokens: int, window: int, mean_length: float = 20.0, batch: int = 1, heads: int = 2, width: int = 16,
        dtype: torch.dtype = torch.float32, document: Tensor | None = None,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(tokens + window)

        def random(heads: int) -> Tensor:
            values = torch.randn(batch, tokens, heads, width, generator=generator).to(dtype)
            return values.to(DEVICE).requires_grad_()

        self.document = (random_documents(batch, tokens, mean_length) if document is None else document).to(DEVICE)
        self.window = torch.tensor(float(window), device=DEVICE)
        self.query_and_key, self.value, self.direction = random(2 * heads), random(heads), random(heads).detach()

    def inputs(self) -> list[Tensor]:
        return [*self.query_and_key.chunk(2, dim=2), self.value]

    def attend(self, inputs: list[Tensor] | None = None) -> Tensor:
        mask = build_mask("triton", self.document, self.window)
        return attention("triton", *(inputs or self.inputs()), mask, SCALE)

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


def assert_equal(results: Results, expected: Results, tolerance: float) -> None:
    assert results.keys() == expected.keys()
    for name, value in results.items():
        wanted = expected[name].double()
        atol = tolerance * max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("small_tiles")
class TestValues:
    pytestmark = runs_kernels

    @pytest.mark.parametrize(
        "shape",
        [
            pytest.param(dict(tokens=64, window=1000, batch=2), id="a-window-larger-than-the-slice"),
            pytest.param(dict(tokens=64, window=1000, mean_length=1e6), id="one-document"),
            pytest.param(dict(tokens=96, window=21, mean_length=1e6), id="a-window-that-crosses-blocks"),
            pytest.param(dict(tokens=96, window=32, mean_length=60.0, batch=2), id="documents-longer-than-the-window"),
            pytest.param(dict(tokens=64, window=1), id="a-window-of-one-token"),
            pytest.param(dict(tokens=64, window=9, mean_length=1.0, batch=2), id="documents-of-one-token"),
            pytest.param(dict(tokens=64, window=40, mean_length=4.0, width=32), id="short-documents-and-wider-heads"),
            pytest.param(dict(tokens=45, window=30, batch=2, heads=1), id="no-multiple-of-the-tiles"),
            pytest.param(dict(tokens=1, window=8), id="one-token"),
            pytest.param(dict(tokens=64, window=24, batch=2, dtype=torch.bfloat16), id="bfloat16"),
        ],
    )
    def test_it_gives_the_values_and_gradients_of_the_reference(self, shape: dict[str, Any]) -> None:
        problem = Problem(**shape)
        results = problem.with_gradients(problem.attend())
        assert results["result"].dtype == problem.value.dtype and results["result"].is_contiguous()
        assert_equal(results, problem.expected(), TOLERANCE[problem.value.dtype])

    @pytest.mark.parametrize("tiles", [(16, 32), (32, 16)], ids=str)
    def test_a_tile_may_have_more_keys_than_queries_or_fewer(
        self, tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for sizes in KERNELS.values():
            monkeypatch.setitem(sizes, "QUERIES", tiles[0])
            monkeypatch.setitem(sizes, "KEYS", tiles[1])
        problem = Problem(tokens=112, window=50, mean_length=40.0)
        assert_equal(problem.with_gradients(problem.attend()), problem.expected(), TOLERANCE[torch.float32])

    def test_scores_of_any_size_give_no_infinity(self) -> None:
        problem = Problem(tokens=48, window=20, mean_length=15.0)
        with torch.no_grad():
            problem.query_and_key *= 30  # exp of these scores is beyond float32
        assert_equal(problem.with_gradients(problem.attend()), problem.expected(), 1e-3)

    @pytest.mark.parametrize("layout", ["spread", "turned", "off-16-bytes", "any-stride-of-one-slice"])
    def test_no_input_need_be_contiguous(self, layout: str) -> None:
        problem = Problem(tokens=40, window=30)
        expected = problem.expected()

        def laid_out(value: Tensor) -> Tensor:
            value = value.detach()
            if layout == "spread":
                apart = torch.full((*value.shape, 2), 1e6, device=DEVICE)
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
        assert_equal(problem.with_gradients(problem.attend()), expected, TOLERANCE[torch.float32])

    def test_nor_need_a_gradient_be_that_is_one_number_everywhere(self) -> None:
        problem = Problem(tokens=40, window=30, batch=2)
        problem.direction = torch.ones(1, 1, 1, 1, device=DEVICE).expand_as(problem.value)
        result = problem.attend()
        leaves = [problem.query_and_key, problem.value]
        gradients = dict(zip(("query and key", "value"), torch.autograd.grad(result.sum(), leaves), strict=True))
        assert_equal({"result": result.detach()} | gradients, problem.expected(), TOLERANCE[torch.float32])
        one_row = torch.ones(2, 1, 2, 16, device=DEVICE).expand(-1, 40, -1, -1)
        assert 0 not in attention_triton._by_head(one_row, 16).strides  # which the interpreter would take

    @pytest.mark.parametrize("cut", [40, 48, 56])
    def test_no_later_token_changes_a_bit_of_an_earlier_ones_result(self, cut: int) -> None:
        index = torch.arange(80)
        results = []
        # Of the last one the first query block that holds the cut begins to see later than others.
        for later_starts in ((), (cut,), (cut, cut + 3), range(cut, 80)):
            starts = torch.tensor([0, 19, *later_starts])
            problem = Problem(80, window=33, document=torch.searchsorted(starts, index, right=True)[None])
            with torch.no_grad():
                for x in (problem.query_and_key, problem.value):
                    x[:, cut:] *= len(starts)
            results.append(problem.attend()[:, :cut])
        for other in results[1:]:
            assert torch.equal(other, results[0])

    @pytest.mark.parametrize("hidden", [slice(0, 32), slice(32, 64)], ids=["earlier", "later"])
    def test_blocks_that_a_document_does_not_see_are_not_read(self, hidden: slice) -> None:
        problem = Problem(64, window=100, document=(torch.arange(64) >= 32).long()[None])
        seen = slice(32, 64) if hidden.start == 0 else slice(0, 32)
        with torch.no_grad():
            for x in (problem.query_and_key, problem.value, problem.direction):
                x[:, hidden] = torch.nan
        for value in problem.with_gradients(problem.attend()).values():
            assert value[:, seen].isfinite().all() and value[:, hidden].isnan().all()

    def test_nor_are_those_that_a_window_hides(self) -> None:
        problem = Problem(80, window=17, mean_length=1e6)
        with torch.no_grad():
            for x in (problem.query_and_key, problem.value, problem.direction):
                x[:, :16] = torch.nan
        for value in problem.with_gradients(problem.attend()).values():
            assert value[:, 48:].isfinite().all() and value[:, 16:32].isnan().any()

    def test_without_a_gradient_the_result_is_the_same(self) -> None:
        problem = Problem(tokens=48, window=20)
        with torch.no_grad():
            result = problem.attend()
        assert not result.requires_grad and torch.equal(result, problem.attend())

    def test_compiled_and_computed_again_in_the_backward_it_is_the_same(self) -> None:
        problem = Problem(tokens=48, window=20, mean_length=30.0)
        plain = problem.with_gradients(problem.attend())
        compiled = torch.compile(problem.attend, backend="aot_eager" if INTERPRETED else "inductor", fullgraph=True)
        again = checkpoint(problem.attend, use_reentrant=False, preserve_rng_state=False)
        both = checkpoint(compiled, use_reentrant=False, preserve_rng_state=False)
        for result in (compiled(), again, both):
            assert_equal(problem.with_gradients(result), plain, 0.0 if INTERPRETED else 1e-6)

    @pytest.mark.parametrize("tokens", [32, 20])
    def test_torch_is_told_the_truth_about_the_operators(self, tokens: int) -> None:
        problem = Problem(tokens=tokens, window=12, batch=2)
        inputs, mask = problem.inputs(), build_mask("triton", problem.document, problem.window)
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(attention_triton.forward, (*inputs, *mask, SCALE), test_utils=tests)
        inputs = [x.detach() for x in inputs]
        out, logsumexp = attention_triton.forward(*inputs, *mask, SCALE)
        arguments = (problem.direction, *inputs, out, logsumexp, *mask, SCALE)
        torch.library.opcheck(attention_triton.backward, arguments, test_utils=tests)


class TestTheTrainersTiles:
    pytestmark = runs_kernels

    @pytest.mark.parametrize("tokens", [384, 300])
    def test_they_give_the_values_and_gradients_of_the_reference(self, tokens: int) -> None:
        problem = Problem(tokens, window=150, mean_length=200.0, heads=1, width=32, dtype=torch.bfloat16)
        assert_equal(problem.with_gradients(problem.attend()), problem.expected(), TOLERANCE[torch.bfloat16])

    def test_so_do_those_of_float32(self) -> None:
        problem = Problem(96, window=50, mean_length=60.0)
        assert_equal(problem.with_gradients(problem.attend()), problem.expected(), TOLERANCE[torch.float32])
