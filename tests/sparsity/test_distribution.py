"""Budgets over layers: uniform, ERK against a brute force, SWAT-M against its words."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swat_jax.errors import UsageError
from swat_jax.sparsity import distribution, top_k
from tests import oracle

SPARSITIES = st.one_of(st.integers(0, 99).map(lambda n: n / 100), st.sampled_from([0.999, 0.0]))
SHAPE = st.one_of(
    st.tuples(*[st.sampled_from([1, 3, 7])] * 2, st.integers(1, 64), st.integers(1, 64)),
    st.tuples(st.integers(1, 200), st.integers(1, 200)),
    st.tuples(st.integers(1, 5), st.integers(1, 20), st.integers(1, 20)),
)
LAYERS = st.lists(SHAPE, min_size=1, max_size=8).map(
    lambda shapes: {f"layer{i}": shape for i, shape in enumerate(shapes)}
)


def test_names():
    assert set(distribution.names()) == {"dense", "uniform", "erk", "momentum"}


def test_uniform():
    shapes = {"stem": (3, 3, 3, 8), "conv": (3, 3, 8, 8), "classifier": (8, 10)}
    assert distribution.uniform(shapes, 0.9) == dict.fromkeys(shapes, 0.9)
    assert distribution.uniform(shapes, 0.9, dense=("stem",)) == {
        "stem": 0.0,
        "conv": 0.9,
        "classifier": 0.9,
    }
    assert list(distribution.uniform(shapes, 0.5)) == list(shapes)


def test_uniform_refuses_what_is_no_layer():
    with pytest.raises(UsageError, match=r"dense.*stm"):
        distribution.uniform({"stem": (3, 3, 3, 8)}, 0.9, dense=("stm",))


@pytest.mark.parametrize("make", [distribution.uniform, distribution.erdos_renyi_kernel])
@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan"), "x", None])
def test_sparsity_out_of_range_is_refused(make, sparsity):
    with pytest.raises(UsageError, match=r"sparsity.*\[0, 1\)"):
        make({"a": (3, 3, 2, 2)}, sparsity)


@settings(max_examples=100)
@given(shapes=LAYERS, sparsity=SPARSITIES)
def test_erk_matches_a_brute_force(shapes, sparsity):
    result = distribution.erdos_renyi_kernel(shapes, sparsity)
    assert list(result) == list(shapes)
    expected = oracle.erdos_renyi_kernel(shapes, sparsity)
    for name in shapes:
        assert 0 <= result[name] < 1
        assert result[name] == pytest.approx(expected[name], abs=1e-9)
    kept = sum(top_k.keep_count(result[n], math.prod(s)) for n, s in shapes.items())
    total = (1 - sparsity) * sum(math.prod(s) for s in shapes.values())
    # Counts are rounded up layer by layer.
    assert -1e-6 * total - 1e-6 <= kept - total <= len(shapes) + 1e-6 * total


def test_erk_by_hand():
    # Densities 12 e / 27 and 10 e / 16 over 43 weights: all of them together keep 21.5 = 22 e.
    shapes = {"a": (3, 3, 3, 1), "b": (8, 2)}
    scale = 21.5 / (3 + 3 + 3 + 1 + 8 + 2)
    result = distribution.erdos_renyi_kernel(shapes, 0.5)
    assert result["a"] == pytest.approx(1 - scale * 10 / 27)
    assert result["b"] == pytest.approx(1 - scale * 10 / 16)


def test_erk_solves_again_when_a_layer_becomes_dense():
    shapes = {"tiny": (1, 1, 2, 2), "large": (3, 3, 64, 64)}
    result = distribution.erdos_renyi_kernel(shapes, 0.5)
    assert result["tiny"] == 0.0
    n = 3 * 3 * 64 * 64
    assert (1 - result["large"]) * n == pytest.approx((n + 4) / 2 - 4)


# --- SWAT-M ----------


@functools.cache
def compiled_budgets(sizes, total):
    return jax.jit(lambda m: distribution.momentum_budgets(m, np.asarray(sizes), total))


def budgets(momentum, sizes, total):
    keep = compiled_budgets(tuple(sizes), total)(jnp.asarray(momentum, jnp.float32))
    assert keep.dtype == jnp.int32
    assert keep.shape == (len(sizes),)
    return np.asarray(keep)


NETWORKS = [
    ((100, 100, 100, 100), 100),
    ((432, 2304, 9216, 36864, 640), 4945),
    ((432, 2304, 9216, 36864, 640), 24728),
    ((10, 20, 30), 55),
    ((10, 20, 30), 60),
    ((10, 20, 30), 3),
    ((1, 1, 5000), 500),
    ((1_000_000, 64, 2_000_000), 300_006),
    ((7,), 4),
]
MOMENTA = st.one_of(
    st.floats(2.0**-20, 1.0, width=32),
    st.sampled_from([1e-12, 1e-6, 1.0, 1e3]).map(lambda v: float(np.float32(v))),
)


@pytest.mark.parametrize(("sizes", "total"), NETWORKS)
@settings(max_examples=25)
@given(data=st.data())
def test_momentum_budgets_follow_the_words(sizes, total, data):
    momentum = data.draw(st.lists(MOMENTA, min_size=len(sizes), max_size=len(sizes)))
    keep = budgets(momentum, sizes, total)
    size = np.asarray(sizes)
    assert keep.sum() == total
    assert (keep >= 1).all()
    assert (keep <= size).all()
    expected = oracle.momentum_budgets(momentum, sizes, total)
    # Shares are rounded once, and leftovers once each time that they are spread: at most once per
    # layer. Where nobody is that near a limit, this is all that may differ (and float32).
    slack = len(sizes) + 1
    limits = 0.99 * size
    clear = (expected > 1 + slack) & ((expected < limits - slack) | (expected == size))
    if clear.all():
        np.testing.assert_allclose(keep, expected, atol=slack + 2e-7 * total)


def test_budgets_by_hand():
    assert budgets([1, 1, 2], (100, 100, 100), 40).tolist() == [10, 10, 20]
    # The third would get 150 of 100: it becomes dense, and the 50 too many go 25 to each other.
    assert budgets([1, 3, 12], (200, 200, 100), 200).tolist() in (
        [37, 63, 100],
        [38, 62, 100],
    )
    # 99 of 100 stays as it is, 99.5 becomes dense and costs the others the difference.
    assert budgets([99, 101], (100, 1000), 200).tolist() == [99, 101]
    assert budgets([199, 201], (100, 1000), 200).tolist() in ([100, 100], [99, 101])
    # The surplus of the first makes the second dense too.
    assert budgets([30, 5, 5], (100, 70, 1000), 280).tolist() == [100, 70, 110]


@pytest.mark.parametrize(
    "momentum", [[0, 0, 0], [np.nan, np.nan, np.nan], [np.inf, np.inf, np.inf]]
)
def test_budgets_without_any_usable_momentum_keep_the_sizes_proportions(momentum):
    keep = budgets(momentum, (100, 200, 300), 60)
    np.testing.assert_allclose(keep, [10, 20, 30], atol=1)
    assert keep.sum() == 60


def test_a_layer_that_does_not_move_keeps_one_weight():
    keep = budgets([0, 1, np.nan], (100, 200, 300), 60)
    assert keep.tolist() == [1, 58, 1]


@pytest.mark.parametrize("total", [2, 601, 2**31])
def test_a_total_that_cannot_be_spread_is_refused(total):
    with pytest.raises(UsageError, match="total"):
        distribution.momentum_budgets(jnp.ones(3), np.array([100, 200, 300]), total)


def test_momentum_total_is_that_of_the_uniform_start():
    sizes = {"a": 11, "b": 10, "c": 1}
    assert distribution.momentum_total(sizes, 0.9) == 2 + 1 + 1


def test_budgets_do_not_depend_on_compilation():
    momentum = jnp.array([0.3, 0.2, 0.9])
    sizes, total = np.array([432, 2304, 9216]), 1195
    plain = distribution.momentum_budgets(momentum, sizes, total)
    np.testing.assert_array_equal(plain, budgets(momentum, sizes, total))
