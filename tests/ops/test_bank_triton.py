"""The experts' feed-forward in Triton: the formula's values and gradients, and no register spilled on a Hopper GPU.

Values are tested by tests with pytest.mark.gpu: see tests/ops/triton_kernels.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from switch_bank.ops import bank, bank_triton
from switch_bank.ops.bank import expert_ffn
from tests.ops.test_bank import Problem, assert_equal
from tests.ops.triton_kernels import (
    DEVICE,
    INTERPRETED,
    TRITON_VERSION,
    compile_for_hopper,
    compiles,
    run_interpreted,
    runs_kernels,
)

TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 0.03}
POINTERS = {
    "pick_ptr": "*i64", "expert_ptr": "*i32", "ends_ptr": "*i32", "gate_parts_ptr": "*fp32", "sums_ptr": "*fp32",
    "hidden_parts_ptr": "*fp32", "scale_parts_ptr": "*fp32", "bias_parts_ptr": "*fp32",
}  # fmt: skip
INTEGERS = {"tokens": "i32", "width": "i32", "hidden_width": "i32", "experts": "i32"}
W1 = dict(GATED=False, TRANSPOSED=True)
W2 = dict(GATED=True, TRANSPOSED=False, ADAPTER=False)


@compiles
def test_the_values_are_right_in_the_interpreter() -> None:
    run_interpreted(__file__)


@compiles
@pytest.mark.parametrize(
    ("kernel", "sizes", "options"),
    [
        ("hidden_rows", bank_triton.ADAPTED, {}), ("hidden_rows", bank_triton.PLAIN, dict(ADAPTER=False)),
        ("output_rows", bank_triton.PLAIN, {}),
        ("hidden_row_gradients", bank_triton.PLAIN, {}),
        ("hidden_row_gradients", bank_triton.PLAIN, dict(ADAPTER=False)),
        ("input_row_gradients", bank_triton.PLAIN, {}),
        ("input_row_gradients", bank_triton.PLAIN, dict(ADAPTER=False)),
        ("weight_gradients", bank_triton.GATHERED, W1),
        ("weight_gradients", bank_triton.GATHERED, W1 | dict(ADAPTER=False)),
        ("weight_gradients", bank_triton.GATHERED, W2),
    ],
    ids=str,
)  # fmt: skip
def test_a_hopper_gpu_spills_no_register_and_runs_two_programs_a_multiprocessor(
    kernel: str, sizes: dict[str, int], options: dict[str, bool], tmp_path: Path
) -> None:
    """But one: to sum x's part and 1's part of an adapter's gradient takes a program alone on its multiprocessor."""
    function, options = getattr(bank_triton, kernel), dict(ADAPTER=True) | options
    pointers = {name: POINTERS.get(name, "*bf16") for name in function.arg_names if name.endswith("_ptr")}
    compiled = compile_for_hopper(
        function, tmp_path, sizes["num_warps"], sizes["num_stages"], **pointers, **INTEGERS, TOP_K=1,
        TILE=bank_triton.TILE, STEP=sizes["STEP"], **options,
    )  # fmt: skip
    print(f"{kernel} {options}: {compiled}")
    assert compiled.spilled == 0 and compiled.shared <= 227 * 1024
    assert "wgmma.mma_async" in compiled.ptx and "cp.async" in compiled.ptx
    if TRITON_VERSION.startswith("3.6."):
        alone = kernel == "input_row_gradients" and options["ADAPTER"]
        assert compiled.shared <= 227 * 1024 // 2 and (compiled.registers <= 128 or alone)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of 16, and where nothing but this process's own memory is used, new memory is full of NaN."""
    monkeypatch.setattr(bank_triton, "TILE", 16)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(INTERPRETED)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("small_tiles")
