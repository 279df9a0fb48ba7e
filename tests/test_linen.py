"""Linen layers: at sparsity 0 the stock layers bit for bit; else SWAT's rules and periods."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.errors import ModifyScopeVariableError

from swat_jax.errors import UsageError
from swat_jax.linen import SwatConv, SwatDense
from tests import oracle
from tests.strategies import Grid


class Stock(NamedTuple):
    """Fields of a stock layer, and an input."""

    fields: dict[str, Any]
    x: tuple[int, ...]
    x_dtype: Any = jnp.float32


CONVS = {
    "plain": Stock({"kernel_size": (3, 3)}, (2, 6, 5, 3)),
    "strided": Stock({"kernel_size": (3, 3), "strides": 2, "padding": "VALID"}, (2, 6, 5, 3)),
    "circular": Stock({"kernel_size": (3, 3), "padding": "CIRCULAR"}, (2, 6, 5, 3)),
    "causal": Stock({"kernel_size": (3,), "padding": "CAUSAL"}, (2, 9, 3)),
    "dilated_groups": Stock(
        {"kernel_size": (3, 3), "feature_group_count": 2, "kernel_dilation": (2, 1)}, (2, 7, 5, 6)
    ),
    "input_dilation": Stock(
        {"kernel_size": (3, 3), "input_dilation": 2, "padding": [(2, 1), 1]}, (2, 4, 3, 3)
    ),
    "more_batch_axes": Stock({"kernel_size": (3, 3)}, (2, 3, 5, 4, 3)),
    "no_batch_axis_or_bias": Stock({"kernel_size": (3, 3), "use_bias": False}, (5, 4, 3)),
    "masked": Stock(
        {"kernel_size": (3, 3), "mask": jnp.tril(jnp.ones((3, 3, 3, 4)))}, (2, 6, 5, 3)
    ),
    "bfloat16": Stock({"kernel_size": (3, 3), "dtype": jnp.bfloat16}, (2, 6, 5, 3)),
}
DENSES = {
    "plain": Stock({}, (3, 5)),
    "more_batch_axes": Stock({}, (2, 3, 5)),
    "no_batch_axis_or_bias": Stock({"use_bias": False}, (5,)),
    "bfloat16": Stock({"dtype": jnp.bfloat16}, (3, 5)),
    "bfloat16_parameters": Stock({"param_dtype": jnp.bfloat16}, (3, 5)),
}


def outputs_and_gradients(layer, variables, x, **call):
    """Output, gradients of parameters and input; the other collections stay as they are."""
    rest = {name: value for name, value in variables.items() if name != "params"}

    @jax.jit
    def run(parameters, x):
        y, back = jax.vjp(lambda p, x: layer.apply({"params": p, **rest}, x, **call), parameters, x)
        weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return y, back(weights.astype(y.dtype))

    return run(variables["params"], x)


def assert_identical(actual, expected):
    """Structure, types and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def check_dense_equivalence(stock_class, swat_class, stock, **sparse):
    fields, shape, dtype = stock
    x = jax.random.normal(jax.random.key(3), shape).astype(dtype)
    dense = stock_class(features=4, **fields)
    swat = swat_class(features=4, **fields, **sparse)
    variables = dense.init(jax.random.key(0), x)
    assert_identical(swat.init(jax.random.key(0), x), variables)
    expected = outputs_and_gradients(dense, variables, x)
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(expected))
    assert_identical(outputs_and_gradients(swat, variables, x), expected)


@pytest.mark.parametrize("name", CONVS)
def test_conv_without_sparsity_is_the_stock_layer(name):
    check_dense_equivalence(nn.Conv, SwatConv, CONVS[name])


@pytest.mark.parametrize("name", DENSES)
def test_dense_without_sparsity_is_the_stock_layer(name):
    check_dense_equivalence(nn.Dense, SwatDense, DENSES[name])


@pytest.mark.parametrize("sparse", [{"granularity": "channel"}, {"deterministic": True}])
def test_no_option_of_sparsity_matters_at_sparsity_zero(sparse):
    check_dense_equivalence(nn.Conv, SwatConv, CONVS["plain"], weight_sparsity=0.0, **sparse)


class Network(nn.Module):
    """Two layers inside a parent, named by Flax or by hand."""

    conv: Any
    dense: Any

    @nn.compact
    def __call__(self, x):
        x = nn.relu(self.conv(4, (3, 3), name="first")(x))
        return self.dense(3, name="last")(x)


