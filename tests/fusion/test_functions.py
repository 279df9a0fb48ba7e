"""What a user's function is and does besides calling layers stays as it is, or is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import swat_jax
from swat_jax import SwatConv


class Pair(nnx.Module):
    """Two layers with a function between them."""

    def __init__(self, between, rngs):
        options = {"weight_sparsity": 0.5, "pack": True, "rngs": rngs}
        self.conv1 = SwatConv(3, 8, (3, 3), **options)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.conv2 = SwatConv(8, 4, (3, 3), **options)
        self.between = between
        self.calls = 0

    def __call__(self, x):
        return self.conv2(self.between(self.norm(self.conv1(x))))


@jax.custom_jvp
def straight_through(x):
    """A ReLU with the derivative of what it is given."""
    return jnp.maximum(x, 0)


straight_through.defjvp(lambda primals, tangents: (straight_through(primals[0]), tangents[0]))


@jax.custom_jvp
def slow_sum(x):
    return x + x[::-1]


slow_sum.defjvp(lambda primals, tangents: (slow_sum(primals[0]), 0.1 * tangents[0]))


@pytest.mark.parametrize("between", [straight_through, slow_sum])
def test_a_derivative_of_ones_own_stays(between):
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))

    def loss(model, x):
        return jnp.sum(jnp.sin(model(x)))

    expected = nnx.value_and_grad(loss)(Pair(between, nnx.Rngs(0)), x)
    found = nnx.value_and_grad(swat_jax.fuse(loss))(Pair(between, nnx.Rngs(0)), x)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4),
        found, expected,
    )  # fmt: skip


def test_variables_that_are_arguments_are_changed():
    @swat_jax.fuse
    def count(model, counts, x):
        counts["calls"][...] += 1
        return jnp.sum(model(x))

    counts = {"calls": nnx.Variable(jnp.zeros(()))}
    for expected in (1, 2):
        count(Pair(nnx.relu, nnx.Rngs(0)), counts, jnp.ones((1, 8, 8, 3)))
        assert counts["calls"][...] == expected


def _replace(model):
    model.norm.scale = nnx.Param(jnp.ones(8))
    model.again = model.norm.scale


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.eval(),
        lambda model: setattr(model, "calls", model.calls + 1),
        lambda model: setattr(model, "late", nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
        _replace,
    ],
)
def test_changes_that_would_be_lost_are_refused(change):
    def run(model, x):
        change(model)
        return model(x)

    model = Pair(nnx.relu, nnx.Rngs(0))
    with pytest.raises(swat_jax.UsageError, match="changes more of its arguments"):
        swat_jax.fuse(run)(model, jnp.ones((1, 8, 8, 3)))


def test_an_object_with_names_like_ours_and_a_method():
    class Twice:
        def __init__(self, fn):
            self._fn, self.report = fn, "its own"

        def __call__(self, *args):
            return 2 * self._fn(*args)

        @swat_jax.fuse
        def method(self, x):
            return 3 * x

    twice = Twice(lambda model, x: jnp.sum(model(x)))
    arguments = (Pair(nnx.relu, nnx.Rngs(0)), jnp.ones((1, 8, 8, 3)))
    np.testing.assert_allclose(swat_jax.fuse(twice)(*arguments), twice(*arguments), rtol=1e-4)
    assert twice.method(jnp.float32(2)) == 6


def test_precision_within_the_function_is_that_of_its_products():
    def run(model, x):
        with jax.default_matmul_precision("highest"):
            return model(x)

    model = Pair(nnx.relu, nnx.Rngs(0))
    x = jnp.ones((1, 8, 8, 3))
    expected, found = (str(jax.make_jaxpr(fn)(model, x)) for fn in (run, swat_jax.fuse(run)))
    assert found.count("HIGHEST") == expected.count("HIGHEST") > 0


def test_a_call_that_somebody_replaced_is_called_and_stays(monkeypatch):
    stock = nnx.BatchNorm.__call__

    def doubled(self, x, *args, **kwargs):
        return 2 * stock(self, x, *args, **kwargs)

    monkeypatch.setattr(nnx.BatchNorm, "__call__", doubled)
    run = lambda model, x: model.norm(x)  # noqa: E731
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    expected = run(Pair(nnx.relu, nnx.Rngs(0)), x)
    swat_jax.fuse(run)(Pair(nnx.relu, nnx.Rngs(0)), x)
    assert nnx.BatchNorm.__call__ is doubled
    np.testing.assert_array_equal(run(Pair(nnx.relu, nnx.Rngs(0)), x), expected)
