"""Convolutions of few channels, computed with strides folded into channels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from swat_jax.convolution import Convolution
from swat_jax.functional import swat_conv


def convolution(strides, padding):
    ones = (1,) * len(strides)
    return Convolution(strides, padding, ones, ones)


def by_hand(x, kernel, strides, pads):
    """Two spatial axes, in float64, window by window."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *pads, (0, 0)))
    kernel = np.asarray(kernel, np.float64)
    height, width = kernel.shape[:2]
    rows = range(0, x.shape[1] - height + 1, strides[0])
    columns = range(0, x.shape[2] - width + 1, strides[1])
    return np.stack(
        [
            np.stack([np.tensordot(x[:, r : r + height, c : c + width], kernel, 3)
                      for c in columns], axis=1)
            for r in rows
        ], axis=1,
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    window=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2),
    channels=st.integers(1, 7),
)
def test_folding_changes_nothing(size, window, strides, pads, channels):
    outputs = [(size[a] + sum(pads[a]) - window[a]) // strides[a] + 1 for a in range(2)]
    if min(outputs) < 1:
        return
    rng = np.random.default_rng(0)
    x = rng.integers(-8, 9, (2, *size, channels)).astype(np.float32)
    kernel = rng.integers(-8, 9, (*window, channels, 3)).astype(np.float32)
    conv = convolution(strides, pads)
    # Whole numbers this small have exact sums in any order.
    expected = by_hand(x, kernel, strides, pads)
    np.testing.assert_array_equal(conv.folded(jnp.asarray(x), jnp.asarray(kernel)), expected)
    np.testing.assert_array_equal(conv(jnp.asarray(x), jnp.asarray(kernel)), expected)


@pytest.mark.parametrize("padding", ["SAME", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_folding_in_every_rank_and_with_named_padding(padding, spatial):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.integers(-8, 9, (2, *(9, 7, 6)[:spatial], 3)), jnp.float32)
    kernel = jnp.asarray(rng.integers(-8, 9, (*(5, 4, 3)[:spatial], 3, 4)), jnp.float32)
    conv = convolution((2, 3, 1)[:spatial], padding)
    np.testing.assert_array_equal(conv.folded(x, kernel), conv(x, kernel))


def test_gradients_of_folding():
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.integers(-8, 9, (2, 9, 8, 3)), jnp.float32)
    kernel = jnp.asarray(rng.integers(-8, 9, (7, 7, 3, 4)), jnp.float32)
    plain = convolution((2, 2), ((3, 3), (3, 3)))
    folds = dataclasses.replace(plain, folds=True)
    y, vjp = jax.vjp(plain, x, kernel)
    again, folded_vjp = jax.vjp(folds, x, kernel)
    dy = jnp.asarray(rng.integers(-8, 9, y.shape), jnp.float32)
    np.testing.assert_array_equal(again, y)
    for found, expected in zip(folded_vjp(dy), vjp(dy), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel_dilation": (2, 2)},
        {"input_dilation": (2, 1)},
        {"feature_group_count": 3},
        {"strides": (3, 8)},
    ],
)
def test_what_cannot_be_folded_is_computed_as_it_is(changes):
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((1, 16, 16, 3)), jnp.float32)
    groups = changes.get("feature_group_count", 1)
    kernel = jnp.asarray(rng.standard_normal((7, 7, 3 // groups, 3)), jnp.float32)
    plain = dataclasses.replace(convolution((2, 2), ((0, 0), (1, 2))), **changes)
    folds = dataclasses.replace(plain, folds=True)
    expected = plain(x, kernel)
    assert expected.size > 0
    np.testing.assert_array_equal(folds(x, kernel), expected)


def test_what_is_sharded_explicitly_is_not_folded(fake_devices):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Explicit,))
    rng = np.random.default_rng(4)
    x = rng.standard_normal((4, 9, 8, 3)).astype(np.float32)
    kernel = jnp.asarray(rng.standard_normal((5, 5, 3, 2)), jnp.float32)
    plain = convolution((2, 2), ((2, 2), (2, 2)))
    folds = dataclasses.replace(plain, folds=True)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch")))
        found = jax.jit(folds)(sharded, kernel)
    np.testing.assert_allclose(found, plain(jnp.asarray(x), kernel), rtol=1e-5, atol=1e-5)


def test_the_backend_decides(monkeypatch):
    """Many channels stay as they are; few are folded where there are kernels."""

    def strides_of(x, kernel):
        jaxpr = jax.make_jaxpr(lambda x, k: swat_conv(
            x, k, strides=2, weight_sparsity=0.0, activation_sparsity=0.0
        ))(x, kernel)  # fmt: skip
        return str(jaxpr).split("window_strides=")[1].split(")")[0]

    image, wide = jnp.ones((1, 8, 8, 3)), jnp.ones((1, 8, 8, 8))
    assert strides_of(image, jnp.ones((3, 3, 3, 4))) == "(2, 2"
    monkeypatch.setattr("swat_jax.kernels.folds", lambda dtype: True)
    assert strides_of(image, jnp.ones((3, 3, 3, 4))) == "(1, 1"
    assert strides_of(wide, jnp.ones((3, 3, 8, 4))) == "(2, 2"
