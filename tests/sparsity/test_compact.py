"""The compact form of sparse kernels, against loops over single weights."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swat_jax import kernels
from swat_jax.errors import UsageError
from swat_jax.sparsity import compact
from swat_jax.sparsity.compact import VECTORS, transposed

# Window, input and output channels, chunk, multiple.
CASES = [
    ((1, 1), 8, 32, 8, 1),
    ((1, 1), 20, 64, 16, 2),
    ((3, 3), 40, 96, 32, 4),
    ((3, 2), 5, 32, 4, 3),
    ((2, 3), 33, 160, 16, 8),
    ((5, 1), 7, 32, 64, 2),
]


def draw(window, inputs, outputs, share=0.2, dtype=jnp.float32, seed=0):
    """A kernel of small whole numbers, whose first output is empty and whose last one is full."""
    rng = np.random.default_rng([seed, inputs, outputs])
    shape = (*window, inputs, outputs)
    kernel = rng.integers(1, 8, shape) * rng.choice([-1, 1], shape) * (rng.random(shape) < share)
    kernel[..., 0] = 0
    kernel[..., -1] = 3
    return jnp.asarray(kernel, dtype)


def by_loops(kernel, vector, chunk, multiple):
    """Of each group and chunk a list of (position, values), filled up; from the definition."""
    kernel = np.asarray(kernel, np.float64)
    height, width, inputs, outputs = kernel.shape
    for group in range(outputs // vector):
        segments = []
        for first in range(0, inputs, chunk):
            found = []
            for row, column in itertools.product(range(height), range(width)):
                for channel in range(first, min(first + chunk, inputs)):
                    values = kernel[row, column, channel, group * vector : (group + 1) * vector]
                    if values.any():
                        position = (row * width + column) * chunk + channel - first
                        found.append((position, values.tolist()))
            while len(found) % multiple:
                found.append((0, [0.0] * vector))
            segments.append(found)
        yield segments


def check(found, kernel, vector, chunk, multiple):
    values, positions, starts = (np.asarray(part) for part in found)
    assert values.dtype == kernel.dtype
    assert positions.dtype == starts.dtype == np.int32
    height, width, inputs, outputs = kernel.shape
    room = -(-height * width * chunk // multiple) * multiple * -(-inputs // chunk)
    assert values.shape == (outputs // vector, room, vector)
    assert positions.shape == (outputs // vector, room)
    for group, segments in enumerate(by_loops(kernel, vector, chunk, multiple)):
        ends = np.cumsum([len(segment) for segment in segments])
        assert starts[group].tolist() == [0, *ends]
        flat = [entry for segment in segments for entry in segment]
        assert positions[group, : len(flat)].tolist() == [position for position, _ in flat]
        assert values[group, : len(flat)].astype(float).tolist() == [value for _, value in flat]


@pytest.mark.parametrize("vector", VECTORS)
@pytest.mark.parametrize(("window", "inputs", "outputs", "chunk", "multiple"), CASES)
def test_the_definition(window, inputs, outputs, chunk, multiple, vector):
    compiled = jax.jit(kernels.compact, static_argnums=(1, 2, 3))
    for dtype in (jnp.float32, jnp.bfloat16):
        kernel = draw(window, inputs, outputs, dtype=dtype)
        check(compiled(kernel, vector, chunk, multiple), kernel, vector, chunk, multiple)


def test_beyond_the_last_segment_the_definition_has_zeros():
    compiled = jax.jit(compact.compact, static_argnums=(1, 2, 3))
    values, positions, starts = map(np.asarray, compiled(draw((3, 3), 40, 32, 0.1), 1, 16, 2))
    for group in range(32):
        assert not values[group, starts[group, -1] :].any()
        assert not positions[group, starts[group, -1] :].any()


def test_nothing_everything_nan_and_negative_zero():
    zeros = jnp.zeros((3, 3, 4, 8))
    assert not any(part.any() for part in kernels.compact(zeros, 8, 4, 2))
    assert not any(part.any() for part in kernels.compact(-zeros, 1, 4, 2))
    found = kernels.compact(zeros.at[1, 2, 3, 5].set(jnp.nan), 8, 4, 1)
    assert np.isnan(found.values[0, 0]).tolist() == [False] * 5 + [True] + [False] * 2
    assert found.positions[0, 0] == 5 * 4 + 3
    everything = kernels.compact(zeros + 1, 1, 3, 4)
    assert everything.starts[0].tolist() == [0, 28, 40]  # 27 and 9 weights


def test_under_vmap_and_of_no_channels():
    stack = jnp.stack([draw((3, 3), 10, 16, share, seed=1) for share in (0.1, 0.5)])
    each = jax.vmap(lambda kernel: kernels.compact(kernel, 1, 4, 2))(stack)
    for i, kernel in enumerate(stack):
        check([part[i] for part in each], kernel, 1, 4, 2)
    assert kernels.compact(jnp.zeros((3, 3, 8, 0)), 1, 4, 2).values.shape == (0, 72, 1)
    assert kernels.compact(jnp.zeros((3, 3, 0, 2)), 1, 4, 2).starts.tolist() == [[0], [0]]


def test_the_transposed_kernel_makes_the_input_gradient():
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.integers(-3, 4, (3, 2, 5, 7)), jnp.float32)
    dy = np.asarray(rng.integers(-3, 4, (1, 6, 4, 7)), np.float64)
    turned = np.asarray(transposed(kernel), np.float64)
    dx, expected = np.zeros((2, 1, 8, 5, 5))
    wide = np.pad(dy, ((0, 0), (2, 2), (1, 1), (0, 0)))
    for i, j in np.ndindex(3, 2):
        # By the transposed kernel, and as the gradient of a sum over windows.
        dx += wide[:, i : i + 8, j : j + 5] @ turned[i, j]
        expected[:, i : i + 6, j : j + 4] += dy @ np.asarray(kernel, np.float64)[i, j].T
    np.testing.assert_array_equal(dx, expected)


@pytest.mark.parametrize(
    ("shape", "numbers", "message"),
    [
        ((3, 8, 8), (1, 8, 1), "axes \\(height, width, in, out\\), got shape \\(3, 8, 8\\)"),
        ((1, 1, 8, 8), (4, 8, 1), "vector must be one of \\(1, 8, 16, 32\\), got 4"),
        ((1, 1, 8, 12), (8, 8, 1), "vector must divide the 12 output channels, got 8"),
        ((1, 1, 8, 8), (1, 0, 1), "at least 1, got 0 and 1"),
        ((1, 1, 8, 8), (1, 8, 0), "at least 1, got 8 and 0"),
        ((2**8, 2**8, 2**15, 1), (1, 32, 1), "fewer than 2\\*\\*31 entries"),
    ],
)
def test_what_is_refused(shape, numbers, message):
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(
            lambda kernel: kernels.compact(kernel, *numbers),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        )
