"""Inputs from strangers: whatever a shard, a checkpoint or a configuration holds, it is used or refused in one line.

Any exception but the refusals named here fails a test, and so does a crash of the process. Every test tries some cases
in the quick set and many in the slow one.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switch_bank.config import Config, ConfigError, from_dict, parse, presets
from switch_bank.data import MAGIC, VERSION, DataError, Shards, write_shard

MANY = pytest.param(600, marks=pytest.mark.slow)


def assert_one_clear_line(error: Exception, about: str = "") -> None:
    message = str(error)
    assert message and about in message
    assert "\n" not in message and len(message) < 1000 + len(about)


# --- Shards

VOCABULARY = 300
INT32 = st.integers(-(2**31), 2**31 - 1)
TOKENS = st.lists(st.integers(0, VOCABULARY - 1) | st.integers(0, 65_535), max_size=8)


def open_shard(path: Path) -> None:
    """A file is used if and only if it is a shard, and then it is read to its last token."""
    raw = path.read_bytes()
    header, tokens = raw[:1024], np.frombuffer(raw[1024 : len(raw) - len(raw) % 2], "<u2")
    is_shard = len(raw) == 1024 + 2 * len(tokens) and len(tokens) > 0 and (tokens < VOCABULARY).all()
    is_shard = is_shard and np.frombuffer(header, "<i4")[:3].tolist() == [MAGIC, VERSION, len(tokens)]
    try:
        shards = Shards.open(str(path), VOCABULARY)
    except DataError as error:
        assert not is_shard
        assert_one_clear_line(error, str(path))
    else:
        assert is_shard
        assert np.array_equal(shards.read(0, 2 * len(tokens)), [*tokens, *tokens])


@pytest.mark.parametrize("cases", [60, MANY])
def test_a_file_of_any_content_is_a_shard_or_refused(cases: int, tmp_path: Path) -> None:
    path = tmp_path / "train_0.bin"
    number_of_tokens = st.integers(-1, 9) | INT32

    @settings(max_examples=cases)
    @given(st.just(MAGIC) | INT32, st.just(VERSION) | INT32, number_of_tokens, TOKENS, st.binary(max_size=3))
    def check(magic: int, version: int, count: int, tokens: list[int], rest: bytes) -> None:
        header = np.zeros(256, "<i4")
        header[:3] = magic, version, count
        path.write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes() + rest)
        open_shard(path)

    check()


@pytest.mark.parametrize("cases", [60, MANY])
def test_a_shard_with_bytes_changed_cut_off_or_added_is_read_as_it_is_or_refused(cases: int, tmp_path: Path) -> None:
    path = tmp_path / "train_0.bin"
    whole = 1024 + 2 * 40

    @settings(max_examples=cases)
    @given(st.dictionaries(st.integers(0, whole - 1), st.integers(0, 255), max_size=3), st.integers(0, whole + 4))
    def check(changes: dict[int, int], size: int) -> None:
        write_shard(path, np.arange(40))
        raw = bytearray(path.read_bytes())
        for at, byte in changes.items():
            raw[at] = byte
        path.write_bytes(raw)
        os.truncate(path, size)
        open_shard(path)

    check()


@pytest.mark.parametrize("cases", [60, MANY])
def test_a_pattern_of_any_characters_finds_shards_or_is_refused(cases: int, tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", np.arange(40))
    write_shard(tmp_path / "ä b.bin", np.arange(40))
    (tmp_path / "folder.bin").mkdir()
    write_shard(tmp_path / "folder.bin" / "a.bin", np.arange(40))
    (tmp_path / "nowhere.bin").symlink_to("nothing")

    @settings(max_examples=cases)
    @given(st.text(st.sampled_from("abinÄä ?*[]!-./\\\n\0\ud800{}$~")) | st.text() | st.text("*?/a", max_size=200))
    def check(pattern: str) -> None:
        if ".." in pattern:
            return  # would leave the folder
        try:
            shards = Shards.open(f"{tmp_path}/{pattern}", VOCABULARY)
        except DataError as error:
            assert_one_clear_line(error, about=str(tmp_path))
        else:
            assert shards.total == 40 * len(shards.paths) > 0

    check()


def test_a_header_that_promises_terabytes_takes_no_memory_and_no_time(tmp_path: Path) -> None:
    path = tmp_path / "train_0.bin"
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, 2**31 - 1
    for size in (1024, 2**42):  # the second one is a file of holes
        path.write_bytes(header.tobytes())
        os.truncate(path, size)
        with pytest.raises(DataError, match=rf"2147483647 tokens \(4294968318 bytes\) but the file has {size} bytes"):
            Shards.open(str(path), VOCABULARY)


# --- Configurations

NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**400, -(10**4000), 1e308, 5e-324])
PLAIN = (
    st.none() | st.booleans() | NUMBERS | st.text() | st.sampled_from(["nano", "\ud800", "\0", "a\nb", "x" * 10_000])
)
JSON = st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


def read_saved(values: Any) -> None:
    """What is accepted can run on one process and survives being saved again."""
    try:
        config = from_dict(values)
    except ConfigError as error:
        assert_one_clear_line(error)
    else:
        assert config.check() is config
        assert from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize("cases", [60, MANY])
def test_a_saved_configuration_of_any_content_is_used_or_refused(cases: int) -> None:
    @settings(max_examples=cases)
    @given(JSON | st.dictionaries(st.sampled_from(["preset", "model", "schedule", "optim", "data", "run"]), JSON))
    def check(values: Any) -> None:
        read_saved(values)

    check()


@pytest.mark.parametrize("cases", [60, MANY])
def test_a_saved_configuration_with_options_changed_removed_or_added_is_used_or_refused(cases: int) -> None:
    saved = {name: json.loads(json.dumps(dataclasses.asdict(preset))) for name, preset in presets.items()}
    options = [(group, name) for group, values in saved["nano"].items() if group != "preset" for name in values]
    added = st.tuples(st.sampled_from(["model", "run"]), st.text() | st.integers() | st.tuples(st.integers()))
    value = JSON | st.lists(st.tuples(NUMBERS, NUMBERS))

    @settings(max_examples=cases)
    @given(
        st.sampled_from(list(presets)),
        st.lists(st.tuples(st.sampled_from(options) | added, value), min_size=1, max_size=4),
        st.lists(st.sampled_from(options), max_size=3),
    )
    def check(preset: str, changes: list[tuple[tuple[str, Any], Any]], removed: list[tuple[str, str]]) -> None:
        values = {group: dict(of) if isinstance(of, dict) else of for group, of in saved[preset].items()}
        for group, name in removed:
            values[group].pop(name, None)
        for (group, name), changed in changes:
            values[group][name] = changed
        read_saved(values)

    check()


def test_a_value_too_deep_or_too_long_to_print_is_refused() -> None:
    deep: Any = 0
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, tuple(deep), 10**5000, [10**5000], {"a": deep}):
        for group in ("model", "schedule", "optim", "data", "run"):
            for option in dataclasses.fields(getattr(Config(), group)):
                with pytest.raises(ConfigError) as error:
                    from_dict({group: {option.name: value}})
                assert_one_clear_line(error.value, f"{group}.{option.name}")


OPTIONS = [
    f"--{group}.{option.name.replace('_', '-')}"
    for group in ("model", "schedule", "optim", "data", "run")
    for option in dataclasses.fields(getattr(Config(), group))
]
VALUES = (
    NUMBERS.map(str)
    | st.text()
    | st.sampled_from(
        [
            "nan",
            "inf",
            "-inf",
            "1e400",
            "9" * 5000,
            "None",
            "True",
            "causal",
            "0x10",
            "1_000",
            "\ud800",
            "٣",
            "--",
            "-",
            "",
        ]
    )
)


@pytest.mark.parametrize("cases", [20, MANY])  # tyro takes a quarter of a second for each
def test_a_command_line_of_any_words_is_used_or_refused(cases: int, capsys: pytest.CaptureFixture[str]) -> None:
    option = st.tuples(st.sampled_from(OPTIONS), st.lists(VALUES, max_size=3)).map(lambda pair: [pair[0], *pair[1]])

    @settings(max_examples=cases)
    @given(st.lists(VALUES, max_size=1), st.lists(option | st.lists(VALUES, max_size=2), max_size=3))
    def check(first: list[str], others: list[list[str]]) -> None:
        words = first + [word for words in others for word in words]
        try:
            config = parse(words, "nano").check()
        except ConfigError as error:
            assert_one_clear_line(error)
        except SystemExit as exit_:
            assert exit_.code == 2 and capsys.readouterr().err
        else:
            assert from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config

    check()
