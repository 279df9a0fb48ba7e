"""Max pooling with a gradient rule of its own against Flax's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swat_jax.errors import UsageError
from swat_jax.functional import max_pool

CASES = [((2, 2), (2, 2), "VALID"), ((3, 3), (2, 2), ((1, 1), (1, 1))), ((3, 2), (1, 2), "SAME")]


@pytest.mark.parametrize(("window", "strides", "padding"), CASES)
@pytest.mark.parametrize("size", [6, 7])
def test_equals_flax_with_ties(window, strides, padding, size):
    rng = np.random.default_rng(0)
    # Whole numbers: many ties, and sums that are exact in any order.
    x = jnp.asarray(rng.integers(-2, 3, (2, size, size, 3)), jnp.float32)

    @jax.jit
    def both(x):
        found = jax.vjp(lambda x: max_pool(x, window, strides, padding), x)
        wanted = jax.vjp(lambda x: nnx.max_pool(x, window, strides, padding), x)
        dy = jnp.arange(wanted[0].size, dtype=x.dtype).reshape(wanted[0].shape)
        return (found[0], *found[1](dy)), (wanted[0], *wanted[1](dy))

    found, wanted = both(x)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_keeps_one_byte_for_each_result():
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    _, pullback = jax.eval_shape(lambda x: jax.vjp(lambda x: max_pool(x, (2, 2), (2, 2)), x), x)
    assert [leaf.dtype for leaf in jax.tree.leaves(pullback)] == [jnp.uint8]
    assert [leaf.shape for leaf in jax.tree.leaves(pullback)] == [(2, 4, 4, 3)]


def test_refuses_a_window_of_another_rank():
    with pytest.raises(UsageError, match="window_shape"):
        max_pool(jnp.ones((1, 4, 4, 1)), (2, 2, 2))
