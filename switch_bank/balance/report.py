"""An analysis as text, as one HTML page and as JSON."""

import dataclasses
import html
import json
import math
from typing import Any, NamedTuple, SupportsFloat

import numpy as np

from switch_bank.balance import statistics
from switch_bank.balance.analysis import Balance, LayerBalance, LayerComparison, PartBalance
from switch_bank.balance.statistics import Floats

TEXT_WIDTH = 120
NAMED_EXPERTS = 6  # a cell of the text names at most this many


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]
    fair_multiples: Floats | None = None  # [rows, columns after the first]: colours the HTML's cells


def tables(balance: Balance) -> list[Table]:
    """All figures as tables of text, in the order in which they are read."""
    found = []
    for name, part in balance.parts.items():
        found += _expert_tables(name, part, balance.experts)
        found += _layer_tables(name, part)
    if balance.comparison is not None:
        train, val = balance.parts["train"], balance.parts["val"]
        found.append(_difference_table(balance.comparison, balance.experts))
        found.append(_comparison_table(balance.comparison, train, val, balance.experts))
    return found


def _expert_tables(name: str, part: PartBalance, experts: list[int]) -> list[Table]:
    every = [*part.layers, part.together] if len(part.layers) > 1 else part.layers
    header = ["layer", *(f"e{expert}" for expert in experts)]

    def table(title: str, cells: list[list[str]], fair_multiples: Floats | None = None) -> Table:
        rows = [[_layer_name(layer), *row] for layer, row in zip(every, cells, strict=True)]
        return Table(f"{name}: {title}", header, rows, fair_multiples)

    loads = np.stack([layer.fair_multiples for layer in every])
    found = [
        table("sum over the rows", [[str(count) for count in layer.sums] for layer in every]),
        table("mean of a row", [[f"{mean:.1f}" for mean in layer.means] for layer in every]),
        table("load, as multiples of the fair load", [[f"{load:.2f}" for load in row] for row in loads], loads),
        table("slope, counts per row", [[f"{slope:+.2f}" for slope in layer.slopes] for layer in every]),
    ]
    if any(layer.starved_rows.any() for layer in every):
        starved_rows = [[str(rows) for rows in layer.starved_rows] for layer in every]
        found.append(table(f"in how many of {len(part.rows)} rows the expert starves", starved_rows))
    return found


def _layer_tables(name: str, part: PartBalance) -> list[Table]:
    every = [*part.layers, part.together] if len(part.layers) > 1 else part.layers
    header = ["layer", "std", "CV", "by chance", "max/min", "entropy gap"]
    header += ["rows' std", "rows' CV", "by chance", "rows' max/min", "slope of CV"]
    figures, groups = [], []
    for layer in every:
        profile, rows = layer.profile, layer.rows
        row = [_layer_name(layer), f"{profile.std:.1f}", _percent(profile.cv), _percent(layer.profile_chance_cv)]
        row += [_ratio(profile.max_min), f"{profile.entropy_gap:.4f}", f"{rows.std:.1f}", _percent(rows.cv)]
        row += [_percent(layer.rows_chance_cv), _ratio(rows.max_min), f"{100 * layer.cv_slope:+.2f} pp"]
        figures.append(row)
        experts = (layer.hot, layer.cold, layer.starved, layer.rising, layer.falling)
        groups.append([_layer_name(layer), layer.verdict, *map(_experts, experts)])
    return [
        Table(f"{name}: the mean profile, and the mean over the rows", header, figures),
        Table(f"{name}: verdict", ["layer", "verdict", "hot", "cold", "starved", "rising", "falling"], groups),
    ]


def _difference_table(comparison: list[LayerComparison], experts: list[int]) -> Table:
    rows = [[str(layer.layer), *(f"{100 * part:+.2f}" for part in layer.differences)] for layer in comparison]
    header = ["layer", *(f"e{expert}" for expert in experts)]
    return Table("validation minus train: share of the picks, percentage points", header, rows)


