"""Can a run's log be believed? `verify` looks for what does not agree in it, `replay` runs its source once more.

python -m switch_bank records verify LOG        python -m switch_bank records replay LOG --steps N --yes

A log that agrees with itself may still be made up, by somebody who changed every place that says the same thing. A
replay is the stronger test: there the losses have to come out of the source.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from switch_bank import run_log
from switch_bank.data import HEADER, TOKEN
from switch_bank.read_log import LOSS_LINE, Log, LogError, Loss, Part, differences, read_options
from switch_bank.replay import replay

RESULT = (
    r"result: val_loss (?P<val_loss>\S+) over (?P<tokens>\S+) tokens after (?P<steps>\S+) steps, "
    r"(?P<seconds>\d+\.\d) s of training, seed (?P<seed>\S+), resumed (?P<resumed>\S+) times, "
    r"(?P<verdict>causal: yes|NOT CAUSAL) .*"
)


def main(arguments: list[str]) -> int:
    """Exit code: 0 if all agrees, 1 if something does not, 2 for what is no log and for anything else to put right."""
    parser = argparse.ArgumentParser(prog="python -m switch_bank records", description="Check the log of a run.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verify_parser = verbs.add_parser("verify", help="re-read a log and say what in it does not agree; runs nothing")
    replay_parser = verbs.add_parser("replay", help="run the source in a log again and compare the first losses")
    for verb in (verify_parser, replay_parser):
        verb.add_argument("log", metavar="LOG", type=Path, help="log.txt of a run; its neighbours are read too")
    replay_parser.add_argument("--steps", type=int, required=True, help="how many steps of the run to take")
    replay_parser.add_argument("--yes", action="store_true", help="do run the code that is in the log")
    for split in ("train", "val"):
        replay_parser.add_argument(
            f"--data.{split}", dest=split, metavar="GLOB", help="where that data lies here, if not where the log says"
        )
    options = parser.parse_args(arguments)
    try:
        log = Log.read(options.log)
        if options.verb == "verify":
            return verify(log)
        return replay(log, options.steps, options.train, options.val, options.yes)
    except (LogError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def verify(log: Log) -> int:
    """Prints what the log holds, and a line for each thing that does not agree. 0 if all agrees, else 1."""
    wrong = [*check_source(log), *check_data(log), *check_parameter_table(log), *check_graphs(log)]
    wrong += check_verdicts(log)
    try:
        parts = log.parts()
        for check in (check_options, check_step_lines, check_all_steps_are_there, check_metrics, check_result):
            wrong += check(log, parts)
    except LogError as error:
        wrong.append(str(error))
    for line in remarks(log):
        print(line)
    for line in wrong:
        print(f"does not agree: {line}")
    print(f"{log.path}: {f'{len(wrong)} things do not agree' if wrong else 'all agrees'}")
    return 1 if wrong else 0


def remarks(log: Log) -> Iterator[str]:
    """What the reader of a verdict should know besides; no fault of the log."""
    here = run_log.source_files()
    other = sorted(name for name in log.source | here if log.source.get(name) != here.get(name))
    same = f"differs from this package in {', '.join(other)}" if other else "the same as this package"
    yield f"source: {len(log.source)} files, {same}"
    for path in dict.fromkeys(path for path, _, _ in log.data()):
        if not Path(path).is_file():
            yield f"data: {path} is not here, its checksum was not compared"
    for name in ("config.json", "metrics.jsonl"):
        if not (log.path.parent / name).is_file():
            yield f"{name} is not beside the log and was not compared"
    yield from (line for line in log.lines if line.startswith("result: "))


# ---- the checks: each yields a line for each thing that does not agree -----------------------------------------------


def check_source(log: Log) -> Iterator[str]:
    """Every start of the run gives the checksums of just this source."""
    given = {(found[1], found[2]) for found in log.find(r"source (\S+) sha256 (\w+)")}
    own = {(name, hashlib.sha256(text.encode()).hexdigest()) for name, text in log.source.items()}
    for name, sha256 in sorted(given - own):
        yield f"source {name}: the log gives the checksum {sha256} and holds another text"
    for name in sorted(log.source.keys() - {name for name, _ in given}):
        yield f"source {name}: the log gives no checksum"


def check_data(log: Log) -> Iterator[str]:
    """Each data file that is here has the checksum and the length of the log."""
    if not log.data():
        yield "data: the log names no file"
    for path, tokens, sha256 in sorted(set(log.data())):
        if not Path(path).is_file():
            continue
        # First, as some files of /proc never end: their size is 0.
        if os.path.getsize(path) != HEADER.itemsize + TOKEN.itemsize * tokens:
            yield f"data {path}: the log says {tokens} tokens and the file holds another number"
        elif (found := file_sha256(path)) != sha256:
            yield f"data {path}: the log gives the checksum {sha256} and the file has {found}"


def file_sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def check_parameter_table(log: Log) -> Iterator[str]:
    """The rows of the table of parameters add up to its last one."""
    rows = [line.replace(",", "").rsplit(maxsplit=2) for line in log.lines]
    start = rows.index(["part", "parameters", "active"]) if ["part", "parameters", "active"] in rows else len(rows)
    sums = [0, 0]
    for row in rows[start + 1 :]:
        if len(row) != 3 or not (row[1].isdecimal() and row[2].isdecimal() and len(row[1] + row[2]) < 40):
            break
        numbers = [int(row[1]), int(row[2])]
        if row[0] == "total":
            if numbers != sums:
                yield "the table of parameters: its rows add up to {:,} and {:,}, its total is {:,} and {:,}".format(
                    *sums, *numbers
                )
            return
        sums = [sums[0] + numbers[0], sums[1] + numbers[1]]
    yield "the table of parameters is not whole"


def check_graphs(log: Log) -> Iterator[str]:
    """Nothing was compiled after step 0."""
    counts = [found[1] for found in log.find(r"graphs compiled before step 0: \d+, after it: (\d+)")]
    if not counts:
        yield "no line says how many graphs were compiled after step 0"
    for count in counts:
        if count != "0":
            yield f"{count} graphs were compiled after step 0, where there must be none"


def is_verdict(line: str) -> bool:
    return line.startswith(("causal: yes", "NOT CAUSAL"))


def check_verdicts(log: Log) -> Iterator[str]:
    """Each verdict on causality is that of the findings below it."""
    if not any(map(is_verdict, log.lines)):
        yield "the log has no check of causality"
    elif "the same of the trained weights:" not in log.lines:
        yield "the log has no check of causality of the trained weights"
    for index, line in enumerate(log.lines):
        if is_verdict(line):
            findings = []
            for finding in log.lines[index + 1 :]:
                if not finding.startswith("  "):
                    break
                findings.append(": passed: " in finding)
            if not findings or all(findings) != line.startswith("causal: yes"):
                yield f"the verdict {line!r} stands over {sum(findings)} of {len(findings)} checks passed"


def check_options(log: Log, parts: list[Part]) -> Iterator[str]:
    """The configuration is that of config.json, of the run's name and length, and the same at each resume."""
    beside = log.path.parent / "config.json"
    if beside.is_file():
        text = beside.read_text(encoding="utf-8", errors="replace")
        if wrong := differences(parts[0].options, read_options(text, json.loads, "config.json")[0]):
            yield f"the config line and config.json: {wrong}"
    first, *others = (  # of the options of a run, the seed alone says what was run
        {n: value for n, value in part.options.items() if not n.startswith("run.") or n == "run.seed"} for part in parts
    )
    for part, other in zip(parts[1:], others, strict=True):
        if wrong := differences(first, other):
            yield f"the config lines at the start and at step {part.first_step}: {wrong}"
    for config in (part.config for part in parts):
        name = config.preset if config.model.causal else f"{config.preset}-NOT-CAUSAL"
        if log.lines[0] != f"name: {name}":
            yield f"{log.lines[0]!r} is not the name {name!r}, as the config line has it"
        step_tokens = config.data.slices_per_step * config.data.slice_tokens
        length = f"{config.schedule.steps} steps of {step_tokens} tokens, N an epoch, seed {config.run.seed}"
        if not log.find(length.replace("N", r"\d+")):
            yield f"there is no line {length!r}, as the config line has it"