def test_parameters_inside_a_network_have_the_stock_names_and_values():
    x = jnp.ones((1, 5, 5, 2))
    swat, stock = Network(SwatConv, SwatDense), Network(nn.Conv, nn.Dense)
    variables = stock.init(jax.random.key(0), x)
    assert_identical(swat.init(jax.random.key(0), x), variables)
    assert_identical(
        outputs_and_gradients(swat, variables, x), outputs_and_gradients(stock, variables, x)
    )


# ---------- SWAT's rules through the layers ----------

X_SHAPE, X_SIZE, K_SIZE = (2, 6, 7, 3), 252, 108


def grid_input(salt=2):
    return jnp.asarray(Grid(1, 16, 0.3).array(X_SHAPE, salt=salt))


def grid_parameters(seed=1):
    grid = Grid(seed, 16, 0.0)
    return {
        "kernel": jnp.asarray(grid.array((3, 3, 3, 4))),
        "bias": jnp.asarray(grid.array((4,), salt=1)),
    }


def conv_layer(**sparse):
    return SwatConv(4, (3, 3), strides=(1, 2), padding="VALID", **sparse)


def step(layer, variables, x, dy, **call):
    """Output, gradients, and the collections that changed."""
    rest = {name: value for name, value in variables.items() if name != "params"}

    def forward(parameters, x):
        y, updates = layer.apply({"params": parameters, **rest}, x, mutable=["thresholds"], **call)
        return y, updates

    y, back, updates = jax.vjp(forward, variables["params"], x, has_aux=True)
    return y, *back(dy), updates


def check_conv_layer(layer, variables, x, call=None, **selection):
    """One call against the oracle, which is told what should be selected; returns the updates."""
    dy = jnp.asarray(Grid(1, 16, 0.0).array((2, 4, 3, 4), salt=3))
    y, dparameters, dx, updates = step(layer, variables, x, dy, **(call or {}))
    expected = oracle.swat_conv(
        np.asarray(x),
        np.asarray(variables["params"]["kernel"]),
        np.asarray(dy),
        strides=(1, 2),
        padding="VALID",
        **selection,
    )
    np.testing.assert_array_equal(y, expected.y + np.asarray(variables["params"]["bias"]))
    np.testing.assert_array_equal(dx, expected.dx)
    np.testing.assert_array_equal(dparameters["kernel"], expected.dkernel)
    np.testing.assert_array_equal(dparameters["bias"], np.asarray(dy).sum((0, 1, 2)))
    return updates


@pytest.mark.parametrize("granularity", ["unstructured", "channel", "filter", "vector8"])
@pytest.mark.parametrize("sparsities", [(0.7, None), (0.9, 0.3)])
def test_conv_layer_matches_the_oracle(granularity, sparsities):
    weight, activation = sparsities
    layer = conv_layer(
        weight_sparsity=weight, activation_sparsity=activation, granularity=granularity
    )
    updates = check_conv_layer(
        layer,
        {"params": grid_parameters()},
        grid_input(),
        granularity=granularity,
        weight_keep=oracle.keep_count(weight, oracle.units((3, 3, 3, 4), granularity)),
        activation_keep=oracle.keep_count(weight if activation is None else activation, X_SIZE),
    )
    assert not updates


def test_dense_layer_matches_the_oracle():
    layer = SwatDense(4, weight_sparsity=0.7, activation_sparsity=0.4)
    grid = Grid(1, 16, 0.3)
    x, kernel = jnp.asarray(grid.array((5, 6))), jnp.asarray(grid.array((6, 4), salt=1))
    dy = jnp.asarray(Grid(1, 16, 0.0).array((5, 4), salt=2))
    variables = {"params": {"kernel": kernel, "bias": jnp.ones(4)}}
    y, dparameters, dx, updates = step(layer, variables, x, dy)
    expected = oracle.swat_linear(
        np.asarray(x), np.asarray(kernel), np.asarray(dy), weight_keep=8, activation_keep=18
    )
    np.testing.assert_array_equal(y, expected.y + 1)
    np.testing.assert_array_equal(dx, expected.dx)
    np.testing.assert_array_equal(dparameters["kernel"], expected.dkernel)
    np.testing.assert_array_equal(dparameters["bias"], np.asarray(dy).sum(0))
    assert not updates


def test_masks_come_from_the_float32_master_weights():
    layer = SwatDense(4, weight_sparsity=0.7, use_bias=False, dtype=jnp.bfloat16)
    kernel = 1 + np.arange(16, dtype=np.float32).reshape(4, 4) * np.float32(2.0**-20)
    y: Any = layer.apply({"params": {"kernel": jnp.asarray(kernel)}}, jnp.eye(4))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(oracle.widen(y), np.arange(16).reshape(4, 4) >= 11)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("how", ["field", "call", "call_over_field"])
