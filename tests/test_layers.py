"""NNX layers: at sparsity 0 the stock layers bit for bit; else SWAT's rules and periods."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swat_jax.activations import Activation
from swat_jax.errors import UsageError
from swat_jax.kernels import choice
from swat_jax.layer_state import (
    ActivationThreshold,
    MeasuredSparsity,
    Threshold,
    ThresholdAge,
    WeightBudget,
    WeightThreshold,
)
from swat_jax.layers import SwatConv, SwatLinear
from swat_jax.norm_relu import BatchNormRelu, apply, branch
from tests import oracle
from tests.strategies import Grid

# ---------- Dense equivalence ----------


class Stock(NamedTuple):
    """Arguments of a stock layer, and an input."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    x: tuple[int, ...]
    x_dtype: Any = jnp.float32


def lower_triangle(shape):
    return jnp.tril(jnp.ones(shape))


CONVS = {
    "plain": Stock((3, 4, (3, 3)), {}, (2, 6, 5, 3)),
    "strided": Stock((3, 4, (3, 3)), {"strides": 2, "padding": "VALID"}, (2, 6, 5, 3)),
    "circular": Stock((3, 4, (3, 3)), {"padding": "CIRCULAR", "strides": (1, 2)}, (2, 6, 5, 3)),
    "reflect_without_bias": Stock(
        (3, 4, (3, 3)), {"padding": "REFLECT", "use_bias": False}, (2, 6, 5, 3)
    ),
    "causal": Stock((3, 4, 3), {"padding": "CAUSAL", "kernel_dilation": 2}, (2, 9, 3)),
    "padded": Stock((3, 4, 3), {"padding": 1, "strides": None}, (2, 9, 3)),
    "padded_by_axis": Stock((3, 4, (3, 3)), {"padding": [1, (0, 2)]}, (2, 6, 5, 3)),
    "dilated_groups": Stock(
        (6, 4, (3, 3)), {"feature_group_count": 2, "kernel_dilation": (2, 1)}, (2, 7, 5, 6)
    ),
    "input_dilation": Stock(
        (3, 4, (3, 3)), {"input_dilation": 2, "padding": [(2, 1), (1, 2)]}, (2, 4, 3, 3)
    ),
    "more_batch_axes": Stock((3, 4, (3, 3)), {}, (2, 3, 5, 4, 3)),
    "no_batch_axis": Stock((3, 4, (3, 3)), {}, (5, 4, 3)),
    "masked": Stock((3, 4, (3, 3)), {"mask": lower_triangle((3, 3, 3, 4))}, (2, 6, 5, 3)),
    "three_axes": Stock((2, 3, (2, 3, 2)), {"strides": (1, 2, 1)}, (1, 4, 5, 3, 2)),
    "initialised": Stock(
        (3, 4, (3, 3)),
        {"kernel_init": nnx.initializers.normal(), "bias_init": nnx.initializers.ones_init()},
        (2, 6, 5, 3),
    ),
    "bfloat16": Stock((3, 4, (3, 3)), {"dtype": jnp.bfloat16}, (2, 6, 5, 3)),
    "bfloat16_parameters": Stock((3, 4, (3, 3)), {"param_dtype": jnp.bfloat16}, (2, 6, 5, 3)),
    "bfloat16_input": Stock((3, 4, (3, 3)), {}, (2, 6, 5, 3), jnp.bfloat16),
    "float32_result": Stock(
        (3, 4, (3, 3)),
        {
            "dtype": jnp.bfloat16,
            "preferred_element_type": jnp.float32,
            "precision": jax.lax.Precision.HIGHEST,
        },
        (2, 6, 5, 3),
    ),
}
LINEARS = {
    "plain": Stock((5, 4), {}, (3, 5)),
    "more_batch_axes": Stock((5, 4), {}, (2, 3, 5)),
    "no_batch_axis": Stock((5, 4), {}, (5,)),
    "without_bias": Stock((5, 4), {"use_bias": False}, (3, 5)),
    "initialised": Stock((5, 4), {"kernel_init": nnx.initializers.ones_init()}, (3, 5)),
    "bfloat16": Stock((5, 4), {"dtype": jnp.bfloat16}, (3, 5)),
    "bfloat16_parameters": Stock((5, 4), {"param_dtype": jnp.bfloat16}, (3, 5)),
    "float32_result": Stock(
        (5, 4), {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32}, (3, 5)
    ),
}


