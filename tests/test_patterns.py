"""Patterns of layer paths, and what is said of one that fits none."""

import pytest

from swat_jax import patterns
from swat_jax.errors import UsageError

PATHS = ("stem", "stage1/0/conv1", "stage1/0/conv2", "stage1/1/conv1", "head")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("stem", {"stem"}),
        ("*", {"stem", "head"}),
        ("**", set(PATHS)),
        ("stage1/*/conv1", {"stage1/0/conv1", "stage1/1/conv1"}),
        ("stage1/0/conv?", {"stage1/0/conv1", "stage1/0/conv2"}),
        ("stage1/[!0]/*", {"stage1/1/conv1"}),
        ("**/conv1", {"stage1/0/conv1", "stage1/1/conv1"}),
        ("stage1/**", set(PATHS) - {"stem", "head"}),
        ("**/0/**", {"stage1/0/conv1", "stage1/0/conv2"}),
    ],
)
def test_what_fits(pattern, expected):
    assert set(patterns.select(pattern, PATHS, "dense")) == expected
    assert {path for path in PATHS if patterns.matches(pattern, path)} == expected


def test_a_layer_that_is_the_whole_model():
    assert patterns.matches("", "")
    assert patterns.matches("**", "")
    assert patterns.matches("*", "")
    assert not patterns.matches("a", "")


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("stm", "did you mean 'stem'"),
        ("stage1", r"'stage1/\*\*'"),
        ("stage1/0/conv3", "'stage1/0/conv"),
        ("Head", "did you mean 'head'"),
        ("zzzz", "(?s)zzzz.*layers: stem, stage1/0/conv1"),
        (3, "patterns that are text, got 3"),
    ],
)
def test_what_fits_none_says_what_may_have_been_meant(pattern, words):
    with pytest.raises(UsageError, match=r"^dense"):
        patterns.select(pattern, PATHS, "dense")
    with pytest.raises(UsageError, match=words):
        patterns.select(pattern, PATHS, "dense")


def test_long_lists_are_cut():
    assert patterns.did_you_mean("x", [f"layer{n}" for n in range(12)], "layers").endswith(
        "layer9 and 2 more"
    )
