"""Convolutions whose weights are sparse one by one: their definition, and what a block does."""

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swat_jax import kernels, sparse_conv_direct
from swat_jax.convolution import Convolution
from swat_jax.errors import UsageError
from swat_jax.sparse_conv_direct import Cut

ROOT = Path(__file__).parents[1]
ONES = (1, 1)
# Window, strides, padding, of an input (5, 7, 6, 12).
CONVS = [
    ((1, 1), (1, 1), "SAME"),
    ((1, 1), (2, 2), "VALID"),
    ((1, 1), (1, 1), ((1, 2), (0, 1))),
    ((3, 3), (1, 1), "SAME"),
    ((3, 3), (2, 2), ((1, 1), (1, 1))),
    ((3, 3), (2, 2), "SAME"),
    ((3, 2), (1, 3), "SAME_LOWER"),
    ((3, 3), (1, 1), "VALID"),
    ((3, 3), (1, 1), ((2, 0), (0, 2))),
    ((5, 7), (3, 2), ((4, 0), (2, 6))),
    ((5, 5), (1, 1), "SAME"),
    ((2, 2), (1, 1), ((0, -1), (0, -2))),
]
# Those whose input gradient has a kernel.
TURNED = [one for one in CONVS if one[1] == ONES and one[2] not in (CONVS[2][2], CONVS[-1][2])]


def convolution(strides=ONES, padding: object = "SAME", **changes):
    return Convolution(
        strides, padding, **{"input_dilation": ONES, "kernel_dilation": ONES} | changes
    )


def draw(window, shape=(5, 7, 6, 12), out=20, share=0.2, dtype=jnp.float32):
    """An input of small whole numbers, and a kernel; its first output channel has no weights."""
    rng = np.random.default_rng([*window, *shape, out])
    x = rng.integers(-4, 5, shape)
    kernel = rng.integers(-4, 5, (*window, shape[-1], out))
    kernel *= rng.random(kernel.shape) < share
    kernel[..., 0] = 0
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


def pairs(conv, x, window, result):
    """For every tap the pixels of the output that see the input, and those that they see."""
    low = [low for low, _ in sparse_conv_direct.pads(conv, x[1:-1], window)]
    for i, j in np.ndindex(*window):
        found = []
        for a, tap in enumerate((i, j)):
            seen = np.arange(result[a]) * conv.strides[a] + tap - low[a]
            there = (seen >= 0) & (seen < x[1 + a])
            found.append((np.flatnonzero(there), seen[there]))
        (rows, ys), (columns, xs) = found
        yield i, j, np.ix_(rows, columns), np.ix_(ys, xs)


