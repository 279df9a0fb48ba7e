"""Convolutions with single sparse weights on a GPU: against numpy, and their definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swat_jax import kernels, sparse_conv_direct
from swat_jax.sparse_conv_direct import TILES, WINDOW_TILES, Cut
from tests.runs import needs_library
from tests.test_sparse_conv_direct import (
    CONVS,
    TURNED,
    by_numpy,
    convolution,
    draw,
    gradient_by_numpy,
)

pytestmark = needs_library
# Images, height, width, in, out.
SHAPES = [
    (1, 1, 1, 4, 4),
    (5, 7, 7, 40, 72),
    (3, 8, 8, 64, 132),
    (6, 14, 14, 36, 64),
    (2, 32, 32, 16, 20),
    (9, 28, 28, 12, 40),
    (70, 4, 4, 72, 60),
    (130, 2, 2, 8, 64),
    (4, 5, 61, 8, 8),
]


@pytest.fixture(autouse=True)
def kernels_are_in_use():
    assert kernels.backend() == "cuda"


@functools.cache
def forward(conv, cut=None):
    """Compiled once for each shape."""
    return jax.jit(lambda x, kernel: kernels.sparse_conv_forward(x, kernel, conv, cut))


@functools.cache
def gradient(conv, size):
    return jax.jit(lambda dy, k: kernels.sparse_conv_input_gradient(dy, k, conv, size))


def exact(expected, dtype):
    """Whole numbers that are sums in any order, rounded once."""
    return jnp.asarray(expected, jnp.float32).astype(dtype)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("window", [(1, 1), (3, 3)])
def test_sums_are_exact(share, window):
    for shape in SHAPES:
        for strides in ((1, 1), (2, 2)):
            conv = convolution(strides)
            x, kernel = draw(window, shape[:-1], shape[-1], share)
            y = forward(conv)(x, kernel)
            message = f"{shape} {strides}"
            np.testing.assert_array_equal(y, by_numpy(x, kernel, conv), err_msg=message)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("window", "strides", "padding"), CONVS)
def test_windows_strides_and_paddings(window, strides, padding, dtype):
    conv = convolution(strides, padding)
    for shape, out in (((5, 7, 6, 12), 20), ((6, 15, 13, 68), 136)):
        x, kernel = draw(window, shape, out, 0.1, dtype)
        expected = exact(by_numpy(x, kernel, conv), dtype)
        np.testing.assert_array_equal(forward(conv)(x, kernel), expected, err_msg=f"{shape}")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("window", "strides", "padding"), TURNED)
def test_input_gradients(window, strides, padding, dtype):
    conv = convolution(strides, padding)
    for shape, out in (((5, 7, 6, 12), 20), ((6, 15, 13, 68), 136)):
        x, kernel = draw(window, shape, out, 0.1, dtype)
        dy = by_numpy(x, kernel, conv) % 7 - 3
        expected = exact(gradient_by_numpy(dy, kernel, conv, shape[1:-1]), dtype)
        found = gradient(conv, shape[1:-1])(jnp.asarray(dy, dtype), kernel)
        np.testing.assert_array_equal(found, expected, err_msg=f"{shape}")


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("chunk", [4, 8, 16, 32])
def test_every_cut(tile, chunk):
    for size, columns in ((28, 8), (14, 14), (8, 5)):
        x, kernel = draw((3, 3), (5, size, size, 40), 76, 0.1)
        conv = convolution()
        cut = Cut(tile, chunk, columns)
        if sparse_conv_direct.shared_bytes(conv, x.shape, kernel.shape, cut) > 99 * 1024:
            continue
        found = forward(conv, cut)(x, kernel)
        np.testing.assert_array_equal(found, by_numpy(x, kernel, conv), err_msg=f"{cut}")


@pytest.mark.parametrize("tile", WINDOW_TILES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_windows_as_a_whole(tile, dtype):
    conv = convolution()
    for shape in SHAPES[1::2]:
        x, kernel = draw((3, 3), shape[:-1], shape[-1], 0.2)
        # Some windows of every output channel are dropped.
        rng = np.random.default_rng(2)
        kernel *= rng.random(kernel.shape[-2:]) < 0.3
        x, kernel = x.astype(dtype), kernel.astype(dtype)
        expected = exact(by_numpy(x, kernel, conv), dtype)
        for columns in {shape[2], min(shape[2], 8)}:
            cut = Cut(tile, 8, columns, windows=True)
            if sparse_conv_direct.shared_bytes(conv, x.shape, kernel.shape, cut) > 99 * 1024:
                continue
            found = forward(conv, cut)(x, kernel)
            np.testing.assert_array_equal(found, expected, err_msg=f"{shape} {cut}")
        run = jax.jit(lambda x, k: kernels.sparse_conv_forward(x, k, conv, windows=True))
        np.testing.assert_array_equal(run(x, kernel), expected, err_msg=f"{shape}")


def test_values_as_in_training():
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (33, 16, 16, 256))
    kernel = jax.random.normal(keys[1], (3, 3, 256, 256)) / 48
    kernel = kernels.sparsify(kernel, kernels.threshold(kernel, kernel.size // 10))
    conv = convolution()
    y = forward(conv)(x, kernel)
    expected = by_numpy(x, kernel, conv)
    assert np.abs(y - expected).max() < 2e-6 * np.abs(expected).max()
    dx = gradient(conv, (16, 16))(x, kernel)
    expected = gradient_by_numpy(x, kernel, conv, (16, 16))
    assert np.abs(dx - expected).max() < 2e-6 * np.abs(expected).max()


def test_the_type_of_the_result_is_rounded_once():
    x, kernel = draw((3, 3), (4, 8, 8, 64), 64, 0.5, jnp.bfloat16)
    x, kernel = x * 1.125, kernel * 0.8125
    conv = convolution()
    wide = by_numpy(x, kernel, conv)
    np.testing.assert_array_equal(forward(conv)(x, kernel), exact(wide, jnp.bfloat16))


def test_under_vmap():
    conv = convolution()
    parts = [draw((3, 3), (3, 9, 7, 12), 20, share) for share in (0.1, 0.4, 0.0)]
    x, kernel = (jnp.stack(both) for both in zip(*parts, strict=True))
    run = jax.jit(jax.vmap(lambda x, kernel: kernels.sparse_conv_forward(x, kernel, conv)))
    expected = np.stack([by_numpy(*part, conv) for part in parts])
    np.testing.assert_array_equal(run(x, kernel), expected)


def test_nan_stays_in_its_window():
    x, kernel = draw((3, 3), (5, 8, 8, 16), 64, 0.2)
    found = np.isnan(forward(convolution())(x.at[2, 4, 5, 7].set(jnp.nan), kernel))
    assert found[2, 3:6, 4:7].any()
    found[2, 3:6, 4:7] = False
    assert not found.any()


def test_twenty_runs_have_the_same_bits():
    keys = jax.random.split(jax.random.key(1), 2)
    x = jax.random.normal(keys[0], (64, 28, 28, 128))
    kernel = jax.random.normal(keys[1], (3, 3, 128, 128))
    kernel = kernels.sparsify(kernel, 1.6)
    conv = convolution()
    # Only the chunk decides the order of sums; this one leaves room for most tiles.
    chosen = Cut((256, 64), 16, 8)
    first = np.asarray(forward(conv, chosen)(x, kernel)).view(np.uint32)
    cuts = [Cut(tile, chosen.chunk, 8) for tile in TILES]
    cuts = [
        cut
        for cut in cuts
        if sparse_conv_direct.shared_bytes(conv, x.shape, kernel.shape, cut) <= 99 * 1024
    ]
    assert len(cuts) > 2
    for cut in (*[chosen] * 20, *cuts):
        again = np.asarray(forward(conv, cut)(x, kernel)).view(np.uint32)
        np.testing.assert_array_equal(again, first, err_msg=f"{cut}")


def test_operands_that_do_not_fit_are_refused():
    x, kernel = draw((3, 3), (2, 8, 8, 8), 16)
    compact = kernels.compact(kernel, 1, 8, 2)
    good = {"window": (3, 3), "tile": (256, 64), "chunk": 8, "columns": 8, "out": 16}
    good["windows"] = False

    def call(x=x, **changes):
        options = good | changes
        numbers = {name: np.array(options[name], np.int64) for name in ("window", "tile")}
        return jax.ffi.ffi_call(
            "swat_jax_sparse_conv_direct", jax.ShapeDtypeStruct((2, 8, 8, options["out"]), x.dtype)
        )(
            *(x, *compact), **numbers, strides=np.array((1, 1), np.int64),
            lows=np.array((1, 1), np.int64), chunk=np.int64(options["chunk"]),
            columns=np.int64(options["columns"]), windows=options["windows"],
        )  # fmt: skip

    np.testing.assert_array_equal(jax.jit(call)(), by_numpy(x, kernel, convolution()))
    for message, changes in (
        ("no tile of 256 pixels and 32", {"tile": (256, 32)}),
        ("values must have", {"tile": (512, 32), "windows": True}),
        ("windows must be 3x3", {"window": (1, 3), "windows": True}),
        ("tile has no pixels", {"tile": (64, 64)}),
        ("chunk must be a power of two", {"chunk": 12}),
        ("columns 1 to 8; got 8, 9", {"columns": 9}),
        ("values must have", {"chunk": 16}),
        ("multiples of 4", {"out": 18}),
        ("values must have", {"window": (3, 5)}),
        ("values must have element type", {"x": x.astype(jnp.bfloat16)}),
    ):
        with pytest.raises(Exception, match=message):
            jax.block_until_ready(jax.jit(functools.partial(call, **changes))())
