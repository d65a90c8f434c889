"""Ablations: the trainer in several ways, and one table of what came of them."""

import json
import math
from pathlib import Path

import pytest

from experiments.ablations import ABLATIONS, figures, main, table
from tests.runs import tiny


def test_the_four_ways_of_balancing_are_compared_in_one_table(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    small = ["--steps", "3", "--seeds", "1", "--out", str(tmp_path / "new"), *tiny(shards)[1:]]
    assert main(["router_balance", *small, "--model.top-k", "2"]) == 0
    output = capfd.readouterr().out
    ways = ["softmax, aux", "softmax, bias", "sigmoid, aux", "sigmoid, bias"]
    text = (tmp_path / "new" / "router_balance.md").read_text()
    assert text in output
    written = (tmp_path / "new" / "router_balance.json").read_text()
    saved = json.loads(written)
    assert "Infinity" not in written
    assert list(saved["results"]) == ways and "--steps 3" in saved["command"]
    for way in ways:
        score, balance = way.split(", ")
        folder = tmp_path / "new" / f"{score}-{balance}-0"
        model = json.loads((folder / "config.json").read_text())["model"]
        assert (model["score"], model["balance"], model["top_k"], model["adapter"]) == (score, balance, 2, "lora")
        reported = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        loss = [line["val_loss"] for line in reported if line["kind"] == "val"][-1]
        plain = {name: value if math.isfinite(value) else None for name, value in figures(folder).items()}
        assert saved["results"][way] == [plain] and plain["val_loss"] == loss
        assert f"| {way} | {loss:.4f} | - |" in text


def test_a_row_holds_the_means_over_the_seeds_and_the_spread_of_the_loss() -> None:
    run = {"val_loss": 3.0, "train_time_s": 9.0, "cv": 0.25, "max_min": 2.0, "health": 0.5, "least_used": 0.5}
    rows = table({"one": [run, run | {"val_loss": 3.5, "cv": 0.75, "least_used": 0.25}], "dense": [
        {"val_loss": 2.0, "train_time_s": 5.0}
    ]})  # fmt: skip
    assert rows[1] == ["one", "3.2500", "0.5000", "50.0%", "2.00", "0.50", "0.38", "9"]
    assert rows[2] == ["dense", "2.0000", "-", "-", "-", "-", "-", "5"]


def test_figures_are_those_of_the_last_validation(tmp_path: Path) -> None:
    lines = [
        {"kind": "val", "step": 1, "val_loss": 9.0, "train_time_s": 1.0},
        {"kind": "val", "step": 2, "val_loss": 4.0, "train_time_s": 2.0},
        {"kind": "routing", "split": "val", "active": [0, 2], "counts": [[10, 0, 30], [20, 0, 20]], "health": 0.9},
        {"kind": "routing", "split": "train", "active": [0, 1, 2], "counts": [[1, 1, 1]] * 2, "health": 0.1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert figures(tmp_path) == {
        "val_loss": 4.0, "train_time_s": 2.0, "cv": 0.25, "max_min": 2.0, "health": 0.9, "least_used": 0.75,
    }  # fmt: skip


def test_a_run_that_fails_ends_the_comparison_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["router_balance", "--out", str(tmp_path), "--data.train", "no/such/*.bin", "--steps", "2"]) == 2
    errors = capfd.readouterr().err
    assert errors.count("\n") == 1 and errors.startswith("error: softmax, aux, seed 0: error: ")
    assert "no/such/*.bin" in errors and not (tmp_path / "router_balance.md").exists()


def test_the_command_line_itself_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in ((["no_such"], "invalid choice"), (["router_balance", "--seeds", "0"], "at least 1")):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2 and message in capsys.readouterr().err


def test_every_way_of_an_ablation_has_a_name_that_can_be_a_folder() -> None:
    for ablation in ABLATIONS.values():
        assert len(ablation.ways) > 1 and not any("/" in way for way in ablation.ways)
