"""Configurations from strangers: saved or typed, they can run or are refused in one line.

Any exception but that refusal fails a test, and so does a crash of the process.
"""

import contextlib
import dataclasses
import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switch_bank.config import Config, ConfigError, from_dict, parse, presets
from tests.strangers import JSON, MANY, NUMBERS, assert_one_clear_line


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
WORDS = [
    "nan",
    "inf",
    "-inf",
    "1e400",
    "9" * 5000,
    "None",
    "True",
    "0x10",
    "1_000",
    "causal",
    "\ud800",
    "٣",
    "-",
    "--",
    "",
]
VALUES = NUMBERS.map(str) | st.text() | st.sampled_from(WORDS)


@pytest.mark.parametrize("cases", [20, MANY])  # tyro takes a quarter of a second for each
def test_a_command_line_of_any_words_is_used_or_refused(cases: int) -> None:
    option = st.tuples(st.sampled_from(OPTIONS), st.lists(VALUES, max_size=3)).map(lambda pair: [pair[0], *pair[1]])

    @settings(max_examples=cases)
    @given(st.lists(VALUES, max_size=1), st.lists(option | st.lists(VALUES, max_size=2), max_size=3))
    def check(first: list[str], others: list[list[str]]) -> None:
        words = first + [word for words in others for word in words]
        stderr = io.TextIOWrapper(io.BytesIO(), errors="backslashreplace")  # as Python opens it
        try:
            with contextlib.redirect_stderr(stderr):
                config = parse(words, "nano").check()
        except ConfigError as error:
            assert_one_clear_line(error)
        except SystemExit as exit_:
            assert exit_.code == 2 and stderr.tell() > 0
        else:
            assert from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config

    check()
