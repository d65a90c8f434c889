"""The results of benchmarks/gpu.sh: one JSON document, its schema, and a table for reading.

python -m benchmarks.results FOLDER --out DIR     what the steps of gpu.sh left in FOLDER becomes DIR/<device>.json
python -m benchmarks.results FILE.json            checks the document against the schema and prints the table
"""

import argparse
import csv
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import device_name
from benchmarks.trace import summary
from switch_bank import run_log

NUMBER = (int, float)
MAYBE_NUMBER = (int, float, type(None))
SCHEMA: dict[str, Any] = {
    "device": str,
    "date": str,
    "small_shapes": bool,  # every step ran, but the numbers are no measurements
    "environment": str,
    "steps": [{"name": str, "status": str, "exit_code": int, "seconds": NUMBER, "command": str, "tail": str}],
    "limits": [{
        "device": str, "dtype": str, "preset": str, "shape": dict, "matmul_flops_per_s": NUMBER,
        "memory_bytes_per_s": NUMBER, "flops": NUMBER, "bytes": NUMBER, "arithmetic_ms": NUMBER, "bytes_ms": NUMBER,
    }],
    "bank": [{
        "device": str, "dtype": str, "backend": str, "routing": str, "repetitions": int,
        "shape": {"tokens": int, "width": int, "expert_width": int, "experts": int, "top_k": int, "layers": int,
                  "microbatches": int},
        "dense_ms": NUMBER, "bank_ms": NUMBER, "ratio": NUMBER, "alone_ms": NUMBER, "router_ms": NUMBER,
        "largest_error": NUMBER,
        "dense_quartiles_ms": [NUMBER], "bank_quartiles_ms": [NUMBER],
    }],
    "step": [{
        "device": str, "preset": str, "dtype": str, "repetitions": int,
        "model": {
            "layers": int, "width": int, "experts": int, "top_k": int, "expert_width": int, "slice_tokens": int,
            "slices_per_step": int,
        },
        "step_ms": NUMBER, "dense_step_ms": NUMBER, "ratio": NUMBER,
        "step_quartiles_ms": [NUMBER], "dense_step_quartiles_ms": [NUMBER],
        "tokens_per_s": NUMBER, "dense_tokens_per_s": NUMBER, "peak_memory_mb": NUMBER, "dense_peak_memory_mb": NUMBER,
        "flops_per_token": NUMBER, "dense_flops_per_token": NUMBER, "matmul_flops_per_s": NUMBER,
        "mfu": NUMBER, "dense_mfu": NUMBER,
    }],
    "optimizer": [{
        "device": str, "preset": str, "optimizer": str, "dtype": str, "matrices": int, "repetitions": int,
        "ms": NUMBER, "quartiles_ms": [NUMBER], "ratio": NUMBER,
        "orthogonality_error": {"gaussian": NUMBER, "decaying": NUMBER},
    }],
    "runs": [{
        "name": str, "result": str, "warm_up_seconds": MAYBE_NUMBER, "peak_memory_mib": MAYBE_NUMBER,
        "tokens_per_s": MAYBE_NUMBER,
        "val": [{"kind": str, "step": int, "train_time_s": NUMBER, "val_loss": NUMBER, "val_tokens": int}],
    }],
    "profile": [{"name": str, "ms": NUMBER, "share": NUMBER, "calls": int}],
}  # fmt: skip
STATUS = {0: "passed", 124: "timed out", 137: "timed out", -1: "not started: no time left"}


class SchemaError(ValueError):
    """A results document that is not what SCHEMA says; the message names the place."""


def check(value: Any, schema: Any = SCHEMA, where: str = "results") -> None:
    """Raises SchemaError unless `value` has exactly the keys and types of `schema`, and every number is finite."""
    if isinstance(schema, dict):
        if not isinstance(value, dict) or value.keys() != schema.keys():
            raise SchemaError(f"{where} must be an object with exactly the keys {', '.join(schema)}")
        for key, part in schema.items():
            check(value[key], part, f"{where}.{key}")
    elif isinstance(schema, list):
        if not isinstance(value, list):
            raise SchemaError(f"{where} must be a list")
        for index, part in enumerate(value):
            check(part, schema[0], f"{where}[{index}]")
    elif not isinstance(value, schema) or isinstance(value, float) and not math.isfinite(value):
        raise SchemaError(f"{where} is {value!r}: it must be a finite value of {schema}")


