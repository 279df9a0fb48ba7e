"""Dropout that keeps bits, against that of Flax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swat_jax import functional
from swat_jax.dropout import Dropout
from swat_jax.errors import UsageError


def value_and_gradient(layer, key, x):
    return jax.value_and_grad(lambda x: jnp.sum(jnp.sin(layer(x, rngs=key))))(x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("options", [{}, {"deterministic": True}, {"broadcast_dims": (0,)}])
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_is_that_of_flax(rate, options, dtype):
    x = jax.random.normal(jax.random.key(0), (7, 33), dtype)
    key = jax.random.key(5)
    np.testing.assert_array_equal(
        Dropout(rate, **options)(x, rngs=key), nnx.Dropout(rate, **options)(x, rngs=key)
    )
    found = value_and_gradient(Dropout(rate, **options), key, x)[1]
    wanted = value_and_gradient(nnx.Dropout(rate, **options), key, x)[1]
    # One division may be a product with the inverse.
    close = 2e-6 if dtype == jnp.float32 else 2**-7
    np.testing.assert_allclose(*(v.astype(np.float32) for v in (found, wanted)), rtol=close)


def test_keys_are_taken_in_turn_and_may_be_given():
    x = jnp.ones((100,))
    mine, stock = Dropout(0.5, rngs=nnx.Rngs(1)), nnx.Dropout(0.5, rngs=nnx.Rngs(1))
    for _ in range(3):
        np.testing.assert_array_equal(mine(x), stock(x))
    for given in (jax.random.key(3), nnx.Rngs(4)):
        again = nnx.Rngs(4) if isinstance(given, nnx.Rngs) else given
        np.testing.assert_array_equal(mine(x, rngs=given), stock(x, rngs=again))
    with pytest.raises(ValueError, match="rngs"):
        Dropout(0.5)(x)


def test_keeps_one_bit_per_value():
    x = jnp.ones((64, 32))
    _, back = jax.vjp(lambda x: functional.dropout(x, jax.random.key(0), 0.3), x)
    kept = [leaf for leaf in jax.tree.leaves(back) if leaf.size > 1]
    assert [(leaf.shape, leaf.dtype) for leaf in kept] == [((64,), jnp.uint32)]


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_refuses_rates_that_are_none(rate):
    with pytest.raises(UsageError, match="rate"):
        functional.dropout(jnp.ones(3), jax.random.key(0), rate)
