"""Counts of tokens per expert, read from a run's folder, or from text, CSV or JSON that any program wrote."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

TENSOR = r"\(\s*(-?\d+)\s*,\s*(?:torch\.)?tensor\(\s*\["  # (layer, tensor([
ROW_START = re.compile(rf"\[\s*(?={TENSOR})")
LAYER_START = re.compile(TENSOR)
LAYER = re.compile(
    TENSOR + r"([^][()]*)\][^()]*\)\s*,?\s*\)\s*"
)  # after the counts: device=..., dtype=..., grad_fn=...
ROW_END = re.compile(r",?\s*\]")
NEXT_LAYER = re.compile(r",\s*")
PART = re.compile(r"(?<![a-z])(?:(train|training)|val|valid|validation|eval|evaluation)(?![a-z])", re.IGNORECASE)
EXPERT_COLUMN = re.compile(r"(?:expert|e|count|c)?[ _]?\d{1,6}")


class CountsError(ValueError):
    """Counts that cannot be analysed. One line: what is wrong, in which row, what to do."""


class Row(NamedTuple):
    """One row as it was found; what it holds is not checked yet."""

    part: str | None  # "train" or "val", if anything said so
    name: str  # which row, and where it is
    layers: dict[int, list[Any]]  # of each layer its experts' counts: numbers, or the text of numbers
    active: list[int] | None = None  # the experts that could be chosen, if not all


@dataclass(frozen=True)
class PartCounts:
    rows: list[str]  # the rows' names, [R]
    counts: NDArray[np.int64]  # [R, L, E]


@dataclass(frozen=True)
class Counts:
    """Checked counts: whole numbers from 0 up, the same layers and experts in all rows, no layer without tokens."""

    parts: dict[str, PartCounts]  # train, then val; one part "all" if nothing told parts apart
    layers: list[int]
    experts: list[int]
    top_k: int | None  # experts per token, if the run's configuration says so
    notes: list[str]  # what the reader should know about how the counts were read


def read_counts(path: Path) -> Counts:
    """The counts in a run's folder or in a file: .csv, .json, .jsonl, and text with any other ending.

    Raises CountsError where they cannot be analysed, and OSError where the file cannot be read.
    """
    top_k: int | None = None
    if path.is_dir():
        config, path = path / "config.json", path / "metrics.jsonl"
        if not path.exists():
            raise CountsError("this folder holds no metrics.jsonl: name a run's folder or a file with counts")
        if config.exists():
            match _load(config.read_bytes(), "config.json"):
                case {"model": {"top_k": int(top_k)}}:
                    pass
                case _:
                    raise CountsError("config.json has no model.top_k that is a whole number: mend or remove it")
    text = path.read_bytes().decode("utf-8-sig", errors="replace")
    notes: list[str] = []
    match path.suffix.lower():
        case ".csv":
            rows = csv_rows(text)
        case ".json":
            rows = json_rows(text)
        case ".jsonl":
            rows = json_lines(text)
        case _:
            rows, notes = text_rows(text)
    return check_rows(rows, top_k, notes)


# --- Text


def text_rows(text: str) -> tuple[list[Row], list[str]]:
    """Rows `[(layer, tensor([c0, c1, ...])), ...]` in any text, and notes.

    A row belongs to the part that the text before it names last: a line, or the row's own line up to the row. A line
    that names both train and validation names neither.
    """
    rows: list[Row] = []
    part, line, end, layers_read, naming_both = None, 1, 0, 0, []
    for start in ROW_START.finditer(text):
        for heading in text[end : start.start()].split("\n"):
            named = parts_named(heading)
            if len(named) == 1:
                part = named.pop()
            elif named:
                naming_both.append(line)
            line += 1
        line -= 1  # the last heading shares its line with the row
        name = f"row {len(rows) + 1} (line {line})"
        layers, row_end = _text_row(text, start.end(), name)
        line += text.count("\n", start.start(), row_end)
        end, layers_read = row_end, layers_read + len(layers)
        rows.append(Row(part, name, layers))
    if len(LAYER_START.findall(text)) > layers_read:
        raise CountsError("some (layer, tensor([...])) stand outside of any row: a row begins with [( and ends with )]")
    notes = []
    if naming_both:
        notes.append(
            "lines that name both train and validation were not used to tell the parts apart: "
            f"{len(naming_both)}, the first is line {naming_both[0]}"
        )
    return rows, notes


def _text_row(text: str, at: int, name: str) -> tuple[dict[int, list[Any]], int]:
    """The layers of the row whose first layer begins at `at`, and where the row ends."""
    layers: dict[int, list[Any]] = {}
    while True:
        cell = LAYER.match(text, at)
        if cell is None:
            after = f"after layer {list(layers)[-1]}" if layers else "at its first layer"
            raise CountsError(
                f"{name} cannot be read {after}: expected (layer, tensor([c0, c1, ...])), found {text[at : at + 30]!r}"
            )
        if len(cell[1]) > 18:
            raise CountsError(f"{name}: {cell[1][:18]}... is no layer: write a number of up to 18 digits")
        layer, numbers = int(cell[1]), cell[2].strip()
        if layer in layers:
            raise CountsError(f"{name} has layer {layer} twice")
        layers[layer] = numbers.split(",") if numbers else []
        if end := ROW_END.match(text, cell.end()):
            return layers, end.end()
        comma = NEXT_LAYER.match(text, cell.end())
        if comma is None:
            found = text[cell.end() : cell.end() + 30]
            raise CountsError(f"{name} breaks off after layer {layer}: expected a comma or ], found {found!r}")
        at = comma.end()


def parts_named(text: str) -> set[str]:
    return {"train" if match[1] else "val" for match in PART.finditer(text)}


def _one_part(name: object, row: str) -> str:
    named = parts_named(str(name))
    if len(named) != 1:
        raise CountsError(f"{row}: {name!r} is no part: write train or val")
    return named.pop()


# --- JSON


def json_rows(text: str) -> list[Row]:
    """A list of rows, or an object {"train": rows, "val": rows}; a row is [layers][experts] or an object of a run's
    metrics: {"counts": [layers][experts], "split": "train" or "val", "step": ..., "active": [experts]}, where only
    counts must be there."""
    value = _load(text, "the file")
    groups: list[tuple[str | None, Any]] = [(None, value)]
    if isinstance(value, dict):
        groups = [(_one_part(key, "the file"), rows) for key, rows in value.items()]
    rows: list[Row] = []
    for part, items in groups:
        if not isinstance(items, list):
            raise CountsError('expected a list of rows, or {"train": [rows], "val": [rows]}')
        rows += [_json_row(item, part, f"row {number}") for number, item in enumerate(items, len(rows) + 1)]
    return rows


def json_lines(text: str) -> list[Row]:
    """A run's metrics: the lines whose kind is "routing", each an object as in `json_rows`."""
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            item = _load(line, f"line {number}")
            if not isinstance(item, dict):
                raise CountsError(f"line {number} is not an object")
            if item.get("kind") == "routing":
                rows.append(_json_row(item, None, f"row {len(rows) + 1}"))
    if not rows:
        raise CountsError('no rows: no line of this file is of the kind "routing"')
    return rows


