"""`python -m switch_bank balance`: what it prints and writes, and one line where it cannot."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from switch_bank.balance import main

ROWS = """Training
step 0 [(0, tensor([50, 50, 50, 50])), (7, tensor([120, 60, 20, 0]))]
step 1 [(0, tensor([51, 49, 50, 50])), (7, tensor([121, 59, 20, 0]))]
step 2 [(0, tensor([52, 48, 50, 50])), (7, tensor([122, 58, 20, 0]))]
Validation
[(0, tensor([48, 52, 50, 50])), (7, tensor([150, 25, 25, 0]))]
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Two layers, 0 even and 7 not; three rows of training and one of validation; 100 tokens, K = 2, but expert 0 of
    layer 7 has more picks than that allows."""
    (tmp_path / "<counts>.txt").write_text(ROWS)
    return tmp_path / "<counts>.txt"


def test_the_text_holds_the_figures_and_ends_with_verdict_and_advice(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(table)]) == 0
    text, errors = capsys.readouterr()
    blocks = {block.splitlines()[0]: block.splitlines()[1:] for block in text.split("\n\n")}
    assert errors == "" and text.startswith(f"{table}: 2 layers, 4 experts\n")

    def cells(title: str, line: int) -> list[str]:
        return blocks[title][line].split()

    assert cells("train: sum over the rows", 0) == ["layer", "e0", "e1", "e2", "e3"]
    assert cells("train: sum over the rows", 2) == ["7", "363", "177", "60", "0"]
    assert cells("train: sum over the rows", 3) == ["all", "516", "324", "210", "150"]
    assert cells("val: mean of a row", 1) == ["0", "48.0", "52.0", "50.0", "50.0"]
    assert cells("train: load, as multiples of the fair load", 2) == ["7", "2.42", "1.18", "0.40", "0.00"]
    assert cells("train: slope, counts per row", 2) == ["7", "+1.00", "-1.00", "+0.00", "+0.00"]
    assert cells("train: in how many of 3 rows the expert starves", 2) == ["7", "0", "0", "0", "3"]
    # deviations of layer 7's profile 121 59 20 0 from 50: squares 5041 + 81 + 900 + 2500, over 4
    assert cells("train: the mean profile, and the mean over the rows", 2)[:5] == [
        "7",
        "46.2",
        "92.3%",
        "7.1%",
        "infinite",
    ]
    assert cells("train: verdict", 2) == ["7", "high", "e0", "e2", "e3", "e3", "-", "-"]
    assert cells("validation minus train: share of the picks, percentage points", 2) == [
        "7", "+14.50", "-17.00", "+2.50", "+0.00"
    ]  # fmt: skip
    comparison = next(lines for title, lines in blocks.items() if title.startswith("validation against train:"))
    assert comparison[2].split()[-6:] == ["e0", "+14.50", "e1", "-17.00", "-", "yes"]
    assert "train: consistent: every layer of every row sums to 200\n" in text
    assert "train: high imbalance (layers: 1 high, 0 moderate, 1 balanced; summed up: high)\n" in text
    assert "\nverdict: high imbalance\n\nwhat to try next:\n- starved experts in layer 7:" in text


def test_a_wide_table_is_broken_into_lines_that_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = [[[1000 + expert for expert in range(128)]]]
    (tmp_path / "counts.json").write_text(json.dumps(counts))
    assert main([str(tmp_path / "counts.json")]) == 0
    text = capsys.readouterr().out
    tables = text.split("\n\n")[1:-3]
    assert max(len(line) for table in tables for line in table.splitlines()) <= 120
    sums = next(table for table in tables if table.startswith("all: sum over the rows")).splitlines()[1:]
    assert [name for line in sums[::2] for name in line.split()[1:]] == [f"e{expert}" for expert in range(128)]
    assert [count for line in sums[1::2] for count in line.split()[1:]] == [str(count) for count in counts[0][0]]


def test_json_has_the_documented_keys_and_no_infinity(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(table), "--json", "--top-k", "2"]) == 0

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=no_constant)
    assert found.keys() == {
        "source", "experts", "top_k", "notes", "parts", "comparison", "verdict", "advice", "thresholds",
    }  # fmt: skip
    assert found["source"] == str(table) and found["experts"] == [0, 1, 2, 3] and found["top_k"] == 2
    assert found["verdict"] == "high" and found["thresholds"]["high_max_min"] == 2
    train = found["parts"]["train"]
    assert train.keys() == {"rows", "consistency", "layers", "together", "verdict"}
    assert train["consistency"] == {
        "row_sums": [200, 200], "deviations": [], "tokens": 100,
        "problems": ["row 3 (line 4), layer 7: expert 0 has 122 picks of 100 tokens: K cannot be 2"],
    }  # fmt: skip
    even, uneven = train["layers"]
    assert even.keys() == {
        "layer", "verdict", "sums", "means", "fair_multiples", "profile", "profile_chance_cv", "rows", "rows_chance_cv",
        "oscillates", "cv_slope", "hot", "cold", "starved", "starved_rows", "slopes", "rising", "falling",
    }  # fmt: skip
    assert uneven["layer"] == 7 and uneven["sums"] == [363, 177, 60, 0] and uneven["starved"] == [3]
    assert uneven["profile"]["max_min"] is None and uneven["profile"]["max_min_infinite"] is True
    assert uneven["rows"]["max_min"] is None and uneven["rows"]["max_min_infinite"] is True
    assert even["profile"]["max_min"] == pytest.approx(51 / 49) and even["profile"]["max_min_infinite"] is False
    assert train["together"]["layer"] is None and train["together"]["sums"] == [516, 324, 210, 150]
    assert [layer["layer"] for layer in found["comparison"]] == [0, 7]
    assert found["comparison"][1]["differences"] == pytest.approx([0.145, -0.17, 0.025, 0])
    assert found["comparison"][1]["more_uneven"] is True


class Page(HTMLParser):
    """Checks that every element is closed, and gathers what a page refers to and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attributes]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else_and_holds_what_the_text_holds(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(table), "--html", str(tmp_path / "page.html")]) == 0
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(source)
    assert "http" not in source and "url(" not in source and "@import" not in source
    assert not {"script", "link", "img", "iframe"} & set(page.tags) and not {"src", "href"} & set(page.attributes)
    assert "verdict: high imbalance" in page.text and str(table) in page.text
    assert page.tags.count("table") == 16  # 7 for each part and 2 to compare
    tables = " ".join(capsys.readouterr().out.split("\n\n")[1:-3])
    assert len(tables.split()) > 400 and [cell for cell in tables.split() if cell not in page.text] == []
    assert 'rgba(230, 97, 0, 0.60)">2.42' in source and 'rgba(0, 90, 181, 0.60)">0.00' in source


