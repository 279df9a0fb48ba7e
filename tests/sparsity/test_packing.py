"""The packed form: what is on the mask comes out, what does not fit is dropped as promised."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swat_jax.errors import UsageError
from swat_jax.sparsity import packing, top_k
from tests import oracle
from tests.strategies import any_bits, grids


@functools.cache
def compiled_round_trip(capacity):
    def round_trip(x, limit):
        packed = packing.pack(x, limit, capacity)
        return packed, packing.unpack(packed)

    return jax.jit(round_trip)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@settings(max_examples=30)
@given(data=st.data())
def test_what_fits_comes_back(dtype, data):
    x = data.draw(any_bits(dtype, (3, 15)))
    keep = data.draw(st.integers(1, 45))
    limit = oracle.threshold(x, keep)
    packed, unpacked = compiled_round_trip(45)(x, limit)
    expected = oracle.top_mask(x, keep)
    want = np.where(expected, x, np.zeros((), x.dtype))
    assert unpacked.dtype == x.dtype
    np.testing.assert_array_equal(oracle.widen(unpacked), oracle.widen(want))
    count = int(expected.sum())
    kept = np.asarray(packed.values)[:count]
    np.testing.assert_array_equal(oracle.widen(kept), oracle.widen(x[expected]))
    assert not np.asarray(packed.values)[count:].any()
    assert int(packed.overflow) == 0
    flat = np.unpackbits(np.asarray(packed.bitmap).view(np.uint8), bitorder="little")
    np.testing.assert_array_equal(flat[:45], expected.ravel())
    assert not flat[45:].any()


@pytest.mark.parametrize("capacity", [1, 5, 20])
@settings(max_examples=40)
@given(grid=grids(), limit=st.integers(0, 17))
def test_what_does_not_fit_is_dropped_smallest_first_then_last(capacity, grid, limit):
    x = grid.array((6, 8))
    packed, unpacked = compiled_round_trip(capacity)(x, np.float32(limit / 8))
    wanted = oracle.mask(x, limit / 8)
    expected = wanted
    if wanted.sum() > capacity:
        flat = np.abs(np.where(wanted, x, 0)).ravel()
        first = np.argsort(-flat, kind="stable")[:capacity]
        expected = np.zeros(x.size, bool)
        expected[first] = True
        expected = expected.reshape(x.shape)
    np.testing.assert_array_equal(unpacked, np.where(expected, x, 0))
    assert int(packed.overflow) == wanted.sum() - expected.sum()


def test_memory_depends_on_the_capacity_only():
    x = jnp.zeros((5000,), jnp.bfloat16)
    packed, unpacked = compiled_round_trip(525)(x, 0.0)
    assert packed.values.shape == (525,)
    assert packed.values.dtype == jnp.bfloat16
    assert packed.bitmap.shape == (157,)
    assert packed.bitmap.dtype == jnp.uint32
    assert packed.offsets.shape == (-(-5000 // packing.TILE),)
    np.testing.assert_array_equal(unpacked, x)


def test_offsets_count_what_comes_before_each_tile():
    x = (jax.random.uniform(jax.random.key(0), (3, packing.TILE)) > 0.7).astype(jnp.float32)
    packed, _ = compiled_round_trip(x.size)(x, 0.5)
    counts = np.asarray(x).sum(axis=1)
    np.testing.assert_array_equal(packed.offsets, [0, counts[0], counts[:2].sum()])


def test_capacity():
    assert packing.capacity(100, 1000) == 105
    assert packing.capacity(100, 102) == 102
    assert packing.capacity(1, 1000) == 2
    assert packing.capacity(100, 1000, slack=0.0) == 100
    with pytest.raises(UsageError, match="slack"):
        packing.capacity(1, 2, slack=-0.1)
    with pytest.raises(UsageError, match="capacity"):
        packing.pack(jnp.ones(3), 0.5, 0)


def test_a_threshold_of_another_type():
    x = jnp.array([1.0, 1.0078125, -2.0], jnp.bfloat16)
    packed, unpacked = compiled_round_trip(3)(x, jnp.float32(1.001))
    assert packed.dtype == jnp.bfloat16
    np.testing.assert_array_equal(unpacked, top_k.sparsify(x, jnp.float32(1.001)))