def outputs_and_gradients(layer, x):
    """Output, gradient of the input, and gradients of the parameters by name."""
    definition, parameters, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def run(parameters, x):
        def forward(parameters, x):
            return nnx.merge(definition, parameters, rest, copy=True)(x)

        y, back = jax.vjp(forward, parameters, x)
        weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        return y, back(weights.astype(y.dtype))

    y, (dparameters, dx) = run(parameters, x)
    return y, dx, nnx.to_pure_dict(dparameters)


def assert_identical(actual, expected):
    """Structure, types and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def parameters_of(layer):
    return nnx.to_pure_dict(nnx.state(layer, nnx.Param))


def check_dense_equivalence(stock_class, swat_class, stock, **sparse):
    arguments, options, shape, dtype = stock
    x = jax.random.normal(jax.random.key(3), shape).astype(dtype)
    dense = stock_class(*arguments, **options, rngs=nnx.Rngs(0))
    swat = swat_class(*arguments, **options, **sparse, rngs=nnx.Rngs(0))
    assert isinstance(swat, stock_class)
    assert_identical(parameters_of(swat), parameters_of(dense))
    expected = outputs_and_gradients(dense, x)
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(expected))
    assert_identical(outputs_and_gradients(swat, x), expected)


@pytest.mark.parametrize("name", CONVS)
def test_conv_without_sparsity_is_the_stock_layer(name):
    check_dense_equivalence(nnx.Conv, SwatConv, CONVS[name])


@pytest.mark.parametrize("name", LINEARS)
def test_linear_without_sparsity_is_the_stock_layer(name):
    check_dense_equivalence(nnx.Linear, SwatLinear, LINEARS[name])


@pytest.mark.parametrize(
    "sparse",
    [
        {"granularity": "channel"},
        {"granularity": "filter", "threshold_every_steps": 3},
        {"threshold_every_steps": 3},
    ],
)
def test_no_option_of_sparsity_matters_at_sparsity_zero(sparse):
    check_dense_equivalence(nnx.Conv, SwatConv, CONVS["plain"], weight_sparsity=0.0, **sparse)
    layer = SwatConv(3, 4, (3, 3), **sparse, rngs=nnx.Rngs(0))
    assert not jax.tree.leaves(nnx.state(layer, Threshold))


def test_evaluation_without_sparsity_is_the_stock_layer():
    x = jax.random.normal(jax.random.key(3), (2, 6, 5, 3))
    dense, swat = (c(3, 4, (3, 3), rngs=nnx.Rngs(0)) for c in (nnx.Conv, SwatConv))
    expected = outputs_and_gradients(dense, x)
    assert_identical(jax.jit(swat)(x), expected[0])
    swat.eval()
    assert_identical(outputs_and_gradients(swat, x), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_bias_before_a_batch_norm_gets_no_gradient_in_training(training, use_bias):
    conv = SwatConv(3, 4, (3, 3), use_bias=use_bias, weight_sparsity=0.5, rngs=nnx.Rngs(0))
    norm = BatchNormRelu(4, rngs=nnx.Rngs(1))
    model = nnx.List([conv, norm])
    for layer in model:
        layer.train() if training else layer.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    x = jax.random.normal(jax.random.key(2), (2, 6, 6, 3))

    def loss(params, *norms):
        conv, norm = nnx.merge(graph, params, rest, copy=True)
        y = norm(apply(conv, Activation(x), *(norm for _ in norms)), dense=True).dense
        return jnp.sum(jnp.sin(3 * y))

    found, wanted = jax.grad(loss)(params, None), jax.grad(loss)(params)
    for (path, one), other in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):
        largest = np.abs(other).max()
        is_bias = "'bias'" in jax.tree_util.keystr(path) and "[0]" in jax.tree_util.keystr(path)
        if is_bias and training:
            assert not one.any()
            assert largest < 1e-4  # zero but for rounding
        else:
            assert largest > 1e-3
            np.testing.assert_array_equal(one, other)


# ---------- SWAT's rules through the layers ----------


def held(variable: nnx.Variable | None) -> nnx.Variable:
    """A variable that the layer must have."""
    assert variable is not None
    return variable


def on_grid(layer, seed=1):
    """Gives a layer weights and a bias whose sums are exact."""
    grid = Grid(seed, 16, 0.0)
    layer.kernel[...] = jnp.asarray(grid.array(layer.kernel.shape))
    if layer.bias is not None:
        held(layer.bias)[...] = jnp.asarray(grid.array(layer.bias.shape, salt=1))
    return layer


def grid_input(shape, salt=2):
    return jnp.asarray(Grid(1, 16, 0.3).array(shape, salt=salt))


def vjp(layer, x):
    """Output and a function from dy to (dx, dkernel, dbias); the layer's state moves on."""
    definition, parameters, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def run(parameters, rest, x, dy):
        def forward(parameters, x):
            model = nnx.merge(definition, parameters, rest, copy=True)
            y = model(x)
            return y, nnx.state(model, nnx.Not(nnx.Param))

        y, back, state = jax.vjp(forward, parameters, x, has_aux=True)
        dparameters, dx = back(dy)
        return y, dx, dparameters, state

    shape = jax.eval_shape(lambda x: nnx.merge(definition, parameters, rest, copy=True)(x), x)
    dy = jnp.asarray(Grid(1, 16, 0.0).array(shape.shape, salt=3)).astype(shape.dtype)
    y, dx, dparameters, state = run(parameters, rest, x, dy)
    nnx.update(layer, state)
    return dy, y, dx, nnx.to_pure_dict(dparameters)