def _comparison_table(
    comparison: list[LayerComparison], train: PartBalance, val: PartBalance, experts: list[int]
) -> Table:
    header = ["layer", "distance", "CV train", "CV val", "change", "max/min train", "max/min val"]
    header += ["gained", "lost", "newly starved", "more uneven"]
    rows = []
    for layer, before, after in zip(comparison, train.layers, val.layers, strict=True):
        gained, lost = layer.differences.argmax(), layer.differences.argmin()
        row = [str(layer.layer), f"{layer.distance:.4f}", _percent(before.profile.cv), _percent(after.profile.cv)]
        row += [f"{100 * layer.cv_change:+.1f}", _ratio(before.profile.max_min), _ratio(after.profile.max_min)]
        row += [f"e{experts[at]} {100 * layer.differences[at]:+.2f}" for at in (gained, lost)]
        rows.append([*row, _experts(layer.newly_starved), "yes" if layer.more_uneven else "-"])
    title = (
        "validation against train: Jensen-Shannon distance (base 2: 0 the same, 1 apart), changes in percentage points"
    )
    return Table(title, header, rows)


def conclusions(balance: Balance) -> list[str]:
    """How the counts were read, whether they fit together, and verdicts, a line each."""
    lines, parts = list(balance.notes), balance.parts
    lines += [f"{name}: from {part.rows[0]} to {part.rows[-1]}, rows: {len(part.rows)}" for name, part in parts.items()]
    for name, part in parts.items():
        check = part.consistency
        if check.problems:
            lines += [f"{name}: inconsistent: {problem}" for problem in check.problems]
        else:
            tokens = f" = {check.tokens} tokens x {balance.top_k}" if check.tokens is not None else ""
            lines.append(f"{name}: consistent: every layer of every row sums to {check.row_sums[0]}{tokens}")
    for name, part in parts.items():
        verdicts = [layer.verdict for layer in part.layers]
        counted = ", ".join(f"{verdicts.count(word)} {word}" for word in ("high", "moderate", "balanced"))
        lines.append(f"{name}: {_imbalance(part.verdict)} (layers: {counted}; summed up: {part.together.verdict})")
    return [*lines, f"verdict: {_imbalance(balance.verdict)}"]


LEGEND = (
    f"high: max/min > {statistics.HIGH_MAX_MIN:g} or CV > {statistics.HIGH_CV:.0%}; moderate: CV from "
    f"{statistics.MODERATE_CV:.0%}; both of the mean profile. Hot, cold, starved: above {statistics.HOT:g}, below "
    f"{statistics.COLD:g}, below {statistics.STARVED:g} of the fair load. Std and CV: over the experts, of the "
    "population. By chance: the CV if tokens chose blindly. Rising, falling: a slope that chance does not explain and "
    f"that moves {statistics.TREND_CHANGE:.0%} of the fair load over the rows. all: the layers summed up, "
    "as one bank shared by them sees it. pp: percentage points."
)


def as_text(balance: Balance) -> str:
    """For a terminal; the verdict and the advice come last."""
    blocks = ["\n".join([table.title, *_text_lines(table)]) for table in tables(balance)]
    next_steps = "\n".join(["what to try next:", *(f"- {line}" for line in balance.advice)])
    layers = len(next(iter(balance.parts.values())).layers)
    title = f"{balance.source}: {layers} layers, {len(balance.experts)} experts"
    return "\n\n".join([title, *blocks, LEGEND, "\n".join(conclusions(balance)), next_steps])


