"""python -m switch_bank report RUN [RUN ...] [--out FILE] [--text FILE_OR_TEXT] [--png DIR]"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch

from switch_bank.checkpoint import CheckpointError
from switch_bank.config import ConfigError
from switch_bank.data import DataError
from switch_bank.export import load_model
from switch_bank.model.folder import ModelFolderError
from switch_bank.read_log import LogError
from switch_bank.report.microscope import Microscope, look
from switch_bank.report.runs import ReportError, Run, told_apart


def main(arguments: list[str]) -> int:
    """Writes the page; returns the exit code: 0, or 2 after one line about what is missing or damaged."""
    parser = argparse.ArgumentParser(
        prog="python -m switch_bank report",
        description="One page that shows what a run did, or that compares several. It needs no network.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run; several are compared")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: report.html in the first RUN)")
    parser.add_argument(
        "--text", metavar="FILE_OR_TEXT", help="follow this text through the routers (default: the validation text)"
    )
    parser.add_argument("--png", type=Path, metavar="DIR", help="write the charts as pictures too")
    options = parser.parse_args(arguments)
    out = options.out or options.runs[0] / "report.html"
    try:
        if importlib.util.find_spec("vl_convert") is None:
            raise ReportError("a report needs vl-convert: pip install -e '.[report]'")
        from switch_bank.report.page import as_html, write_pngs  # only here: vl-convert is an extra

        runs = told_apart([Run.read(folder) for folder in options.runs])
        microscope, absent = _microscope(runs, options.text)
        out.write_text(as_html(runs, microscope, absent), encoding="utf-8")
        written = [out, *(write_pngs(options.png, runs, microscope) if options.png else [])]
    except (CheckpointError, ConfigError, DataError, LogError, ModelFolderError, ReportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    print("\n".join(f"{path}: written" for path in written))
    return 0


def _microscope(runs: list[Run], text: str | None) -> tuple[Microscope | None, str]:
    """The microscope, or why there is none; what a text was given for and cannot be had is raised."""
    if len(runs) > 1:
        if text is not None:
            raise ReportError("--text follows a text through one run: name one")
        return None, "It looks at one run: make a report of each."
    if text is not None and len(text) < 4096 and Path(text).is_file():
        text = Path(text).read_text(encoding="utf-8", errors="replace")
    try:
        config, model = load_model(runs[0].folder, "cuda" if torch.cuda.is_available() else "cpu")
        return look(runs[0].folder, config, model, text), ""
    except (DataError, ModelFolderError) as error:
        if text is not None:
            raise
        return None, f"There is none: {error}."
