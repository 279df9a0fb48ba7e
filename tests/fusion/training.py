"""Steps of training, fused and not, in float64: what both have to agree about."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from swat_jax import SwatConv, SwatLinear
from tests.stock_networks import Layers

# Fused and unfused differ by the order of sums and by how a variance is computed, a few units of
# 2**-53 each time; through the layers of a small network and three steps that has been seen to grow
# to 1e-13 of the largest value of its kind.
BOUND = 1e-10


def swat_layers(*, seed=0, dropout=nnx.Dropout, dtype=jnp.float64, **options):
    """Constructors of SWAT layers that pack, and of stock ones."""
    options = {"weight_sparsity": 0.7, "threshold_every_steps": 2, "pack": True} | options
    return Layers(
        functools.partial(SwatConv, **options),
        functools.partial(SwatLinear, **options),
        dropout,
        rngs=nnx.Rngs(seed),
        param_dtype=dtype,
    )


def in_float64(model):
    """Running averages too, which stock batch norm makes in float32."""
    averages = nnx.state(model, nnx.BatchStat)
    nnx.update(model, jax.tree.map(lambda value: value.astype(jnp.float64), averages))
    model.train()
    return model


def images(*shape):
    return jax.random.normal(jax.random.key(1), shape, jnp.float64)


def sum_of_squares(model, x):
    return jnp.sum(jnp.square(model(x)))


def train(build, loss, x, steps=3):
    """Losses, gradients and state of a few steps; the loss comes as it is or fused."""
    model = in_float64(build())

    @nnx.jit
    def step(model, x):
        value, gradients = nnx.value_and_grad(loss)(model, x)
        weights = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda w, g: w - 1e-3 * g, weights, gradients))
        return value, gradients

    found = [step(model, x) for _ in range(steps)]
    return [value for value, _ in found], [g for _, g in found], nnx.state(model)


def assert_same(found, expected):
    """Losses, gradients and states agree to `BOUND`, each of the largest of its kind."""
    for ours, theirs in zip(found, expected, strict=True):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        ours, theirs = ([_plain(leaf) for leaf in jax.tree.leaves(x)] for x in (ours, theirs))
        largest = max(np.max(np.abs(leaf)) for leaf in theirs)
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=BOUND, atol=BOUND * min(largest, 1e6))


def _plain(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf, np.float64)
