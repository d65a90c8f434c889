"""python -m switch_bank balance FILE|RUN [--top-k K] [--json] [--html FILE] [--png DIR]"""

import argparse
import importlib.util
import sys
from pathlib import Path

from switch_bank.balance.analysis import analyse
from switch_bank.balance.counts import CountsError, read_counts
from switch_bank.balance.report import as_html, as_json, as_text


def main(arguments: list[str]) -> int:
    """Prints the analysis; returns the exit code: 0, or 2 after one line about input that cannot be analysed."""
    parser = argparse.ArgumentParser(
        prog="python -m switch_bank balance",
        description="How evenly are tokens spread over experts, layer by layer? From a run's folder or from counts.",
    )
    parser.add_argument(
        "source", type=Path, metavar="FILE|RUN", help="a run's folder; .csv, .json, .jsonl; or text with rows of counts"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="experts per token: tells how many tokens a row has")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a self-contained page too")
    parser.add_argument("--png", type=Path, metavar="DIR", help="write pictures too (needs the extra 'report')")
    options = parser.parse_args(arguments)
    try:
        counts = read_counts(options.source)
        balance = analyse(str(options.source), counts, options.top_k)
        if options.html:
            options.html.write_text(as_html(balance), encoding="utf-8")
        if options.png:
            if importlib.util.find_spec("matplotlib") is None:
                raise CountsError("--png needs matplotlib: pip install -e '.[report]'")
            from switch_bank.balance.pictures import write_pngs  # only here: matplotlib is an extra

            write_pngs(options.png, balance, counts)
    except CountsError as error:
        print(f"error: {options.source}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    print(as_json(balance) if options.json else as_text(balance))
    return 0
