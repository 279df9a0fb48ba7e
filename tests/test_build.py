"""Networks with the sparsity of their config; every row is built, and training steps are traced."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from swat_jax import (
    build,
    config_file,
    data_parallel,
    flops,
    layer_table,
    listing,
    models,
    training_setup,
)
from swat_jax.data import Info
from swat_jax.errors import UsageError
from swat_jax.layers import SwatConv, SwatLinear
from swat_jax.models import LayerTypes
from tests.models.networks import OneKey
from tests.runs import ROOT, digits

FACTS = {"num_classes": 10, "image_shape": (8, 8, 1)}


def abstract(config):
    return nnx.eval_shape(lambda: build.build(config, **FACTS, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("method", "stem", "other"), [("u90", 0.0, 0.9), ("channel70", 0.0, 0.7), ("m90", 0.9, 0.9)]
)
def test_uniform_and_momentum(method, stem, other):
    layers = dict(build.sparse_layers(abstract(digits(method))))
    assert len(layers) == 10
    for path, layer in layers.items():
        expected = stem if path == "stem" else other
        assert (layer.weight_sparsity, layer.activation_sparsity) == (expected, expected)
        assert (layer.weight_budget is not None) == (method == "m90")


def test_erk_keeps_the_total():
    layers = dict(build.sparse_layers(abstract(digits("erk90"))))
    sizes = {path: layer.kernel.get_value().size for path, layer in layers.items()}
    kept = sum((1 - layers[path].weight_sparsity) * size for path, size in sizes.items())
    assert kept == pytest.approx(0.1 * sum(sizes.values()))
    assert len({layer.weight_sparsity for layer in layers.values()}) > 3


def test_dense_is_stock():
    model = abstract(digits("dense"))
    kinds = {type(module) for _, module in nnx.iter_modules(model)}
    assert not kinds & {SwatConv, SwatLinear}
    assert {nnx.Conv, nnx.Linear} <= kinds


def test_the_period_makes_state_of_thresholds():
    layers = dict(build.sparse_layers(abstract(digits(sparsity__threshold_every_steps=4))))
    assert layers["stem"].threshold_age is None
    assert layers["stage1/0/conv1"].weight_threshold is not None
    assert layers["stage1/0/conv1"].activation_threshold is not None
    assert layers["classifier"].threshold_age is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight", 1.0),
        ("weight", -0.1),
        ("activation", 1.5),
        ("distribution", "zipf"),
        ("granularity", "block"),
        ("threshold_every_steps", 0),
        ("exact_epochs", -1),
    ],
)
def test_refusals_name_the_key(key, value):
    with pytest.raises(UsageError, match=rf"config\.sparsity\.{key}"):
        build.build(digits(**{f"sparsity__{key}": value}), **FACTS, rngs=nnx.Rngs(0))


def test_momentum_needs_single_weights_and_one_budget():
    for key, value in (("granularity", "channel"), ("activation", 0.5)):
        with pytest.raises(UsageError, match=rf"config\.sparsity\.{key}"):
            build.build(digits("m90", **{f"sparsity__{key}": value}), **FACTS, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("method", "pack", "expected"),
    [("u90", None, True), ("m90", None, False), ("m90", True, True), ("u90", False, False)],
)
def test_where_there_are_kernels_inputs_are_packed_but_under_momentum(
    monkeypatch, method, pack, expected
):
    """Its budgets may come to keep all of an input."""
    monkeypatch.setattr(build.kernels, "packs", lambda: True)
    model = build.build(digits(method, sparsity__pack=pack), **FACTS, rngs=nnx.Rngs(0))
    for _, layer in build.sparse_layers(model):
        assert layer.pack == expected
        if method == "m90":
            assert layer.activation_capacity(1000) == 1000


ROWS = listing.rows(ROOT / "configs")
# The amount of sparsity changes numbers in the program, not its shape: of the steps, one row stands
# for all. That each amount can be had is tested below for every row.
SHAPES = {
    (row["network"], row["method"].rstrip("0123456789")): (row["config"], row["method"])
    for row in ROWS
    if row["dataset"] != "cifar100"
}
# Tracing these takes 5 to 20 s, so of their steps the one with most in it has to do: single
# weights, activations, budgets and momentum; channels where there is no SWAT-M. How layers meet the
# other methods does not depend on how many there are, and is traced in the smaller networks.
LARGE = {"densenet121": "m", "imagenet_resnet50": "m", "imagenet_wrn50_2": "channel"}
TRACED = [key for key in SHAPES if LARGE.get(key[0], key[1]) == key[1]]


@pytest.fixture
def quick_tracing(monkeypatch):
    """Tells JAX not to look for where a traced value is from.

    Flax asks traced values for their sharding, which they have not. For the text of that error,
    which Flax catches, JAX searches all equations so far: most of a minute for a DenseNet.
    """
    tracers = []
    jax.eval_shape(lambda x: tracers.append(type(x)), 1.0)
    monkeypatch.setattr(tracers[0], "_origin_msg", lambda self: "", raising=False)


def row(key):
    """The config, and the size, channels and number of classes of its images."""
    file, method = SHAPES[key]
    config = config_file.load(f"{ROOT / file}:{method}")
    config.devices = 1
    classes = {"imagenet": 1000}.get(config.dataset, 10)
    return config, config.data.image_size, len(config.data.mean), classes


@pytest.mark.newest
@pytest.mark.parametrize("key", [key for key in SHAPES if key not in TRACED], ids="-".join)
def test_every_other_row_is_built(key):
    config, size, channels, classes = row(key)
    facts = {"num_classes": classes, "image_shape": (size, size, channels)}
    model = nnx.eval_shape(lambda: build.build(config, **facts, rngs=OneKey()))
    layers = dict(build.sparse_layers(model))
    table = flops.network_table(config.model.name, **facts)
    planned = flops.sparsities(table, config.sparsity)
    expected = set() if key[1] == "dense" else {layer.path for layer in table}
    assert set(layers) == expected
    for path, layer in layers.items():
        assert layer.weight_sparsity == planned.weight[path]
        assert layer.activation_sparsity == planned.activation[path]
        if isinstance(layer, SwatConv):
            assert layer.granularity == config.sparsity.granularity


@pytest.mark.usefixtures("quick_tracing")
@pytest.mark.parametrize(
    "key",
    [pytest.param(key, marks=[pytest.mark.newest] if key[0] in LARGE else []) for key in TRACED],
    ids="-".join,
)
def test_a_training_step_traces(key):
    config, size, channels, classes = row(key)
    info = Info(
        name=config.dataset,
        num_classes=classes,
        image_shape=(size, size, channels),
        num_train=50_000,
        num_holdout=0,
        num_test=10_000,
        mean=config.data.mean,
        std=config.data.std,
        class_names=tuple(map(str, range(classes))),
    )
    trainer, make_state = training_setup.make_trainer(config, info, mesh())
    state = jax.eval_shape(make_state)
    images = jax.ShapeDtypeStruct((config.batch_size, size, size, channels), jnp.uint8)
    labels = jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)
    after, metrics = jax.eval_shape(trainer.train_step, state, images, labels)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics["loss"].shape == ()


@functools.cache
def table(network, classes, image_shape):
    return layer_table.network_table(network, num_classes=classes, image_shape=image_shape)


@functools.cache
def bare(network, classes, channels, is_dense, granularity):
    """A network of sparse layers that have no sparsity yet."""
    conv = functools.partial(SwatConv, granularity=granularity)
    layers = LayerTypes() if is_dense else LayerTypes(conv, SwatLinear)
    return nnx.eval_shape(
        lambda: models.create(
            network, num_classes=classes, in_channels=channels, layers=layers, rngs=nnx.Rngs(0)
        )
    )


@pytest.mark.newest
@pytest.mark.parametrize("network", sorted({row["network"] for row in ROWS}))
def test_every_amount_on_every_data_set_is_set(network, monkeypatch):
    """All rows, with the network itself made once for several of them."""
    for listed in (row for row in ROWS if row["network"] == network):
        config = config_file.load(f"{ROOT / listed['config']}:{listed['method']}")
        classes = flops.NUM_CLASSES[listed["dataset"]]
        size, channels = config.data.image_size, len(config.data.mean)
        found = table(network, classes, (size, size, channels))
        kind = (config.sparsity.distribution == "dense", config.sparsity.granularity)
        model = nnx.clone(bare(network, classes, channels, *kind))
        monkeypatch.setattr(build.layer_table, "network_table", lambda *_, found=found, **__: found)
        monkeypatch.setattr(build, "_create", lambda *_, model=model: model)
        facts = {"num_classes": classes, "image_shape": (size, size, channels)}
        layers = dict(build.sparse_layers(build.build(config, **facts, rngs=nnx.Rngs(0))))
        assert set(layers) == (set() if kind[0] else {layer.path for layer in found})
        # Percent of all weights; the first conv, where it is dense, is a small part of them.
        zeros = sum(layers[x.path].weight_sparsity * x.weights for x in found if layers)
        total = sum(layer.weights for layer in found)
        assert zeros / total == pytest.approx(config.sparsity.weight, abs=2e-3), listed
        assert all(0 <= layer.activation_sparsity < 1 for layer in layers.values())
        period = config.sparsity.threshold_every_steps
        assert {layer.threshold_every_steps for layer in layers.values()} <= {period}
        if listed["method"].startswith("m"):
            assert all(layer.weight_budget is not None for layer in layers.values())


def test_which_steps_are_traced():
    """Written out: a row that the list loses, or one that nothing traces any more, shows here."""
    traced = {network: sorted(m for n, m in TRACED if n == network) for network, _ in SHAPES}
    assert traced == {
        "densenet121": ["m"],
        "imagenet_resnet50": ["m"],
        "imagenet_wrn50_2": ["channel"],
        "resnet18": ["channel", "dense"],
        "resnet8": ["channel", "dense", "erk", "m", "u"],
        "vgg16": ["dense", "erk", "m", "u"],
        "wrn16_8": ["dense", "erk", "m", "u"],
    }
    # Those of CIFAR-100 are the same steps with a wider last layer.
    pairs = {
        dataset: {(r["network"], r["method"]) for r in ROWS if r["dataset"] == dataset}
        for dataset in ("cifar10", "cifar100")
    }
    assert pairs["cifar100"] == pairs["cifar10"]


@functools.cache
def mesh():
    return data_parallel.make_mesh(1)
