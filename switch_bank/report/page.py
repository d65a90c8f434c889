"""The report as one HTML file that needs nothing else: text, charts, and all that draws them."""

import html
import json
from pathlib import Path
from typing import Any

import vl_convert

from switch_bank.config import Config
from switch_bank.model.gpt import SwitchBankGPT
from switch_bank.report.charts import OKABE_ITO, Chart, Section, sections
from switch_bank.report.microscope import Microscope, look
from switch_bank.report.runs import Run, facts

HERE = Path(__file__).parent
PICTURE_WIDTH, PICTURE_SCALE = 560, 1.5  # pixels of a PNG's axes, and how many times as many it has


def write_own_report(folder: Path, config: Config, model: SwitchBankGPT) -> None:
    """The report that a run leaves in its folder. model: its trained one, in eval mode."""
    microscope = look(folder, config, model) if config.model.experts > 1 else None
    absent = "" if microscope else "The model has one expert: there are no routes to show."
    (folder / "report.html").write_text(as_html([Run.read(folder)], microscope, absent), encoding="utf-8")


def as_html(runs: list[Run], microscope: Microscope | None, absent: str) -> str:
    """The page of one run, or one that compares several. absent: why there is no microscope, if there is none."""
    title = html.escape(f"SwitchBank: {', '.join(run.name for run in runs)}")
    shown = sections(runs, None if microscope is None else microscope.similarity)
    leaky = [run.name for run in runs if not run.config.model.causal]
    warning = f"<p><strong>NOT CAUSAL: {html.escape(', '.join(leaky))}</strong>, trained on tokens to come.</p>"
    body = [f"<h1>{title}</h1>", warning if leaky else "", _table(facts(runs)), *map(_section, shown)]
    body.append("<section><h2>Routing microscope</h2>")
    body.append(f"<p>{html.escape(absent)}</p>" if microscope is None else _microscope(microscope))
    body.append("</section>")
    data = {
        "charts": {chart.name: chart.spec for section in shown for chart in section.charts},
        "microscope": microscope.data if microscope else None,
        "colours": OKABE_ITO,
    }
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    scripts = [f'<script type="application/json" id="data">{_json(data)}</script>']
    scripts += [
        f"<script>{script}</script>"
        for script in (vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"), _read("page.js"))
    ]
    return "\n".join(
        ["<!DOCTYPE html>", f'<html lang="en"><head>{head}<style>{_read("page.css")}</style></head>', "<body>", *body]
        + [*scripts, "</body></html>", ""]
    )


def write_pngs(folder: Path, runs: list[Run], microscope: Microscope | None) -> list[Path]:
    """Each of the page's charts as NAME.png, in the state that it has when the page opens. Returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for section in sections(runs, None if microscope is None else microscope.similarity):
        for chart in section.charts:
            written.append(folder / f"{chart.name}.png")
            written[-1].write_bytes(_png(chart))
    return written


def _png(chart: Chart) -> bytes:
    config = chart.spec["config"] | {"background": "white"}
    return vl_convert.vegalite_to_png(chart.spec | {"width": PICTURE_WIDTH, "config": config}, scale=PICTURE_SCALE)


def _table(rows: list[list[str]]) -> str:
    lines = []
    for number, (name, *values) in enumerate(rows):
        cell = "th" if number == 0 else "td"
        cells = "".join(f"<{cell}>{html.escape(value)}</{cell}>" for value in values)
        lines.append(f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>')
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _section(section: Section) -> str:
    places = "".join(f'<div class="chart" id="{chart.name}"></div>' for chart in section.charts)
    return (
        f"<section><h2>{html.escape(section.title)}</h2><p>{html.escape(section.note)}</p>"
        f'<div class="charts">{places}</div></section>'
    )


def _microscope(microscope: Microscope) -> str:
    layers, experts = len(microscope.data["likes"]), microscope.data["experts"]
    tokens = "".join(
        f'<span tabindex="{-1 if at else 0}">{html.escape(text)}</span>' for at, text in enumerate(microscope.text)
    )
    choices = "".join(f'<option value="{expert}">expert {expert}</option>' for expert in range(experts))
    return f"""<p>{html.escape(microscope.note)} Each token has the colour and the number of the expert that it goes to
first. Point at one, or go to it with the arrow keys, to see its probabilities; up and down change the layer; Enter
asks what its expert likes.</p>
<p><label>layer <input type="range" id="layer" min="0" max="{layers - 1}" value="0">
<output id="layer-number">0</output></label></p>
<div id="lens"><div id="text" role="group" aria-label="tokens">{tokens}</div>
<div id="token" aria-live="polite"></div></div>
<h3>What does an expert like?</h3>
<p><label>of this layer, <select id="expert">{choices}</select></label>
counted over the first {microscope.data["counted"]:,} tokens of the validation split. Specific tokens go to it more
often than tokens do on the whole; the percentage is how much of a token's picks it gets.</p>
<div id="likes" aria-live="polite"></div>"""


def _json(data: Any) -> str:
    """JSON that may stand in a script element: no text in it can end the element."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
