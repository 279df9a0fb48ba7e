"""SWAT in Linen modules that know nothing of it, against the same modules written by hand."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.errors import ScopeParamShapeError

from swat_jax.errors import UsageError
from swat_jax.linen import SwatConv, SwatDense, sparsify
from tests import oracle

SPARSE = {"weight_sparsity": 0.75, "activation_sparsity": 0.5}
X = jax.random.normal(jax.random.key(7), (4, 8, 8, 3))
LABELS = jnp.arange(4) % 5


class Block(nn.Module):
    """Made in ``setup``, in a list; called twice by its parent."""

    conv: Any

    def setup(self):
        self.convs = [self.conv(8, (3, 3), use_bias=False) for _ in range(2)]

    def __call__(self, x):
        for conv in self.convs:
            x = nn.relu(conv(x))
        return x


class Net(nn.Module):
    """Compact and given modules, batch norm, dropout, groups, names by hand and by Flax."""

    conv: Any = nn.Conv
    dense: Any = nn.Dense
    block: Any = Block

    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        block = self.block(self.conv, name="block")
        x = block(block(x))
        x = self.conv(16, (3, 3), strides=2, feature_group_count=2, name="Conv_0")(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x).mean(axis=(1, 2)))
        return self.dense(5, name="Dense_0")(x)


def by_hand(block=Block, deterministic=False, **options):
    """`Net` of SWAT layers: what `sparsify` has to compute."""
    sparse = {**SPARSE, "deterministic": deterministic}
    return Net(
        functools.partial(SwatConv, **sparse, **options),
        functools.partial(SwatDense, **sparse),
        block,
    )


def model_of(module=None, **options):
    sparsities = {"sparsity": 0.75, "activation_sparsity": 0.5, "dense": "stem"}
    return sparsify(Net() if module is None else module, **{**sparsities, **options})


def assert_identical(actual, expected):
    """Structure, types and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


RNGS = {"dropout": jax.random.key(3)}
MUTABLE = ["batch_stats", "thresholds"]


def train(model, variables, steps=3):
    """Losses and variables after a few steps of SGD."""
    transformation = optax.sgd(0.1, momentum=0.9)

    @jax.jit
    def step(variables, state, x):
        rest = {name: value for name, value in variables.items() if name != "params"}

        def loss_of(params):
            logits, changed = model.apply({"params": params, **rest}, x, rngs=RNGS, mutable=MUTABLE)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
            return losses.mean(), changed

        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, changed), grads = gradient(variables["params"])
        updates, state = transformation.update(grads, state)
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, **rest, **changed}, state, loss

    state, losses = transformation.init(variables["params"]), []
    for number in range(steps):
        variables, state, loss = step(variables, state, X * (1 + number))
        losses.append(float(loss))
    return losses, variables


@pytest.fixture(scope="module")
def variables():
    return Net().init({"params": jax.random.key(0), **RNGS}, X)


# ---------- It is the module written by hand ----------


@pytest.mark.parametrize(
    "options", [{}, {"granularity": "channel"}, {"threshold_every_steps": 2}], ids=str
)
def test_it_trains_as_the_module_written_by_hand(options, variables):
    model, hand = model_of(**options), by_hand(**options)
    keys = {"params": jax.random.key(0), **RNGS}
    start = model.init(keys, X)
    assert_identical(start["params"], variables["params"])
    assert_identical(start, hand.init(keys, X))
    losses, after = train(model, start)
    expected, by_hand_after = train(hand, start)
    assert losses == expected
    assert_identical(after, by_hand_after)
    assert losses != train(Net(), variables)[0]
    # Variables of the module itself will do, too.
    assert train(model_of(**options), variables)[0] == expected


def test_the_module_itself_is_as_it_was(variables):
    module = Net()
    before = module.apply(variables, X, train=False)
    model_of(module).apply(variables, X, train=False)
    np.testing.assert_array_equal(module.apply(variables, X, train=False), before)


