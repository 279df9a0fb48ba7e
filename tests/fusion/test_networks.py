"""Networks of stock layers, fused: they compute what they computed, and keep what ours keep."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from swat_jax import SwatConv, SwatLinear, functional, fuse, kept_bytes
from swat_jax.dropout import Dropout
from swat_jax.models import densenet, resnet, vgg, wide_resnet
from swat_jax.models.layer_factory import LayerFactory
from swat_jax.models.layer_types import LayerTypes
from swat_jax.norm_relu import BatchNormRelu
from tests import stock_networks
from tests.fusion import training
from tests.stock_networks import Layers
from tests.test_memory import residuals, size_of, total

SPARSE = {"weight_sparsity": 0.9, "threshold_every_steps": 10, "pack": True}

# Each network by its own text, and as `swat_jax.models` has it.
NETWORKS = {
    "resnet": (
        lambda layers: stock_networks.ResNet((2, 1), 4, 5, layers),
        lambda make: resnet.ResNet(
            resnet.Bottleneck, (2, 1), widths=(4, 8), stem="7x7", num_classes=5, in_channels=3,
            make=make,
        ),
    ),
    "vgg": (
        lambda layers: stock_networks.VGG((2, 1, 1), (4, 8, 8), 16, 5, layers),
        lambda make: vgg.VGG((2, 1, 1), num_classes=5, in_channels=3, dropout_rate=0.5, make=make),
    ),
    "wide_resnet": (
        lambda layers: stock_networks.WideResNet(1, 1, 5, layers),
        lambda make: wide_resnet.WideResNet(
            10, 1, num_classes=5, in_channels=3, dropout_rate=0.3, make=make
        ),
    ),
    "densenet": (
        lambda layers: stock_networks.DenseNet((2, 1), 4, 5, layers),
        lambda make: densenet.DenseNet((2, 1), 4, num_classes=5, in_channels=3, make=make),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def narrow_vgg(monkeypatch):
    monkeypatch.setattr(vgg, "WIDTHS", (4, 8, 8))
    monkeypatch.setattr(vgg, "HIDDEN", 16)


def call(model, x):
    return model(x)


@pytest.mark.parametrize(
    "name",
    [
        "resnet",
        *(pytest.param(name, marks=pytest.mark.newest) for name in NETWORKS if name != "resnet"),
    ],
)
def test_losses_gradients_and_states(name):
    with jax.enable_x64(True):

        def build():
            return NETWORKS[name][0](training.swat_layers())

        x = training.images(3, 16, 16, 3)
        fused = fuse(training.sum_of_squares)
        found = training.train(build, fused, x)
        training.assert_same(found, training.train(build, training.sum_of_squares, x))
    assert all(norm.fused for norm in fused.report.norms)
    assert not fused.report.lost


def ours(build, **options):
    """The network of this package with its own layers, for `residuals`."""
    conv, linear = (functools.partial(kind, **SPARSE) for kind in (SwatConv, SwatLinear))
    types = LayerTypes(conv, linear, BatchNormRelu, functional.max_pool, Dropout)
    conv_bias = build is NETWORKS["vgg"][1]
    make = LayerFactory(types, rngs=nnx.Rngs(0), conv_bias=conv_bias, **options)
    return build(make)


def stock(build, dtype=None):
    conv, linear = (functools.partial(kind, **SPARSE) for kind in (SwatConv, SwatLinear))
    return build(Layers(conv, linear, Dropout, rngs=nnx.Rngs(0), dtype=dtype))


@pytest.mark.newest
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_keeps_what_our_own_network_keeps(name, dtype):
    """The same arrays, and of dense activations between batch norm and SWAT layers none."""
    theirs, own = NETWORKS[name]
    shape = (3, 16, 16, 3)
    expected = residuals(ours(own, dtype=dtype), shape, dtype)
    found = residuals(stock(theirs, dtype), shape, dtype, fuse(call))
    assert sorted(map(str, found)) == sorted(map(str, expected))
    # Unfused, SWAT layers pack too, and it is the dense activations that are more.
    assert size_of(residuals(stock(theirs, dtype), shape, dtype)) > 1.3 * size_of(found)


def resnet50(build):
    model = nnx.eval_shape(build)
    model.stem.set_sparsity(weight_sparsity=0.0, activation_sparsity=0.0)
    return model


@pytest.mark.newest
def test_resnet50_keeps_what_is_counted_for_our_own():
    """At full size, traced and not run; the count is that of `python -m swat_jax.flops --bytes`."""
    shape = (2, 224, 224, 3)

    def own():
        types = LayerTypes(
            functools.partial(SwatConv, **SPARSE),
            functools.partial(SwatLinear, **SPARSE),
            BatchNormRelu,
            functional.max_pool,
        )
        make = LayerFactory(types, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        return resnet.ResNet(
            resnet.Bottleneck, (3, 4, 6, 3), stem="7x7", num_classes=1000, in_channels=3, make=make
        )

    def theirs():
        return stock(functools.partial(stock_networks.ResNet, (3, 4, 6, 3), 64, 1000), jnp.bfloat16)

    fused = fuse(call)
    found = residuals(resnet50(theirs), shape, jnp.bfloat16, fused)
    assert size_of(found) == total(kept_bytes.trace(resnet50(own), shape, jnp.bfloat16))
    assert len(fused.report.norms) == 53
    assert all(norm.fused for norm in fused.report.norms)


def temporary_bytes(model, forward):
    """What XLA plans for a step of training besides its arguments and results."""
    model.train()
    graph, weights, rest = nnx.split(model, nnx.Param, ...)

    def step(weights, rest, x):
        def loss(weights):
            copy = nnx.merge(graph, weights, rest, copy=True)
            value = jnp.sum(jnp.square(forward(copy, x)))
            return value, nnx.state(copy, nnx.Not(nnx.Param))

        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(weights)
        return value, state, jax.tree.map(lambda w, g: w - 0.1 * g, weights, gradients)

    x = jax.ShapeDtypeStruct((8, 64, 64, 3), jnp.float32)
    compiled = jax.jit(step).lower(weights, rest, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.newest
def test_xla_plans_as_much_memory_as_for_our_own_network():
    """Measured: the same to the byte with JAX 0.12.0, and 0.01 % more with 0.10.2; unfused 1.8 and
    1.2 times as much. At the size of ResNet-50, batch 32, it is 0.08 % more.
    """
    own = ours(
        lambda make: resnet.ResNet(
            resnet.Bottleneck, (2, 1), widths=(16, 32), stem="7x7", num_classes=5, in_channels=3,
            make=make,
        )
    )  # fmt: skip
    theirs = stock(functools.partial(stock_networks.ResNet, (2, 1), 16, 5))
    expected = temporary_bytes(own, call)
    assert temporary_bytes(theirs, fuse(call)) < 1.01 * expected
    assert temporary_bytes(theirs, call) > 1.1 * expected
