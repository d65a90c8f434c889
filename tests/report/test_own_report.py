"""The report that a run leaves in its own folder, where the extra that draws it is installed."""

from pathlib import Path

import pytest

from tests.runs import tiny, train

pytest.importorskip("vl_convert", reason="the extra 'report' is not installed")


def test_a_run_ends_with_its_report(shards: Path, tmp_path: Path) -> None:
    options = [option for option in tiny(shards) if option != "--run.no-report"]
    result = train([*options, "--run.steps", "6"], tmp_path / "run")
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "6 of 6 steps" in page and 'id="text"' in page and "<td>yes</td>" in page
