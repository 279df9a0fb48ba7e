"""What a weight mask selects, against sorted float64 scores."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swat_jax.errors import UsageError
from swat_jax.sparsity import granularity as granularities
from swat_jax.sparsity import top_k
from tests import oracle
from tests.strategies import DTYPES, grids, precision_of

GRANULARITIES = ("unstructured", "channel", "filter")
VECTORS = ("vector8", "vector16", "vector32")
SHAPES = {1: (3, 4, 5), 2: (3, 2, 4, 5), 3: (2, 1, 3, 2, 5), 0: (6, 5)}


def test_the_registry_names_the_paper_s_granularities_and_vectors():
    assert set(granularities.names()) == {*GRANULARITIES, *VECTORS}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES.values())
def test_units(shape, granularity):
    count = granularities.units(shape, granularity)
    assert isinstance(count, int)
    assert count == oracle.units(shape, granularity)
    expected = {"unstructured": math.prod(shape), "channel": math.prod(shape[-2:]), "filter": 5}
    assert count == expected[granularity]


@functools.cache
def compiled_mask(granularity):
    def mask(kernel, keep):
        score = granularities.score(kernel, granularity)
        limit = top_k.threshold(score, keep)
        return (
            score,
            granularities.weight_mask(kernel, granularity, limit),
            granularities.masked_weights(kernel, granularity, limit),
        )

    return jax.jit(mask)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@given(data=st.data(), grid=grids())
def test_scores_and_masks_match_the_oracle(dtype, granularity, data, grid):
    shape = data.draw(st.sampled_from([SHAPES[1], SHAPES[2]]))
    keep = data.draw(st.integers(1, oracle.units(shape, granularity)))
    kernel = grid.array(shape, dtype)
    with precision_of(dtype):
        score, kept, masked = compiled_mask(granularity)(kernel, np.int32(keep))
    axes = oracle.unit_axes(kernel.ndim, granularity)
    assert score.ndim == kernel.ndim
    np.broadcast_shapes(score.shape, kernel.shape)
    np.testing.assert_array_equal(
        np.abs(np.asarray(score, np.float64)),
        np.abs(oracle.widen(kernel)).sum(axis=axes, keepdims=True),
    )
    expected = oracle.weight_mask(kernel, keep=keep, granularity=granularity)
    assert kept.shape == kernel.shape
    np.testing.assert_array_equal(kept, expected)
    assert masked.dtype == kernel.dtype
    np.testing.assert_array_equal(oracle.widen(masked), oracle.sparsify(kernel, expected))


def test_channel_drops_whole_slices_and_filter_whole_outputs():
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 4, 6))
    channel = granularities.weight_mask(
        kernel, "channel", top_k.threshold(granularities.score(kernel, "channel"), 10)
    )
    per_slice = np.asarray(channel).reshape(9, 24).sum(0)
    assert sorted(per_slice) == [0] * 14 + [9] * 10
    whole = granularities.weight_mask(
        kernel, "filter", top_k.threshold(granularities.score(kernel, "filter"), 2)
    )
    assert sorted(np.asarray(whole).reshape(36, 6).sum(0)) == [0] * 4 + [36] * 2


def test_channel_equals_unstructured_for_a_window_of_one():
    kernel = jax.random.normal(jax.random.key(2), (1, 1, 8, 6))
    for keep in (1, 17, 48):
        masks = [
            granularities.weight_mask(
                kernel, name, top_k.threshold(granularities.score(kernel, name), keep)
            )
            for name in ("channel", "unstructured")
        ]
        np.testing.assert_array_equal(masks[0], masks[1])


@pytest.mark.parametrize("granularity", VECTORS)
@pytest.mark.parametrize("outputs", [1, 7, 8, 32, 37, 64])
@settings(max_examples=10)
@given(data=st.data(), grid=grids())
def test_vectors_are_kept_or_dropped_as_a_whole(granularity, outputs, data, grid):
    shape = (3, 1, 4, outputs)
    count = oracle.units(shape, granularity)
    assert granularities.units(shape, granularity) == count
    assert count == 12 * -(-outputs // int(granularity[6:]))
    keep = data.draw(st.integers(1, count))
    kernel = grid.array(shape, np.float32)
    _, kept, masked = compiled_mask(granularity)(kernel, np.int32(keep))
    expected = oracle.weight_mask(kernel, keep=keep, granularity=granularity)
    np.testing.assert_array_equal(kept, expected)
    np.testing.assert_array_equal(masked, np.where(expected, kernel, 0))


@pytest.mark.parametrize("granularity", VECTORS)
def test_a_nan_keeps_its_vector(granularity):
    kernel = np.ones((1, 1, 3, 64), np.float32)
    kernel[0, 0, 1, 40] = np.nan
    limit = granularities.weight_threshold(jnp.asarray(kernel), granularity, 1)
    kept = np.asarray(granularities.weight_mask(jnp.asarray(kernel), granularity, limit))
    length = int(granularity[6:])
    assert kept[0, 0, 1, 40 // length * length :][:length].all()
    assert kept.sum() == length


@pytest.mark.parametrize("granularity", ["channel", "filter"])
def test_norms_of_half_floats_neither_overflow_nor_round(granularity):
    """Both sums exceed float16's range, and differ by less than bfloat16 can show."""
    kernel = np.full((3, 3, 1, 2), 30_000, np.float16)
    kernel[0, 0, 0, 1] = 30_016
    kept = granularities.weight_mask(
        jnp.asarray(kernel),
        granularity,
        top_k.threshold(granularities.score(jnp.asarray(kernel), granularity), 1),
    )
    assert np.asarray(kept).all(axis=(0, 1, 2)).tolist() == [False, True]
    small = np.ones((3, 3, 1, 2), jnp.bfloat16)
    small[0, 0, 0, 0] = 1 + 2**-7
    kept = granularities.weight_mask(
        jnp.asarray(small),
        granularity,
        top_k.threshold(granularities.score(jnp.asarray(small), granularity), 1),
    )
    assert np.asarray(kept).all(axis=(0, 1, 2)).tolist() == [True, False]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_nan_weights_are_kept(granularity):
    kernel = np.ones((2, 2, 3, 3), np.float32)
    kernel[0, 1, 2, 0] = np.nan
    kernel[:, :, :, 1] = 5
    limit = top_k.threshold(granularities.score(jnp.asarray(kernel), granularity), 2)
    kept = np.asarray(granularities.weight_mask(jnp.asarray(kernel), granularity, limit))
    assert kept[0, 1, 2, 0]
    masked = granularities.masked_weights(jnp.asarray(kernel), granularity, limit)
    assert np.isnan(np.asarray(masked)).sum() == 1


@pytest.mark.parametrize("name", ["Channel", "", "vector?", None])
def test_unknown_granularity_is_refused_with_the_list(name):
    with pytest.raises(UsageError, match=r"granularity.*unstructured.*channel.*filter"):
        granularities.units((3, 3, 2, 2), name)
    with pytest.raises(UsageError, match="granularity"):
        granularities.score(jnp.ones((3, 3, 2, 2)), name)
