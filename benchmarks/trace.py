"""What of a trace takes the time: the operations of `--run.profile`'s trace.json, by their own time.

python -m benchmarks.trace TRACE.json [--rows N] [--json]
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.measure import show

GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


def own_times(events: list[dict[str, Any]]) -> dict[str, tuple[float, int]]:
    """Microseconds and number of calls by name: of what ran on GPUs if anything did, else of CPU operations, each
    without the operations inside it."""
    complete = [event for event in events if event.get("ph") == "X"]
    work = [event for event in complete if event.get("cat") in GPU_WORK]
    if not work:
        work = [event for event in complete if event.get("cat") == "cpu_op"]
    microseconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    lanes: dict[tuple[Any, Any], list[dict[str, Any]]] = defaultdict(list)
    for event in work:
        lanes[event["pid"], event["tid"]].append(event)
    for lane in lanes.values():
        around: list[dict[str, Any]] = []  # the operations that the current one runs inside of
        for event in sorted(lane, key=lambda event: (event["ts"], -event["dur"])):
            while around and around[-1]["ts"] + around[-1]["dur"] <= event["ts"]:
                around.pop()
            if around and event["cat"] == "cpu_op":
                microseconds[around[-1]["name"]] -= event["dur"]
            microseconds[event["name"]] += event["dur"]
            calls[event["name"]] += 1
            around.append(event)
    return {name: (microseconds[name], calls[name]) for name in calls}


def summary(trace: Path, rows: int) -> list[dict[str, Any]]:
    """The costliest operations of a trace file, each with its time, its share of all and its number of calls."""
    times = own_times(json.loads(trace.read_text())["traceEvents"])
    total = sum(microseconds for microseconds, _ in times.values())
    ordered = sorted(times.items(), key=lambda item: -item[1][0])
    return [
        {"name": name, "ms": microseconds / 1000, "share": microseconds / total, "calls": calls}
        for name, (microseconds, calls) in ordered[:rows]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trace", description=__doc__.split("\n\n")[0])
    parser.add_argument("trace", type=Path, metavar="TRACE.json")
    parser.add_argument("--rows", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="an object a line")
    options = parser.parse_args()
    if not options.trace.is_file():
        print(f"error: {options.trace}: no such file; a run with --run.profile writes one", file=sys.stderr)
        return 2
    for row in summary(options.trace, options.rows):
        show(row, options.json, f"{row['ms']:10.3f} ms {100 * row['share']:5.1f}% {row['calls']:6} {row['name'][:100]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