@pytest.mark.parametrize("transform", [nn.jit, nn.remat], ids=["jit", "remat"])
def test_transformed_modules_compute_the_same_whatever_ran_before(transform):
    block = transform(Block)  # one class, and what `nn.jit` has compiled belongs to it
    module = Net(block=block)
    variables = module.init({"params": jax.random.key(0), **RNGS}, X)

    def output_and_gradient(model):
        def weigh(params):
            y = model.apply({**variables, "params": params}, X, rngs=RNGS, mutable=["batch_stats"])
            return (y[0] ** 2).sum()

        return jax.value_and_grad(weigh)(variables["params"])

    dense = output_and_gradient(module)
    for options in ({}, {"granularity": "filter"}):
        actual = output_and_gradient(model_of(module, **options))
        expected = output_and_gradient(by_hand(block, **options))
        assert_identical(actual, expected)
    assert_identical(output_and_gradient(module), dense)


def test_layers_under_scan_compute_as_each_alone():
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(nn.Dense(6)(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(
                Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return scanned(name="body")(x, None)[0]

    x = jax.random.normal(jax.random.key(1), (5, 6))
    model = sparsify(Stack(), sparsity=0.75, activation_sparsity=0.5)
    variables = model.init(jax.random.key(0), x)
    params = variables["params"]["body"]["Dense_0"]

    def weigh(variables):
        return (model.apply(variables, x) ** 2).sum()

    def weigh_all(params):
        y = x
        for number in range(3):
            own = jax.tree.map(lambda leaf, n=number: leaf[n], params)
            y = nn.relu(SwatDense(6, **SPARSE).apply({"params": own}, y))
        return (y**2).sum()

    grads = jax.grad(weigh)(variables)["params"]["body"]["Dense_0"]
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        grads,
        jax.grad(weigh_all)(params),
    )
    pruned = model.prune(variables)["params"]["body"]["Dense_0"]["kernel"]
    for number in range(3):
        kernel = np.asarray(params["kernel"][number])
        np.testing.assert_array_equal(pruned[number], kernel * oracle.weight_mask(kernel, keep=9))


def test_boxes_around_parameters_stay():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    module = nn.Dense(4, kernel_init=init)
    x = jax.random.normal(jax.random.key(0), (2, 4))
    model = sparsify(module, sparsity=0.75)
    variables = model.init(jax.random.key(0), x)
    assert_identical(variables, module.init(jax.random.key(0), x))
    expected = SwatDense(4, weight_sparsity=0.75).apply(nn.meta.unbox(variables), x)
    np.testing.assert_array_equal(model.apply(variables, x), expected)
    kernel = model.prune(variables)["params"]["kernel"]
    assert kernel.names == (None, "model")
    assert np.count_nonzero(kernel.value) == 4


def test_erk_is_spread_over_what_the_call_reaches(variables):
    model = model_of(distribution="erk", dense=(), overrides={"Dense_0": 0.5})
    model.apply(variables, X, train=False)
    found = model.per_layer()
    shapes = {
        "stem": (3, 3, 3, 8), "block/convs_0": (3, 3, 8, 8), "block/convs_1": (3, 3, 8, 8),
        "Conv_0": (3, 3, 4, 16),
    }  # fmt: skip
    assert found["Dense_0"].weight_sparsity == 0.5
    sizes = {path: np.prod(shape) for path, shape in shapes.items()}
    kept = sum(
        size * (1 - found[path].weight_sparsity if path in found else 1)
        for path, size in sizes.items()
    )
    assert kept == pytest.approx(0.25 * sum(sizes.values()))


# ---------- Evaluation and pruning ----------


@pytest.mark.newest
@pytest.mark.parametrize("every", [1, 2])
def test_evaluation_is_what_the_module_computes_with_pruned_weights(every):
    model = model_of(threshold_every_steps=every)
    variables = train(model, model.init({"params": jax.random.key(0), **RNGS}, X))[1]
    evaluated = model.eval().apply(variables, X, train=False)
    pruned = model.prune(variables)
    assert set(pruned) == {"params", "batch_stats"}
    np.testing.assert_array_equal(Net().apply(pruned, X, train=False), evaluated)
    kernel = np.asarray(variables["params"]["Conv_0"]["kernel"])
    mask = oracle.weight_mask(kernel, keep=kernel.size // 4)
    np.testing.assert_array_equal(pruned["params"]["Conv_0"]["kernel"], kernel * mask)
    np.testing.assert_array_equal(
        pruned["params"]["stem"]["kernel"], variables["params"]["stem"]["kernel"]
    )
    # Activations are dense, so gradients are those of a dense module with these weights.
    assert model.eval().train().deterministic is False


def test_gradients_in_evaluation_mode_have_dense_activations(variables):
    def weigh(model, params):
        y = model.apply({**variables, "params": params}, X, train=False)
        return (y**2).sum()

    model = model_of()
    actual = jax.grad(lambda params: weigh(model.eval(), params))(variables["params"])
    hand = by_hand(deterministic=True)
    assert_identical(actual, jax.grad(lambda params: weigh(hand, params))(variables["params"]))


# ---------- What can be asked of apply ----------


@pytest.mark.parametrize("mutable", [False, True, "batch_stats", ["batch_stats"], []])
def test_what_is_mutable_comes_back_as_from_the_module(mutable, variables):
    call = {"rngs": RNGS, "mutable": mutable, "train": mutable is not False and mutable != []}
    model, hand = model_of(), by_hand()
    assert_identical(model.apply(variables, X, **call), hand.apply(variables, X, **call))


def test_intermediates_and_output_of_init(variables):
    model, hand = model_of(), by_hand()
    call = {"train": False, "mutable": ["intermediates"], "capture_intermediates": True}
    _, one = model.apply(variables, X, **call)
    assert "Conv_0" in one["intermediates"]
    output, made = model.init_with_output({"params": jax.random.key(0), **RNGS}, X)
    expected, hand_made = hand.init_with_output({"params": jax.random.key(0), **RNGS}, X)
    assert_identical((output, made), (expected, hand_made))


class TwoWays(nn.Module):
    def setup(self):
        self.one, self.two = nn.Dense(4), nn.Dense(4)

    def __call__(self, x):
        return self.two(self.one(x))

    def half(self, x):
        return self.one(x)


def test_a_method_may_reach_a_part_but_not_more_than_was_planned():
    x = jnp.ones((2, 4))
    variables = TwoWays().init(jax.random.key(0), x)
    model = sparsify(TwoWays(), sparsity=0.5)
    model.init(jax.random.key(0), x)
    half = SwatDense(4, weight_sparsity=0.5).apply({"params": variables["params"]["one"]}, x)
    np.testing.assert_array_equal(model.apply(variables, x, method="half"), half)
    short = sparsify(TwoWays(), sparsity=0.5)
    short.apply(variables, x, method=TwoWays.half)
    with pytest.raises(UsageError, match="the layer two has no share"):
        short.apply(variables, x)


# ---------- What cannot be a SWAT layer ----------


class Shifted(nn.Conv):
    @nn.compact
    def __call__(self, inputs):
        return super().__call__(inputs - 1)


class Renamed(nn.Dense):
    """A subclass that leaves the call to Flax."""


def double(*args, **kwargs):
    return 2 * jax.lax.dot_general(*args, **kwargs)


REFUSED = {
    "transposed": (nn.ConvTranspose(4, (3,)), "ConvTranspose has no SWAT form"),
    "local": (nn.ConvLocal(4, (3,)), "ConvLocal has no SWAT form"),
    "general": (nn.DenseGeneral(4), "DenseGeneral has no SWAT form"),
    "einsum": (nn.Einsum((4, 4), "abc,cd->abd"), "Einsum has no SWAT form"),
    "own_call": (Shifted(4, (3,)), "Shifted has a __call__ of its own"),
    "own_product": (nn.Dense(4, dot_general=double), "it has a dot_general of its own"),
    "own_product_class": (
        nn.Dense(4, dot_general_cls=lambda: double), "it has a dot_general_cls of its own",
    ),
    "masked": (nn.Conv(4, (3,), mask=jnp.ones((3, 4, 4))), "it has a mask of its own"),
    "normed": (nn.WeightNorm(nn.Dense(4)), "WeightNorm changes its kernel"),
}  # fmt: skip


class Two(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="last")(self.layer(x))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sparse_stays_and_is_named_with_the_reason(name):
    layer, reason = REFUSED[name]
    x = jax.random.normal(jax.random.key(0), (2, 6, 4))
    model = sparsify(Two(layer), sparsity=0.5)
    with pytest.warns(UserWarning, match="left as they are: layer") as told:
        variables = model.init(jax.random.key(0), x)
    assert len(told) == 1
    assert reason in str(told[0].message)
    assert set(model.per_layer()) == {"last"}
    between = layer.apply(
        {name: value["layer"] for name, value in variables.items() if "layer" in value}
        if name != "normed"
        else {"params": variables["params"]["layer"]},
        x,
    )
    own = {"params": variables["params"]["last"]}
    expected = SwatDense(4, weight_sparsity=0.5).apply(own, between)
    np.testing.assert_array_equal(model.apply(variables, x), expected)
    with pytest.raises(UsageError, match="no layer that can be sparse"):
        sparsify(layer, sparsity=0.5).init(jax.random.key(0), x)


def test_subclasses_that_leave_the_call_to_flax_are_sparse():
    model = sparsify(Renamed(4), sparsity=0.5)
    x = jax.random.normal(jax.random.key(0), (2, 4))
    variables = model.init(jax.random.key(0), x)
    expected = SwatDense(4, weight_sparsity=0.5).apply(variables, x)
    np.testing.assert_array_equal(model.apply(variables, x), expected)
    assert list(model.per_layer()) == [""]
    assert np.count_nonzero(model.prune(variables)["params"]["kernel"]) == 8


def test_layers_that_are_sparse_already_are_left_alone_without_a_word():
    module = nn.Sequential([SwatDense(4, weight_sparsity=0.25), nn.Dense(4)])
    x = jax.random.normal(jax.random.key(0), (2, 4))
    model = sparsify(module, sparsity=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        variables = model.init(jax.random.key(0), x)
    assert list(model.per_layer()) == ["layers_1"]
    hand = nn.Sequential([SwatDense(4, weight_sparsity=0.25), SwatDense(4, weight_sparsity=0.5)])
    np.testing.assert_array_equal(model.apply(variables, x), hand.apply(variables, x))


def test_a_layer_is_given_back_its_product_when_the_call_fails():
    class Failing(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(4)
            y = layer(x)
            with pytest.raises(ScopeParamShapeError):
                layer(x[:, :2])
            assert layer.dot_general is None
            assert layer.promote_dtype is stock
            return y

    stock = nn.Dense(4).promote_dtype
    sparsify(Failing(), sparsity=0.5).init(jax.random.key(0), jnp.ones((2, 4)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"distribution": "momentum"}, "must be uniform or erk for Linen modules, got 'momentum'"),
        ({"sparsity": 1}, "sparsity must be"),
        ({"dense": "stm"}, "did you mean 'stem'"),
        ({"overrides": {"block": 0.5}}, r"did you mean 'block/\*\*'"),
        ({"filter": lambda path, layer: False}, "filter takes none"),
    ],
)
def test_bad_requests_are_refused(options, words, variables):
    with pytest.raises(UsageError, match=words):
        model_of(**options).apply(variables, X, train=False)


def test_what_is_not_known_yet_is_said(variables):
    for ask in (lambda model: model.per_layer(), lambda model: model.prune(variables)):
        with pytest.raises(UsageError, match="call one of them first"):
            ask(model_of())
    with pytest.raises(UsageError, match="no layer that could be sparse"):
        sparsify(nn.Dropout(0.5, deterministic=True), sparsity=0.5).init(jax.random.key(0), X)


class Layered(nn.Module):
    """Two convolutions that are one, repeated."""

    carried: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        class Body(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.Conv(4, (3, 3))(x), None

        axes = dict.fromkeys(self.carried, 0)
        scanned = nn.scan(Body, variable_axes=axes, split_rngs={"params": True}, length=2)
        return scanned()(x, None)[0]


def test_thresholds_of_a_scanned_layer_need_its_collection():
    x = jnp.ones((1, 8, 8, 4))
    for carried in (("params",), ("params", "thresholds")):
        model = sparsify(Layered(carried), sparsity=0.75, threshold_every_steps=3)
        if "thresholds" not in carried:
            with pytest.raises(UsageError, match="does not carry the collection 'thresholds'"):
                model.init(jax.random.key(0), x)
        else:
            variables = model.init(jax.random.key(0), x)
            assert jax.tree.leaves(variables["thresholds"])[0].shape == (2,)