def test_evaluation_has_exact_weights_and_dense_activations(how, every):
    field = {"field": {"deterministic": True}}.get(how, {"deterministic": False})
    call: dict[str, Any] = {} if how == "field" else {"deterministic": True}
    layer = conv_layer(weight_sparsity=0.7, threshold_every_steps=every, **field)
    stored = {"weight": jnp.float32(9), "activation": jnp.float32(9), "age": jnp.int32(1)}
    variables = {"params": grid_parameters(), "thresholds": stored}
    updates = check_conv_layer(
        layer, variables, grid_input(), call, weight_keep=33, activation_keep=X_SIZE
    )
    assert_identical(updates.get("thresholds", stored), stored)
    # Nothing is written, so nothing has to be declared mutable.
    layer.apply(variables, grid_input(), **call)


# ---------- Thresholds that are reused ----------


def test_thresholds_are_recomputed_every_so_many_steps_and_used_between():
    layer = conv_layer(weight_sparsity=0.7, threshold_every_steps=3)
    state = layer.init(jax.random.key(0), grid_input())["thresholds"]
    used = {}
    for number in range(7):
        parameters = grid_parameters(number)
        x = grid_input(10 + number) * (1 + number)
        if number % 3 == 0:
            used = {
                "weight_threshold": float(oracle.threshold(np.asarray(parameters["kernel"]), 33)),
                "activation_threshold": float(oracle.threshold(np.asarray(x), 76)),
            }
        variables = {"params": parameters, "thresholds": state}
        state = check_conv_layer(layer, variables, x, **used)["thresholds"]
        assert float(state["weight"]) == used["weight_threshold"]
        assert float(state["activation"]) == used["activation_threshold"]
        assert int(state["age"]) == (number + 1) % 3


@pytest.mark.parametrize(
    ("sparse", "expected"),
    [
        ({"weight_sparsity": 0.5}, set()),
        ({"weight_sparsity": 0.5, "threshold_every_steps": 2}, {"weight", "activation", "age"}),
        (
            {"weight_sparsity": 0.5, "threshold_every_steps": 2, "granularity": "channel"},
            {"activation", "age"},
        ),
        (
            {"weight_sparsity": 0.5, "activation_sparsity": 0.0, "threshold_every_steps": 2},
            {"weight", "age"},
        ),
    ],
)
def test_a_layer_has_only_the_state_that_it_needs(sparse, expected):
    variables: Any = conv_layer(**sparse).init(jax.random.key(0), grid_input())
    assert set(variables["params"]) == {"kernel", "bias"}
    assert set(variables.get("thresholds", {})) == expected
    # Initialising is no training step.
    assert not np.any(jax.tree.leaves(variables.get("thresholds", {})))


def test_training_with_reused_thresholds_must_declare_them_mutable():
    layer = conv_layer(weight_sparsity=0.5, threshold_every_steps=2)
    variables = layer.init(jax.random.key(0), grid_input())
    with pytest.raises(ModifyScopeVariableError, match="thresholds"):
        layer.apply(variables, grid_input())


# ---------- Refusals ----------


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"weight_sparsity": 1.0}, r"weight_sparsity.*\[0, 1\)"),
        ({"weight_sparsity": "x"}, r"weight_sparsity.*'x'"),
        ({"activation_sparsity": -0.1}, r"activation_sparsity.*-0\.1"),
        ({"weight_sparsity": 0.5, "threshold_every_steps": 0}, "threshold_every_steps"),
        ({"granularity": "block"}, r"granularity.*'block'"),
        ({"conv_general_dilated": jax.lax.conv_general_dilated}, "conv_general_dilated"),
    ],
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_conv_refuses_before_anything_runs(options, pattern, deterministic):
    layer = conv_layer(**options, deterministic=deterministic)
    with pytest.raises(UsageError, match=pattern):
        jax.eval_shape(layer.init, jax.random.key(0), grid_input())


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"weight_sparsity": 1.0}, r"weight_sparsity.*\[0, 1\)"),
        ({"activation_sparsity": 1.5}, r"activation_sparsity.*1\.5"),
        ({"dot_general": jax.lax.dot_general}, "dot_general"),
    ],
)
def test_dense_refuses_before_anything_runs(options, pattern):
    with pytest.raises(UsageError, match=pattern):
        jax.eval_shape(SwatDense(4, **options).init, jax.random.key(0), jnp.ones((2, 3)))
