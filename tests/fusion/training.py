"""Steps of training, fused and not, in float64: what both have to agree about."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from swat_jax import SwatConv, SwatLinear
from swat_jax.layer_state import ActivationThreshold, ThresholdAge, WeightThreshold
from tests.stock_networks import Layers

# Fused and unfused differ by the order of sums and by how a variance is computed, a few units of
# 2**-53 each time; through the layers of a small network and three steps that has been seen to grow
# to 1e-13 of the largest value of its kind.
BOUND = 1e-10

# An exact threshold is the magnitude of one of the values that it is compared with. XLA may make
# that value anew for the comparison, with another rounding, and then one value of them all is lost,
# fused or not. So thresholds are reused here, and these lie between values.
REUSED = {"weight_sparsity": 0.5, "threshold_every_steps": 10}
STORED = {WeightThreshold: 0.1234567, ActivationThreshold: 0.9876543}


def swat_layers(dropout=nnx.Dropout):
    """Constructors of SWAT layers that pack, and of stock ones; linear layers are always exact."""
    return Layers(
        functools.partial(SwatConv, pack=True, **REUSED),
        functools.partial(SwatLinear, weight_sparsity=0.5, activation_sparsity=0.0),
        dropout,
        rngs=nnx.Rngs(0),
        param_dtype=jnp.float64,
    )


def prepared(model):
    """In training mode, with `STORED` thresholds in use.

    Running averages become float64, which stock batch norm makes in float32.
    """
    model.train()
    for kind, value in {**STORED, ThresholdAge: 1}.items():
        state = nnx.state(model, kind)
        nnx.update(model, jax.tree.map(lambda old, new=value: jnp.full_like(old, new), state))
    averages = nnx.state(model, nnx.BatchStat)
    nnx.update(model, jax.tree.map(lambda old: old.astype(jnp.float64), averages))
    return model


def images(*shape):
    return jax.random.normal(jax.random.key(1), shape, jnp.float64)


def sum_of_squares(model, x):
    return jnp.sum(jnp.square(model(x)))


def train(build, loss, x, *, steps=2, compiled=True):
    """Losses, gradients and state of a few steps; the loss comes as it is or fused."""
    model = prepared(build())

    def step(model, x):
        value, gradients = nnx.value_and_grad(loss)(model, x)
        weights = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda w, g: w - 1e-3 * g, weights, gradients))
        return value, gradients

    run = nnx.jit(step) if compiled else step
    found = [run(model, x) for _ in range(steps)]
    return [value for value, _ in found], [g for _, g in found], nnx.state(model)


def assert_same(found, expected):
    """Losses, gradients and states agree to `BOUND`, each of the largest of its kind."""
    for ours, theirs in zip(found, expected, strict=True):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        ours, theirs = ([_plain(leaf) for leaf in jax.tree.leaves(x)] for x in (ours, theirs))
        largest = max(np.max(np.abs(leaf)) for leaf in theirs)
        for one, other in zip(ours, theirs, strict=True):
            # Keys and counters may be huge.
            np.testing.assert_allclose(one, other, rtol=BOUND, atol=BOUND * min(largest, 1e6))


def _plain(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf, np.float64)