def check_step_lines(log: Log, parts: list[Part]) -> Iterator[str]:
    """Step lines are whole and in order, and their times agree."""
    steps, last_step, last_train, last_time = parts[0].config.schedule.steps, 0, 0, 0
    for line in log.lines:
        if not line.startswith("step:"):
            continue
        loss, any_line = LOSS_LINE.fullmatch(line), re.match(r"step:(\d{1,12})/(\d{1,12}) ", line)
        if any_line is None or loss is None and "_loss" in line:
            yield f"not a whole step line: {line!r}"
            continue
        step = int(any_line[1])
        if int(any_line[2]) != steps:
            yield f"step {step} is one of {any_line[2]}, and the config line has {steps}"
        if step < last_step:
            yield f"step {step} comes after step {last_step}"
        last_step = step
        if loss is None:
            continue
        if loss["kind"] == "train":
            if step == last_train:
                yield f"step {step} has two training lines"
            last_train = step
        time, average, count = int(loss["milliseconds"]), float(loss["average"]), max(1, step)
        if abs(average - time / count) > 0.5 / count + 0.0051:  # both are rounded
            yield f"step {step}: step_avg is {average} ms, train_time by steps {time / count:.2f} ms"
        if time < last_time:
            yield f"step {step} is at {time} ms, a line after {last_time} ms"
        last_time = time


