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
    "pick_ptr": "*i32", "expert_ptr": "*i32", "ends_ptr": "*i32", "gate_parts_ptr": "*fp32", "sums_ptr": "*fp32",
    "hidden_parts_ptr": "*fp32", "offset_ptr": "*fp32", "scale_ptr": "*fp32", "bias_ptr": "*fp32",
    "scale_parts_ptr": "*fp32", "bias_parts_ptr": "*fp32",
}  # fmt: skip
INTEGERS = ("tokens", "width", "hidden_width", "experts")


@compiles
def test_the_values_are_right_in_the_interpreter() -> None:
    run_interpreted(__file__)


@compiles
@pytest.mark.parametrize(
    ("kernel", "sizes", "options"),
    [
        ("hidden_rows", bank_triton.PLAIN, dict(ADAPTER=True)), ("hidden_rows", bank_triton.PLAIN, dict(ADAPTER=False)),
        ("picks_of_rows", bank_triton.PLAIN, dict(BACKWARD=False)),
        ("hidden_row_gradients", bank_triton.PLAIN, dict(ADAPTER=True)),
        ("hidden_row_gradients", bank_triton.PLAIN, dict(ADAPTER=False)),
        ("picks_of_rows", bank_triton.PLAIN, dict(BACKWARD=True)),
        ("w1_gradients", bank_triton.GATHERED, dict(ADAPTER=True)),
        ("w1_gradients", bank_triton.GATHERED, dict(ADAPTER=False)),
        ("w2_gradients", bank_triton.GATHERED, {}),
    ],
    ids=str,
)  # fmt: skip
def test_a_hopper_gpu_spills_no_register_and_runs_two_programs_a_multiprocessor(
    kernel: str, sizes: dict[str, int], options: dict[str, bool], tmp_path: Path
) -> None:
    function = getattr(bank_triton, kernel)
    pointers = {name: POINTERS.get(name, "*bf16") for name in function.arg_names if name.endswith("_ptr")}
    integers = {name: "i32" for name in function.arg_names if name in INTEGERS}
    launch = {name: value for name, value in sizes.items() if name != "STEP"}
    compiled = compile_for_hopper(
        function, tmp_path, launch, **pointers, **integers, TOP_K=1, TILE=bank_triton.TILE, STEP=sizes["STEP"],
        **options,
    )  # fmt: skip
    print(f"{kernel} {options}: {compiled}")
    # w1_gradients spills a few after its product.
    assert compiled.spilled <= (160 if kernel == "w1_gradients" else 0) and compiled.shared <= 227 * 1024
    assert "wgmma.mma_async" in compiled.ptx and "cp.async" in compiled.ptx
    if TRITON_VERSION.startswith("3.6."):
        assert compiled.shared <= 227 * 1024 // 2 and compiled.registers <= 128


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of 16, plans in chunks of 32; where nothing but this process's memory is used, new memory is NaN."""
    monkeypatch.setattr(bank_triton, "TILE", 16)
    monkeypatch.setattr(bank_triton, "CHUNK", 32)
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
        scale, bias, *_ = problem.adapter
        matrices = bank_triton.arrange(problem.w1, problem.w2, torch.float32)
        y = bank_triton.expert_ffn(problem.x, matrices, scale, bias, problem.experts, problem.gates)
        assert_equal(problem.with_gradients(y), problem.solve_by_definition(), TOLERANCE[torch.float32])

    @pytest.mark.parametrize("shape", [(150, 1, 5), (40, 3, 5), (1, 1, 2), (70, 2, 128)])
    def test_a_plan_gives_each_pick_a_row_among_its_experts_in_order(self, shape: tuple[int, int, int]) -> None:
        tokens, top_k, count = shape
        problem = Problem(tokens=tokens, experts=count, top_k=top_k, width=2, hidden=2, device=DEVICE)
        plan, expected = bank_triton.Plan.of(problem.experts, count), bank.plan_rows(problem.experts, count, 16)
        ends = expected.ends
        assert torch.equal(plan.ends, ends)
        assert torch.equal(plan.pick_of_row.long(), expected.pick_of_row)
        first_rows = torch.arange(0, len(plan.pick_of_row), 16, device=DEVICE)
        assert plan.expert_of_block.tolist() == torch.searchsorted(ends, first_rows, right=True).tolist()

    def test_layers_that_share_matrices_add_up_their_gradients(self) -> None:
        problem = Problem(tokens=30, experts=3, width=16, hidden=16, dtype=torch.float32, device=DEVICE)
        results = []
        for shared in (True, False):
            matrices, x = bank_triton.arrange(problem.w1, problem.w2, torch.float32), problem.x
            for _ in range(3):
                own = matrices if shared else bank_triton.arrange(problem.w1, problem.w2, torch.float32)
                scale, bias, *_ = problem.adapter
                x = x + 0.1 * bank_triton.expert_ffn(x, own, scale, bias, problem.experts, problem.gates)
            results.append(problem.with_gradients(x))
        assert_equal(results[0], {name: value.cpu().double() for name, value in results[1].items()}, 1e-5)

    def test_without_a_gradient_the_result_is_the_same(self) -> None:
        problem = Problem(tokens=30, experts=3, dtype=torch.float32, device=DEVICE)
        with torch.no_grad():
            arguments = (problem.x, problem.w1, problem.w2, problem.adapter, problem.experts, problem.gates)
            y = expert_ffn("triton", *arguments)
        assert not y.requires_grad and torch.equal(y, problem.solve("triton")["y"])

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

    @pytest.mark.skipif(not INTERPRETED, reason="reads memory that nothing wrote: here it is full of NaN")
    def test_no_work_is_done_for_blocks_of_no_expert(self) -> None:
        problem = Problem(tokens=9, experts=4, used=[0, 2], width=8, hidden=16, dtype=torch.float32, device=DEVICE)
        plan, (scale, bias, *_) = bank_triton.Plan.of(problem.experts, 4), problem.adapter
        matrices = bank_triton.arrange(problem.w1, problem.w2, torch.float32)
        _, hidden = bank_triton._forward(problem.x, problem.gates, scale, bias, matrices, plan)
        written, left_alone = hidden.detach().tensor_split([int(plan.ends[-1])])
        assert len(left_alone) > 0 and left_alone.isnan().all() and not written.isnan().any()


def test_lora_adapters_are_not_ignored() -> None:
    problem = Problem(adapter="lora", dtype=torch.float32)
    with pytest.raises(ValueError, match="LoRA"):
        problem.solve("triton")
