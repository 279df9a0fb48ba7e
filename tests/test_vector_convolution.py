"""Products with vectors of weights: their definition, cuts, and the CUDA kernel on a CPU."""

import dataclasses
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swat_jax import kernels, sparse_convolution, vector_convolution
from swat_jax.errors import UsageError
from tests.test_sparse_convolution import CONVS, convolution

ROOT = Path(__file__).parents[1]
FORWARD = kernels.sparse_conv_vector_forward


def draw(window, shape, out, vector, share, dtype=jnp.bfloat16, seed=0):
    """Small whole numbers: an input, and a kernel of which so many vectors are kept."""
    rng = np.random.default_rng([seed, *shape, out, vector])
    x = rng.integers(-4, 5, shape)
    kept = np.repeat(rng.random((*window, shape[-1], out // vector)) < share, vector, axis=-1)
    kernel = rng.integers(-4, 5, kept.shape) * kept
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


def by_numpy(x, kernel, conv):
    """In float64, output pixel by output pixel."""
    window = kernel.shape[:2]
    pads = sparse_convolution.pads(conv, x.shape[1:-1], window)
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *(np.maximum(pads, 0)), (0, 0)))
    kernel = np.asarray(kernel, np.float64)
    high = [min(pad[1], 0) for pad in pads]
    size = [
        (x.shape[axis + 1] + high[axis] - window[axis]) // conv.strides[axis] + 1 for axis in (0, 1)
    ]
    y = np.zeros((x.shape[0], *size, kernel.shape[-1]))
    for r, c, i, j in np.ndindex(*size, *window):
        y[:, r, c] += x[:, r * conv.strides[0] + i, c * conv.strides[1] + j] @ kernel[i, j]
    return y


@pytest.mark.parametrize(("window", "strides", "padding"), CONVS)
@pytest.mark.parametrize(("vector", "dtype"), [(8, jnp.bfloat16), (16, jnp.float16)])
def test_the_definition(window, strides, padding, vector, dtype):
    conv = convolution(strides, padding)
    x, kernel = draw(window, (3, 7, 6, 16), 32, vector, 0.3, dtype)
    if window == (5, 7):
        with pytest.raises(UsageError, match="does not fit in 232448 bytes of shared memory"):
            FORWARD(x, kernel, conv, vector)
        return
    found = FORWARD(x, kernel, conv, vector)
    assert found.dtype == dtype
    # Exact sums, rounded once.
    np.testing.assert_array_equal(found, by_numpy(x, kernel, conv).astype(dtype))


def test_sums_are_rounded_once():
    """256 and eight halves: in bfloat16 every half would be lost."""
    x = jnp.ones((1, 1, 1, 16), jnp.bfloat16)
    kernel = jnp.full((1, 1, 16, 8), 0.5, jnp.bfloat16).at[0, 0, 0].set(256)
    assert (FORWARD(x, kernel, convolution(), 8) == 264).all()


def test_under_vmap():
    parts = [draw((3, 3), (2, 5, 4, 8), 16, 8, share, seed=i) for i, share in enumerate((0.2, 0.9))]
    x, kernel = (jnp.stack(one) for one in zip(*parts, strict=True))
    found = jax.vmap(lambda x, kernel: FORWARD(x, kernel, convolution(), 8))(x, kernel)
    for one, (x, kernel) in zip(found, parts, strict=True):
        np.testing.assert_array_equal(one, FORWARD(x, kernel, convolution(), 8))


def test_nothing_at_all():
    x, kernel = draw((3, 3), (2, 5, 4, 8), 16, 8, 0.5)
    assert FORWARD(x[:0], kernel, convolution(), 8).shape == (0, 5, 4, 16)
    assert not FORWARD(x, jnp.zeros_like(kernel), convolution(), 8).any()


@pytest.mark.parametrize(
    ("changes", "shape", "dtype", "kernel", "vector", "reason"),
    [
        ({}, (2, 4, 4, 8), jnp.float32, (1, 1, 8, 8), 8, "x is float32"),
        ({}, (2, 4, 4, 12), jnp.bfloat16, (1, 1, 12, 8), 8, "12 input and 8 output"),
        ({"kernel_dilation": (2, 2)}, (2, 4, 4, 8), jnp.bfloat16, (3, 3, 8, 8), 8, "dilated"),
        ({}, (2, 4, 4, 8), jnp.bfloat16, (1, 1, 8, 8), 4, r"vectors of 4 are none of \(8, 16"),
        ({}, (2, 4, 4, 8), jnp.bfloat16, (1, 1, 8, 24), 16, "vectors of 16 do not divide 24"),
        ({}, (2, 40, 4, 8), jnp.bfloat16, (17, 1, 8, 8), 8, "above 16"),
        ({}, (2, 40, 40, 8), jnp.bfloat16, (16, 16, 8, 8), 8, "does not fit in 232448 bytes"),
    ],
)
def test_refusals(changes, shape, dtype, kernel, vector, reason):
    x, weights = jnp.zeros(shape, dtype), jnp.zeros(kernel, dtype)
    with pytest.raises(UsageError, match=reason):
        FORWARD(x, weights, convolution(**changes), vector)


def test_bad_operands_are_refused():
    x, kernel = draw((3, 3), (2, 5, 4, 8), 16, 8, 0.5)
    conv = convolution()
    with pytest.raises(UsageError, match="kernel must be bfloat16 like x, got float32"):
        FORWARD(x, kernel.astype(jnp.float32), conv, 8)
    good = vector_convolution.cut(conv, x.shape, kernel.shape)
    for changes, message in (
        ({"tile": (4, 8, 32)}, r"cut.tile must be one of \(\(4, 8, 128\), .*got \(4, 8, 32\)"),
        ({"height": 3}, "cut.height must divide 8, got 3"),
        ({"chunk": 48}, "cut.chunk must be a power of 2 from 32 to 1024, got 48"),
        ({"chunk": 512}, "cut must fit in 232448 bytes"),
    ):
        with pytest.raises(UsageError, match=message):
            FORWARD(x, kernel, conv, 8, dataclasses.replace(good, **changes))
    np.testing.assert_array_equal(FORWARD(x, kernel, conv, 8, good), FORWARD(x, kernel, conv, 8))


@pytest.mark.parametrize("room", [99, 163, 227])
@pytest.mark.parametrize(("window", "stride"), [(3, 1), (1, 1), (3, 2), (1, 2)])
@pytest.mark.parametrize("size", [1, 2, 4, 7, 8, 14, 32, 56])
def test_cuts_fit_and_suit_the_image(room, window, stride, size):
    conv = convolution((stride, stride), ((window // 2, window // 2),) * 2)
    for inputs, outputs in ((16, 16), (64, 64), (128, 128), (512, 2048)):
        shape, kernel = (512, size, size, inputs), (window, window, inputs, outputs)
        found = list(vector_convolution.cuts(conv, shape, kernel, room * 1024))
        if not found:
            assert (window, stride) == (3, 2)
            assert room < 227
            continue
        assert vector_convolution.cut(conv, shape, kernel, room * 1024) in found
        rows = -(-size // stride)
        for cut in found:
            assert vector_convolution.shared_bytes(conv, kernel, cut) <= room * 1024
            assert cut.tile[0] % cut.height == 0
            # Few lines of it lie outside, but where images are tiny.
            assert cut.height < 2 * rows or rows <= 2
            assert cut.chunk < 2 * max(inputs, 17)


# What is missing or wrong in one line of the kernel, and has to be found.
FAULTS = {
    "nothing": ("", ""),
    "no barrier after the first chunk": ("gpu.sync();\n  while", "while"),
    "no barrier after a chunk": ("gpu.sync();  // the next chunk", "// the next chunk"),
    "no barrier after a table": ("table[p] = plan.place(p);\n  gpu.sync();",
                                 "table[p] = plan.place(p);"),
    "no barrier before counts are read": ("  gpu.sync();\n  // A warp for every bank.", ""),
    "one tile": ("now = other, other = swap;", "(void)swap;"),
    "another order of values": ("column = v / kEach * 2", "column = v / kEach"),
    "an even pitch": ("channel = positions | 1;", "channel = (positions + 1) & ~1u;"),
    "an order that knows no banks": ("return place(2 * octets * p + in_pair);",
                                     "return 2 * octets * p + in_pair;"),
}  # fmt: skip


@pytest.mark.newest
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_block_does_emulated_thread_by_thread(fault, tmp_path):
    """The source of the CUDA kernel, compiled for the CPU."""
    source = (ROOT / "ops/sparse_conv_vector.cuh").read_text()
    right, wrong = FAULTS[fault]
    assert right in source
    (tmp_path / "sparse_conv_vector.cuh").write_text(source.replace(right, wrong, 1))
    program = tmp_path / "emulate"
    command = ["g++", "-std=c++17", "-O0", "-I", str(tmp_path), "-I", str(ROOT / "ops")]
    command += [str(ROOT / "tests/emulate_sparse_conv_vector.cpp"), "-o", str(program)]
    if fault != "nothing":
        command.append("-DSWAT_JAX_FEW_CASES")
    subprocess.run(command, check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (result.returncode == 0) == (fault == "nothing"), result.stdout
    assert ("everything as by naive loops" in result.stdout) == (fault == "nothing")
