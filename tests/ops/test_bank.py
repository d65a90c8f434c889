"""The bank's feed-forward: sorting tokens by expert changes no value and no gradient."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from switch_bank.ops import TRITON_INSTALLED, bank_cpu
from switch_bank.ops.bank import (
    ALIGN,
    FEW,
    Adapter,
    _opaque_grouped_mm,
    choose_backend,
    expert_ffn,
    plan_rows,
)

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
RANK = 8
# What runs here, and the adapters that it knows.
FAST = [("grouped", adapter) for adapter in ("none", "scale_bias", "lora")]
FAST += [("cpu", adapter) for adapter in ("none", "scale_bias")] if bank_cpu.DTYPES else []
FAST_BACKENDS = list(dict(FAST))


class Problem:
    """Random inputs of expert_ffn and a direction to take the gradient along; every tensor is a leaf."""

    def __init__(
        self, tokens: int = 40, experts: int = 5, top_k: int = 1, width: int = 24, hidden: int = 32,
        adapter: str = "scale_bias", dtype: torch.dtype = torch.float64, device: str = "cpu",
        used: list[int] | None = None,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(tokens * 1000 + experts * 10 + top_k)

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
            return drawn.to(device, dtype).requires_grad_()

        self.x = randn(tokens, width)
        self.w1 = randn(experts, hidden, width, scale=width**-0.5)
        self.w2 = randn(experts, width, hidden, scale=hidden**-0.5)
        self.adapter = Adapter()
        if adapter == "scale_bias":
            self.adapter = Adapter(scale=randn(experts, width), bias=randn(experts, width))
        elif adapter == "lora":
            self.adapter = Adapter(
                in_down=randn(experts, RANK, width, scale=width**-0.5),
                in_up=randn(experts, hidden, RANK, scale=RANK**-0.5),
                out_down=randn(experts, RANK, hidden, scale=hidden**-0.5),
                out_up=randn(experts, width, RANK, scale=RANK**-0.5),
            )
        allowed = torch.tensor(list(range(experts)) if used is None else used)
        order = torch.rand(tokens, len(allowed), generator=generator).argsort(1)[:, :top_k]
        self.experts = allowed[order].to(device)
        self.gates = randn(tokens, top_k)
        self.direction = randn(tokens, width).detach()

    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x, "w1": self.w1, "w2": self.w2, "gates": self.gates}
        return named | {name: part for name, part in self.adapter._asdict().items() if part is not None}

    def solve(self, backend: str) -> dict[str, Tensor]:
        """The result and the gradient of each leaf."""
        return self.with_gradients(
            expert_ffn(backend, self.x, self.w1, self.w2, self.adapter, self.experts, self.gates)
        )

    def with_gradients(self, y: Tensor) -> dict[str, Tensor]:
        """The result y and the gradient of each leaf."""
        leaves = self.leaves()
        gradients = torch.autograd.grad((y * self.direction).sum(), list(leaves.values()))
        return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}

    def solve_by_definition(self) -> dict[str, Tensor]:
        """The same from the formula, token by token and pick by pick, in float64 on the CPU."""
        leaves = {name: leaf.detach().cpu().double().requires_grad_() for name, leaf in self.leaves().items()}
        rows = []
        for token, picks in enumerate(self.experts.tolist()):
            row = torch.zeros_like(leaves["x"][token])
            for pick, expert in enumerate(picks):
                v, w1, w2 = leaves["x"][token], leaves["w1"][expert], leaves["w2"][expert]
                if "scale" in leaves:
                    v = v * leaves["scale"][expert] + leaves["bias"][expert]
                if "in_up" in leaves:
                    w1 = w1 + leaves["in_up"][expert] @ leaves["in_down"][expert]
                    w2 = w2 + leaves["out_up"][expert] @ leaves["out_down"][expert]
                row = row + leaves["gates"][token, pick] * (w2 @ torch.clamp(w1 @ v, min=0) ** 2)
            rows.append(row)
        y = torch.stack(rows)
        gradients = torch.autograd.grad((y * self.direction.cpu().double()).sum(), list(leaves.values()))
        return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def assert_equal(results: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor within `tolerance` of the largest magnitude expected of it, or of 0.1 where products cancel out."""
    assert results.keys() == expected.keys()
    for name, want in expected.items():
        error = (results[name].cpu().double() - want).abs().max()
        assert error <= tolerance * want.abs().max().clamp(min=0.1), f"{name} is off by {error:.3g}"