def check_conv_layer(layer, x, **selection):
    """One call against the oracle, which is told what should be selected."""
    kernel = np.asarray(layer.kernel[...])
    dy, y, dx, dparameters = vjp(layer, x)
    expected = oracle.swat_conv(
        np.asarray(x), kernel, np.asarray(dy), strides=(1, 2), padding="VALID", **selection
    )
    np.testing.assert_array_equal(y, expected.y + np.asarray(held(layer.bias)[...]))
    np.testing.assert_array_equal(dx, expected.dx)
    np.testing.assert_array_equal(dparameters["kernel"], expected.dkernel)
    np.testing.assert_array_equal(dparameters["bias"], np.asarray(dy).sum((0, 1, 2)))


def conv_layer(**sparse):
    return on_grid(
        SwatConv(3, 4, (3, 3), strides=(1, 2), padding="VALID", **sparse, rngs=nnx.Rngs(0))
    )


X_SHAPE, X_SIZE, K_SIZE = (2, 6, 7, 3), 252, 108


@pytest.mark.parametrize("granularity", ["unstructured", "channel", "filter", "vector8"])
@pytest.mark.parametrize("sparsities", [(0.7, None), (0.9, 0.3), (0.0, 0.8)])
def test_conv_layer_matches_the_oracle(granularity, sparsities):
    weight, activation = sparsities
    layer = conv_layer(
        weight_sparsity=weight, activation_sparsity=activation, granularity=granularity
    )
    check_conv_layer(
        layer,
        grid_input(X_SHAPE),
        granularity=granularity,
        weight_keep=oracle.keep_count(weight, oracle.units((3, 3, 3, 4), granularity)),
        activation_keep=oracle.keep_count(weight if activation is None else activation, X_SIZE),
    )


