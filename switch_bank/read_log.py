"""Reads what run_log.py and the trainer wrote: a log.txt taken apart, and not yet believed."""

import ast
import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from switch_bank.config import Config, from_dict

TRAINER = "train_switch_bank.py"
MODULE = re.compile(r"switch_bank/(\w+/)*\w+\.(py|cpp|h|css|js)", re.ASCII)  # knows no way out of the folder
LOSS_LINE = re.compile(
    r"step:(?P<step>\d{1,12})/(?P<steps>\d{1,12}) (?P<kind>train|val)_loss:(?P<loss>-?\d+\.\d{4}) "
    r"train_time:(?P<milliseconds>\d{1,15})ms step_avg:(?P<average>\d+\.\d\d)ms"
)


class LogError(ValueError):
    """A file that is no log of a run, or one that cannot be used. One line: what is wrong, where, what to do."""


class Loss(NamedTuple):
    """A loss that a run reports, in log.txt or in metrics.jsonl."""

    step: int
    kind: str  # "train" or "val"
    loss: str  # to 4 decimals, as printed
    milliseconds: int  # on the training clock

    def __str__(self) -> str:
        return f"step {self.step}, {self.kind}_loss {self.loss} at {self.milliseconds} ms"


class Part(NamedTuple):
    """What one start of the run wrote: a log has one part, and one more for each time that the run was resumed."""

    first_step: int
    options: dict[str, Any]  # "group.option" → value as JSON has it; all options of the version that wrote the log
    config: Config  # the same, as far as this version knows them
    losses: list[Loss]


@dataclass(frozen=True)
class Log:
    """A log.txt in its pieces."""

    path: Path
    source: dict[str, str]  # file name → text, the trainer first
    lines: list[str]  # all after the source

    @classmethod
    def read(cls, path: Path) -> "Log":
        """Raises LogError where `path` is no log, or its source names a file that is not the trainer's."""
        if not path.is_file():
            raise LogError(f"there is no file {path}: name the log.txt of a run")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise LogError(f"{path} is no log of a run: it is not UTF-8 text") from error
        if not text.startswith(f"===== {TRAINER}\n"):
            raise LogError(f"{path} is no log of a run: it does not begin with the line '===== {TRAINER}'")
        source_text, end, run_text = text.partition("\n===== run\n")
        if not end:
            raise LogError(f"{path} is no log of a run: no line '===== run' ends its source")
        source: dict[str, str] = {}
        for file in source_text.removeprefix("===== ").split("\n===== "):
            name, _, content = file.partition("\n")
            if name in source:
                raise LogError(f"{path} is refused: its source holds {name!r} twice")
            if name != TRAINER and not MODULE.fullmatch(name):
                raise LogError(f"{path} is refused: {name!r} in its source is neither {TRAINER} nor in switch_bank/")
            source[name] = content
        return cls(path, source, run_text.split("\n"))

    def find(self, pattern: str) -> list[re.Match[str]]:
        """The lines that `pattern` matches whole."""
        return [found for line in self.lines if (found := re.fullmatch(pattern, line))]

    def data(self) -> list[tuple[str, int, str]]:
        """Path, tokens and sha256 of each data file; each start of the run names them all."""
        return [(m[1], int(m[2]), m[3]) for m in self.find(r"data (.+) tokens (\d{1,18}) sha256 (\w+)")]

    def parts(self) -> list[Part]:
        """The starts of the run, in order; raises LogError where a configuration is missing or cannot be read."""
        parts: list[Part] = []
        first_step = 0
        for line in self.lines:
            if resumed := re.match(r"resumed at step (\d{1,12}),", line):
                first_step = int(resumed[1])
            elif line.startswith("config {"):
                options, config = read_options(line.removeprefix("config "), ast.literal_eval, "the config line")
                parts.append(Part(first_step, options, config, []))
            elif m := LOSS_LINE.fullmatch(line):
                if not parts:
                    raise LogError("no config line comes before the first step line")
                parts[-1].losses.append(Loss(int(m["step"]), m["kind"], m["loss"], int(m["milliseconds"])))
        if not parts:
            raise LogError("there is no config line")
        return parts


def read_options(text: str, parse: Callable[[str], Any], where: str) -> tuple[dict[str, Any], Config]:
    """The options of a written configuration by "group.option", and the Config of those that this version knows.

    Raises LogError, which says `where`, for a configuration that cannot have been a run's.
    """
    try:
        values = json.loads(json.dumps(parse(text)))  # tuples become lists, as in config.json
        preset = values.pop("preset")
        known = dataclasses.asdict(Config())
        groups = {group: {name: of[name] for name in of if name in known[group]} for group, of in values.items()}
        config = from_dict({"preset": preset} | groups).check()
    except (ValueError, TypeError, KeyError, AttributeError, SyntaxError, MemoryError, RecursionError) as error:
        raise LogError(f"{where} cannot be read: {type(error).__name__}: {error}") from error
    return {"preset": preset} | {f"{g}.{name}": value for g, of in values.items() for name, value in of.items()}, config


def differences(one: dict[str, Any], other: dict[str, Any]) -> str:
    """In which options two configurations differ, in words; empty where they are the same."""
    names = [name for name in one | other if one.get(name, "missing") != other.get(name, "missing")]
    return ", ".join(f"{name} is {one.get(name, 'missing')} and {other.get(name, 'missing')}" for name in names)
