"""Counts are read as other programs write them, and what cannot be counts is refused by the row it is in."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from switch_bank.balance.counts import CountsError, read_counts


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


# --- Text


def test_a_row_is_read_with_and_without_spaces_among_other_text(tmp_path: Path) -> None:
    text = """starting, 2 layers (of 2), seed [7]
[12:00:01] INFO step 10 loss 3.2 [(0, tensor([1, 2, 3])), (1, tensor([4, 5, 6]))] lr [0.1, 0.2]
[(0,tensor([7,8,9])),(1,tensor([10,11,12]))]
  done: [(0, tensor(0.25)), (1, tensor(0.5))] [1, 2]
"""
    counts = read_counts(write(tmp_path, "log.txt", text))
    assert list(counts.parts) == ["all"] and counts.layers == [0, 1] and counts.experts == [0, 1, 2]
    assert counts.parts["all"].counts.tolist() == [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]]]
    assert counts.parts["all"].rows == ["row 1 (line 2)", "row 2 (line 3)"]
    assert counts.top_k is None and counts.notes == []


@pytest.mark.parametrize(
    "tensor",
    [
        "tensor([3, 0, 5], device='cuda:0')",
        "tensor([3, 0, 5], dtype=torch.int32)",
        "tensor([3., 0., 5.], device='cuda:7', grad_fn=<AddBackward0>)",
        "tensor([3.0000e+00, 0.0000e+00, 5.0000e+00])",
        "tensor( [ 3 ,\n\t 0,\r\n 5 ] )",
        "torch.tensor([3, 0, 5])",
    ],
)
def test_a_tensor_may_be_written_in_any_way_that_torch_writes_it(tensor: str, tmp_path: Path) -> None:
    counts = read_counts(write(tmp_path, "counts.txt", f"[(4, {tensor})]"))
    assert counts.layers == [4] and counts.parts["all"].counts.tolist() == [[[3, 0, 5]]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64])
def test_what_torch_prints_is_read_back(dtype: torch.dtype, tmp_path: Path) -> None:
    """64 experts wrap over several lines, and print in columns."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 1000, (30, 5, 64), generator=generator)
    rows = [f"step {step}: {list(enumerate(row.to(dtype)))}" for step, row in enumerate(counts)]
    read = read_counts(write(tmp_path, "log", "\n".join(rows)))
    assert rows[0].count("\n") > 10
    assert torch.equal(torch.from_numpy(read.parts["all"].counts), counts)
    assert read.parts["all"].rows[1] == f"row 2 (line {2 + rows[0].count(chr(10))})"


def test_layers_are_told_by_their_number_in_whatever_order_they_stand(tmp_path: Path) -> None:
    text = "[(3, tensor([1, 2])), (-1, tensor([3, 4]))]\n[(-1, tensor([5, 6])), (3, tensor([7, 8]))]"
    counts = read_counts(write(tmp_path, "counts.txt", text))
    assert counts.layers == [-1, 3] and counts.parts["all"].counts.tolist() == [[[3, 4], [1, 2]], [[5, 6], [7, 8]]]


@pytest.mark.parametrize(
    "headings",
    [
        ("Training", "Validation"),
        ("=== TRAIN ===", "=== VAL ==="),
        ("train_counts = [", "], val_counts = ["),
        ('{"train": [', '], "valid": ['),
        ("step 3 train:", "step 3 eval:"),
        ("# training rows\n\nsome words", "# evaluation\n\nsome words"),
        ("", "validation rows follow"),
    ],
)
def test_a_line_that_names_a_part_begins_it(headings: tuple[str, str], tmp_path: Path) -> None:
    row = "[(0, tensor([{}, 9]))]"
    rows = [row.format(number) for number in range(5)]
    for between in ("\n", " "):
        text = between.join([headings[0], *rows[:3], headings[1], *rows[3:]])
        parts = read_counts(write(tmp_path, "counts.txt", text)).parts
        assert {name: part.counts[:, 0, 0].tolist() for name, part in parts.items()} == {
            "train": [0, 1, 2],
            "val": [3, 4],
        }


def test_the_part_may_alternate_and_a_row_keeps_to_the_last_line_that_names_one(tmp_path: Path) -> None:
    text = """train step 1 [(0, tensor([1, 9]))]
val step 1 [(0, tensor([2, 9]))]
[(0, tensor([3, 9]))]
step 2 train_loss 3.1 val_loss 3.3
[(0, tensor([4, 9]))]
training the retrained, constrained and interval words name nothing more
[(0, tensor([5, 9]))]
"""
    counts = read_counts(write(tmp_path, "counts.txt", text))
    found = {name: part.counts[:, 0, 0].tolist() for name, part in counts.parts.items()}
    assert found == {"train": [1, 5], "val": [2, 3, 4]}
    assert counts.notes == [
        "lines that name both train and validation were not used to tell the parts apart: 1, the first is line 4"
    ]


