"""Requests that cannot be met are refused at once, by the name of the argument, in one line."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from swat_jax.errors import UsageError
from swat_jax.functional import swat_conv, swat_linear
from swat_jax.sparsity import packing

X, KERNEL = jnp.ones((2, 5, 5, 4)), jnp.ones((3, 3, 4, 6))
FINE: dict[str, Any] = {"weight_sparsity": 0.5, "activation_sparsity": 0.5}


def refused(call, pattern):
    with pytest.raises(UsageError, match=pattern) as caught:
        call()
    assert "\n" not in str(caught.value)


SELECTION = [
    ({"weight_sparsity": 1.0}, r"weight_sparsity.*\[0, 1\).*1\.0"),
    ({"activation_sparsity": 1.0}, r"activation_sparsity.*\[0, 1\)"),
    ({"weight_sparsity": -0.1}, r"weight_sparsity.*-0\.1"),
    ({"activation_sparsity": 2}, r"activation_sparsity.*2"),
    ({"weight_sparsity": "x"}, r"weight_sparsity.*'x'"),
    ({"activation_sparsity": float("nan")}, r"activation_sparsity.*nan"),
    ({"weight_keep": 3}, r"weight_sparsity.*weight_keep"),
    ({"activation_keep": 3}, r"activation_sparsity.*activation_keep"),
    ({"weight_sparsity": None}, r"weight_sparsity.*weight_keep.*weight_threshold"),
    ({"activation_sparsity": None}, r"activation_sparsity.*activation_keep"),
    ({"weight_sparsity": None, "weight_keep": 0}, r"weight_keep.*\[1, \d+\].*0"),
    ({"weight_sparsity": None, "weight_keep": -1}, r"weight_keep"),
    ({"weight_sparsity": None, "weight_keep": 10_000}, r"weight_keep.*10000"),
    ({"weight_sparsity": None, "weight_keep": np.int64(0)}, r"weight_keep"),
    ({"activation_sparsity": None, "activation_keep": 0}, r"activation_keep.*\[1, \d+\].*0"),
    ({"activation_sparsity": None, "activation_keep": np.int32(10_000)}, r"activation_keep"),
]


@pytest.mark.parametrize(("change", "pattern"), SELECTION)
def test_conv_refuses(change, pattern):
    refused(lambda: swat_conv(X, KERNEL, **(FINE | change)), pattern)


@pytest.mark.parametrize(("change", "pattern"), SELECTION)
def test_linear_refuses(change, pattern):
    refused(lambda: swat_linear(jnp.ones((3, 4)), jnp.ones((4, 6)), **(FINE | change)), pattern)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"granularity": "block"}, r"granularity.*unstructured.*channel.*filter.*block"),
        ({"strides": (1, 1, 1)}, "strides"),
        ({"strides": 0}, "strides"),
        ({"strides": None}, r"strides must be one whole number >= 1 or 2.*None"),
        ({"strides": 1.5}, r"strides.*1\.5"),
        ({"strides": (1, 2.0)}, r"strides.*2\.0"),
        ({"strides": "same"}, "strides.*'same'"),
        ({"kernel_dilation": (1,)}, "kernel_dilation"),
        ({"input_dilation": (0, 1)}, "input_dilation"),
        ({"feature_group_count": 3}, "feature_group_count"),
        ({"feature_group_count": 0}, "feature_group_count"),
        ({"padding": "FULL"}, "padding.*FULL"),
        ({"padding": 1}, "padding.*1"),
        ({"padding": ((1, 1),)}, "padding"),
        ({"padding": (1, 1)}, "padding"),
        ({"granularity": "channel", "weight_sparsity": None, "weight_keep": 25}, "weight_keep.*24"),
        ({"granularity": "filter", "weight_sparsity": None, "weight_keep": 7}, "weight_keep.*6"),
    ],
)
def test_conv_refuses_geometry(change, pattern):
    refused(lambda: swat_conv(X, KERNEL, **(FINE | change)), pattern)


@pytest.mark.parametrize(
    ("x", "kernel"),
    [
        ((5, 5, 4), (3, 3, 4, 6)),
        ((2, 5, 5, 4), (3, 4, 6)),
        ((2, 5, 5, 4), (3, 3, 5, 6)),
        ((2, 4), (4, 6)),
        ((1, 2, 2, 2, 2, 3), (1, 1, 1, 1, 3, 3)),
    ],
)
def test_conv_refuses_shapes_and_says_them(x, kernel):
    with pytest.raises(UsageError, match="kernel") as caught:
        swat_conv(jnp.ones(x), jnp.ones(kernel), **FINE)
    assert str(x) in str(caught.value)
    assert str(kernel) in str(caught.value)


@pytest.mark.parametrize(
    ("x", "kernel"), [((3, 4), (5, 6)), ((3, 4), (4,)), ((3, 4), (2, 4, 6)), ((), (4, 6))]
)
def test_linear_refuses_shapes_and_says_them(x, kernel):
    with pytest.raises(UsageError, match="kernel") as caught:
        swat_linear(jnp.ones(x), jnp.ones(kernel), **FINE)
    assert str(x) in str(caught.value)
    assert str(kernel) in str(caught.value)


@pytest.mark.parametrize(
    ("x", "kernel", "pattern"),
    [
        (jnp.ones((3, 4), jnp.int32), jnp.ones((4, 6)), "x.*int32"),
        (jnp.ones((3, 4)), jnp.ones((4, 6), jnp.int32), "kernel.*int32"),
        (jnp.ones((3, 4), jnp.complex64), jnp.ones((4, 6)), "x.*complex64"),
    ],
)
def test_what_is_not_float_is_refused(x, kernel, pattern):
    refused(lambda: swat_linear(x, kernel, **FINE), pattern)


@pytest.mark.parametrize(
    ("held", "pattern"),
    [
        (jax.ShapeDtypeStruct((3, 5), jnp.float32), r"packed.*3, 4.*3, 5"),
        (jax.ShapeDtypeStruct((3, 4), jnp.bfloat16), r"packed.*float32.*bfloat16"),
    ],
)
def test_packed_of_another_tensor_is_refused(held, pattern):
    def run(x, held):
        packed = packing.pack(held, 0.5, 12)
        return swat_linear(x, jnp.ones((4, 6)), weight_keep=3, packed=packed)

    refused(lambda: jax.eval_shape(run, jnp.ones((3, 4)), held), pattern)


def test_refusals_come_while_tracing():
    """Before training starts, that is: nothing has to run."""
    refused(
        lambda: jax.eval_shape(
            lambda x, k: swat_conv(x, k, weight_sparsity=1.0, activation_sparsity=0.5), X, KERNEL
        ),
        "weight_sparsity",
    )


@pytest.mark.parametrize("strides", [np.int64(2), np.array([2, 2]), [2, np.int32(2)]])
def test_whole_numbers_of_numpy_are_strides(strides):
    found = swat_conv(X, KERNEL, strides=strides, **FINE)
    assert np.array_equal(found, swat_conv(X, KERNEL, strides=2, **FINE))