def _json_row(item: Any, part: str | None, name: str) -> Row:
    counts, active = item, None
    if isinstance(item, dict):
        counts, active = item.get("counts"), item.get("active")
        if "step" in item:
            name = f"{name} (step {item['step']})"
        if "split" in item:
            part = _one_part(item["split"], name)
    if not (isinstance(counts, list) and all(isinstance(layer, list) for layer in counts)):
        raise CountsError(f"{name}: its counts are not a list over layers of lists over experts")
    if not isinstance(active, list | None):
        raise CountsError(f"{name}: its active experts are {active!r}: expected a list of their numbers")
    return Row(part, name, dict(enumerate(counts)), active)


def _load(text: str | bytes, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also not UTF-8, a number too long and lists too deep for Python
        raise CountsError(f"{place} is not JSON that can be read: {error}") from None


# --- CSV


def csv_rows(text: str) -> list[Row]:
    """Lines of columns separated by comma, semicolon or tab, under a line with their names.

    Either a line for each count: columns expert and count; or a line for all experts: a column each, named by number
    (expert_0, e0, 0). Columns layer, split and step may stand beside them. Lines of the same step and split make a
    row; without steps, the n-th line of each layer and split (and expert) belongs to its n-th row.
    """
    header, *lines = text.splitlines() or [""]
    separator = max(",;\t", key=header.count)
    names = [name.lower() for name in _cells(header, separator)]
    wide = sorted(filter(EXPERT_COLUMN.fullmatch, names), key=lambda name: int(re.sub(r"\D", "", name)))
    known = {"layer", "split", "step", *(wide or ["expert", "count"])}
    if set(names) - known or len(set(names)) < len(names) or not (wide or {"expert", "count"} <= set(names)):
        raise CountsError(
            f"the first line is {header[:60]!r}: it must name the columns, expert and count or one numbered column an "
            "expert, and if there are any layer, split and step"
        )
    found: dict[tuple[str | None, str], Row] = {}
    times: Counter[tuple[str | None, int, int]] = Counter()
    for number, text_line in enumerate(lines, 2):
        if not text_line.strip():
            continue
        cells = _cells(text_line, separator)
        if len(cells) != len(names):
            raise CountsError(f"line {number} has {len(cells)} columns and the first line {len(names)}")
        line = dict(zip(names, cells, strict=True))
        part = _one_part(line["split"], f"line {number}") if "split" in names else None
        layer = _index(line.get("layer", "0"), f"line {number}: layer")
        experts = range(len(wide)) if wide else [_index(line["expert"], f"line {number}: expert")]
        for expert, value in zip(experts, (line[name] for name in wide or ["count"]), strict=True):
            step = line.get("step", str(times[part, layer, expert]))
            times[part, layer, expert] += 1
            label = f"row {len(found) + 1} (step {step})" if "step" in names else f"row {len(found) + 1}"
            row = found.setdefault((part, step), Row(part, label, {}))
            counts = row.layers.setdefault(layer, [])
            counts += [None] * (expert + 1 - len(counts))
            if counts[expert] is not None:
                raise CountsError(f"{row.name}, layer {layer}, expert {expert} is there twice, again in line {number}")
            counts[expert] = value
    return list(found.values())


def _cells(line: str, separator: str) -> list[str]:
    return [cell.strip().strip('"') for cell in line.split(separator)]


def _index(text: str, place: str) -> int:
    if not text.isdecimal() or len(text) > 6:
        raise CountsError(f"{place} is {text!r}: it must be a whole number from 0 to 999999")
    return int(text)


# --- Checks


def check_rows(rows: list[Row], top_k: int | None, notes: list[str]) -> Counts:
    """The rows as arrays, part by part. Raises CountsError, naming the row, where they do not fit together."""
    if not rows:
        raise CountsError("no rows: a row is [(layer, tensor([c0, c1, ...])), (layer, tensor([...])), ...]")
    active, notes = rows[-1].active, list(notes)
    kept = [row for row in rows if row.active == active]
    if len(kept) < len(rows):
        notes.append(f"rows left out, as other experts were active than in {rows[-1].name}: {len(rows) - len(kept)}")
    first = kept[0]
    layers = sorted(first.layers)
    found = [(row, list(_row_counts(row, first, layers))) for row in kept]
    width = len(found[0][1][0])
    experts = list(range(width)) if active is None else active
    are_experts = all(type(expert) is int and 0 <= expert < width for expert in experts)
    if not experts or not are_experts or len(set(experts)) < len(experts):
        raise CountsError(f"{first.name}: its active experts are {experts}: expected different numbers below {width}")

    named = {row.part for row in kept if row.part}
    unnamed = "all" if not named else "train" if named == {"val"} else "unnamed"
    if named and any(row.part is None for row in kept):
        notes.append(f"rows of no named part, here called {unnamed!r}: {sum(row.part is None for row in kept)}")
    parts = {}
    for part in ("all", "unnamed", "train", "val"):
        own = [(row, counts) for row, counts in found if (row.part or unnamed) == part]
        if own:
            counts = np.array([counts for _, counts in own], dtype=np.int64)[..., experts]
            for row, layer in np.argwhere(counts.sum(-1) == 0):
                raise CountsError(f"{own[row][0].name}, layer {layers[layer]} counts no tokens at all")
            parts[part] = PartCounts([row.name for row, _ in own], counts)
    return Counts(parts, layers, experts, top_k, notes)


def _row_counts(row: Row, first: Row, layers: list[int]) -> Iterator[list[int]]:
    """The counts of each layer of a row that must have the layers and experts of the first row."""
    if sorted(row.layers) != layers or not layers:
        has, had = (", ".join(map(str, sorted(r.layers))) or "none" for r in (row, first))
        raise CountsError(f"{row.name} has layers {has}; the first row has layers {had}")
    experts = len(first.layers[layers[0]])
    for layer in layers:
        values = row.layers[layer]
        if len(values) != experts or not values:
            raise CountsError(
                f"{row.name}, layer {layer} has {len(values)} counts; the first row starts with {experts}"
            )
        counts = []
        for expert, value in enumerate(values):
            count = _whole_number(value)
            if count is None:
                shown = repr(value.strip()) if isinstance(value, str) else "there" if value is None else value
                raise CountsError(
                    f"{row.name}, layer {layer}, expert {expert}: {shown} is no count: counts are whole, from 0 up"
                )
            counts.append(count)
        yield counts


def _whole_number(value: Any) -> int | None:
    """The count that a number or its text stands for ("255." and "1.0e+03" too), or None."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if number.is_integer() and 0 <= number < 2**53 and value is not True else None