def test_rows_before_any_heading_are_said_to_be(tmp_path: Path) -> None:
    row = "[(0, tensor([1, 9]))]\n"
    before_val = read_counts(write(tmp_path, "a.txt", row + "val\n" + row))
    assert list(before_val.parts) == ["train", "val"]
    assert before_val.notes == ["rows of no named part, here called 'train': 1"]
    before_train = read_counts(write(tmp_path, "b.txt", row + "train\n" + row + "val\n" + row))
    assert list(before_train.parts) == ["unnamed", "train", "val"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows: a row is [(layer, tensor([c0, c1, ...])), (layer, tensor([...])), ...]"),
        ("just words (0, 1) [2, 3]", "no rows: a row is"),
        ("[(0, tensor([1, 2]))]\n\n[(0, tensor([1, -2]))]", "row 2 (line 3), layer 0, expert 1: '-2' is no count"),
        ("[(0, tensor([1, 2.5]))]", "row 1 (line 1), layer 0, expert 1: '2.5' is no count"),
        ("[(0, tensor([1, nan]))]", "row 1 (line 1), layer 0, expert 1: 'nan' is no count"),
        ("[(0, tensor([1, inf]))]", "row 1 (line 1), layer 0, expert 1: 'inf' is no count"),
        ("[(0, tensor([1, 2,  ..., 5]))]", "row 1 (line 1), layer 0, expert 2: '...' is no count"),
        (
            "[(0, tensor([1, 2, 3]))]\n[(0, tensor([1, 2]))]",
            "row 2 (line 2), layer 0 has 2 counts; the first row starts",
        ),
        (
            "[(0, tensor([1, 2])), (1, tensor([1]))]",
            "row 1 (line 1), layer 1 has 1 counts; the first row starts with 2",
        ),
        ("[(0, tensor([]))]", "row 1 (line 1), layer 0 has 0 counts"),
        (
            "[(0, tensor([1])), (1, tensor([1]))]\n[(0, tensor([1]))]",
            "row 2 (line 2) has layers 0; the first row has layers 0, 1",
        ),
        ("[(0, tensor([1])), (0, tensor([1]))]", "row 1 (line 1) has layer 0 twice"),
        ("[(0, tensor([1])), (1, tensor([1", "row 1 (line 1) cannot be read after layer 0: expected (layer, tensor(["),
        ("[(0, tensor([[1, 2]]))]", "row 1 (line 1) cannot be read at its first layer: expected (layer, tensor(["),
        (
            "\n[(0, tensor([1, 2])) and (1, ",
            "row 1 (line 2) breaks off after layer 0: expected a comma or ], found 'and",
        ),
        (f"[({'9' * 5000}, tensor([1, 2]))]", "row 1 (line 1): 999999999999999999... is no layer: write a number of"),
        (" (1, tensor([3, 4]))]\n[(0, tensor([1, 2]))]", "some (layer, tensor([...])) stand outside of any row"),
        ("[(0, tensor([1, 2]))]\n[(0, tensor([0, 0]))]", "row 2 (line 2), layer 0 counts no tokens at all"),
    ],
)
def test_what_is_no_table_of_counts_is_refused_by_its_row(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CountsError) as refused:
        read_counts(write(tmp_path, "counts.txt", text))
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


# --- CSV