def by_numpy(x, kernel, conv):
    """The output in float64, tap by tap."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    window = kernel.shape[:2]
    result = jax.eval_shape(conv, jnp.zeros(x.shape), jnp.zeros(kernel.shape)).shape
    y = np.zeros(result)
    for i, j, to, of in pairs(conv, x.shape, window, result[1:-1]):
        y[:, to[0], to[1]] += x[:, of[0], of[1]] @ kernel[i, j]
    return y


def gradient_by_numpy(dy, kernel, conv, size):
    dy, kernel = np.asarray(dy, np.float64), np.asarray(kernel, np.float64)
    dx = np.zeros((dy.shape[0], *size, kernel.shape[-2]))
    for i, j, to, of in pairs(conv, dx.shape, kernel.shape[:2], dy.shape[1:-1]):
        dx[:, of[0], of[1]] += dy[:, to[0], to[1]] @ kernel[i, j].T
    return dx


@pytest.mark.parametrize(("window", "strides", "padding"), CONVS)
def test_the_output(window, strides, padding):
    conv = convolution(strides, padding)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        x, kernel = draw(window, dtype=dtype)
        y = kernels.sparse_conv_forward(x, kernel, conv)
        assert y.dtype == dtype
        # Whole numbers this small have exact sums in any order, but the result may be rounded.
        expected = by_numpy(x, kernel, conv)
        np.testing.assert_array_equal(y, jnp.asarray(expected, jnp.float32).astype(dtype))
        assert not y[..., 0].any()


@pytest.mark.parametrize(("window", "strides", "padding"), TURNED)
def test_the_input_gradient(window, strides, padding):
    conv, size = convolution(strides, padding), (7, 6)
    for dtype in (jnp.float32, jnp.bfloat16):
        x, kernel = draw(window, dtype=dtype)
        dy = by_numpy(x, kernel, conv) % 7 - 3
        dx = kernels.sparse_conv_input_gradient(jnp.asarray(dy, dtype), kernel, conv, size)
        assert dx.dtype == dtype
        expected = gradient_by_numpy(dy, kernel, conv, size)
        np.testing.assert_array_equal(dx, jnp.asarray(expected, jnp.float32).astype(dtype))


@pytest.mark.parametrize(("window", "strides", "padding"), TURNED)
def test_at_stride_1_the_gradient_is_a_convolution_with_the_transposed_kernel(
    window, strides, padding
):
    """What the CUDA kernel computes."""
    conv, size = convolution(strides, padding), (7, 6)
    x, kernel = draw(window)
    dy = jnp.asarray(by_numpy(x, kernel, conv) % 7 - 3, jnp.float32)
    turned = sparse_conv_direct.transposed(conv, size, window)
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    expected = gradient_by_numpy(dy, kernel, conv, size)
    np.testing.assert_array_equal(by_numpy(dy, flipped, turned), expected)
    assert sparse_conv_direct.results(turned, dy.shape[1:-1], window) == size


def test_the_gradient_is_that_of_the_output():
    conv = convolution(padding=((1, 1), (1, 1)))
    x, kernel = draw((3, 3))
    y, pull = jax.vjp(lambda x: conv(x, kernel), x)
    np.testing.assert_array_equal(kernels.sparse_conv_forward(x, kernel, conv), y)
    (dx,) = pull(y % 5)
    found = kernels.sparse_conv_input_gradient(y % 5, kernel, conv, (7, 6))
    np.testing.assert_array_equal(found, dx)


def test_under_vmap_and_of_nothing():
    conv = convolution()
    x, kernel = draw((3, 3))
    xs, weights = jnp.stack([x, x[::-1]]), jnp.stack([kernel, -2 * kernel])
    each = jax.vmap(lambda x, kernel: kernels.sparse_conv_forward(x, kernel, conv))(xs, weights)
    for y, one, own in zip(each, xs, weights, strict=True):
        np.testing.assert_array_equal(y, by_numpy(one, own, conv))
    assert kernels.sparse_conv_forward(x[:0], kernel, conv).shape == (0, 7, 6, 20)
    assert not kernels.sparse_conv_forward(x, jnp.zeros_like(kernel), conv).any()
    valid = convolution(padding="VALID")
    assert kernels.sparse_conv_forward(x[:, :2], kernel, valid).shape == (5, 0, 4, 20)


def test_windows_as_vectors():
    """What is kept of a kernel window by window is what is kept of it."""
    _, kernel = draw((3, 3), share=0.05)
    kept = kernels.compact(sparse_conv_direct.by_windows(kernel), sparse_conv_direct.WINDOW, 8, 1)
    found = np.zeros(kernel.shape)
    for out, (values, positions, starts) in enumerate(zip(*kept, strict=True)):
        for chunk in range(2):
            for entry in range(starts[chunk], starts[chunk + 1]):
                assert not values[entry, 9:].any()
                channel = 8 * chunk + positions[entry]
                found[:, :, channel, out] = values[entry, :9].reshape(3, 3)
    np.testing.assert_array_equal(found, kernel)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_windows_are_another_way_to_the_same(strides):
    conv = convolution(strides)
    x, kernel = draw((3, 3))
    y = kernels.sparse_conv_forward(x, kernel, conv, windows=True)
    np.testing.assert_array_equal(y, by_numpy(x, kernel, conv))
    cut = Cut((512, 32), 4, 3, windows=True)
    if strides == (1, 1):
        assert kernels.sparse_conv_forward(x, kernel, conv, cut).shape == y.shape
    else:
        with pytest.raises(UsageError, match=r"cut.windows must be False for a kernel \(3, 3"):
            kernels.sparse_conv_forward(x, kernel, conv, cut)


@pytest.mark.parametrize(
    ("changes", "shape", "dtype", "kernel", "reason"),
    [
        ({}, (2, 4, 4, 8), jnp.float64, (1, 1, 8, 8), "x is float64"),
        ({}, (2, 4, 8), jnp.float32, (1, 8, 8), "1 spatial axes"),
        ({}, (2, 4, 4, 6), jnp.float32, (1, 1, 6, 8), "6 input and 8 output"),
        ({}, (2, 4, 4, 8), jnp.float16, (1, 1, 8, 10), "8 input and 10 output"),
        ({"feature_group_count": 2}, (2, 4, 4, 16), jnp.float32, (1, 1, 8, 16), "group"),
        ({"input_dilation": (1, 2)}, (2, 4, 4, 8), jnp.float32, (1, 1, 8, 8), "dilated"),
        ({"kernel_dilation": (2, 2)}, (2, 4, 4, 8), jnp.float32, (3, 3, 8, 8), "dilated"),
        ({"padding": ((-1, 0), (0, 0))}, (2, 4, 4, 8), jnp.float32, (1, 1, 8, 8), "cuts off"),
        ({"preferred_element_type": jnp.float32}, (2, 4, 4, 8), jnp.float16, (1, 1, 8, 8), "type"),
        ({}, (2**15, 2**8, 2**8, 8), jnp.float32, (1, 1, 8, 8), "2\\*\\*31 pixels"),
        ({}, (2, 99, 99, 8), jnp.float32, (65, 65, 8, 8), "taps"),
        ({"padding": "VALID"}, (2, 64, 64, 8), jnp.float32, (64, 64, 8, 8), "no tile"),
    ],
)
def test_refusals(changes, shape, dtype, kernel, reason):
    conv = convolution(**changes)
    assert re.search(reason, sparse_conv_direct.refusal(conv, shape, dtype, kernel))
    assert sparse_conv_direct.gradient_refusal(conv, shape, dtype, kernel)


def test_refusals_of_gradients():
    refused = sparse_conv_direct.gradient_refusal
    shape, kernel = (2, 8, 8, 8), (3, 3, 8, 16)
    assert not refused(convolution(), shape, jnp.float32, kernel)
    for strides, padding, reason in (
        ((2, 1), "SAME", "strides are \\(2, 1\\), not 1"),
        ((1, 1), ((0, -1), (0, 0)), "cuts off the input"),
        ((1, 1), ((0, 3), (0, 0)), "wider than the window"),
    ):
        conv = convolution(strides, padding)
        assert re.search(reason, refused(conv, shape, jnp.float32, kernel))
        dy = jnp.zeros((2, *sparse_conv_direct.results(conv, (8, 8), (3, 3)), 16))
        with pytest.raises(UsageError, match=reason):
            kernels.sparse_conv_input_gradient(dy, jnp.zeros(kernel), conv, (8, 8))


def test_bad_operands_are_refused():
    conv = convolution()
    x, kernel = draw((3, 3))
    with pytest.raises(UsageError, match="no sparse convolution: feature_group_count is 4"):
        kernels.sparse_conv_forward(x, kernel, convolution(feature_group_count=4))
    with pytest.raises(UsageError, match="type and channels of x, float32 and 12; got bfloat16"):
        kernels.sparse_conv_forward(x, kernel.astype(jnp.bfloat16), conv)
    with pytest.raises(UsageError, match=r"float32 and 12; got float32\[3, 3, 8, 20\]"):
        kernels.sparse_conv_forward(x, kernel[:, :, :8], conv)
    with pytest.raises(UsageError, match=r"like the output, float32\[5, 7, 6, 20\]; got .*12\]"):
        kernels.sparse_conv_input_gradient(x, kernel, conv, (7, 6))
    good = sparse_conv_direct.cut(conv, x.shape, kernel.shape)
    for changes, message in (
        ({"tile": (256, 32)}, r"cut.tile must be one of .*, got \(256, 32\)"),
        ({"chunk": 12}, "cut.chunk must be a power of two from 4 to 256, got 12"),
        ({"columns": 7}, r"cut.columns must be in \[1, 6\], got 7"),
        ({"windows": True, "tile": (256, 64)}, r"cut.tile must be one of .*, got \(256, 64\)"),
    ):
        with pytest.raises(UsageError, match=message):
            kernels.sparse_conv_forward(x, kernel, conv, dataclasses.replace(good, **changes))


@pytest.mark.parametrize(
    ("size", "channels"), [((32, 32), 128), ((28, 28), 128), ((7, 7), 512), ((4, 4), 512)]
)
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_cuts_fit_into_shared_memory(size, channels, strides):
    conv, kernel = convolution(strides), (3, 3, channels, channels)
    shape = (256, *size, channels)
    chosen = sparse_conv_direct.cut(conv, shape, kernel)
    every = sparse_conv_direct.cuts(conv, shape, kernel)
    assert chosen in every
    assert {cut.tile for cut in every} >= {(256, 64), (256, 128), (128, 64)}
    for cut in every:
        assert sparse_conv_direct.shared_bytes(conv, shape, kernel, cut) <= 99 * 1024
    assert len(sparse_conv_direct.cuts(conv, shape, kernel, shared=227 * 1024)) > len(every)
    windows = sparse_conv_direct.cut(conv, shape, kernel, windows=True)
    assert windows.windows == (strides == (1, 1))
    assert windows in sparse_conv_direct.cuts(conv, shape, kernel, windows=True)
    assert sparse_conv_direct.shared_bytes(conv, shape, kernel, windows) <= 99 * 1024


# What is missing or wrong in one line of the kernel, and has to be found.
FAULTS = {
    "nothing": ("", ""),
    "no barrier after the tables": ("gpu.sync();  // the tables", "// the tables"),
    "no barrier after staging": ("gpu.sync();  // activations", "// activations"),
    "no barrier before staging": ("gpu.sync();  // nobody", "// nobody"),
    "no barrier of the warp": ("gpu.sync_warp();  // entries", "// entries"),
    "one ring for two turns": ("turn ^= 1;", ""),
    "too few rows": ("lines * strip + ends *", "lines * strip + 0 *"),
    "images after the last one": ("pixel != kNowhere && at < end", "pixel != kNowhere"),
    "no zeros behind a row": ("* pitch + taps[1] - 1;", "* pitch;"),
}


@pytest.mark.newest
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_block_does_emulated_thread_by_thread(fault, tmp_path):
    """The source of the CUDA kernel, compiled for the CPU."""
    source = (ROOT / "ops/sparse_conv_direct.cuh").read_text()
    right, wrong = FAULTS[fault]
    assert right in source
    (tmp_path / "sparse_conv_direct.cuh").write_text(
        source.replace(right, wrong, 1) if right else source
    )
    program = tmp_path / "emulate"
    command = ["g++", "-std=c++17", "-O0", "-I", str(tmp_path), "-I", str(ROOT / "tests")]
    command += [str(ROOT / "tests/emulate_sparse_conv_direct.cpp"), "-o", str(program)]
    subprocess.run(command, check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (result.returncode == 0) == (fault == "nothing"), result.stdout
    if fault != "nothing":
        return
    assert "everything as by naive loops" in result.stdout
    # Both sides agree on how much shared memory a block needs.
    lines = re.findall(r"^ok .*$", result.stdout, re.MULTILINE)
    assert len(lines) > 20
    for line in lines:
        found = dict(re.findall(r"(\w+) ([0-9 ]+)\b", line))
        number = {name: [int(word) for word in text.split()] for name, text in found.items()}
        size = (*number["height"], *number["width"])
        ends = [
            (*number["rows"], *number["columns"])[a] * number["strides"][a] + number["window"][a]
            for a in (0, 1)
        ]
        padding = tuple(
            (low, end - number["strides"][a] - low - size[a])
            for a, (low, end) in enumerate(zip(number["lows"], ends, strict=True))
        )
        windows = number["strip"] == [4]
        cut = Cut((4 * number["run"][0], 0), number["chunk"][0], number["part"][0], windows)
        conv = convolution(tuple(number["strides"]), padding)
        shape = (*number["images"], *size, *number["in"])
        kernel = (*number["window"], *number["in"], *number["out"])
        bytes_ = sparse_conv_direct.shared_bytes(conv, shape, kernel, cut)
        assert bytes_ == number["bytes"][0], line