def collect(folder: Path, small_shapes: bool) -> dict[str, Any]:
    """The document, from what the steps of gpu.sh left: steps.tsv, and NAME.out and NAME.err of each step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with open(folder / "steps.tsv", newline="", encoding="utf-8") as file:
        steps = [step_record(folder, *row) for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    trace = folder / "runs" / "small" / "trace.json"
    measured = {
        kind: [row for step in steps if step["name"].split("-")[0] == kind for row in rows_of(folder, step["name"])]
        for kind in ("limits", "bank", "step", "optimizer")
    }
    return {
        "device": device_name(device), "date": time.strftime("%Y-%m-%d"), "small_shapes": small_shapes,
        "environment": run_log.environment(device, 1), "steps": steps, **measured,
        "runs": [run_record(run) for run in sorted((folder / "runs").glob("*")) if (run / "log.txt").exists()],
        "profile": summary(trace, 30) if trace.exists() else [],
    }  # fmt: skip


def step_record(folder: Path, name: str, exit_code: str, seconds: str, command: str) -> dict[str, Any]:
    """A step of gpu.sh, with the ends of what it wrote, of either stream, unless it passed."""
    code = int(exit_code)
    written = [folder / f"{name}.{stream}" for stream in ("out", "err")]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in written if file.exists()]
    ends = [line for text in texts for line in text.splitlines()[-40:]]
    return {
        "name": name, "status": STATUS.get(code, "failed"), "exit_code": code, "seconds": float(seconds),
        "command": command, "tail": "" if code == 0 else "\n".join(ends),
    }  # fmt: skip


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """The JSON objects, a line each, that a step printed; those of a step that ran out of time too."""
    output = folder / f"{name}.out"
    lines = output.read_text(encoding="utf-8").splitlines() if output.exists() else []
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def run_record(run: Path) -> dict[str, Any]:
    """A training run's readings, from its folder."""
    log = (run / "log.txt").read_text(encoding="utf-8")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    def number(pattern: str) -> float | None:
        found = re.findall(pattern, log, re.MULTILINE)
        return float(found[-1]) if found else None

    speeds = [record["tokens_per_s"] for record in records if record["kind"] == "train"]
    results = re.findall("^result: .*", log, re.MULTILINE)
    return {
        "name": run.name, "result": results[-1] if results else "did not end",
        "warm_up_seconds": number(r"^compiled and warmed up in ([\d.]+) s"),
        "peak_memory_mib": number(r"^peak memory: (\d+) MiB"), "tokens_per_s": speeds[-1] if speeds else None,
        "val": [record for record in records if record["kind"] == "val"],
    }  # fmt: skip


def table(document: dict[str, Any]) -> str:
    """The document in Markdown."""
    lines = [f"# {document['device']}, {document['date']}", ""]
    if document["small_shapes"]:
        lines += ["Small shapes: every step ran, the numbers are no measurements.", ""]
    lines += ["| step | status | seconds |", "|---|---|---|"]
    lines += [f"| {step['name']} | {step['status']} | {step['seconds']:.0f} |" for step in document["steps"]]
    lines += ["", "| one bank layer | routing | dense ms | bank ms | ratio | router ms |", "|---|---|---|---|---|---|"]
    for row in document["bank"]:
        shape = row["shape"]
        name = f"{row['backend']} {row['dtype']} T={shape['tokens']} D={shape['width']} F={shape['expert_width']}"
        name += f" E={shape['experts']} K={shape['top_k']}"
        lines.append(
            f"| {name} | {row['routing']} | {row['dense_ms']:.3f} | {row['bank_ms']:.3f} | {row['ratio']:.3f} "
            f"| {row['router_ms']:.3f} |"
        )
    lines += ["", "| training step | ms | dense ms | ratio | tokens/s | of matmul peak | peak MB |", "|" + "---|" * 7]
    for row in document["step"]:
        model = row["model"]
        name = f"{row['preset']} {row['dtype']} L={model['layers']} E={model['experts']}"
        name += f" {model['slices_per_step']}x{model['slice_tokens']}"
        lines.append(
            f"| {name} | {row['step_ms']:.1f} | {row['dense_step_ms']:.1f} | {row['ratio']:.3f} "
            f"| {row['tokens_per_s']:,.0f} | {100 * row['mfu']:.1f}% | {row['peak_memory_mb']:,.0f} |"
        )
    lines += ["", "| optimizer | ms | of plain matmuls | error, gaussian | decaying |", "|---|---|---|---|---|"]
    for row in document["optimizer"]:
        errors = row["orthogonality_error"]
        lines.append(
            f"| {row['preset']} {row['optimizer']} | {row['ms']:.2f} | {row['ratio']:.3f} "
            f"| {errors['gaussian']:.4f} | {errors['decaying']:.4f} |"
        )
    lines += ["", "| run | warm-up s | tokens/s | validation: seconds, loss |", "|---|---|---|---|"]
    for run in document["runs"]:
        readings = "; ".join(f"{reading['train_time_s']:.1f} s {reading['val_loss']:.4f}" for reading in run["val"])
        speed = "" if run["tokens_per_s"] is None else f"{run['tokens_per_s']:,.0f}"
        lines.append(f"| {run['name']} | {run['warm_up_seconds']} | {speed} | {readings} |")
    lines += ["", "| what the time goes to | ms | share | calls |", "|---|---|---|---|"]
    for row in document["profile"][:15]:
        lines.append(f"| `{row['name'][:80]}` | {row['ms']:.3f} | {100 * row['share']:.1f}% | {row['calls']} |")
    for step in document["steps"]:
        if step["status"] != "passed":
            lines += ["", f"{step['name']} {step['status']}: `{step['command']}`", "```", step["tail"], "```"]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="a folder of gpu.sh's steps, or a results document")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the document")
    parser.add_argument("--small-shapes", action="store_true", help="note that the numbers are no measurements")
    options = parser.parse_args()
    try:
        if options.path.is_dir():
            document = collect(options.path, options.small_shapes)
            check(document)
            options.out.mkdir(parents=True, exist_ok=True)
            name = re.sub(r"[^A-Za-z0-9]+", "_", document["device"]).strip("_")
            file = options.out / f"{name}.json"
            file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            print(f"{file}\n")
        else:
            document = json.loads(options.path.read_text(encoding="utf-8"))
            check(document)
    except (SchemaError, OSError, json.JSONDecodeError) as error:
        print(f"error: {options.path}: {error}", file=sys.stderr)
        return 2
    print(table(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