def test_linear_layer_matches_the_oracle():
    layer = on_grid(
        SwatLinear(6, 4, weight_sparsity=0.7, activation_sparsity=0.4, rngs=nnx.Rngs(0))
    )
    x = grid_input((5, 6))
    dy, y, dx, dparameters = vjp(layer, x)
    expected = oracle.swat_linear(
        np.asarray(x),
        np.asarray(layer.kernel[...]),
        np.asarray(dy),
        weight_keep=oracle.keep_count(0.7, 24),
        activation_keep=oracle.keep_count(0.4, 30),
    )
    np.testing.assert_array_equal(y, expected.y + np.asarray(held(layer.bias)[...]))
    np.testing.assert_array_equal(dx, expected.dx)
    np.testing.assert_array_equal(dparameters["kernel"], expected.dkernel)
    np.testing.assert_array_equal(dparameters["bias"], np.asarray(dy).sum(0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: SwatLinear(4, 4, use_bias=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
        lambda: SwatConv(4, 4, 1, use_bias=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
    ],
)
def test_masks_come_from_the_float32_master_weights(make):
    """All weights are 1 in bfloat16, and all different in float32: there are no ties."""
    layer = make()
    layer.set_sparsity(weight_sparsity=0.7, activation_sparsity=0.0)
    kernel = 1 + np.arange(16, dtype=np.float32).reshape(4, 4) * np.float32(2.0**-20)
    layer.kernel[...] = jnp.asarray(kernel).reshape(layer.kernel.shape)
    y = layer(jnp.eye(4))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(oracle.widen(y), np.arange(16).reshape(4, 4) >= 11)
    assert layer.kernel[...].dtype == jnp.float32


def test_evaluation_has_exact_weights_and_dense_activations():
    layer = conv_layer(weight_sparsity=0.7, activation_sparsity=0.9)
    layer.eval()
    check_conv_layer(
        layer,
        grid_input(X_SHAPE),
        weight_keep=oracle.keep_count(0.7, K_SIZE),
        activation_keep=X_SIZE,
    )


def test_train_and_eval_reach_layers_inside_models():
    layers = [
        SwatConv(3, 4, (3, 3), weight_sparsity=0.5, rngs=nnx.Rngs(0)),
        SwatLinear(4, 2, weight_sparsity=0.5, rngs=nnx.Rngs(0)),
    ]
    model = nnx.Sequential(*layers)
    for mode, expected in [(model.eval, True), (model.train, False)]:
        mode()
        assert [layer.deterministic for layer in layers] == [expected] * 2


# ---------- Thresholds that are reused ----------


def thresholds_of(layer):
    return {
        name: float(getattr(layer, name)[...])
        for name in ("weight_threshold", "activation_threshold")
    }


def exact_limits(layer, x, weight_keep=33, activation_keep=76):
    return {
        "weight_threshold": float(oracle.threshold(np.asarray(layer.kernel[...]), weight_keep)),
        "activation_threshold": float(oracle.threshold(np.asarray(x), activation_keep)),
    }


def test_thresholds_are_recomputed_every_so_many_steps_and_used_between():
    layer = conv_layer(weight_sparsity=0.7, threshold_every_steps=3)
    used = {}
    for step in range(8):
        x = grid_input(X_SHAPE, salt=10 + step) * (1 + step)
        layer.kernel[...] = layer.kernel[...] + jnp.asarray(
            Grid(step, 16, 0.5).array(layer.kernel.shape)
        )
        if step % 3 == 0:
            used = exact_limits(layer, x)
        check_conv_layer(layer, x, **used)
        assert thresholds_of(layer) == used
        assert int(held(layer.threshold_age)[...]) == (step + 1) % 3


def test_evaluation_touches_no_state_and_recomputes():
    layer = conv_layer(weight_sparsity=0.7, threshold_every_steps=5)
    layer(grid_input(X_SHAPE))
    layer.kernel[...] = layer.kernel[...] * 2
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer)))
    layer.eval()
    check_conv_layer(layer, 4 * grid_input(X_SHAPE), weight_keep=33, activation_keep=X_SIZE)
    assert_identical(jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer))), before)
    layer.train()
    x = grid_input(X_SHAPE, salt=7)
    check_conv_layer(layer, x, **thresholds_of(layer))
    assert int(held(layer.threshold_age)[...]) == 2