class TestValues:
    pytestmark = runs_kernels

    @pytest.mark.parametrize(
        "shape",
        [
            pytest.param({"tokens": 45, "experts": 3, "width": 24, "hidden": 40}, id="experts-of-several-blocks"),
            pytest.param({"tokens": 9, "top_k": 2, "experts": 7, "used": [1, 4, 5]}, id="two-picks-and-empty-experts"),
            pytest.param({"tokens": 20, "experts": 3, "used": [2], "width": 16}, id="all-to-the-last"),
            pytest.param({"tokens": 1, "experts": 2, "width": 5, "hidden": 3}, id="one-token-and-odd-widths"),
            pytest.param({"tokens": 3, "top_k": 2, "experts": 128, "width": 8, "hidden": 16}, id="128-experts"),
            pytest.param({"tokens": 9, "top_k": 2, "dtype": torch.bfloat16}, id="bfloat16"),
            pytest.param({"tokens": 20, "top_k": 2, "experts": 3, "adapter": "none"}, id="no-adapter"),
        ],
    )
    def test_it_gives_the_values_and_gradients_of_the_formula(self, shape: dict[str, Any]) -> None:
        problem = Problem(**({"dtype": torch.float32} | shape), device=DEVICE)
        assert_equal(problem.solve("triton"), problem.solve_by_definition(), TOLERANCE[problem.x.dtype])

    def test_so_do_the_trainers_tiles(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bank_triton, "TILE", 128)
        problem = Problem(tokens=150, experts=2, width=72, hidden=136, dtype=torch.float32, device=DEVICE)
        assert_equal(problem.solve("triton"), problem.solve_by_definition(), TOLERANCE[torch.float32])

    def test_the_kernels_take_one_expert_too(self) -> None:
        problem = Problem(tokens=18, experts=1, width=16, hidden=16, dtype=torch.float32, device=DEVICE)
        expected = problem.solve_by_definition()
        y = bank._fused(problem.x, problem.w1, problem.w2, problem.adapter, problem.experts, problem.gates)
        leaves = problem.leaves()
        gradients = torch.autograd.grad((y * problem.direction).sum(), list(leaves.values()))
        results = {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}
        assert_equal(results, expected, TOLERANCE[torch.float32])

    def test_no_input_need_be_contiguous(self) -> None:
        problem = Problem(tokens=9, experts=2, top_k=2, width=8, hidden=16, dtype=torch.float32, device=DEVICE)
        expected = problem.solve_by_definition()

        def spread(value: torch.Tensor) -> torch.Tensor:
            apart = torch.full((*value.shape, 2), 1e6, device=DEVICE)
            apart[..., 0] = value.detach()
            return apart[..., 0].requires_grad_()

        for name in ("x", "w1", "w2", "gates", "direction"):
            setattr(problem, name, spread(getattr(problem, name)))
        problem.adapter = problem.adapter._replace(
            scale=spread(problem.adapter.scale), bias=spread(problem.adapter.bias)
        )
        assert not problem.x.is_contiguous() and not problem.direction.is_contiguous()
        assert_equal(problem.solve("triton"), expected, TOLERANCE[torch.float32])

    def test_a_gate_of_zero_gives_and_gets_exactly_nothing(self) -> None:
        problem = Problem(tokens=9, experts=3, top_k=2, width=8, hidden=16, dtype=torch.float32, device=DEVICE)
        with torch.no_grad():
            problem.gates[problem.experts == 2] = 0.0
            problem.gates[7] = 0.0
        results = problem.solve("triton")
        assert (results["y"][7] == 0).all() and (results["x"][7] == 0).all()
        for name in ("w1", "w2", "scale", "bias"):
            assert (results[name][2] == 0).all() and (results[name][0] != 0).any()

    def test_compiled_in_one_graph_it_gives_the_values_and_gradients_of_the_formula(self) -> None:
        problem = Problem(tokens=9, experts=3, top_k=2, width=16, hidden=16, dtype=torch.float32, device=DEVICE)
        compiled = torch.compile(expert_ffn, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
        y = compiled("triton", problem.x, problem.w1, problem.w2, problem.adapter, problem.experts, problem.gates)
        leaves = problem.leaves()
        gradients = torch.autograd.grad((y * problem.direction).sum(), list(leaves.values()))
        results = {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}
        assert_equal(results, problem.solve_by_definition(), TOLERANCE[torch.float32])

    @pytest.mark.skipif(not INTERPRETED, reason="reads memory that nothing wrote: here it is full of NaN")
    def test_no_work_is_done_for_blocks_of_no_expert(self) -> None:
        problem = Problem(tokens=9, experts=4, used=[0, 2], width=8, hidden=16, dtype=torch.float32, device=DEVICE)
        plan = bank.plan_rows(problem.experts, 4, 16)
        (scale, bias, *_), w1, w2 = problem.adapter, problem.w1, problem.w2
        _, hidden = bank_triton.fused_experts(
            problem.x, w1, w2, scale, bias, problem.gates,
            plan.pick_of_row, plan.row_of_pick, plan.expert_of_block(), plan.ends,
        )  # fmt: skip
        written, left_alone = hidden.detach().tensor_split([int(plan.ends[-1])])
        assert len(left_alone) > 0 and left_alone.isnan().all() and not written.isnan().any()

    @pytest.mark.parametrize("adapter", ["none", "scale_bias"])
    def test_they_are_correct_operators_of_torch(self, adapter: str) -> None:
        problem = Problem(
            tokens=18, experts=2, width=8, hidden=8, adapter=adapter, dtype=torch.float32, device=DEVICE
        )  # fmt: skip
        problem.experts = torch.tensor([[0]] * 17 + [[1]], device=DEVICE)  # rows of no expert are not defined
        plan = bank.plan_rows(problem.experts, 2, 16)
        arguments = (
            problem.x, problem.w1, problem.w2, problem.adapter.scale, problem.adapter.bias, problem.gates,
            plan.pick_of_row, plan.row_of_pick, plan.expert_of_block(), plan.ends,
        )  # fmt: skip
        torch.library.opcheck(bank_triton.fused_experts, arguments)


def test_lora_adapters_are_not_ignored() -> None:
    problem = Problem(adapter="lora", dtype=torch.float32)
    with pytest.raises(ValueError, match="LoRA"):
        problem.solve("triton")
