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
    "vector8-": ("uniform", "vector8"),
    "vector16-": ("uniform", "vector16"),
    "vector32-": ("uniform", "vector32"),
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
        ("vector8-80", method.Method("uniform", "vector8", 0.8)),
        ("vector32-97.5", method.Method("uniform", "vector32", 0.975)),
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
            "vector80",
            "vector16",
            "vector16-",
            "vector16--5",
            "vector4-80",
            "vector1680",
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
        ("vector16-80", True),
        ("erk90", False),
        ("m90", False),
    ],
)
def test_apply_fills_the_config_and_nothing_else(text, first_dense):
    config = recipe.digits()
    config.sparsity.threshold_every_steps = 7
    config.sparsity.exact_epochs = 3
    others = config.sparsity.to_dict()
    assert method.apply(config, text) is config
    parsed = method.parse(text)
    assert config.sparsity.to_dict() == others | {
        "method": text,
        "distribution": parsed.distribution,
        "granularity": parsed.granularity,
        "weight": parsed.sparsity,
        "activation": parsed.sparsity,
        "first_layer_dense": first_dense,
    }


@pytest.mark.parametrize(
    "text", ["dense", "u90", "erk97.5", "m0", "channel70", "filter50", "vector16-80"]
)
def test_the_label_of_a_method_is_its_name(text):
    assert method.label(method.apply(recipe.digits(), text).sparsity) == text


@pytest.mark.parametrize(
    ("text", "changes", "label"),
    [
        ("u90", {"weight": 0.8}, "u (weight 80, activation 90)"),
        ("u90", {"weight": 0.8, "activation": 0.8}, "u80"),
        ("u90", {"activation": 0.0}, "u (weight 90, activation 0)"),
        ("u90", {"first_layer_dense": False}, "u90 (first layer sparse)"),
        ("u90", {"granularity": "channel"}, "channel90"),
        ("u90", {"distribution": "erk", "first_layer_dense": False}, "erk90"),
        ("u90", {"distribution": "dense", "weight": 0.0, "activation": 0.0}, "dense"),
        ("erk90", {"granularity": "filter"}, "erk filter 90"),
        ("u80", {"granularity": "vector8"}, "vector8-80"),
        ("vector32-80", {"activation": 0.9}, "vector32 (weight 80, activation 90)"),
        (
            "erk90",
            {"granularity": "filter", "weight": 0.875},
            "erk filter (weight 87.5, activation 90)",
        ),
        ("dense", {"distribution": "uniform", "weight": 0.5}, "u (weight 50, activation 0)"),
    ],
)
def test_the_label_says_what_flags_made_of_it(text, changes, label):
    config = method.apply(recipe.digits(), text)
    config.sparsity.update(changes)
    assert method.label(config.sparsity) == label