def test_a_reset_age_refreshes_at_the_next_step():
    layer = conv_layer(weight_sparsity=0.7, threshold_every_steps=5)
    for salt in (3, 4):
        layer(grid_input(X_SHAPE, salt=salt))
    held(layer.threshold_age)[...] = jnp.int32(0)
    x = 3 * grid_input(X_SHAPE, salt=5)
    layer(x)
    assert thresholds_of(layer) == exact_limits(layer, x)


STATE = {
    "exact": ({"weight_sparsity": 0.5}, set()),
    "reused": (
        {"weight_sparsity": 0.5, "threshold_every_steps": 2},
        {WeightThreshold, ActivationThreshold, ThresholdAge},
    ),
    "dense_activations": (
        {"weight_sparsity": 0.5, "activation_sparsity": 0.0, "threshold_every_steps": 2},
        {WeightThreshold, ThresholdAge},
    ),
    "dense_weights": (
        {"weight_sparsity": 0.0, "activation_sparsity": 0.5, "threshold_every_steps": 2},
        {ActivationThreshold, ThresholdAge},
    ),
    "channel": (
        {"weight_sparsity": 0.5, "threshold_every_steps": 2, "granularity": "channel"},
        {ActivationThreshold, ThresholdAge},
    ),
    "filter": (
        {"weight_sparsity": 0.5, "threshold_every_steps": 2, "granularity": "filter"},
        {ActivationThreshold, ThresholdAge},
    ),
}


@pytest.mark.parametrize("name", STATE)
def test_a_layer_has_only_the_state_that_it_needs(name):
    sparse, expected = STATE[name]
    layer = conv_layer(**sparse)
    variables = nnx.state(layer, nnx.Not(nnx.Param))
    kinds = {
        variable.type
        for _, variable in jax.tree.leaves_with_path(
            variables, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
        )
    }
    assert kinds == expected
    assert set(parameters_of(layer)) == {"kernel", "bias"}