def _text_lines(table: Table) -> list[str]:
    """Right-aligned columns; what does not fit into a line's width follows below, under the first column again."""
    columns = [list(column) for column in zip(table.header, *table.rows, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    lines, start = [], 1
    while start < len(columns):
        end, width = start + 1, widths[0] + 2 + widths[start]
        while end < len(columns) and width + 2 + widths[end] <= TEXT_WIDTH:
            width += 2 + widths[end]
            end += 1
        shown = [0, *range(start, end)]
        lines += [
            "  ".join(columns[at][line].rjust(widths[at]) for at in shown).rstrip() for line in range(len(columns[0]))
        ]
        start = end
    return lines


# --- HTML

STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
div { overflow-x: auto }
table { border-collapse: collapse; margin: 1.5rem 0; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding: .3rem 0 }
th, td { padding: .15rem .6rem; text-align: right; white-space: nowrap }
thead th { border-bottom: 1px solid }
"""


def as_html(balance: Balance) -> str:
    """One page that needs nothing else. Cells with loads are orange above the fair load and blue below it, which the
    colour-blind can tell apart, and hold the number too."""
    title = html.escape(f"Balance of {balance.source}")
    body = [f"<h1>{title}</h1>", _html_list("Verdict", conclusions(balance))]
    body += [_html_list("What to try next", balance.advice), *map(_html_table, tables(balance))]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    page = "\n".join([*body, f"<p>{html.escape(LEGEND)}</p>"])
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{page}\n</body></html>\n'


def _html_list(title: str, lines: list[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<h2>{title}</h2>\n<ul>{items}</ul>"


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.header)
    rows = []
    for number, row in enumerate(table.rows):
        cells = [f'<th scope="row">{html.escape(row[0])}</th>']
        for column, cell in enumerate(row[1:]):
            style = "" if table.fair_multiples is None else _shade(table.fair_multiples[number, column])
            cells.append(f"<td{style}>{html.escape(cell)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    caption = f"<caption>{html.escape(table.title)}</caption>"
    body = "\n".join(rows)
    return f"<div><table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"


def _shade(multiple: float) -> str:
    """Deepest from twice and from half the fair load on."""
    strength = min(1.0, abs(math.log2(max(multiple, 0.01)))) * 0.6
    return f' style="background: rgba({"230, 97, 0" if multiple > 1 else "0, 90, 181"}, {strength:.2f})"'


# --- JSON


def as_json(balance: Balance) -> str:
    """The analysis as one JSON object; docs/balance.md has the formulas.

    {source, experts: [E], top_k, notes: [text], verdict, advice: [text],
     thresholds: {high_max_min, high_cv, moderate_cv, hot, cold, starved, trend_change},
     parts: {train, val, all or unnamed: {
       rows: [names], verdict,
       consistency: {row_sums: [L], deviations: [{row, layer, sum}], tokens, problems: [text]},
       layers: [LAYER], together: LAYER}},
     comparison: null or [{layer, differences: [E], distance, cv_change, more_uneven, newly_starved: [experts]}]}

    LAYER: {layer (null: all layers summed), verdict, sums: [E], means: [E], fair_multiples: [E],
      profile: SPREAD, profile_chance_cv, rows: SPREAD, rows_chance_cv, oscillates, cv_slope,
      hot, cold, starved: [experts], starved_rows: [E], slopes: [E], rising, falling: [experts]}
    SPREAD: {std, cv, max_min, max_min_infinite, entropy, entropy_gap, usage}

    Arrays [E] are in the order of `experts`, lists of experts hold their numbers, and a part is named "all" where
    nothing told parts apart. JSON has no infinity: where a load is 0, max_min is null and max_min_infinite true.
    """
    names = ("HIGH_MAX_MIN", "HIGH_CV", "MODERATE_CV", "HOT", "COLD", "STARVED", "TREND_CHANGE")
    thresholds = {name.lower(): getattr(statistics, name) for name in names}
    return json.dumps(_plain(balance) | {"thresholds": thresholds}, indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    """Dataclasses and named tuples as dicts, arrays as lists."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        plain = _plain(value._asdict())
        if "max_min" in plain:
            infinite = math.isinf(plain["max_min"])
            plain |= {"max_min": None if infinite else plain["max_min"], "max_min_infinite": infinite}
        return plain
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


# --- Figures as text


def _layer_name(layer: LayerBalance) -> str:
    return "all" if layer.layer is None else str(layer.layer)


def _imbalance(verdict: str) -> str:
    return "balanced" if verdict == "balanced" else f"{verdict} imbalance"


def _percent(share: SupportsFloat) -> str:
    return f"{100 * float(share):.1f}%"


def _ratio(ratio: SupportsFloat) -> str:
    return "infinite" if math.isinf(ratio) else f"{float(ratio):.2f}"


def _experts(experts: list[int]) -> str:
    if not experts:
        return "-"
    more = f" +{len(experts) - NAMED_EXPERTS}" if len(experts) > NAMED_EXPERTS else ""
    return " ".join(f"e{expert}" for expert in experts[:NAMED_EXPERTS]) + more
