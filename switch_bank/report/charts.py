"""A run's curves and loads as Vega-Lite charts: plain dicts, drawn on the page by its own copy of Vega and as PNG
pictures by vl-convert. Colours are Okabe and Ito's and purple-orange, which the colour-blind can tell apart."""

import math
from typing import Any, NamedTuple

import numpy as np

from switch_bank import schedules
from switch_bank.balance.statistics import Floats, fair_multiples
from switch_bank.report.runs import Run

OKABE_ITO = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#b8a800", "#888888"]
POINTS = 600  # of one curve
CELLS = 100_000  # of one heat map over all its reports
INK = "currentColor"  # the page's own colour of text, light or dark
CONFIG = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "title": {"color": INK, "fontSize": 13, "anchor": "start"},
    "axis": {
        "labelColor": INK,
        "titleColor": INK,
        "gridColor": "#88888840",
        "domainColor": "#888",
        "tickColor": "#888",
    },
    "legend": {"labelColor": INK, "titleColor": INK, "orient": "bottom", "labelLimit": 400, "titleLimit": 400},
    "range": {"category": OKABE_ITO},
}


class Chart(NamedTuple):
    name: str  # of its place on the page and of its PNG file
    spec: dict[str, Any]


class Section(NamedTuple):
    title: str
    note: str  # how to read it
    charts: list[Chart]


def sections(runs: list[Run], similarity: Floats | None) -> list[Section]:
    """All charts of one run, or those that compare several. similarity: [E, E] of `microscope.expert_similarity`."""
    found = [
        Section(
            "Loss",
            "Nats per token: thin of training, dotted with points of validation. Dashed lines mark the clock readings "
            "fixed in the configuration. Drag to move, Shift and the wheel to zoom, double-click to go back.",
            [_loss(runs, *axis) for axis in AXES],
        ),
        Section(
            "Speed", "Tokens of training per second of the training clock, since the report before.", [_speed(runs)]
        ),
    ]
    if any(run.routing for run in runs):
        note = (
            "From 0, collapsed, to 1, every expert works: the geometric mean of evenness (1 − entropy gap of the "
            "bank's picks), usage (share of the active experts with at least a quarter of an even share) and headroom "
            "(1 − share of the routers' logits at the cap, where no gradient passes)."
        )
        found.append(Section("Router health", note, [_health(runs, part) for part in HEALTH]))
    if len(runs) == 1 and runs[0].routing:
        found += _routing_sections(runs[0], similarity)
    note = "What the configuration makes of each step. Pruning, which depends on loads, is not in it."
    return [*found, Section("Schedules", note, _schedules(runs))]


# --- Curves

AXES = (("clock", "training clock, s"), ("step", "step"), ("tokens", "tokens"))
HEALTH = ("health", "evenness", "usage", "headroom")


def _loss(runs: list[Run], axis: str, title: str) -> Chart:
    def at(run: Run, line: dict[str, Any]) -> float:
        return {"clock": line["train_time_s"], "step": line["step"], "tokens": line["step"] * run.step_tokens}[axis]

    rows = [_row(runs, run, "train", at(run, line), line["train_loss"]) for run in runs for line in _thin(run.train)]
    rows += [_row(runs, run, "validation", at(run, line), line["val_loss"]) for run in runs for line in run.val]
    chart = _curves(f"loss_{axis}", f"Loss against {title.split(',')[0]}", title, rows)
    readings = sorted({seconds for run in runs for seconds in run.config.run.val_at_seconds})
    end = max(line["train_time_s"] for run in runs for line in [*run.train, *run.val])
    if axis == "clock" and (passed := [seconds for seconds in readings if seconds <= end]):
        rule = {"type": "rule", "strokeDash": [3, 3], "color": INK, "opacity": 0.5}
        encoding = {"x": {"field": "x", "type": "quantitative", "title": title}}
        data = {"values": [{"x": seconds} for seconds in passed]}
        chart.spec["layer"].append({"data": data, "mark": rule, "encoding": encoding})
    return chart


def _speed(runs: list[Run]) -> Chart:
    rows = []
    for run in runs:
        lines = _thin(run.train)
        for before, line in zip(lines, lines[1:], strict=False):
            seconds, steps = line["train_time_s"] - before["train_time_s"], line["step"] - before["step"]
            if seconds > 0:
                rows.append(_row(runs, run, "train", line["step"], steps * run.step_tokens / seconds))
    return _curves("tokens_per_second", "Tokens per second", "step", rows, zero=True)


