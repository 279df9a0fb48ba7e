"""Dropout that keeps bits, against that of Flax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swat_jax import dropout_bits, functional
from swat_jax.dropout import Dropout
from swat_jax.errors import UsageError
from swat_jax.sparsity import packing
from tests import oracle


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


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ],
)
def test_known_answers_of_philox(counter, key, expected):
    """Those that its authors publish with it (Random123, kat_vectors)."""
    words = dropout_bits.philox(*(tuple(map(jnp.uint32, part)) for part in (counter, key)))
    assert " ".join(f"{int(word):08x}" for word in words) == expected


@pytest.mark.parametrize("size", [1, 31, 32, 33, 1000])
def test_bits_are_those_of_the_oracle(size):
    key = np.array([0xDEADBEEF, 0x12345678], np.uint32)
    for dropped in (0, 1, 19661, 65535, 65536):
        found = dropout_bits.draw(jnp.asarray(key), size, dropped)
        flags = oracle.dropout_flags(key, size, dropped)
        np.testing.assert_array_equal(found, packing.to_bitmap(jnp.asarray(flags)))


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_a_share_of_the_values_is_dropped_each_apart_from_the_others(rate):
    size = 200_000
    one, other = (
        np.asarray(packing.from_bitmap(functional.draw_kept(jax.random.key(i), rate, size), size))
        for i in (1, 2)
    )
    deviation = (rate * (1 - rate) / size) ** 0.5
    assert abs((~one).mean() - rate) < 5 * deviation
    # Neighbours, values of one word and of one hash, and other keys: the products of independent
    # flags average to the product of their means.
    for shifted in (other, *(np.roll(one, by) for by in (1, 2, 8, 32, 128))):
        share, wanted = (~one & ~shifted).mean(), rate**2
        assert (
            abs(share - wanted) < 5 * (wanted * (1 - wanted) / size) ** 0.5 + 5 * deviation * rate
        )


def test_a_layer_draws_as_often_as_it_is_asked():
    layer = Dropout(0.3, rngs=nnx.Rngs(0))
    assert layer.draws
    assert layer.drawn_rate == pytest.approx(0.3, abs=2**-17)
    assert not Dropout(0.999999, rngs=nnx.Rngs(0)).draws  # it would drop everything
    drawn = [np.asarray(layer.draw(100)) for _ in range(3)]
    assert len({one.tobytes() for one in drawn}) == 3
    key = jax.random.key(4)
    for kind in ("threefry2x32", "rbg"):
        key = jax.random.key(4, impl=kind)
        np.testing.assert_array_equal(*(functional.draw_kept(key, 0.3, 99) for _ in range(2)))


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_refuses_rates_that_are_none(rate):
    with pytest.raises(UsageError, match="rate"):
        functional.dropout(jnp.ones(3), jax.random.key(0), rate)
    with pytest.raises(UsageError, match="rate"):
        functional.draw_kept(jax.random.key(0), rate, 3)
