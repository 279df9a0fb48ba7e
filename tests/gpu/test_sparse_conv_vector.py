"""Products with vectors of weights on a GPU: against numpy, and their definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swat_jax import kernels, vector_convolution
from swat_jax.errors import UsageError
from swat_jax.kernels.vector import shared_room
from tests.runs import needs_library
from tests.test_sparse_convolution import CONVS, convolution
from tests.test_vector_convolution import by_numpy, draw

pytestmark = needs_library
PLAIN = convolution()
ROOM = shared_room()


@pytest.fixture(autouse=True)
def kernels_are_in_use():
    assert kernels.backend() == "cuda"


@functools.cache
def forward(conv, vector, cut=None):
    """Compiled once for each shape."""
    return jax.jit(lambda x, k: kernels.sparse_conv_vector_forward(x, k, conv, vector, cut))


def cuts(conv, x, kernel):
    return list(vector_convolution.cuts(conv, x.shape, kernel.shape, ROOM))


def check(conv, x, kernel, vector, message=""):
    """Whole numbers, exact in any order of sums, by every cut there is."""
    expected = by_numpy(x, kernel, conv).astype(x.dtype)
    found = cuts(conv, x, kernel)
    assert found
    for cut in found:
        y = forward(conv, vector, cut)(x, kernel)
        np.testing.assert_array_equal(y, expected, err_msg=f"{message} {cut}")


@pytest.mark.parametrize("vector", vector_convolution.VECTORS)
@pytest.mark.parametrize(
    ("share", "dtype"),
    [(0.0, jnp.bfloat16), (0.2, jnp.bfloat16), (0.2, jnp.float16), (1.0, jnp.bfloat16)],
)
def test_sums_are_exact(vector, share, dtype):
    for window, shape, out in (
        (3, (8, 8, 8, 64), 128),
        (3, (17, 7, 9, 40), 96),
        (3, (3, 4, 4, 136), 160),
        (3, (2, 1, 2, 8), 32),
        (1, (9, 13, 8, 264), 64),
        (1, (1, 2, 2, 72), 288),
    ):
        x, kernel = draw((window, window), shape, out, vector, share, dtype)
        check(PLAIN, x, kernel, vector, f"{shape}")


@pytest.mark.parametrize(("vector", "dtype"), [(16, jnp.bfloat16), (32, jnp.float16)])
@pytest.mark.parametrize(("window", "strides", "padding"), CONVS)
def test_sums_are_exact_for_any_window(window, strides, padding, vector, dtype):
    conv = convolution(strides, padding)
    for shape, out in (((5, 14, 15, 40), 64), ((9, 9, 8, 128), 192)):
        x, kernel = draw(window, shape, out, vector, 0.2, dtype)
        reason = vector_convolution.refusal(conv, shape, dtype, kernel.shape, vector, ROOM)
        if reason:
            with pytest.raises(UsageError, match="shared memory"):
                kernels.sparse_conv_vector_forward(x, kernel, conv, vector)
        else:
            check(conv, x, kernel, vector, f"{shape}")


def test_more_work_than_blocks():
    """Pieces of work follow one another in a block, with lists of very different lengths."""
    rng = np.random.default_rng(3)
    for vector in vector_convolution.VECTORS:
        x, kernel = draw((3, 3), (160, 16, 16, 72), 256, vector, 0.2)
        share = jnp.asarray(rng.random((1, 1, 72, 1)) < 0.5) & (jnp.arange(256) % 100 > 33)
        check(PLAIN, x, kernel * share.astype(kernel.dtype), vector)


@pytest.mark.parametrize("vector", vector_convolution.VECTORS)
@pytest.mark.parametrize(("size", "channels"), [(32, 128), (16, 256), (8, 512)])
def test_values_as_in_training(vector, size, channels):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.nn.relu(jax.random.normal(keys[0], (16, size, size, channels), jnp.bfloat16))
    kept = jax.random.bernoulli(keys[1], 0.2, (3, 3, channels, channels // vector))
    kernel = jax.random.normal(keys[2], (3, 3, channels, channels)) / channels
    kernel = (kernel * jnp.repeat(kept, vector, -1)).astype(jnp.bfloat16)
    expected = np.asarray(jax.jit(lambda x, k: vector_convolution.forward(x, k, PLAIN))(x, kernel))
    expected = expected.astype(np.float32)
    for cut in cuts(PLAIN, x, kernel):
        found = np.asarray(forward(PLAIN, vector, cut)(x, kernel)).astype(np.float32)
        # Sums of another order may be rounded to the neighbour.
        assert np.abs(found - expected).max() <= 2**-7 * np.abs(expected).max(), cut
        assert (found != expected).mean() < 0.02, cut


def test_nan_reaches_no_further_than_in_a_dense_product():
    x, kernel = draw((3, 3), (16, 12, 12, 64), 64, 16, 0.2)
    x = x.at[3, 5, 6, 7].set(jnp.nan)
    y = np.isnan(np.asarray(forward(PLAIN, 16)(x, kernel), np.float32))
    seen = np.argwhere(y.any(-1))
    assert len(seen)
    assert (seen[:, 0] == 3).all()
    assert (np.abs(seen[:, 1:] - (5, 6)) <= 1).all()
    taps, groups = np.nonzero(np.asarray(kernel[..., 7, ::16] != 0).reshape(9, -1))
    for tap, group in zip(taps, groups, strict=True):
        assert y[3, 5 - (tap // 3 - 1), 6 - (tap % 3 - 1), 16 * group : 16 * group + 16].all()


def test_under_vmap():
    parts = [draw((3, 3), (5, 6, 7, 24), 48, 16, share, seed=i) for i, share in
             enumerate((0.1, 0.4, 0.0))]  # fmt: skip
    x, kernel = (jnp.stack(one) for one in zip(*parts, strict=True))
    run = jax.jit(jax.vmap(lambda x, k: kernels.sparse_conv_vector_forward(x, k, PLAIN, 16)))
    expected = np.stack([by_numpy(*part, PLAIN) for part in parts]).astype(x.dtype)
    np.testing.assert_array_equal(run(x, kernel), expected)


@pytest.mark.parametrize("vector", vector_convolution.VECTORS)
def test_twenty_runs_have_the_same_bits(vector):
    keys = jax.random.split(jax.random.key(1), 2)
    x = jax.random.normal(keys[0], (64, 16, 16, 128), jnp.bfloat16)
    kernel = jax.random.normal(keys[1], (3, 3, 128, 128)).astype(jnp.bfloat16)
    kernel *= draw((3, 3), (1, 1, 1, 128), 128, vector, 0.2)[1] != 0
    for cut in cuts(PLAIN, x, kernel):
        run = forward(PLAIN, vector, cut)
        first = np.asarray(run(x, kernel)).view(np.uint16)
        for _ in range(20):
            np.testing.assert_array_equal(np.asarray(run(x, kernel)).view(np.uint16), first)


def test_operands_that_do_not_fit_are_refused():
    x, kernel = draw((3, 3), (8, 8, 8, 32), 128, 16, 0.2)
    entries = 8 * 288
    good = {
        "window": (3, 3), "strides": (1, 1), "lows": (1, 1), "tile": (4, 8, 128), "vector": 16,
        "height": 4, "chunk": 32,
    }  # fmt: skip

    def call(x=x, kernel=kernel, words=entries * 8, **changes):
        options = {name: np.array(value, np.int64) for name, value in (good | changes).items()}
        options = {name: value if value.ndim else value[()] for name, value in options.items()}
        sizes = (entries, words, 8)
        lists = jax.ffi.ffi_call(
            "swat_jax_sparse_conv_vector_lists",
            [jax.ShapeDtypeStruct((size,), jnp.uint32) for size in sizes],
        )(kernel, **options)
        result = jax.ShapeDtypeStruct((8, 8, 8, 128), x.dtype)
        return jax.ffi.ffi_call("swat_jax_sparse_conv_vector_forward", result)(x, *lists, **options)

    jax.block_until_ready(jax.jit(call)())
    for message, changes in (
        ("vector must be 8, 16 or 32, got 4", {"vector": 4}),
        ("no tile of 4 lines of 8 pixels in 32 channels", {"tile": (4, 8, 32)}),
        ("height must divide the tile's lines, got 3", {"height": 3}),
        ("chunk must be a power of 2 from 32 to 1024, got 48", {"chunk": 48}),
        ("values must have 18432 values, got 18431", {"words": entries * 8 - 1}),
        ("x must be bfloat16 or float16", {"x": x.astype(jnp.float32)}),
        ("kernel must be bfloat16 or float16", {"kernel": kernel.astype(jnp.float32)}),
        ("must begin with the sizes of window", {"window": (3, 1)}),
        ("in must be a multiple of 8", {"strides": (17, 1)}),
        ("must fit each other", {"x": x[:4]}),
    ):
        with pytest.raises(Exception, match=message):
            jax.block_until_ready(jax.jit(functools.partial(call, **changes))())
