"""What tests of inputs from strangers share: values that nobody expects, and what a refusal must look like."""

import pytest
from hypothesis import strategies as st

MANY = pytest.param(500, marks=pytest.mark.slow)

NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**400, -(10**4000), 1e308, 5e-324])
TEXTS = st.text() | st.sampled_from(["nano", "\ud800", "\0", "a\nb", "x" * 10_000])
PLAIN = st.none() | st.booleans() | NUMBERS | TEXTS
JSON = st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


def assert_one_clear_line(error: Exception, about: str = "") -> None:
    message = str(error)
    assert message and about in message
    assert "\n" not in message and len(message) < 1000 + len(about)
