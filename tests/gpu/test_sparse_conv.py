"""The weight gradient from packed activations on a GPU: against numpy, and its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swat_jax import kernels, sparse_convolution
from swat_jax.algorithms import Algorithms
from swat_jax.convolution import Convolution
from swat_jax.functional import swat_conv
from swat_jax.sparsity import packing
from tests.runs import needs_library
from tests.test_sparse_convolution import CONVS, by_numpy, convolution, draw

pytestmark = needs_library
PLAIN = convolution()


@pytest.fixture(autouse=True)
def kernels_are_in_use():
    assert kernels.backend() == "cuda"


pack = jax.jit(kernels.pack, static_argnums=2)


@functools.cache
def gradient(conv: Convolution, window, tile=None):
    """Compiled once for each shape."""

    def run(packed, least, dy):
        cut = sparse_convolution.cut(conv, packed.shape, dy.shape, window, tile)
        return kernels.sparse_conv_weight_gradient(packed, least, dy, conv, window, cut)

    return jax.jit(run)


def whole_numbers(pixels, channels, outputs, share, dtype, seed=0):
    """Exact in any order of sums: a 1x1 problem, packed with small values that are left out."""
    rng = np.random.default_rng([pixels, channels, outputs, seed])
    x = rng.integers(1, 5, (1, 1, pixels, channels)) * rng.choice(
        [-1, 1], pixels * channels
    ).reshape(1, 1, pixels, channels)
    x = x * (rng.random(x.shape) < share)
    dy = rng.integers(-4, 5, (1, 1, pixels, outputs))
    packed = pack(jnp.asarray(x, dtype), 1.0, x.size)
    kept = np.where(np.abs(x) >= 2, x, 0)
    return packed, jnp.asarray(dy, dtype), kept[0, 0].T.astype(float) @ dy[0, 0].astype(float)


@pytest.mark.parametrize("tile", sparse_convolution.TILES)
@pytest.mark.parametrize(
    ("share", "dtype"),
    [(0.0, jnp.bfloat16), (0.1, jnp.bfloat16), (0.5, jnp.float16), (1.0, jnp.bfloat16)],
)
def test_sums_are_exact(tile, share, dtype):
    sizes = [(1, 8, 8), (33, 24, 40), (1000, 64, 64), (4097, 64, 256), (5000, 256, 64)]
    sizes += [
        (3001, 200, 136),
        (2048, 128, 512),
        (1999, 512, 128),
        (777, 504, 264),
        (2049, 384, 128),
        (40_000, 256, 128),
        (50_000, 64, 72),
        (3001, 96, 128),
        (5000, 32, 64),
        (2000, 320, 256),
    ]
    for pixels, channels, outputs in sizes:
        packed, dy, expected = whole_numbers(pixels, channels, outputs, share, dtype)
        found = gradient(PLAIN, (1, 1), tile)(packed, jnp.float32(2), dy)
        message = f"{pixels}, {channels}, {outputs}"
        np.testing.assert_array_equal(found[0, 0], expected, err_msg=message)


@pytest.mark.parametrize(
    ("tile", "dtype"),
    [((64, 64), jnp.bfloat16), ((128, 128), jnp.float16), ((128, 256), jnp.bfloat16),
     ((256, 128), jnp.float16)],
)  # fmt: skip
@pytest.mark.parametrize(("window", "strides", "padding"), CONVS)
def test_sums_are_exact_where_pixels_are_gathered(window, strides, padding, tile, dtype):
    for shape, out in (((5, 14, 15, 136), 72), ((2, 9, 9, 1032), 128)):
        conv, packed, least, dy = draw(window, strides, padding, dtype, shape, out)
        found = gradient(conv, window, tile)(packed, least, dy)
        x = np.asarray(packing.unpack(packed), np.float64)
        low = [low for low, _ in sparse_convolution.pads(conv, shape[1:-1], window)]
        expected = by_numpy(np.where(np.abs(x) >= 2, x, 0), dy, window, strides, low)
        np.testing.assert_array_equal(found, expected, err_msg=f"{shape}")


@pytest.mark.parametrize("channels", [(64, 256), (256, 64), (128, 512), (512, 128), (1024, 256)])
def test_values_as_in_training(channels):
    """What a ReLU leaves of normal values, packed at 90 %, in sums over many pixels."""
    inputs, outputs = channels
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.nn.relu(jax.random.normal(keys[0], (16, 28, 28, inputs), jnp.bfloat16))
    dy = jax.random.normal(keys[1], (16, 28, 28, outputs), jnp.bfloat16)
    keep = x.size // 10
    limit = kernels.threshold(x, keep).astype(jnp.float32)
    packed = jax.jit(lambda x, t: kernels.pack(x, t, int(keep * 1.05)))(x, limit)
    kept = np.asarray(packing.unpack(packed, limit), np.float64).reshape(-1, inputs)
    expected = kept.T @ np.asarray(dy, np.float64).reshape(-1, outputs)
    twin = np.asarray(sparse_convolution.weight_gradient(packed, limit, dy, PLAIN, (1, 1)))[0, 0]
    for tile in (None, *sparse_convolution.tiles(gathers=inputs > 512)):
        found = np.asarray(gradient(PLAIN, (1, 1), tile)(packed, limit, dy))[0, 0]
        for other in (expected, twin):
            assert np.abs(found - other).max() < 1e-4 * np.abs(expected).max(), tile


def test_nan_is_kept_and_stays_in_its_channel():
    packed, dy, _ = whole_numbers(999, 64, 64, 0.1, jnp.bfloat16)
    x = packing.unpack(packed).at[0, 0, 500, 7].set(jnp.nan)
    packed = packing.pack(x, 1.0, x.size)
    found = np.isnan(gradient(PLAIN, (1, 1))(packed, jnp.float32(3), dy))[0, 0]
    assert found[7].all()
    assert found.sum() == 64
    dy = dy.at[0, 0, 3, 9].set(jnp.inf)
    found = np.isfinite(gradient(PLAIN, (1, 1))(packed, jnp.float32(3), dy))[0, 0]
    assert not found[:, 9].any()
    assert found.sum() == 63 * 63


@pytest.mark.parametrize("channels", [(72, 40), (64, 128), (512, 64)])
def test_under_vmap(channels):
    parts = [whole_numbers(300, *channels, share, jnp.bfloat16, seed=i) for i, share in
             enumerate((0.1, 0.4, 0.0))]  # fmt: skip
    x = jnp.stack([packing.unpack(packed) for packed, *_ in parts])
    dy = jnp.stack([dy for _, dy, _ in parts])

    @jax.jit
    @jax.vmap
    def run(x, dy):
        # Room that is no multiple of 8 values: problems begin anywhere.
        packed = kernels.pack(x, 1.0, x.size // 2 + 1)
        return kernels.sparse_conv_weight_gradient(packed, jnp.float32(2), dy, PLAIN, (1, 1))

    np.testing.assert_array_equal(run(x, dy)[:, 0, 0], np.stack([one for *_, one in parts]))


@pytest.mark.parametrize("window", [(1, 1), (3, 3)])
def test_twenty_runs_have_the_same_bits(window):
    keys = jax.random.split(jax.random.key(1), 2)
    x = jax.random.normal(keys[0], (32, 28, 28, 128), jnp.bfloat16)
    dy = jax.random.normal(keys[1], (32, 28, 28, 128), jnp.bfloat16)
    packed = jax.jit(lambda x: kernels.pack(x, 1.5, x.size // 4))(x)
    for tile in sparse_convolution.tiles(gathers=window != (1, 1)):
        run = gradient(PLAIN, window, tile)
        first = np.asarray(run(packed, jnp.float32(1.6), dy)).view(np.uint32)
        for _ in range(20):
            again = np.asarray(run(packed, jnp.float32(1.6), dy)).view(np.uint32)
            np.testing.assert_array_equal(again, first)


def test_training_computes_as_with_dense_activations():
    keys = jax.random.split(jax.random.key(2), 2)
    x = jax.random.normal(keys[0], (8, 14, 14, 64), jnp.bfloat16)
    kernel = jax.random.normal(keys[1], (1, 1, 64, 128))

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(x, weight_gradient):
        def loss(x, kernel):
            y = swat_conv(
                x, kernel, weight_sparsity=0.8, activation_sparsity=0.8, capacity=x.size // 4,
                algorithms=Algorithms(weight_gradient=weight_gradient),
            )  # fmt: skip
            return jnp.sum(y.astype(jnp.float32) ** 2)

        return jax.grad(loss, (0, 1))(x, kernel)

    (dx, dw), (dense_dx, dense_dw) = gradients(x, "sparse"), gradients(x, "dense")
    np.testing.assert_array_equal(dx.astype(jnp.float32), dense_dx.astype(jnp.float32))
    assert jnp.max(jnp.abs(dw - dense_dw)) < 2**-7 * jnp.max(jnp.abs(dense_dw))


def test_operands_that_do_not_fit_are_refused():
    packed, dy, _ = whole_numbers(128, 64, 64, 0.2, jnp.bfloat16)
    good = {"tile": (64, 64), "splits": 2, "gathers": False, "input": (1, 128)}

    def call(dy=dy, scratch=2 * 64 * 64, **changes):
        options = good | changes
        results = [(1, 1, 64, 64), (scratch,)]
        return jax.ffi.ffi_call(
            "swat_jax_sparse_conv_weight_gradient",
            [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results],
        )(
            packed.values, packed.bitmap, packed.offsets, jnp.float32(0), dy,
            input=np.array(options["input"], np.int64), tile=np.array(options["tile"], np.int64),
            strides=np.array((1, 1), np.int64), lows=np.array((0, 0), np.int64),
            splits=np.int64(options["splits"]), gathers=options["gathers"],
        )  # fmt: skip

    jax.block_until_ready(jax.jit(call)())
    for message, changes in (
        ("no tile of 64 x 128", {"tile": (64, 128)}),
        ("no tile of 64 x 256", {"tile": (64, 256), "gathers": True}),
        ("splits must be 1 to 2, got 3", {"splits": 3}),
        ("scratch must have 8192 values, got 8191", {"scratch": 8191}),
        ("dy must be bfloat16 or float16", {"dy": dy.astype(jnp.float32)}),
        ("must fit dw", {"dy": dy[..., :56]}),
        ("gathers must be true", {"input": (2, 64)}),
        ("bitmap must have", {"input": (1, 129), "gathers": True}),
    ):
        with pytest.raises(Exception, match=message):
            jax.block_until_ready(jax.jit(functools.partial(call, **changes))())