def test_csv_has_a_line_for_each_count_or_a_column_for_each_expert(tmp_path: Path) -> None:
    expected = np.arange(1, 25).reshape(3, 2, 4)  # rows, layers, experts; the last row is validation
    splits = ["train", "train", "val"]
    cells = [(splits[r], 10 * r, layer, e, expected[r, layer, e]) for r, layer, e in np.ndindex(3, 2, 4)]
    long = "split,step,layer,expert,count\n" + "\n".join(",".join(map(str, cell)) for cell in cells)
    wide = 'Step;Layer;"expert_0";expert_1; expert_2;expert_3;"Split"\n' + "\n".join(
        ";".join(map(str, [10 * r, layer, *expected[r, layer], splits[r]])) for r, layer in np.ndindex(3, 2)
    )
    no_steps = "layer\te3\te2\te1\te0\tsplit\n" + "\n".join(
        "\t".join(map(str, [layer, *expected[r, layer, ::-1], splits[r]])) for layer, r in np.ndindex(2, 3)
    )
    for text in (long, wide, no_steps):
        counts = read_counts(write(tmp_path, "counts.csv", text))
        assert counts.layers == [0, 1] and counts.experts == [0, 1, 2, 3]
        assert counts.parts["train"].counts.tolist() == expected[:2].tolist()
        assert counts.parts["val"].counts.tolist() == expected[2:].tolist()
    only_counts = read_counts(write(tmp_path, "counts.csv", "0,1,2\n3,4,5\n6,7,8\n"))
    assert only_counts.layers == [0] and only_counts.parts["all"].counts.tolist() == [[[3, 4, 5]], [[6, 7, 8]]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the first line is ''"),
        ("layer,a,b\n0,1,2", "the first line is 'layer,a,b': it must name the columns"),
        ("layer,e0,e1,loss\n0,1,2,3", "the first line is 'layer,e0,e1,loss'"),
        ("layer,e0,e0\n0,1,2", "the first line is 'layer,e0,e0'"),
        (f"layer,e{'9' * 5000}\n0,1", "the first line is 'layer,e999"),
        ("layer,e0,e1\n", "no rows"),
        ("layer,e0,e1\n0,1,2\n0,3\n", "line 3 has 2 columns and the first line 3"),
        ("layer,e0,e1\n0,1,2,3\n", "line 2 has 4 columns and the first line 3"),
        ("layer,e0,e1\n\nx,1,2\n", "line 3: layer is 'x': it must be a whole number from 0 to 999999"),
        ("expert,count\n0,1\n9999999,1", "line 3: expert is '9999999': it must be a whole number from 0 to 999999"),
        ("split,e0,e1\ntest,1,2\n", "line 2: 'test' is no part: write train or val"),
        ("step,layer,e0,e1\n5,0,1,2\n5,0,3,4", "row 1 (step 5), layer 0, expert 0 is there twice, again in line 3"),
        ("step,layer,e0,e1\n5,0,1,2\n6,0,3,-4", "row 2 (step 6), layer 0, expert 1: '-4' is no count"),
        ("step,expert,count\n5,0,1\n5,1,1\n6,1,2", "row 2 (step 6), layer 0, expert 0: there is no count"),
        ("step,expert,count\n5,0,1\n5,1,1\n6,0,2", "row 2 (step 6), layer 0 has 1 counts; the first row starts with 2"),
        ("layer,e0\n0,1\n1,1\n0,1\n", "row 2 has layers 0; the first row has layers 0, 1"),
    ],
)
def test_csv_that_is_no_table_of_counts_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CountsError) as refused:
        read_counts(write(tmp_path, "counts.csv", text))
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


# --- JSON, and a run's folder


