"""Names of methods: what they mean, to the last digit, and what is refused."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swat_jax import method, recipe
from swat_jax.errors import UsageError

KINDS = {
    "u": ("uniform", "unstructured"),
    "erk": ("erk", "unstructured"),
    "m": ("momentum", "unstructured"),
    "channel": ("uniform", "channel"),
    "filter": ("uniform", "filter"),
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dense", method.Method("dense", "unstructured", 0.0)),
        ("u80", method.Method("uniform", "unstructured", 0.8)),
        ("erk95", method.Method("erk", "unstructured", 0.95)),
        ("m95", method.Method("momentum", "unstructured", 0.95)),
        ("channel50", method.Method("uniform", "channel", 0.5)),
        ("filter70", method.Method("uniform", "filter", 0.7)),
        ("u97.5", method.Method("uniform", "unstructured", 0.975)),
        ("m0", method.Method("momentum", "unstructured", 0.0)),
        ("u99.999", method.Method("uniform", "unstructured", 0.99999)),
    ],
)
def test_parse(text, expected):
    assert method.parse(text) == expected


@given(st.sampled_from(sorted(KINDS)), st.integers(0, 99_999))
def test_the_float_prints_as_the_decimal_that_was_asked_for(kind, thousandths):
    found = method.parse(f"{kind}{thousandths // 1000}.{thousandths % 1000:03}")
    assert (found.distribution, found.granularity) == KINDS[kind]
    # Keep counts are computed from this very string.
    assert Fraction(str(found.sparsity)) == Fraction(thousandths, 100_000)


@pytest.mark.parametrize(
    "text",
    [
        *("", "u", "90", "u100", "u100.0", "u250", "u-5", "u9e1", "U90", " u90", "u90 ", "u90\n"),
        *(
            "dense90",
            "u90.",
            "u.5",
            "erk",
            "block90",
            "u90x",
            "uu90",
            "channel",
            "u\u0669\u0660",
            "u0.1234567",
        ),
    ],
)
def test_refusals_say_what_is_allowed(text):
    with pytest.raises(UsageError, match=r"dense.*u, erk, m, channel, filter") as caught:
        method.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "first_dense"),
    [
        ("dense", True),
        ("u90", True),
        ("channel70", True),
        ("filter70", True),
        ("erk90", False),
        ("m90", False),
    ],
)
def test_apply_fills_the_config_and_nothing_else(text, first_dense):
    config = recipe.digits()
    config.sparsity.threshold_every_steps = 7
    config.sparsity.exact_epochs = 3
    assert method.apply(config, text) is config
    parsed = method.parse(text)
    assert config.sparsity.to_dict() == {
        "method": text,
        "distribution": parsed.distribution,
        "granularity": parsed.granularity,
        "weight": parsed.sparsity,
        "activation": parsed.sparsity,
        "first_layer_dense": first_dense,
        "threshold_every_steps": 7,
        "exact_epochs": 3,
    }
