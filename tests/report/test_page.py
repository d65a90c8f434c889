"""report.html, as a reader opens it: in a real browser, without network."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("vl_convert", reason="the extra 'report' is not installed")

from switch_bank.report import main
from tests.report.browser import Opened, needs_browser, opened
from tests.report.conftest import NASTY, NASTY_NAME

FIVE_MB = 5 * 2**20


@pytest.fixture(scope="session")
def page(run: Path) -> Path:
    assert main([str(run)]) == 0
    return run / "report.html"


@pytest.fixture(scope="session")
def shown(page: Path) -> Opened:
    return opened(page)


class Text(HTMLParser):
    """A page's elements and what they say, scripts left out."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sliders = 0
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sliders += ("type", "range") in attributes

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["script"]:
            self.text += data


def test_the_page_is_one_small_file_that_loads_nothing(page: Path) -> None:
    source = page.read_text(encoding="utf-8")
    assert len(source.encode()) < FIVE_MB
    assert not {"link", "img", "iframe", "object"} & set(Text(source).tags)
    assert not re.search(r"<[^>]*\b(src|href)=[\"']?http", source)


def test_many_layers_and_experts_still_make_a_small_page(run_of: Callable[..., Path]) -> None:
    deep = run_of("deep", layers=28, experts=128, expert_width=8)
    metrics = (deep / "metrics.jsonl").read_text()
    (deep / "metrics.jsonl").write_text(12 * metrics)  # as many reports as a run of 2,400 steps
    assert main([str(deep)]) == 0
    assert 2 * 2**20 < (deep / "report.html").stat().st_size < FIVE_MB


@needs_browser
def test_every_chart_is_drawn_without_network_and_without_complaint(page: Path, shown: Opened) -> None:
    assert shown.console == []
    charts = json.loads(re.findall(r'id="data">(.*)</script>', page.read_text(encoding="utf-8"))[0])["charts"]
    assert {"loss_clock", "tokens_per_second", "health_health", "load_val", "bank_use", "expert_similarity"} <= set(
        charts
    )
    for name in charts:
        drawn = re.search(f'id="{name}".*?<svg.*?</svg>', shown.dom, re.DOTALL)
        assert drawn and drawn.group().count("<path") > 3, name


@needs_browser
def test_the_fixed_clock_readings_are_marked(shown: Opened) -> None:
    chart = re.search(r'id="loss_clock".*?</svg>', shown.dom, re.DOTALL)
    rules = chart and re.search("mark-rule role-mark.*?</g>", chart.group(), re.DOTALL)
    assert rules and rules.group().count("<line") == 2  # at 1 and 3 s; the run ended before 1000 s
    loss_by_step = re.search(r'id="loss_step".*?</svg>', shown.dom, re.DOTALL)
    assert loss_by_step and "mark-rule role-mark" not in loss_by_step.group()


@needs_browser
def test_sliders_and_the_microscope_are_native_inputs(shown: Opened) -> None:
    assert Text(shown.dom).sliders == 3  # loads in validation, loads in training, layer
    tokens = re.findall(r'<span tabindex="(-?\d)"[^>]*data-expert="(\d)"', shown.dom)
    assert len(tokens) == 320 and [order for order, _ in tokens] == ["0"] + ["-1"] * 319
    assert {expert for _, expert in tokens} == set("0123")
    assert "Most frequent of its" in shown.dom and "Most specific" in shown.dom


@needs_browser
def test_names_and_tokens_are_text_never_markup(shown: Opened) -> None:
    page = Text(shown.dom)
    assert "img" not in page.tags and "<title>SwitchBank: a&lt;img" in shown.dom
    assert NASTY in page.text and NASTY_NAME in page.text


@needs_browser
def test_arrow_keys_walk_through_tokens_and_layers(page: Path, tmp_path: Path) -> None:
    keys = """<script>
    const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
    document.querySelector("#text span").focus();
    for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft", "ArrowUp", "ArrowUp", "Enter"]) press(key);
    </script></body></html>"""
    source = page.read_text(encoding="utf-8").removesuffix("</body></html>\n")
    (tmp_path / "keys.html").write_text(source + keys, encoding="utf-8")
    after = opened(tmp_path / "keys.html")
    assert after.console == [] and "Token 1, layer 2:" in after.dom
    goes_to = re.search(r"goes to expert (\d)", after.dom)
    probabilities = re.findall(r"expert (\d)</(?:strong|span)></td><td>([01]\.\d{3})</td>", after.dom)
    assert goes_to and len(probabilities) == 4 and f"<strong>expert {goes_to.group(1)}</strong>" in after.dom
    assert sum(float(p) for _, p in probabilities) == pytest.approx(1, abs=0.003)  # softmax


@needs_browser
def test_several_runs_are_compared_on_one_page(
    run_of: Callable[..., Path], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = run_of("other", experts=6, top_k=2)
    out = tmp_path / "both.html"
    assert main([str(run), str(other), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: written\n"
    both = opened(out)
    assert both.console == [] and "--model.top-k" in both.dom and "--model.layers" not in both.dom
    loss = re.search(r'id="loss_step".*?</svg>', both.dom, re.DOTALL)
    assert loss and "other" in loss.group() and 'id="load_val"' not in both.dom
    assert "It looks at one run" in both.dom


def test_a_run_without_a_checkpoint_says_what_is_missing(run_of: Callable[..., Path]) -> None:
    bare = run_of("bare")
    (bare / "checkpoint.pt").unlink()
    assert main([str(bare)]) == 0
    source = (bare / "report.html").read_text(encoding="utf-8")
    assert "There is none:" in source and "holds no model: neither a run" in Text(source).text
    assert 'id="text"' not in source and 'id="load_val"' in source


def test_a_dense_run_has_curves_and_no_routers(run_of: Callable[..., Path]) -> None:
    dense = run_of("dense", experts=1, adapter="none")
    assert main([str(dense)]) == 0
    text = Text((dense / "report.html").read_text(encoding="utf-8")).text
    assert "nothing to route" in text and "it has no routers" in text and "Router health" not in text


def test_a_leaky_run_is_called_not_causal(run_of: Callable[..., Path]) -> None:
    leaky = run_of("leaky", reverse_ema="leaky")
    (leaky / "checkpoint.pt").unlink()
    assert main([str(leaky)]) == 0
    assert "<strong>NOT CAUSAL: leaky</strong>" in (leaky / "report.html").read_text(encoding="utf-8")


def test_the_pictures_are_those_of_the_page(run: Path, tmp_path: Path, page: Path) -> None:
    assert main([str(run), "--out", str(tmp_path / "r.html"), "--png", str(tmp_path / "new" / "pictures")]) == 0
    pictures = {path.stem: path.read_bytes() for path in (tmp_path / "new" / "pictures").iterdir()}
    charts = json.loads(re.findall(r'id="data">(.*)</script>', page.read_text(encoding="utf-8"))[0])["charts"]
    assert set(pictures) == set(charts)
    assert all(picture.startswith(b"\x89PNG") and 5_000 < len(picture) < 500_000 for picture in pictures.values())