def test_json_is_rows_or_parts_with_rows_or_what_a_run_writes(tmp_path: Path) -> None:
    train, val = [[[1, 2], [3, 4]], [[5, 6], [7, 8.0]]], [[[9, 10], [11, 12]]]
    objects = [{"split": "train", "step": 5 * step, "counts": row} for step, row in enumerate(train)]
    objects += [{"split": "val", "step": 10, "counts": val[0]}]
    for value in ({"train": train, "validation": val}, {"train": objects[:2], "val": val}, objects):
        counts = read_counts(write(tmp_path, "counts.json", json.dumps(value)))
        assert counts.parts["train"].counts.tolist() == train and counts.parts["val"].counts.tolist() == val
    assert counts.parts["val"].rows == ["row 3 (step 10)"]
    assert read_counts(write(tmp_path, "counts.json", json.dumps(train))).parts["all"].counts.tolist() == train


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the file is not JSON that can be read: Expecting property name"),
        ("9" * 5000, "the file is not JSON that can be read: Exceeds the limit"),
        ("[" * 100_000, "the file is not JSON that can be read: maximum recursion depth exceeded"),
        ("3", 'expected a list of rows, or {"train": [rows], "val": [rows]}'),
        ("[]", "no rows"),
        ('{"test": []}', "the file: 'test' is no part"),
        ("[[1, 2]]", "row 1: its counts are not a list over layers of lists over experts"),
        ("[[[1, 2]], [[1, true]]]", "row 2, layer 0, expert 1: True is no count"),
        ("[[[1, 2]], [[1, null]]]", "row 2, layer 0, expert 1: there is no count"),
        ("[[[1, 2]], [[1, NaN]]]", "row 2, layer 0, expert 1: nan is no count"),
        (f"[[[1, {'9' * 4000}]]]", "row 1, layer 0, expert 1: 999"),
        ("[[[1, 2]], []]", "row 2 has layers none; the first row has layers 0"),
        ("[[]]", "row 1 has layers none"),
        ('[{"step": 3, "split": "train"}]', "row 1 (step 3): its counts are not a list"),
        ('[{"counts": [[1, 2]], "active": 2}]', "row 1: its active experts are 2: expected a list of their numbers"),
        ('[{"counts": [[1, 2]], "active": [0, 2]}]', "row 1: its active experts are [0, 2]: expected different"),
        ('[{"counts": [[1, 2]], "active": [0, 0]}]', "row 1: its active experts are [0, 0]: expected different"),
        ('[{"counts": [[1, 2]], "active": [true, 0]}]', "row 1: its active experts are [True, 0]: expected different"),
    ],
)
def test_json_that_is_no_table_of_counts_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CountsError) as refused:
        read_counts(write(tmp_path, "counts.json", text))
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def write_run(folder: Path, lines: list[dict], top_k: int = 2) -> Path:
    write(folder, "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write(folder, "config.json", json.dumps({"preset": "nano", "model": {"top_k": top_k}}))
    return folder


def test_of_a_run_the_routing_lines_are_read_and_k_is_its_own(tmp_path: Path) -> None:
    run = write_run(
        tmp_path,
        [
            {"kind": "train", "step": 1, "train_loss": 3.0},
            {"kind": "routing", "split": "train", "step": 25, "counts": [[1, 2], [3, 0]]},
            {"kind": "val", "step": 25, "val_loss": 3.0},
            {"kind": "routing", "split": "val", "step": 25, "counts": [[5, 6], [7, 4]], "cv": [0.1, 0.2]},
        ],
    )
    for source in (run, run / "metrics.jsonl"):
        counts = read_counts(source)
        assert counts.parts["train"].counts.tolist() == [[[1, 2], [3, 0]]]
        assert counts.parts["val"].counts.tolist() == [[[5, 6], [7, 4]]]
        assert counts.parts["val"].rows == ["row 2 (step 25)"]
        assert counts.top_k == (2 if source == run else None)


def test_experts_that_cannot_be_chosen_any_more_are_left_out_and_so_are_rows_with_other_ones(tmp_path: Path) -> None:
    lines = [
        {"kind": "routing", "split": "train", "step": 0, "counts": [[9, 0, 0, 0]], "active": [0]},
        {"kind": "routing", "split": "train", "step": 25, "counts": [[4, 3, 2, 0]], "active": [0, 1, 2]},
        {"kind": "routing", "split": "train", "step": 50, "counts": [[5, 0, 4, 0]], "active": [0, 2]},
        {"kind": "routing", "split": "train", "step": 75, "counts": [[6, 0, 3, 0]], "active": [0, 2]},
    ]
    counts = read_counts(write_run(tmp_path, lines))
    assert counts.experts == [0, 2] and counts.parts["train"].counts.tolist() == [[[5, 4]], [[6, 3]]]
    assert counts.notes == ["rows left out, as other experts were active than in row 4 (step 75): 2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "train", "step": 3}', 'no rows: no line of this file is of the kind "routing"'),
        ('{"kind": "routing", "counts": [[1', "line 1 is not JSON"),
        ("[1]", "line 1 is not an object"),
        ('{"kind": "routing", "split": "test", "counts": [[1]]}', "row 1: 'test' is no part: write train or val"),
    ],
)
def test_a_run_without_counts_says_so(line: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, "metrics.jsonl", line)
    with pytest.raises(CountsError) as refused:
        read_counts(tmp_path)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"[]", "config.json has no model.top_k that is a whole number: mend or remove it"),
        (b'{"model": []}', "config.json has no model.top_k that is a whole number: mend or remove it"),
        (b'{"model": {"top_k": "2"}}', "config.json has no model.top_k that is a whole number: mend or remove it"),
        (b'{"preset": "\xff"}', "config.json is not JSON that can be read: 'utf-8' codec can't decode byte 0xff"),
        (b'{"model": {"top_k": %s}}' % (b"9" * 5000), "config.json is not JSON that can be read: Exceeds the limit"),
        (b"[" * 100_000, "config.json is not JSON that can be read: maximum recursion depth exceeded"),
    ],
)
def test_a_run_whose_configuration_cannot_be_read_says_so(config: bytes, message: str, tmp_path: Path) -> None:
    write_run(tmp_path, [{"kind": "routing", "counts": [[1, 2]]}])
    (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(CountsError) as refused:
        read_counts(tmp_path)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(CountsError, match="^this folder holds no metrics.jsonl: name a run's folder or a file"):
        read_counts(tmp_path)
