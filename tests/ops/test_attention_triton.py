"""Attention in Triton: the reference's values and gradients, no token's bits from later ones, no register spilled.

Values are tested by tests with pytest.mark.gpu: see tests/ops/triton_kernels.py.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from switch_bank.ops import attention_triton
from tests.ops import attention_problem
from tests.ops.attention_problem import OwnKernels, assert_equal
from tests.ops.test_attention import SCALE
from tests.ops.triton_kernels import DEVICE, INTERPRETED, compile_for_hopper, compiles, run_interpreted, runs_kernels

BFLOAT16 = 0.03  # tolerance
KERNELS = {
    "attend_queries": attention_triton.FORWARD, "query_gradients": attention_triton.QUERY_GRADIENTS,
    "key_gradients": attention_triton.KEY_GRADIENTS,
}  # fmt: skip
TYPES = {
    "first_ptr": "*i32", "end_ptr": "*i32", "logsumexp_ptr": "*fp32", "delta_ptr": "*fp32", "tokens": "i32",
    "heads": "i32", "scale": "fp32", "log2_scale": "fp32",
}  # fmt: skip
Problem = partial(attention_problem.Problem, "triton", DEVICE)


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


@pytest.mark.usefixtures("small_tiles")
class TestValues(OwnKernels):
    pytestmark = runs_kernels
    problem = staticmethod(Problem)
    compiler = "aot_eager" if INTERPRETED else "inductor"
    compiled_is_off_by = 0.0 if INTERPRETED else 1e-6

    def test_it_gives_those_of_the_reference_in_bfloat16_too(self) -> None:
        problem = Problem(tokens=64, window=24, batch=2, dtype=torch.bfloat16)
        results = problem.with_gradients(problem.attend())
        assert results["result"].dtype == torch.bfloat16 and results["result"].is_contiguous()
        assert_equal(results, problem.expected(), BFLOAT16)

    @pytest.mark.parametrize("tiles", [(16, 32), (32, 16)], ids=str)
    def test_a_tile_may_have_more_keys_than_queries_or_fewer(
        self, tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for sizes in KERNELS.values():
            monkeypatch.setitem(sizes, "QUERIES", tiles[0])
            monkeypatch.setitem(sizes, "KEYS", tiles[1])
        problem = Problem(tokens=112, window=50, mean_length=40.0)
        assert_equal(problem.with_gradients(problem.attend()), problem.expected())

    def test_nor_need_a_gradient_be_that_is_one_number_everywhere(self) -> None:
        problem = Problem(tokens=40, window=30, batch=2)
        problem.direction = torch.ones(1, 1, 1, 1, device=DEVICE).expand_as(problem.value)
        result = problem.attend()
        leaves = [problem.query_and_key, problem.value]
        gradients = dict(zip(("query and key", "value"), torch.autograd.grad(result.sum(), leaves), strict=True))
        assert_equal({"result": result.detach()} | gradients, problem.expected())
        one_row = torch.ones(2, 1, 2, 16, device=DEVICE).expand(-1, 40, -1, -1)
        assert 0 not in attention_triton._by_head(one_row, 16).strides  # which the interpreter would take

    @pytest.mark.parametrize("tokens", [32, 20])
    def test_torch_is_told_the_truth_about_the_operators(self, tokens: int) -> None:
        problem = Problem(tokens=tokens, window=12, batch=2)
        inputs, mask = problem.inputs(), problem.mask()
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(attention_triton.forward, (*inputs, *mask, SCALE), test_utils=tests)
        inputs = [x.detach() for x in inputs]
        out, logsumexp = attention_triton.forward(*inputs, *mask, SCALE)
        arguments = (problem.direction, *inputs, *mask, out, logsumexp, SCALE)
        torch.library.opcheck(attention_triton.backward, arguments, test_utils=tests)


class TestTheTrainersTiles:
    pytestmark = runs_kernels

    @pytest.mark.parametrize("tokens", [384, 300])
    def test_they_give_the_values_and_gradients_of_the_reference(self, tokens: int) -> None:
        problem = Problem(tokens, window=150, mean_length=200.0, heads=1, width=32, dtype=torch.bfloat16)
        assert_equal(problem.with_gradients(problem.attend()), problem.expected(), BFLOAT16)

    def test_so_do_those_of_float32(self) -> None:
        problem = Problem(96, window=50, mean_length=60.0)
        assert_equal(problem.with_gradients(problem.attend()), problem.expected())