def check_all_steps_are_there(log: Log, parts: list[Part]) -> Iterator[str]:
    """The log has the lines that its configuration asks for, no fewer and no more; each start also reports its first
    step. It has one line for every resume."""
    finished = any(line.startswith("result: ") for line in log.lines)
    for part, later in zip(parts, [*parts[1:], None], strict=True):
        train = {loss.step for loss in part.losses if loss.kind == "train"}
        val = Counter(loss.step for loss in part.losses if loss.kind == "val")
        run, first, every = part.config.run, part.first_step, part.config.run.log_every
        end = later.first_step if later else part.config.schedule.steps if finished else max(train, default=first)
        due = chain([first + 1] if first < end else [], range(((first + 1) // every + 1) * every, end + 1, every))
        val_due = {step for step in run.val_at_steps if first <= step < end} | (
            {end} if finished and not later else set()
        )
        for kind, missing in (
            ("training", (step for step in due if step not in train)),
            ("validation", (step for step in sorted(val_due) if step not in val)),
        ):
            if some := list(islice(missing, 10)):  # a made-up length does not make a list without end
                yield f"no {kind} line at step {', '.join(map(str, some))}{' ...' if len(some) == 10 else ''}"
        for step in sorted(train):
            if not first < step <= end or step % every and step != first + 1:
                yield f"the training line of step {step} is one that this run does not write"
        for step, times in val.items():
            if times > 1:
                yield f"step {step} has {times} validation lines"
    losses = [loss for part in parts for loss in part.losses]
    for reading in parts[0].config.run.val_at_seconds:
        # Only the step that was running then may be reported before the validation is.
        after = [loss.kind for loss in losses if loss.milliseconds > 1000 * reading + 1]
        if after[:2] == ["train", "train"]:
            yield f"the validation line of {reading:g} s is missing"
    numbers = [int(found[1]) for found in log.find(r"resumed at step \d+, resume number (\d{1,9})")]
    if numbers != list(range(1, len(parts))):
        yield f"there are {len(parts)} config lines, one for each start, and resumes with the numbers {numbers}"


def check_metrics(log: Log, parts: list[Part]) -> Iterator[str]:
    """metrics.jsonl holds the losses of the log, and every validation read the same tokens."""
    beside = log.path.parent / "metrics.jsonl"
    if not beside.is_file():
        return
    in_log, in_metrics = [loss for part in parts for loss in part.losses], []
    for number, line in enumerate(beside.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            kind = record["kind"]
            if kind in ("train", "val"):
                milliseconds = int(f"{1000 * record['train_time_s']:.0f}")
                in_metrics.append(Loss(int(record["step"]), kind, f"{record[f'{kind}_loss']:.4f}", milliseconds))
                tokens = parts[0].config.data.val_tokens
                if kind == "val" and record["val_tokens"] != tokens:
                    yield f"the validation at step {record['step']} read {record['val_tokens']} tokens, not {tokens}"
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            yield f"line {number} of metrics.jsonl cannot be read"
    for loss in Counter(in_log) - Counter(in_metrics):
        yield f"the log has {loss}, and metrics.jsonl has not"
    for loss in Counter(in_metrics) - Counter(in_log):
        yield f"metrics.jsonl has {loss}, and the log has not"


def check_result(log: Log, parts: list[Part]) -> Iterator[str]:
    """The result is that of the last validation, the configuration and the verdicts."""
    results = [line for line in log.lines if line.startswith("result: ")]
    validations = [loss for part in parts for loss in part.losses if loss.kind == "val"]
    result = re.fullmatch(RESULT, results[0]) if len(results) == 1 else None
    if result is None or not validations:
        yield f"{len(results)} result lines, {len(validations)} validations: there must be a whole one, of the last"
        return
    config, last = parts[-1].config, validations[-1]
    yes = config.model.causal and not any(line.startswith("NOT CAUSAL") for line in log.lines)
    for name, found, where in (
        ("val_loss", last.loss, "the last validation"),
        ("steps", str(last.step), "the last validation"),
        ("tokens", str(config.data.val_tokens), "the config line"),
        ("seed", str(config.run.seed), "the config line"),
        ("resumed", str(len(parts) - 1), "the number of resumes"),
        ("verdict", "causal: yes" if yes else "NOT CAUSAL", "the checks of causality"),
    ):
        if result[name] != found:
            yield f"the result: {name} is {result[name]}, by {where} it is {found}"
    if abs(float(result["seconds"]) - last.milliseconds / 1000) > 0.0506:  # both are rounded
        yield f"the result: {result['seconds']} s of training, by the last validation {last.milliseconds / 1000} s"