def test_channel_masks_are_exact_between_refreshes():
    layer = conv_layer(weight_sparsity=0.5, threshold_every_steps=4, granularity="channel")
    x = grid_input(X_SHAPE)
    limit = float(oracle.threshold(np.asarray(x), X_SIZE // 2))
    for step in range(3):
        layer.kernel[...] = jnp.asarray(Grid(step, 16, 0.2).array(layer.kernel.shape))
        check_conv_layer(
            layer, x * 2**-step, granularity="channel", weight_keep=6, activation_threshold=limit
        )


def test_linear_layers_are_exact_whatever_the_period():
    layer = SwatLinear(6, 4, weight_sparsity=0.5, threshold_every_steps=4, rngs=nnx.Rngs(0))
    assert not jax.tree.leaves(nnx.state(layer, nnx.Not(nnx.Param)))
    x = jnp.eye(6)
    for seed in range(3):
        on_grid(layer, seed)
        masked = np.asarray(layer(x) - held(layer.bias)[...])
        kernel = np.asarray(layer.kernel[...])
        np.testing.assert_array_equal(masked, np.where(oracle.top_mask(kernel, 12), kernel, 0))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_a_stored_threshold_holds_the_input_s_exactly(dtype):
    """The K-th value itself survives at the refresh step, whatever the input's type."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4, 9, 2)).astype(jnp.dtype(dtype))
    with jax.enable_x64(True):
        x = jnp.asarray(values)
        layers = [
            SwatConv(2, 3, 3, weight_sparsity=0.5, threshold_every_steps=every, rngs=nnx.Rngs(0))
            for every in (1, 2)
        ]
        gradient = nnx.jit(nnx.grad(lambda layer, x: jnp.sum(layer(x).astype(jnp.float32))))
        gradients = [gradient(layer, x) for layer in layers]
        exact, reused = (np.asarray(gradient.kernel[...]) for gradient in gradients)
    np.testing.assert_array_equal(reused, exact)


# ---------- Budgets that change ----------


def test_a_dynamic_budget_sets_weights_and_activations_without_compiling_again():
    layer = conv_layer()
    layer.set_sparsity(weight_sparsity=0.9, activation_sparsity=0.9, dynamic_budget=True)
    assert int(held(layer.weight_budget)[...]) == oracle.keep_count(0.9, K_SIZE)
    x = grid_input(X_SHAPE)
    for keep in (11, 50, K_SIZE):
        held(layer.weight_budget)[...] = jnp.int32(keep)
        check_conv_layer(layer, x, weight_keep=keep, activation_keep=-(-keep * X_SIZE // K_SIZE))
    definition, _, rest = nnx.split(layer, WeightBudget, ...)
    traces = []

    @jax.jit
    def run(budget, x):
        traces.append(1)
        return nnx.merge(definition, budget, rest, copy=True)(x)

    for keep in (11, 50):
        held(layer.weight_budget)[...] = jnp.int32(keep)
        run(nnx.state(layer, WeightBudget), x)
    assert len(traces) == 1


def test_a_new_budget_takes_effect_at_the_next_refresh():
    layer = conv_layer()
    layer.set_sparsity(
        weight_sparsity=0.7, activation_sparsity=0.7, threshold_every_steps=2, dynamic_budget=True
    )
    x = grid_input(X_SHAPE)
    check_conv_layer(layer, x, **exact_limits(layer, x))
    first = thresholds_of(layer)
    held(layer.weight_budget)[...] = jnp.int32(10)
    check_conv_layer(layer, x, **first)
    new = exact_limits(layer, x, 10, -(-10 * X_SIZE // K_SIZE))
    check_conv_layer(layer, x, **new)
    assert thresholds_of(layer) == new != first
    layer.eval()
    check_conv_layer(layer, x, weight_keep=10, activation_keep=X_SIZE)


def test_set_sparsity_makes_and_drops_state():
    layer = conv_layer(weight_sparsity=0.5, threshold_every_steps=2)
    layer.set_sparsity(weight_sparsity=0.8, activation_sparsity=0.5)
    assert not jax.tree.leaves(nnx.state(layer, nnx.Not(nnx.Param)))
    check_conv_layer(
        layer,
        grid_input(X_SHAPE),
        weight_keep=oracle.keep_count(0.8, K_SIZE),
        activation_keep=X_SIZE // 2,
    )


def test_measured_sparsity_counts_zeros_of_weights_and_saved_input():
    layer = conv_layer(weight_sparsity=0.7, activation_sparsity=0.9, threshold_every_steps=2)
    layer.measure = True
    x = grid_input(X_SHAPE)
    for scale in (1, 4):
        limits = exact_limits(layer, x, 33, 26)
        layer(x * scale)
        weights = oracle.mask(np.asarray(layer.kernel[...]), limits["weight_threshold"])
        inputs = oracle.mask(np.asarray(x * scale), limits["activation_threshold"])
        (measured,) = jax.tree.leaves(nnx.state(layer, MeasuredSparsity))
        np.testing.assert_allclose(measured, [1 - weights.mean(), 1 - inputs.mean(), 0], atol=1e-6)


def test_measured_are_values_that_found_no_room():
    layer = conv_layer(weight_sparsity=0.7, activation_sparsity=0.9, pack=True)
    layer.measure = True
    x = jnp.ones(X_SHAPE)  # all of them equal the threshold
    layer(x)
    (measured,) = jax.tree.leaves(nnx.state(layer, MeasuredSparsity))
    assert measured[2] == x.size - layer.activation_capacity(x.size)


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("keep", [1, K_SIZE // 2, K_SIZE])
def test_a_budget_never_outgrows_its_room(announced, keep):
    layer = conv_layer(pack=True)
    layer.set_sparsity(weight_sparsity=0.9, activation_sparsity=0.9, dynamic_budget=True)
    layer.measure = True
    held(layer.weight_budget)[...] = jnp.int32(keep)
    x = jax.random.normal(jax.random.key(0), X_SHAPE)
    layer(branch(x, readers=[layer]).readers[0] if announced else x)
    (measured,) = jax.tree.leaves(nnx.state(layer, MeasuredSparsity))
    kept = -(-keep * x.size // K_SIZE)
    np.testing.assert_allclose(measured[1:], [1 - kept / x.size, 0], atol=1e-6)


@pytest.mark.parametrize("made_by", ["norm", "branch", "the layer"])
def test_what_is_measured_has_no_gradient(made_by, monkeypatch):
    """Kernels have none: on a GPU the gradient of a layer that measures would end in an error."""
    layer = conv_layer(weight_sparsity=0.7, activation_sparsity=0.9, pack=True)
    norm = BatchNormRelu(X_SHAPE[-1], rngs=nnx.Rngs(1))

    def loss(layer, norm, x):
        if made_by == "norm":
            x = norm(x, readers=[layer]).readers[0]
        elif made_by == "branch":
            x = branch(x, readers=[layer]).readers[0]
        return jnp.sum(layer(x) ** 2)

    def gradients():
        x = jax.random.normal(jax.random.key(0), X_SHAPE)
        return jax.tree.leaves(nnx.jit(nnx.grad(loss, argnums=(0, 2)))(layer, norm, x))

    expected = gradients()
    monkeypatch.setattr(choice, "has_kernel", lambda *_: True)  # traced, and not run on a CPU
    layer.measure = True
    for found, wanted in zip(gradients(), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert jax.tree.leaves(nnx.state(layer, MeasuredSparsity))


# ---------- Refusals ----------


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"weight_sparsity": 1.0}, r"weight_sparsity.*\[0, 1\)"),
        ({"weight_sparsity": -0.1}, r"weight_sparsity.*-0\.1"),
        ({"weight_sparsity": "x"}, r"weight_sparsity.*'x'"),
        ({"activation_sparsity": 1.0}, r"activation_sparsity.*\[0, 1\)"),
        ({"threshold_every_steps": 0}, "threshold_every_steps"),
        ({"threshold_every_steps": 1.5}, "threshold_every_steps"),
    ],
)
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_layers_refuse_when_they_are_made(kind, options, pattern):
    make = functools.partial(SwatConv, 3, 4, (3, 3)) if kind == "conv" else None
    make = make or functools.partial(SwatLinear, 3, 4)
    with pytest.raises(UsageError, match=pattern):
        make(**options, rngs=nnx.Rngs(0))


def test_layers_refuse_what_would_replace_their_product():
    with pytest.raises(UsageError, match=r"granularity.*channel.*'block'"):
        SwatConv(3, 4, (3, 3), granularity="block", rngs=nnx.Rngs(0))
    with pytest.raises(UsageError, match="conv_general_dilated"):
        SwatConv(3, 4, (3, 3), conv_general_dilated=jax.lax.conv_general_dilated, rngs=nnx.Rngs(0))
    with pytest.raises(UsageError, match="dot_general"):
        SwatLinear(3, 4, dot_general=jax.lax.dot_general, rngs=nnx.Rngs(0))
    with pytest.raises(UsageError, match="out_sharding"):
        SwatLinear(3, 4, rngs=nnx.Rngs(0))(
            jnp.ones((2, 3)), out_sharding=jax.sharding.PartitionSpec("data")
        )
