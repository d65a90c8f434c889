"""The limits of a bank layer: FLOPs and bytes by hand."""

from benchmarks.bank import Shape
from benchmarks.limits import layer_bytes, layer_flops


def test_flops_are_two_for_each_weight_token_and_product():
    assert layer_flops(Shape(tokens=10, width=3, expert_width=5, experts=7, top_k=2)) == 6 * (2 * 3 * 5) * (10 * 2)


def test_bytes_grow_with_the_rows_and_with_all_experts_weights():
    one = Shape(tokens=10, width=3, expert_width=5, experts=1, top_k=1)
    assert layer_bytes(one, 2) == 2 * (5 * 10 * 3 + 8 * 10 * 5) + (2 * 3 * 5) * (4 + 4 + 2 + 2 + 4 + 4)
    more = layer_bytes(one._replace(experts=4), 2) - layer_bytes(one, 2)
    assert more == 3 * (2 * 3 * 5) * 20