@pytest.mark.parametrize("adapter", ["none", "scale_bias", "lora"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_reference_is_the_formula(adapter: str, top_k: int) -> None:
    problem = Problem(adapter=adapter, top_k=top_k)
    assert_equal(problem.solve("reference"), problem.solve_by_definition(), 1e-12)


@pytest.mark.parametrize(("backend", "adapter"), FAST)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({}, id="plain"),
        pytest.param({"tokens": 61, "top_k": 2}, id="two-picks"),
        pytest.param({"tokens": 33, "top_k": 3, "experts": 3}, id="every-expert-picked"),
        pytest.param({"tokens": 37, "experts": 7, "used": [1, 4]}, id="empty-experts"),
        pytest.param({"tokens": 37, "experts": 7, "used": [6]}, id="all-to-the-last"),
        pytest.param({"tokens": 37, "experts": 7, "used": [0]}, id="all-to-the-first"),
        pytest.param({"tokens": 1}, id="one-token"),
        pytest.param({"tokens": 1, "top_k": 2}, id="one-token-two-picks"),
        pytest.param({"experts": 1}, id="one-expert"),
        pytest.param({"experts": 128, "tokens": 200, "top_k": 2}, id="128-experts"),
        pytest.param({"experts": 128, "tokens": 3}, id="more-experts-than-tokens"),
        pytest.param({"width": 32, "hidden": 8}, id="narrow-experts"),
        pytest.param({"width": 272, "hidden": 136, "tokens": 150, "used": [2]}, id="more-than-a-block-and-a-panel"),
    ],
)
def test_the_values_and_gradients_are_those_of_the_formula(shape: dict, backend: str, adapter: str) -> None:
    problem = Problem(**shape, adapter=adapter, dtype=torch.float32)
    assert_equal(problem.solve(backend), problem.solve_by_definition(), 3e-5)


