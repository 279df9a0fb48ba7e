"""swat_conv and swat_linear, forward and every gradient, against the float64 oracle.

Values lie on a grid of eighths: their sums are exact in float32, so float32 and float64 must agree
with the oracle exactly, whatever the order of summation, and masks are never a matter of rounding.
Half floats may be off by one rounding of the result.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swat_jax.functional import swat_conv, swat_linear
from swat_jax.sparsity import packing, top_k
from tests import oracle
from tests.strategies import DTYPES, Grid, grids, numpy, precision_of

ROUNDING = {"float32": 0.0, "float64": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}


class Case(NamedTuple):
    """One geometry; lists of numbers would not hash."""

    x: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Any = "SAME"
    input_dilation: tuple[int, ...] | None = None
    kernel_dilation: tuple[int, ...] | None = None
    groups: int = 1

    def arguments(self) -> dict[str, Any]:
        """What swat_conv takes; what is not set is left to its defaults."""
        given = {
            "strides": self.strides,
            "padding": self.padding,
            "input_dilation": self.input_dilation,
            "kernel_dilation": self.kernel_dilation,
            "feature_group_count": self.groups,
        }
        return {name: value for name, value in given.items() if value is not None}

    def geometry(self) -> dict[str, Any]:
        """What the oracle takes."""
        return {
            "strides": self.strides,
            "padding": self.padding,
            "input_dilation": self.input_dilation,
            "kernel_dilation": self.kernel_dilation,
            "groups": self.groups,
        }

    def output(self) -> tuple[int, ...]:
        return oracle.conv(np.zeros(self.x), np.zeros(self.kernel), **self.geometry()).shape


CASES = {
    "1d": Case((2, 7, 3), (3, 3, 4), (1,)),
    "1d_valid_strided": Case((2, 9, 2), (4, 2, 3), (2,), "VALID"),
    "2d": Case((2, 5, 6, 3), (3, 3, 3, 4), (1, 1)),
    "2d_strided": Case((2, 7, 6, 3), (3, 2, 3, 4), (2, 3)),
    "2d_same_lower": Case((1, 5, 4, 2), (2, 4, 2, 3), (1, 2), "SAME_LOWER"),
    "2d_explicit": Case((2, 5, 4, 2), (3, 3, 2, 3), (1, 2), ((2, 0), (1, 3))),
    "2d_cropped": Case((2, 6, 5, 2), (3, 2, 2, 3), (1, 1), ((-1, 0), (1, 0))),
    "2d_kernel_dilation": Case((2, 7, 5, 2), (3, 2, 2, 3), (1, 2), "SAME", None, (2, 3)),
    "2d_input_dilation": Case((1, 3, 4, 2), (3, 3, 2, 3), (1, 1), ((1, 2), (1, 1)), (2, 1)),
    "2d_groups": Case((2, 5, 5, 4), (3, 3, 2, 6), (2, 2), groups=2),
    "2d_depthwise": Case((2, 4, 4, 4), (3, 3, 1, 8), (1, 1), "VALID", groups=4),
    "2d_window_of_one": Case((2, 5, 4, 6), (1, 1, 6, 4), (2, 2), "VALID"),
    "2d_without_overlap": Case((2, 5, 5, 2), (1, 2, 2, 3), (3, 3), "VALID"),
    "3d": Case((1, 3, 4, 3, 2), (2, 3, 2, 2, 3), (1, 2, 1)),
    "3d_groups": Case((1, 4, 3, 3, 4), (2, 2, 1, 2, 4), (1, 1, 1), "VALID", None, (1, 2, 1), 2),
}


def vjp_of(product):
    """Output and both gradients from one compiled function."""

    def run(x, kernel, dy, **selection):
        y, back = jax.vjp(functools.partial(product, **selection), x, kernel)
        return y, *back(dy)

    return jax.jit(run)


@functools.cache
def compiled_conv(case: Case, granularity: str = "unstructured"):
    return vjp_of(functools.partial(swat_conv, granularity=granularity, **case.arguments()))


@functools.cache
def compiled_linear():
    return vjp_of(swat_linear)


def assert_gradients(actual, expected, bound, dtype, kernel_dtype=None):
    """Exactly for float32 and float64; else within one rounding of the sum of all magnitudes."""
    for name, value, want, scale, kind in zip(
        ("y", "dx", "dkernel"),
        actual,
        expected,
        bound,
        (dtype, dtype, kernel_dtype or dtype),
        strict=True,
    ):
        assert value.dtype == jnp.dtype(kind), name
        assert value.shape == want.shape, name
        error = np.abs(oracle.widen(value) - want)
        assert (error <= ROUNDING[dtype] * scale).all(), f"{name}: off by {error.max()}"


def magnitudes(*arrays):
    return tuple(np.abs(oracle.widen(a)) for a in arrays)


def draw_values(grid: Grid, case: Case, dtype: str, kernel_dtype: str | None = None):
    return (
        grid.array(case.x, dtype, salt=0),
        grid.array(case.kernel, kernel_dtype or dtype, salt=1),
        Grid(grid.seed, 16, 0.0).array(case.output(), dtype, salt=2),
    )


def check_conv(case, granularity, dtype, grid, weight_keep, activation_keep):
    x, kernel, dy = draw_values(grid, case, dtype)
    with precision_of(dtype):
        actual = compiled_conv(case, granularity)(
            x,
            kernel,
            dy,
            weight_keep=np.int32(weight_keep),
            activation_keep=np.int32(activation_keep),
        )
    keeps = {"weight_keep": weight_keep, "activation_keep": activation_keep}
    expected = oracle.swat_conv(x, kernel, dy, granularity=granularity, **keeps, **case.geometry())
    bound = oracle.swat_conv(
        *magnitudes(x, kernel, dy), granularity=granularity, **keeps, **case.geometry()
    )
    assert_gradients(actual, expected, bound, dtype)


def keeps_of(case: Case, granularity: str = "unstructured"):
    units, size = oracle.units(case.kernel, granularity), int(np.prod(case.x))
    return {"weight_keep": st.integers(1, units), "activation_keep": st.integers(1, size)}


# --- Convolution ----------


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=12)
@given(data=st.data(), grid=grids())
def test_conv_matches_the_oracle_in_every_geometry(name, data, grid):
    case = CASES[name]
    keeps = data.draw(st.fixed_dictionaries(keeps_of(case)))
    check_conv(case, "unstructured", "float32", grid, **keeps)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != "float32"])
@pytest.mark.parametrize("name", ["1d", "2d_strided", "2d_groups"])
@settings(max_examples=8)
@given(data=st.data(), grid=grids())
def test_conv_matches_the_oracle_in_every_type(name, dtype, data, grid):
    case = CASES[name]
    keeps = data.draw(st.fixed_dictionaries(keeps_of(case)))
    check_conv(case, "unstructured", dtype, grid, **keeps)


@pytest.mark.parametrize("granularity", ["channel", "filter", "vector8"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("2d_strided", "float32"),
        ("2d_groups", "bfloat16"),
        ("2d_window_of_one", "float32"),
        ("3d", "float16"),
    ],
)
@settings(max_examples=12)
@given(data=st.data(), grid=grids())
def test_conv_matches_the_oracle_in_every_granularity(name, dtype, granularity, data, grid):
    case = CASES[name]
    keeps = data.draw(st.fixed_dictionaries(keeps_of(case, granularity)))
    check_conv(case, granularity, dtype, grid, **keeps)


@pytest.mark.parametrize("granularity", ["unstructured", "channel", "filter", "vector8"])
@settings(max_examples=12)
@given(grid=grids(), weight_eighths=st.integers(0, 40), activation_eighths=st.integers(0, 17))
def test_conv_with_given_thresholds(granularity, grid, weight_eighths, activation_eighths):
    """Thresholds between, at, below and above the values; 0 keeps every non-zero."""
    case = CASES["2d"]
    x, kernel, dy = draw_values(grid, case, "float32")
    limits: dict[str, Any] = {
        "weight_threshold": np.float32(weight_eighths / 8),
        "activation_threshold": np.float32(activation_eighths / 8),
    }
    actual = compiled_conv(case, granularity)(x, kernel, dy, **limits)
    expected = oracle.swat_conv(x, kernel, dy, granularity=granularity, **limits, **case.geometry())
    assert_gradients(actual, expected, expected, "float32")


@settings(max_examples=15)
@given(data=st.data(), grid=grids())
def test_bfloat16_input_with_float32_master_weights(data, grid):
    case = CASES["2d"]
    x, kernel, dy = draw_values(grid, case, "bfloat16", "float32")
    keeps = data.draw(st.fixed_dictionaries(keeps_of(case)))
    traced = {name: np.int32(value) for name, value in keeps.items()}
    actual = compiled_conv(case)(x, kernel, dy, **traced)
    expected = oracle.swat_conv(x, kernel, dy, **keeps, **case.geometry())
    bound = oracle.swat_conv(*magnitudes(x, kernel, dy), **keeps, **case.geometry())
    assert_gradients(actual, expected, bound, "bfloat16", kernel_dtype="float32")


def test_the_mask_comes_from_the_master_weights_not_from_their_rounding():
    """In bfloat16 these weights are all 1; in float32 they are all different."""
    kernel = jnp.float32(1) + jnp.arange(16, dtype=jnp.float32).reshape(4, 4) * 2.0**-20
    y = swat_linear(jnp.eye(4, dtype=jnp.bfloat16), kernel, weight_keep=5, activation_sparsity=0.0)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(numpy(y), (np.arange(16) >= 11).reshape(4, 4))


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_stored_threshold_of_another_type_means_its_exact_value(stored):
    x = np.array([[1.0, 1.0078125, -1.0, 0.5]], jnp.bfloat16)
    limit = np.array(1.001, jnp.dtype(stored))
    dkernel = jax.grad(
        lambda k: swat_linear(
            jnp.asarray(x), k, weight_sparsity=0.0, activation_threshold=jnp.asarray(limit)
        ).sum()
    )(jnp.ones((4, 1), jnp.float32))
    expected = oracle.sparsify(x, oracle.mask(x, limit)).reshape(4, 1)
    np.testing.assert_array_equal(numpy(dkernel), expected)


@pytest.mark.parametrize("sparsity", [0, 0.0, 0.1, 0.7, 0.9, 0.99, np.float32(0.7), "0.7"])
def test_sparsities_become_exact_counts(sparsity):
    case, grid = CASES["2d"], Grid(3, 16, 0.0)
    x, kernel, dy = draw_values(grid, case, "float32")
    y, back = jax.vjp(
        lambda x, k: swat_conv(
            x, k, weight_sparsity=sparsity, activation_sparsity=sparsity, **case.arguments()
        ),
        x,
        kernel,
    )
    expected = oracle.swat_conv(
        x,
        kernel,
        dy,
        weight_keep=oracle.keep_count(sparsity, kernel.size),
        activation_keep=oracle.keep_count(sparsity, x.size),
        **case.geometry(),
    )
    assert_gradients((y, *back(jnp.asarray(dy))), expected, expected, "float32")


def test_a_given_threshold_wins_over_the_count():
    """Layers always say their sparsity, and sometimes bring a threshold from an earlier step."""
    x, kernel = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[1.0], [2.0], [3.0]])
    y, back = jax.vjp(
        lambda x, k: swat_linear(
            x,
            k,
            weight_sparsity=0.9,
            activation_sparsity=0.9,
            weight_threshold=2.0,
            activation_threshold=2.0,
        ),
        x,
        kernel,
    )
    dx, dkernel = back(jnp.ones((1, 1)))
    np.testing.assert_array_equal(y, [[13.0]])
    np.testing.assert_array_equal(dx, [[0.0, 2.0, 3.0]])
    np.testing.assert_array_equal(dkernel, [[0.0], [2.0], [3.0]])


@pytest.mark.parametrize("strides", [2, (2,), [2, 2], (2, 2)])
def test_one_stride_serves_all_axes(strides):
    if len(np.atleast_1d(strides)) == 1 and not isinstance(strides, int):
        x, kernel, full = jnp.ones((1, 5, 2)), jnp.ones((3, 2, 3)), (2,)
    else:
        x, kernel, full = jnp.ones((1, 5, 4, 2)), jnp.ones((3, 3, 2, 3)), (2, 2)
    y = swat_conv(x, kernel, weight_sparsity=0.0, activation_sparsity=0.0, strides=strides)
    expected = oracle.conv(np.asarray(x), np.asarray(kernel), strides=full)
    np.testing.assert_array_equal(y, expected)


def test_preferred_element_type_and_precision_reach_the_product():
    x = jnp.full((1, 300), 1.0, jnp.bfloat16)
    kernel = jnp.full((300, 1), 1.0078125, jnp.bfloat16)
    options: dict[str, Any] = {
        "weight_sparsity": 0.0,
        "activation_sparsity": 0.0,
        "preferred_element_type": jnp.float32,
        "precision": jax.lax.Precision.HIGHEST,
    }
    y = swat_linear(x, kernel, **options)
    assert y.dtype == jnp.float32
    assert float(y[0, 0]) == 300 * 1.0078125
    dx, dkernel = jax.grad(lambda x, k: swat_linear(x, k, **options).sum(), (0, 1))(x, kernel)
    assert (dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.bfloat16)
    text = str(jax.make_jaxpr(lambda x, k: swat_linear(x, k, **options))(x, kernel))
    assert "HIGHEST" in text
    image = jnp.ones((1, 4, 4, 2), jnp.bfloat16)
    window = jnp.ones((3, 3, 2, 2), jnp.bfloat16)
    y = swat_conv(image, window, **options)
    assert y.dtype == jnp.float32
    dx, dkernel = jax.grad(lambda x, k: swat_conv(x, k, **options).sum(), (0, 1))(image, window)
    assert (dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.bfloat16)


# --- Linear ----------


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*(((5, 6), dtype) for dtype in DTYPES), ((2, 3, 6), "float32"), ((6,), "bfloat16")],
)
@settings(max_examples=12)
@given(data=st.data(), grid=grids())
def test_linear_matches_the_oracle(shape, dtype, data, grid):
    x, kernel = grid.array(shape, dtype), grid.array((6, 4), dtype, salt=1)
    dy = Grid(grid.seed, 16, 0.0).array((*shape[:-1], 4), dtype, salt=2)
    keeps = {
        "weight_keep": data.draw(st.integers(1, kernel.size)),
        "activation_keep": data.draw(st.integers(1, x.size)),
    }
    with precision_of(dtype):
        actual = compiled_linear()(x, kernel, dy, **{n: np.int32(k) for n, k in keeps.items()})
    expected = oracle.swat_linear(x, kernel, dy, **keeps)
    bound = oracle.swat_linear(*magnitudes(x, kernel, dy), **keeps)
    assert_gradients(actual, expected, bound, dtype)


@settings(max_examples=15)
@given(grid=grids(), weight_eighths=st.integers(0, 17), activation_eighths=st.integers(0, 17))
def test_linear_with_given_thresholds(grid, weight_eighths, activation_eighths):
    x, kernel = grid.array((5, 6)), grid.array((6, 4), salt=1)
    dy = Grid(grid.seed, 16, 0.0).array((5, 4), salt=2)
    limits: dict[str, Any] = {
        "weight_threshold": np.float32(weight_eighths / 8),
        "activation_threshold": np.float32(activation_eighths / 8),
    }
    actual = compiled_linear()(x, kernel, dy, **limits)
    expected = oracle.swat_linear(x, kernel, dy, **limits)
    assert_gradients(actual, expected, expected, "float32")


# --- What the rules promise ----------


def test_the_forward_pass_sees_the_dense_input():
    x, kernel = jnp.array([[1.0, 2.0, 4.0]]), jnp.ones((3, 1))
    y = swat_linear(x, kernel, weight_sparsity=0.0, activation_sparsity=0.9)
    assert float(y[0, 0]) == 7.0


def test_masked_weights_get_gradients_and_can_come_back():
    x = jnp.ones((1, 2))
    kernel = jnp.array([[1.0], [0.5]])

    def loss(kernel):
        y = swat_linear(x, kernel, weight_keep=1, activation_sparsity=0.0)
        return (y[0, 0] - 3.0) ** 2

    gradient = jax.grad(loss)(kernel)
    assert (np.asarray(gradient) != 0).all()
    # Weight decay aside, only the gradient can lift the masked weight over the other one.
    moved = kernel - jnp.array([[0.0], [0.3]]) * gradient
    assert float(moved[1, 0]) > 1.0
    y = swat_linear(x, moved, weight_keep=1, activation_sparsity=0.0)
    assert float(y[0, 0]) == float(moved[1, 0])


@pytest.mark.parametrize("place", ["x", "kernel"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_surfaces(place, value):
    """Even where only one value is kept, NaN and Inf reach the output and the gradients."""
    case = CASES["2d_without_overlap"]
    x, kernel, dy = draw_values(Grid(5, 16, 0.0), case, "float32")
    (x if place == "x" else kernel)[0, 0, 1, 1] = value
    keeps = {"weight_keep": 1, "activation_keep": 1}
    actual = compiled_conv(case)(x, kernel, dy, **{n: np.int32(k) for n, k in keeps.items()})
    with np.errstate(invalid="ignore"):
        expected = oracle.swat_conv(x, kernel, dy, **keeps, **case.geometry())
    for name, got, want in zip(("y", "dx", "dkernel"), actual, expected, strict=True):
        np.testing.assert_array_equal(got, want, err_msg=name)
    assert not np.isfinite(actual[0]).all()
    assert np.isfinite(actual[1]).all() == (place == "x")
    assert np.isfinite(actual[2]).all() == (place == "kernel")


def test_nan_is_kept_beside_larger_values():
    """Three infinities fill the count; the NaN is saved for the backward pass all the same."""
    x = jnp.array([[jnp.inf, jnp.inf, jnp.nan, 1.0]])
    kernel = jnp.ones((4, 1))
    dkernel = jax.grad(lambda k: swat_linear(x, k, weight_sparsity=0.0, activation_keep=1).sum())(
        kernel
    )
    np.testing.assert_array_equal(dkernel.ravel(), [0.0, 0.0, np.nan, 0.0])
    dkernel = jax.grad(
        lambda k: swat_linear(
            x, k, weight_sparsity=0.0, activation_threshold=jnp.float32(1e30)
        ).sum()
    )(kernel)
    np.testing.assert_array_equal(dkernel.ravel(), [np.inf, np.inf, np.nan, 0.0])


def test_thresholds_and_packed_get_no_gradient():
    x, kernel = jnp.arange(1.0, 7.0).reshape(1, 6), jnp.ones((6, 2))

    def loss(limits):
        return swat_linear(
            x, kernel, weight_threshold=limits[0], activation_threshold=limits[1]
        ).sum()

    np.testing.assert_array_equal(jax.grad(loss)(jnp.array([0.5, 2.0])), [0.0, 0.0])
    packed = jax.jit(packing.pack, static_argnums=2)(x, 3.0, 6)

    def packed_loss(values):
        again = packing.Packed(values, packed.bitmap, packed.offsets, packed.overflow, packed.shape)
        return swat_linear(x, kernel, weight_sparsity=0.0, packed=again).sum()

    np.testing.assert_array_equal(jax.grad(packed_loss)(packed.values), jnp.zeros(6))


@settings(max_examples=15)
@given(grid=grids(), keep=st.integers(1, 180))
def test_packed_input_gives_the_same_gradients(grid, keep):
    case = CASES["2d"]
    x, kernel, dy = draw_values(grid, case, "float32")
    y, dx, dkernel = _packed_conv()(x, kernel, dy, oracle.threshold(x, keep))
    expected = oracle.swat_conv(
        x, kernel, dy, weight_keep=20, activation_keep=keep, **case.geometry()
    )
    assert_gradients((y, dx, dkernel), expected, expected, "float32")


@functools.cache
def _packed_conv():
    case = CASES["2d"]

    def run(x, kernel, dy, limit):
        packed = packing.pack(x, limit, x.size)
        y, back = jax.vjp(
            lambda x, k: swat_conv(x, k, weight_keep=20, packed=packed, **case.arguments()),
            x,
            kernel,
        )
        return y, *back(dy)

    return jax.jit(run)


def test_counts_may_be_traced_without_compiling_again():
    case = CASES["2d"]
    x, kernel, dy = draw_values(Grid(1, 16, 0.0), case, "float32")
    traces = []

    def product(x, kernel, **how):
        traces.append(1)
        return swat_conv(x, kernel, **how, **case.arguments())

    f = vjp_of(product)
    for weight_keep, activation_keep in [(1, 180), (54, 2), (108, 77)]:
        keeps = {"weight_keep": weight_keep, "activation_keep": activation_keep}
        actual = f(x, kernel, dy, **{n: jnp.uint32(k) for n, k in keeps.items()})
        expected = oracle.swat_conv(x, kernel, dy, **keeps, **case.geometry())
        assert_gradients(actual, expected, expected, "float32")
    assert len(traces) == 1


def test_counts_of_two_words(monkeypatch):
    monkeypatch.setattr(top_k, "_ONE_WORD_LIMIT", 64)
    case = Case((4, 3, 3, 4), (3, 3, 4, 4), (1, 1))
    x, kernel, dy = draw_values(Grid(2, 5, 0.0), case, "float32")
    f = vjp_of(functools.partial(swat_conv, **case.arguments()))
    for weight_keep, activation_keep in [(1, 144), (70, 65), (144, 3)]:
        keeps = {"weight_keep": weight_keep, "activation_keep": activation_keep}
        words = {n: jnp.asarray(top_k.split_count(k)) for n, k in keeps.items()}
        expected = oracle.swat_conv(x, kernel, dy, **keeps, **case.geometry())
        assert_gradients(f(x, kernel, dy, **words), expected, expected, "float32")