def _health(runs: list[Run], part: str) -> Chart:
    rows = []
    for run in runs:
        for split, word in (("train", "train"), ("val", "validation")):
            for line in _thin([line for line in run.routing if line["split"] == split]):
                value = line["health"] if part == "health" else line["health_parts"][part]
                rows.append(_row(runs, run, word, line["step"], value))
    return _curves(f"health_{part}", part.capitalize(), "step", rows, domain=[0, 1])


def _schedules(runs: list[Run]) -> list[Chart]:
    values: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        config, schedule, experts = run.config, run.config.schedule, run.config.model.experts
        for step in sorted({*range(0, schedule.steps + 1, 1 + schedule.steps // POINTS), schedule.steps}):
            for name, value in {
                "experts active": schedules.active_experts(step, schedule, experts),
                "temperature": schedules.temperature(step, schedule, experts),
                "cap on the logits": schedules.logit_cap(step, schedule, experts),
                "Gumbel noise": int(schedules.gumbel_noise(step, schedule)),
                "attention window, tokens": schedules.attention_window(step, schedule.steps, config.model.window),
                "learning-rate factor": schedules.learning_rate_factor(step, schedule),
                "Muon's momentum": schedules.muon_momentum(step, schedule, config.optim.muon_momentum),
            }.items():
                values.setdefault(name, []).append(_row(runs, run, "train", step, value))
    return [
        _curves("schedule_" + "_".join(name.replace(",", "").replace("'", "").split()), name, "step", rows)
        for name, rows in values.items()
    ]


def _row(runs: list[Run], run: Run, split: str, x: float, y: float) -> dict[str, Any]:
    """One run's series are its splits; several runs are a series each."""
    return {"series": run.name if len(runs) > 1 else split, "split": split, "x": _short(x), "y": _short(y)}


def _curves(
    name: str, title: str, x: str, rows: list[dict[str, Any]], zero: bool = False, domain: list[float] | None = None
) -> Chart:
    series = list(dict.fromkeys(row["series"] for row in rows))
    scale: dict[str, Any] = {"zero": zero} | ({} if domain is None else {"domain": domain})
    encoding = {
        "x": {"field": "x", "type": "quantitative", "title": x, "axis": {"tickCount": 5, "format": "~s"}},
        "y": {"field": "y", "type": "quantitative", "title": None, "scale": scale},
        "color": {
            "field": "series", "scale": {"domain": series, "range": OKABE_ITO},
            "legend": {"title": None} if len(series) > 1 else None,
        },
        "tooltip": [{"field": "series"}, {"field": "split"}, {"field": "x", "title": x}, {"field": "y"}],
    }  # fmt: skip
    zoom = {"name": "zoom", "bind": "scales", "select": {"type": "interval", "zoom": "wheel![event.shiftKey]"}}
    marks = {
        "train": {"type": "line", "strokeWidth": 1.5, "opacity": 0.8, "point": {"opacity": 0, "size": 60}},
        "validation": {"type": "line", "strokeDash": [2, 2], "point": {"size": 45}},
    }
    layers: list[dict[str, Any]] = [
        {"mark": mark, "transform": [{"filter": f"datum.split == '{split}'"}], "encoding": encoding}
        for split, mark in marks.items()
        if any(row["split"] == split for row in rows)
    ]
    if layers:
        layers[0]["params"] = [zoom]
    return Chart(name, _spec(title, rows) | {"height": 190, "layer": layers})


# --- Experts


def _routing_sections(run: Run, similarity: Floats | None) -> list[Section]:
    model = run.config.model
    experts = (
        f"Of {model.top_k} picks a token in each layer" if model.top_k > 1 else "Each token is one pick in each layer"
    )
    heat = [
        _loads(split, [line for line in run.routing if line["split"] == split], model.layers, model.experts)
        for split in ("val", "train")
        if any(line["split"] == split for line in run.routing)
    ]
    note = (
        f"{experts}. Load 1 is an even share of the active experts: orange has more, purple less, blank is not active. "
        "The slider moves through the reports."
    )
    bank = [_bank_use(run.routed[-1], run.routed[-1]["split"])]
    bank_note = "Whose picks an expert gets: its share of all picks of the last report, layer by layer."
    if similarity is not None:
        bank.append(_similarity(similarity))
        bank_note += " Similarity is the cosine between two experts' matrices; unrelated ones are near 0."
    return [Section("Load of each layer's experts", note, heat), Section("The bank", bank_note, bank)]


def _loads(split: str, lines: list[dict[str, Any]], layers: int, experts: int) -> Chart:
    lines = _thin(lines, max(2, min(POINTS, CELLS // (layers * experts))))
    rows = []
    for report, line in enumerate(lines):
        load = np.full((layers, experts), np.nan)
        load[:, line["active"]] = fair_multiples(np.array(line["counts"])[:, line["active"]])
        flat = [None if np.isnan(value) else round(float(value), 2) for value in load.flatten()]
        rows.append({"report": report, "load": flat})
    steps, word = [line["step"] for line in lines], {"val": "validation", "train": "training"}[split]
    title = {"text": {"expr": f"'{word}, step ' + {steps}[report]"}}
    slider = {"input": "range", "min": 0, "max": len(rows) - 1, "step": 1, "name": f"report of {word} "}
    encoding = _expert_axes(layers, experts) | {
        "color": {
            "field": "load", "type": "quantitative", "title": "load, as multiples of an even share",
            "scale": {"scheme": "purpleorange", "domain": [0, 2], "domainMid": 1, "clamp": True},
        },
        "tooltip": [{"field": field} for field in ("layer", "expert", "load")],
    }  # fmt: skip
    transform = [
        {"filter": "datum.report == report"},
        {"flatten": ["load"]},
        {"window": [{"op": "row_number", "as": "cell"}]},
        {"calculate": f"floor((datum.cell - 1) / {experts})", "as": "layer"},
        {"calculate": f"(datum.cell - 1) % {experts}", "as": "expert"},
        {"filter": "isValid(datum.load)"},
    ]
    params = [{"name": "report", "value": len(rows) - 1, "bind": slider}]
    spec = _spec(title, rows) | {"height": max(90, 18 * layers), "mark": "rect", "transform": transform}
    return Chart(f"load_{split}", spec | {"params": params, "encoding": encoding})


def _expert_axes(layers: int, experts: int) -> dict[str, Any]:
    axis = {"type": "ordinal", "axis": {"labelAngle": 0, "labelOverlap": True}}
    return {
        "x": axis | {"field": "expert", "scale": {"domain": list(range(experts))}},
        "y": axis | {"field": "layer", "scale": {"domain": list(range(layers))}},
    }


def _bank_use(line: dict[str, Any], split: str) -> Chart:
    counts = np.array(line["counts"], dtype=np.float64)
    shares = counts / counts.sum()
    rows = [
        {"layer": layer, "expert": expert, "share": _short(share)}
        for layer, of_layer in enumerate(shares.tolist())
        for expert, share in enumerate(of_layer)
    ]
    encoding = {
        "x": _expert_axes(*counts.shape)["x"],
        "y": {"field": "share", "type": "quantitative", "aggregate": "sum", "title": None, "axis": {"format": "%"}},
        "color": {"field": "layer", "type": "quantitative", "scale": {"scheme": "viridis"}},
        "tooltip": [{"field": "layer"}, {"field": "expert"}, {"field": "share", "format": ".2%"}],
    }
    title = f"Picks of each expert by layer, {'validation' if split == 'val' else 'training'} at step {line['step']}"
    return Chart("bank_use", _spec(title, rows) | {"height": 240, "mark": "bar", "encoding": encoding})


def _similarity(similarity: Floats) -> Chart:
    experts = len(similarity)
    apart = similarity[~np.eye(experts, dtype=bool)]
    most = max(0.01, float(np.abs(apart).max()))
    rows = [
        {"expert": i, "other": j, "cosine": _short(similarity[i, j])}
        for i in range(experts)
        for j in range(experts)
        if i != j
    ]
    encoding = _expert_axes(experts, experts) | {
        "color": {
            "field": "cosine", "type": "quantitative",
            "scale": {"scheme": "purpleorange", "domain": [-most, most], "domainMid": 0},
        },
        "tooltip": [{"field": "expert"}, {"field": "other"}, {"field": "cosine"}],
    }  # fmt: skip
    encoding["y"] |= {"field": "other", "title": "expert"}
    spec = _spec("Similarity of the experts", rows) | {"height": 240, "mark": "rect", "encoding": encoding}
    return Chart("expert_similarity", spec)


# --- What all charts share


def _spec(title: str | dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"title": title, "width": "container", "config": CONFIG, "data": {"values": rows}}


def _thin(lines: list[dict[str, Any]], most: int = POINTS) -> list[dict[str, Any]]:
    """At most about `most` of the lines, evenly, the last one always among them."""
    if len(lines) <= most:
        return lines
    return [lines[round(at)] for at in np.linspace(0, len(lines) - 1, most)]


def _short(value: float) -> float | None:
    """Five digits are more than a picture shows; what is not finite is a gap."""
    return float(f"{value:.5g}") if math.isfinite(value) else None
