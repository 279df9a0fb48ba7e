"""What is asked of a model, spread over its layers."""

import math

import pytest

from swat_jax.errors import UsageError
from swat_jax.sparsity.per_layer import LayerSparsity, Request

SHAPES = {
    "stem": (3, 3, 3, 16),
    "body/0": (3, 3, 16, 32),
    "body/1": (3, 3, 32, 32),
    "head": (32, 10),
}


def weights(found):
    return {path: one.weight_sparsity for path, one in found.items()}


def test_uniform_is_the_same_everywhere_but_where_dense():
    found = Request(sparsity=0.9, activation_sparsity=0.8, dense="stem").per_layer(SHAPES)
    assert found["stem"] == LayerSparsity(0.0, 0.0)
    assert found["stem"].is_dense
    assert {found[path] for path in ("body/0", "body/1", "head")} == {LayerSparsity(0.9, 0.8)}


def test_granularity_is_that_of_convolutions():
    found = Request(sparsity=0.5, granularity="channel", threshold_every_steps=4).per_layer(SHAPES)
    assert found["stem"].granularity == found["body/1"].granularity == "channel"
    assert found["head"].granularity == "unstructured"
    assert {one.threshold_every_steps for one in found.values()} == {4}


def test_erk_meets_the_sparsity_with_the_layers_that_it_spreads_over():
    request = Request(sparsity=0.9, distribution="erk", dense=["stem"], overrides={"head": 0.5})
    found = request.per_layer(SHAPES)
    sizes = {path: math.prod(shape) for path, shape in SHAPES.items()}
    spread = ("body/0", "body/1")
    kept = sum(sizes[path] * (1 - found[path].weight_sparsity) for path in spread)
    assert kept == pytest.approx(0.1 * sum(sizes[path] for path in spread))
    # Density in proportion to sum(shape) / prod(shape).
    density = {path: (1 - found[path].weight_sparsity) * sizes[path] for path in spread}
    assert density["body/0"] / density["body/1"] == pytest.approx(54 / 70)
    assert (found["stem"].weight_sparsity, found["head"].weight_sparsity) == (0.0, 0.5)


def test_later_overrides_win_setting_by_setting_and_come_before_dense():
    overrides = {
        "**": {"granularity": "filter"},
        "body/*": 0.7,
        "body/1": {"activation_sparsity": 0.2, "threshold_every_steps": 3},
        "stem": {"weight_sparsity": 0.3},
    }
    found = Request(sparsity=0.9, dense=("stem", "head"), overrides=overrides).per_layer(SHAPES)
    assert found["body/0"] == LayerSparsity(0.7, 0.7, "filter")
    assert found["body/1"] == LayerSparsity(0.7, 0.2, "filter", 3)
    assert found["stem"] == LayerSparsity(0.3, 0.3, "filter")
    assert found["head"].is_dense


def test_momentum_gives_budgets_to_all_that_have_no_sparsity_of_their_own():
    request = Request(sparsity=0.9, distribution="momentum", dense="stem", overrides={"head": 0.4})
    found = request.per_layer(SHAPES)
    assert [path for path, one in found.items() if one.dynamic_budget] == ["body/0", "body/1"]
    assert weights(found) == {"stem": 0.0, "body/0": 0.9, "body/1": 0.9, "head": 0.4}


def test_patterns_of_what_stays_dense_may_name_what_cannot_be_sparse():
    found = Request(sparsity=0.5, dense=["up", "stem"]).per_layer(SHAPES, left=["up"])
    assert found["stem"].is_dense
    assert "up" not in found


@pytest.mark.parametrize(
    ("chooses", "expected"),
    [
        (None, list(SHAPES)),
        ("body/*", ["body/0", "body/1"]),
        (("head", "stem"), ["stem", "head"]),
        (lambda path, layer: len(layer) == 2, ["head"]),
    ],
)
def test_filter(chooses, expected):
    assert Request(sparsity=0.5, filter=chooses).chosen(SHAPES) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sparsity": 1.0}, r"sparsity must be .* got 1.0"),
        ({"sparsity": "0.9"}, r"sparsity must be .* got '0.9'"),
        ({"sparsity": True}, r"sparsity must be .* got True"),
        ({"activation_sparsity": -0.1}, "activation_sparsity must be"),
        (
            {"distribution": "erdos"},
            "distribution must be one of uniform, erk, momentum; got 'erdos'",
        ),
        ({"distribution": "dense"}, "distribution must be one of"),
        ({"granularity": "block"}, "granularity must be one of"),
        ({"threshold_every_steps": 0}, "threshold_every_steps must be"),
        (
            {"distribution": "momentum", "granularity": "channel"},
            "granularity must be unstructured",
        ),
        ({"distribution": "momentum", "activation_sparsity": 0.5}, "must equal sparsity"),
        ({"overrides": {"head": 2}}, r"overrides\['head'\] must be"),
        ({"overrides": {"head": {"weight_sparsty": 0.5}}}, "did you mean 'weight_sparsity'"),
        ({"overrides": {"head": {"weight_sparsity": 1}}}, "weight_sparsity'] must be"),
        ({"overrides": {"head": {"granularity": "x"}}}, "granularity must be one of"),
        ({"overrides": {"head": {"threshold_every_steps": 0.5}}}, "threshold_every_steps"),
    ],
)
def test_bad_values_are_refused_at_once(arguments, words):
    with pytest.raises(UsageError, match=words):
        Request(**{"sparsity": 0.9, **arguments})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dense": "stm"}, "dense: no layer fits 'stm'; did you mean 'stem'"),
        (
            {"overrides": {"body": 0.5}},
            r"overrides: no layer fits 'body'; did you mean 'body/\*\*'",
        ),
        (
            {"distribution": "momentum", "overrides": {"head": {"activation_sparsity": 0.5}}},
            "overrides: head has a budget",
        ),
        (
            {"distribution": "momentum", "overrides": {"stem": {"granularity": "filter"}}},
            "overrides: stem has a budget",
        ),
    ],
)
def test_what_does_not_fit_the_layers_is_refused(arguments, words):
    with pytest.raises(UsageError, match=words):
        Request(sparsity=0.9, **arguments).per_layer(SHAPES)


def test_a_filter_that_fits_none_is_refused():
    with pytest.raises(UsageError, match="filter: no layer fits 'tail'"):
        Request(sparsity=0.9, filter="tail").chosen(SHAPES)
