"""`python -m switch_bank report`: one line where no report can be made."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("vl_convert", reason="the extra 'report' is not installed")

from switch_bank.report import main


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def append(name: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text((folder / name).read_text() + text)

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (remove("config.json"), [], "config.json: No such file or directory"),
        (remove("metrics.jsonl"), [], "metrics.jsonl: No such file or directory"),
        (append("config.json", "}"), [], "config.json is not a run's configuration: Extra data"),
        (append("metrics.jsonl", "{"), [], "metrics.jsonl, line 21 is not JSON"),
        (append("metrics.jsonl", "[" * 100_000), [], "metrics.jsonl, line 21 is not JSON"),
        (append("metrics.jsonl", "1" * 10_000), [], "metrics.jsonl, line 21 is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), [], "is not a run's configuration"),
        (append("metrics.jsonl", '{"kind": "val", "step": 3}\n'), [], "its kind 'val' needs step, train_time_s"),
        (append("metrics.jsonl", '[1]\n'), [], "line 21: its kind None is none of train, val, routing"),
        (lambda folder: None, ["--out", "no/such/folder/x.html"], "no/such/folder/x.html: No such file"),
        (lambda folder: (folder / "metrics.jsonl").write_text(""), [], "has no line of training or validation yet"),
        (remove("checkpoint.pt"), ["--text", "x"], "holds no model"),
        (lambda folder: (folder / "checkpoint.pt").write_bytes(b"x"), [], "checkpoint.pt"),
        (lambda folder: (folder / "log.txt").write_text("x"), [], "log.txt is no log of a run"),
    ],
)  # fmt: skip
def test_what_cannot_be_reported_gets_one_line_and_exit_code_2(
    damage: Callable[[Path], object], arguments: list[str], message: str, copy: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(copy.parent)
    damage(copy)
    assert main([str(copy), *arguments]) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.startswith("error: ") and message in errors and errors.count("\n") == 1


def test_without_the_validation_shards_there_is_no_microscope(
    run_of: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    moved = run_of("moved")
    (moved / "val_000000.bin").unlink()
    assert main([str(moved)]) == 0
    assert "val_*.bin" in (moved / "report.html").read_text(encoding="utf-8")
    assert main([str(moved), "--text", "x"]) == 2
    assert "val_*.bin" in capsys.readouterr().err


def test_a_text_belongs_to_one_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), str(run), "--text", "x"]) == 2
    assert capsys.readouterr().err == "error: --text follows a text through one run: name one\n"


def test_without_vl_convert_the_report_is_refused_in_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([str(run)]) == 2
    assert capsys.readouterr().err == "error: a report needs vl-convert: pip install -e '.[report]'\n"