@pytest.mark.parametrize("adapter", ["none", "scale_bias", "lora"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [{"tokens": 1}, {"tokens": 1, "top_k": 3}, {"tokens": FEW, "top_k": 2}], ids=str)
def test_gathered_gives_the_values_and_gradients_of_the_formula(shape: dict, dtype: torch.dtype, adapter: str) -> None:
    problem = Problem(**shape, adapter=adapter, dtype=dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-5
    assert_equal(problem.solve("gathered"), problem.solve_by_definition(), tolerance)


@given(
    tokens=st.integers(1, 3 * ALIGN + 1), experts=st.integers(1, 12), top_k=st.integers(1, 3),
    fast=st.sampled_from(FAST), used=st.integers(1, 12),
)  # fmt: skip
def test_the_result_is_the_references_whatever_the_shape_and_the_load(
    tokens: int, experts: int, top_k: int, fast: tuple[str, str], used: int
) -> None:
    backend, adapter = fast
    used = max(min(used, experts), min(top_k, experts))
    problem = Problem(tokens, experts, min(top_k, experts), adapter=adapter, dtype=torch.float32, used=[*range(used)])
    expected = {name: want.double() for name, want in problem.solve("reference").items()}
    assert_equal(problem.solve(backend), expected, 3e-5)


@st.composite
def picks(draw: st.DrawFn) -> tuple[Tensor, int]:
    """experts [N, K] of a number of experts: even, skewed or all on one, an expert more than once in a row included."""
    tokens, top_k = draw(st.integers(1, 200)), draw(st.integers(1, 4))
    count = draw(st.sampled_from([1, 2, 5, 16, 256, 1024]))
    highest = draw(st.integers(1, count))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return (count - 1 - torch.randint(highest, (tokens, top_k), generator=generator)), count


@given(picks())
def test_a_plan_gives_every_pick_one_row_among_those_of_its_expert(drawn: tuple[Tensor, int]) -> None:
    experts, count = drawn
    plan = plan_rows(experts, count)
    rows, number = plan.pick_of_row.numel(), experts.numel()
    of_pick = plan.row_of_pick.flatten()
    assert plan.row_of_pick.shape == experts.shape and of_pick.unique().numel() == number
    assert torch.equal(plan.pick_of_row[of_pick], torch.arange(number))
    assert torch.equal(plan.block_is_of_expert[of_pick // ALIGN], F.one_hot(experts.flatten(), count).bool())
    assert torch.equal(plan.token_of_row[plan.row_of_pick], torch.arange(len(experts))[:, None].expand_as(experts))
    # Rows of no pick say so: their index is one past the end.
    spare = torch.ones(rows, dtype=torch.bool).index_fill(0, of_pick, False)
    assert (plan.pick_of_row[spare] == number).all() and (plan.token_of_row[spare] == len(experts)).all()
    # Picks keep their order within an expert, so that the sums over its rows have one order.
    for expert in experts.unique().tolist():
        assert (of_pick[experts.flatten() == expert].diff() == 1).all()


@given(picks())
def test_an_expert_has_as_few_whole_blocks_as_hold_its_picks_right_behind_the_expert_before(
    drawn: tuple[Tensor, int],
) -> None:
    experts, count = drawn
    plan = plan_rows(experts, count)
    rows = plan.pick_of_row.numel()
    blocks = -(-experts.flatten().bincount(minlength=count) // ALIGN)
    assert plan.ends.dtype == torch.int32 and torch.equal(plan.ends, (ALIGN * blocks.cumsum(0)).int())
    owner = torch.arange(count).repeat_interleave(blocks)
    owned, behind = plan.block_is_of_expert.split([len(owner), rows // ALIGN - len(owner)])
    assert torch.equal(owned, F.one_hot(owner, count).bool()) and not behind.any()
    # What the rounding adds is bounded, and depends on shapes alone.
    other = plan_rows(torch.zeros_like(experts), count)
    assert rows % ALIGN == 0 and other.pick_of_row.numel() == rows <= experts.numel() + count * ALIGN


@pytest.mark.parametrize(("backend", "adapter"), FAST)
@pytest.mark.parametrize("top_k", [1, 2])
def test_bfloat16_stays_within_bfloat16_of_the_formula(backend: str, adapter: str, top_k: int) -> None:
    problem = Problem(tokens=100, adapter=adapter, top_k=top_k, dtype=torch.bfloat16)
    assert_equal(problem.solve(backend), problem.solve_by_definition(), 0.03)


@pytest.mark.parametrize("adapter", ["none", "scale_bias", "lora"])
@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.float32), ("cpu", torch.bfloat16), pytest.param("cuda", torch.bfloat16, marks=gpu)],
)
def test_compiled_grouped_gives_the_values_and_gradients_of_the_formula(
    device: str, dtype: torch.dtype, adapter: str
) -> None:
    problem = Problem(
        tokens=256, experts=9, top_k=2, width=64, hidden=128, adapter=adapter, dtype=dtype, device=device,
        used=[0, 3, 8],
    )  # fmt: skip
    # On a CPU the graph is traced but runs as it is: what is compiled for it is torch's affair and slow to build.
    compiled = torch.compile(expert_ffn, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    y = compiled("grouped", problem.x, problem.w1, problem.w2, problem.adapter, problem.experts, problem.gates)
    leaves = problem.leaves()
    gradients = torch.autograd.grad((y * problem.direction).sum(), list(leaves.values()))
    results = {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}
    assert_equal(results, problem.solve_by_definition(), 3e-5 if dtype == torch.float32 else 0.03)
    assert all((results[name][[1, 2, 4, 5, 6, 7]] == 0).all() for name in ("w1", "w2"))


@pytest.mark.parametrize("backend", ["reference", *FAST_BACKENDS])
def test_x_may_be_a_view_that_is_not_contiguous(backend: str) -> None:
    problem = Problem(dtype=torch.float32)
    expected = problem.solve_by_definition()
    columns = problem.x.detach().T.contiguous()
    spread = torch.stack([problem.x.detach(), torch.full_like(problem.x, 1e6)], dim=1).flatten(0, 1)
    for view in (columns.T, spread[::2]):
        assert not view.is_contiguous()
        problem.x = view.requires_grad_()
        assert_equal(problem.solve(backend), expected, 3e-5)
        problem.x = view.detach()


@pytest.mark.parametrize(
    ("backend", "adapter"), FAST + [(name, kind) for name in ("reference", "gathered") for _, kind in FAST[:3]]
)
def test_a_gate_of_zero_gives_its_expert_and_its_token_exactly_nothing(backend: str, adapter: str) -> None:
    problem = Problem(top_k=2, adapter=adapter, dtype=torch.float32)
    with torch.no_grad():
        problem.gates[problem.experts == 3] = 0.0
        problem.gates[7] = 0.0
    assert (problem.experts == 3).any()
    results = problem.solve(backend)
    assert (results["y"][7] == 0).all() and (results["x"][7] == 0).all()
    for name in problem.leaves().keys() - {"x", "gates"}:
        assert (results[name][3] == 0).all() and (results[name][0] != 0).any()


@pytest.mark.parametrize(("backend", "adapter"), FAST)
def test_an_expert_that_no_token_picked_gets_exactly_zero_gradients(backend: str, adapter: str) -> None:
    problem = Problem(experts=7, used=[1, 4], adapter=adapter, dtype=torch.float32)
    results = problem.solve(backend)
    for name in problem.leaves().keys() - {"x", "gates"}:
        assert (results[name][[0, 2, 3, 5, 6]] == 0).all() and (results[name][[1, 4]] != 0).any()


@pytest.mark.parametrize(("backend", "adapter"), FAST)
def test_what_memory_held_in_rows_that_no_product_writes_is_in_no_result(
    backend: str, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(adapter=adapter, top_k=2, dtype=torch.float32)
    assert plan_rows(problem.experts, 5).ends[-1] < len(plan_rows(problem.experts, 5).pick_of_row)
    expected = problem.solve_by_definition()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # with that, new memory is full of NaN
    try:
        assert torch.empty(3).isnan().all()
        assert_equal(problem.solve(backend), expected, 3e-5)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_the_same_inputs_give_the_same_bits(backend: str) -> None:
    problem = Problem(tokens=300, top_k=2, dtype=torch.float32)
    first, second = problem.solve(backend), problem.solve(backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_the_order_of_the_tokens_changes_only_the_order_of_the_results(backend: str) -> None:
    problem = Problem(tokens=50, top_k=2, dtype=torch.float32)
    y = problem.solve(backend)["y"]
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    x, experts, gates = problem.x[order], problem.experts[order], problem.gates[order]
    shuffled = expert_ffn(backend, x, problem.w1, problem.w2, problem.adapter, experts, gates)
    torch.testing.assert_close(shuffled, y[order], rtol=0, atol=1e-5)


def test_auto_takes_what_is_fastest_and_works() -> None:
    def choice(dtype: torch.dtype, tokens: int = FEW + 1, device: str = "cpu", plain: bool = True) -> str:
        return choose_backend("auto", torch.device(device), dtype, tokens, plain)

    for dtype in (torch.float32, torch.bfloat16):
        assert choice(dtype) == ("cpu" if bank_cpu.DTYPES else "grouped")
        assert choice(dtype, device="cuda") == ("triton" if TRITON_INSTALLED else "grouped")
        assert choice(dtype, device="cuda", plain=False) == choice(dtype, plain=False) == "grouped"
    assert choice(torch.float64) == "reference"
    assert choice(torch.float64, tokens=1) == choice(torch.bfloat16, tokens=FEW) == "gathered"
    assert choose_backend("reference", torch.device("cpu"), torch.float32, 1, True) == "reference"


def test_triton_is_for_many_tokens_on_cuda_and_else_what_auto_is() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_backend("triton", cuda, torch.bfloat16, FEW + 1, True) == "triton"
    assert choose_backend("triton", cuda, torch.bfloat16, FEW, True) == "gathered"
    assert choose_backend("triton", cpu, torch.float64, 128, True) == "reference"


def test_grouped_products_are_correct_operators_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, matrices = (torch.randn(*shape, generator=generator, requires_grad=True) for shape in ((20, 8), (3, 8, 16)))
    torch.library.opcheck(_opaque_grouped_mm, (rows, matrices, torch.tensor([4, 4, 20], dtype=torch.int32)))
