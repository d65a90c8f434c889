"""Inputs from strangers: whatever a shard, a checkpoint or a configuration holds, it is used or refused in one line.

Any exception but the refusals named here fails a test, and so does a crash of the process. Every test tries some cases
in the quick set and many in the slow one.
"""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switch_bank.config import Config, ConfigError, from_dict, parse, presets

MANY = pytest.param(600, marks=pytest.mark.slow)


def assert_one_clear_line(error: Exception, about: str = "") -> None:
    message = str(error)
    assert message and about in message
    assert "\n" not in message and len(message) < 1000 + len(about)


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
