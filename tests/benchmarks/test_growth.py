"""The benchmark of growth names the limit that binds, and measures what it is asked to."""

import json

import pytest

from benchmarks import growth
from benchmarks.growth import draw, row


def test_the_larger_limit_binds_and_explains_its_share_of_the_median_time():
    found = row("experts", 8, tokens=100, times=[5.0, 4.0, 90.0], limits={"arithmetic": 1.0, "bytes": 2.0})
    assert (found["bound"], found["share_of_bound"], found["ms"]) == ("bytes", 0.4, 5.0)
    assert found["tokens_per_s"] == pytest.approx(20_000) and found["arithmetic_ms"] == 1.0


def test_each_number_grows_alone_from_the_presets_shape(program):
    sizes = ["--experts", "1", "4", "--top-k", "2", "--tokens", "64", "--layers", "2"]
    finished = program(growth, *sizes, "--seconds", "0", "--no-compile", "--json")
    assert finished.exit_code == 0, finished.err
    rows = [json.loads(line) for line in finished.out.splitlines()]
    assert [(each["varied"], each["value"]) for each in rows] == [
        ("experts", 1), ("experts", 4), ("top_k", 2), ("tokens", 64), ("layers", 2),
    ]  # fmt: skip
    arithmetic = [each["arithmetic_ms"] for each in rows]
    assert arithmetic[0] == arithmetic[1] == arithmetic[2] / 2 == pytest.approx(128 * arithmetic[3])
    assert rows[0]["bytes_ms"] < rows[1]["bytes_ms"] and "bytes_ms" not in rows[4]


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    limits = {"arithmetic": 1.0}
    draw([row(name, 2, 10, [3.0], limits) for name in growth.PLACES], "title", str(tmp_path / "growth.png"))
    assert (tmp_path / "growth.png").read_bytes()[:4] == b"\x89PNG"


def test_a_shape_that_cannot_be_gets_one_clear_line(program):
    finished = program(growth, "--top-k", "17")
    assert finished.exit_code == 2 and "top_k at most experts" in finished.err.splitlines()[-1]
