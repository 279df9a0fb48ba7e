"""What the products are made of, on the GPU, against numpy and the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swat_jax import swat_conv
from swat_jax.sparsity import packing, top_k


def on(platform, *values):
    return jax.device_put(values, jax.devices(platform)[0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("size", [1, 1000, 1_000_003])
@pytest.mark.parametrize("share", [0.02, 0.1, 1.0])
def test_threshold_is_the_kth_largest(dtype, size, share):
    values = np.random.default_rng(size).normal(size=size).astype(dtype)
    keep = max(1, int(share * size))
    (x,) = on("cuda", jnp.asarray(values))
    found = jax.jit(top_k.threshold)(x, jnp.uint32(keep))
    assert found.devices() == {jax.devices("cuda")[0]}
    expected = np.sort(np.abs(values.astype(np.float64)))[-keep]
    assert float(found) == expected


def test_nan_infinity_and_ties():
    (x,) = on("cuda", jnp.array([1.0, jnp.nan, -jnp.inf, 0.0, -1.0, 1.0, 0.5]))
    assert np.isnan(top_k.threshold(x, 1))
    assert np.isinf(top_k.threshold(x, 2))
    assert float(top_k.threshold(x, 3)) == 1.0
    kept = top_k.mask(x, top_k.threshold(x, 3))
    assert kept.tolist() == [True, True, True, False, True, True, False]


def test_packing_is_lossless_and_the_same_every_time():
    x = jax.random.normal(jax.random.key(0), (333, 1001), jnp.bfloat16)
    (x,) = on("cuda", x)
    keep = top_k.keep_count(0.9, x.size)
    limit = top_k.threshold(x, keep)
    pack = jax.jit(lambda v, t: packing.pack(v, t, packing.capacity(keep, x.size)))
    packed = pack(x, limit)
    np.testing.assert_array_equal(packing.unpack(packed), top_k.sparsify(x, limit))
    for _ in range(5):
        for first, again in zip(
            jax.tree.leaves(packed), jax.tree.leaves(pack(x, limit)), strict=True
        ):
            np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("granularity", ["unstructured", "channel", "filter"])
@pytest.mark.parametrize("strides", [1, 2])
def test_product_and_gradients_are_those_of_the_cpu(granularity, strides):
    keys = jax.random.split(jax.random.key(1))
    # Multiples of 1/8: the masks cannot differ, and every product is exact.
    x, kernel = (
        jnp.round(jax.random.normal(key, shape) * 8) / 8
        for key, shape in zip(keys, [(4, 16, 16, 32), (3, 3, 32, 16)], strict=True)
    )

    def run(x, kernel):
        y, pull = jax.vjp(
            lambda x, kernel: swat_conv(
                x,
                kernel,
                weight_sparsity=0.8,
                activation_sparsity=0.9,
                strides=strides,
                granularity=granularity,
                precision="highest",
            ),
            x,
            kernel,
        )
        return y, *pull(jnp.round(y))

    results = [jax.jit(run)(*on(platform, x, kernel)) for platform in ("cuda", "cpu")]
    for ours, theirs in zip(*results, strict=True):
        # A Winograd algorithm rounds where a plain sum of these numbers would be exact.
        bound = 1e-5 * np.abs(theirs).max()
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=bound)