def test_the_pictures_are_drawn(table: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
    assert main([str(table), "--png", str(tmp_path / "new" / "pictures")]) == 0
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "new" / "pictures").iterdir()}
    assert pictures.keys() == {
        "loads_train.png", "loads_val.png", "rows_train.png", "rows_val.png", "cv_train.png", "cv_val.png",
        "train_against_val.png",
    }  # fmt: skip
    for picture in pictures.values():
        assert picture.startswith(b"\x89PNG\r\n") and len(picture) > 5_000


def test_without_matplotlib_pictures_are_refused_in_one_line(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([str(table), "--png", str(tmp_path)]) == 2
    assert capsys.readouterr() == ("", f"error: {table}: --png needs matplotlib: pip install -e '.[report]'\n")


def test_a_runs_folder_is_read_with_its_own_k(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        {"kind": "routing", "split": split, "step": step, "counts": [[40, 44, 44], [43, 42, 43]]}
        for step in (25, 50) for split in ("train", "val")
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.json").write_text('{"model": {"top_k": 2}}')
    assert main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "train: from row 1 (step 25) to row 3 (step 50), rows: 2\n" in text
    assert "val: consistent: every layer of every row sums to 128 = 64 tokens x 2\n" in text


@pytest.mark.parametrize(
    ("name", "content", "arguments", "message"),
    [
        ("a.txt", "no counts here", [], "a.txt: no rows: a row is [(layer, tensor([c0, c1, ...])), "),
        ("a.txt", "[(0, tensor([1, 2]))]\n[(0, tensor([1]))]", [], "a.txt: row 2 (line 2), layer 0 has 1 counts"),
        ("a.txt", "[(0, tensor([1, -2]))]", [], "a.txt: row 1 (line 1), layer 0, expert 1: '-2' is no count"),
        ("a.txt", "[(0, tensor([1, 2]))]", ["--top-k", "0"], "a.txt: K is 0 and there are 2 experts"),
        ("a.txt", "[(0, tensor([1, 2]))]", ["--html", "no/such/folder/x.html"], "no/such/folder/x.html: No such file"),
        ("b.bin", "", [], "a.txt: No such file or directory"),
    ],
)
def test_what_cannot_be_analysed_gets_one_line_and_exit_code_2(
    name: str, content: str, arguments: list[str], message: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(content)
    assert main(["a.txt", *arguments]) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.startswith(f"error: {message}") and errors.count("\n") == 1


def test_the_command_line_itself_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["a.txt", "--top-k", "many"])
    assert left.value.code == 2 and "argument --top-k: invalid int value: 'many'" in capsys.readouterr().err
