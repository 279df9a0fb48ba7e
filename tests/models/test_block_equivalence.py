"""At sparsity 0 SWAT layers are stock layers, also in the blocks of the large networks.

The blocks are a few channels wide here, since XLA needs minutes for the real ones.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from swat_jax import network
from swat_jax.layers import SwatConv, SwatLinear
from swat_jax.models import LayerTypes, registry, vgg
from swat_jax.models.densenet import DenseNet
from swat_jax.models.layer_factory import LayerFactory
from swat_jax.models.resnet import Bottleneck, ResNet
from swat_jax.models.vgg import VGG
from swat_jax.models.wide_resnet import WideResNet

FACTS = {"num_classes": 5, "in_channels": 3}
NETWORKS = {
    "densenet": lambda make: DenseNet((2, 1), 4, make=make, **FACTS),
    "vgg": lambda make: VGG((2, 1, 1), dropout_rate=0.0, make=make, **FACTS),
    "wide_resnet": lambda make: WideResNet(10, 1, dropout_rate=0.0, make=make, **FACTS),
    "bottleneck": lambda make: ResNet(
        Bottleneck, (2, 1), widths=(4, 8), stem="3x3", make=make, **FACTS
    ),
    # Identity and projected shortcuts, a stride, the wide 3x3 and the stem with its max pooling.
    "imagenet_wide": lambda make: ResNet(
        Bottleneck, (2, 1), widths=(4, 8), widen=2, stem="7x7", make=make, **FACTS
    ),
}
# Every family of the registry is one of these modules; its basic blocks are resnet8's, which is
# small enough to be compared whole.
COMPARED = {DenseNet, VGG, WideResNet, ResNet}
# Only what XLA fuses around the products may differ: the rounding of float32 sums, by 1e-5 of the
# largest gradient.
BOUND = 1e-5


@pytest.fixture(autouse=True)
def narrow_vgg(monkeypatch):
    """VGG's widths are constants of its module, and its hidden layers hold 18 million weights."""
    monkeypatch.setattr(vgg, "WIDTHS", (4, 8, 8))
    monkeypatch.setattr(vgg, "HIDDEN", 16)


def test_every_family_is_compared():
    assert {network.module for network in registry._NETWORKS.values()} == COMPARED
    built = [build(LayerFactory(LayerTypes(), rngs=nnx.Rngs(0))) for build in NETWORKS.values()]
    assert {type(model) for model in built} == COMPARED


def loss_and_gradients(build, layers):
    model = build(LayerFactory(layers, rngs=nnx.Rngs(0)))
    structure, collections = network.split(model)
    images = jax.random.normal(jax.random.key(1), (3, 16, 16, 3))

    @jax.jit
    def run(params):
        def loss(params):
            traced = structure.model({**collections, "params": params})
            traced.train()
            losses = optax.softmax_cross_entropy_with_integer_labels(traced(images), jnp.arange(3))
            return losses.mean(), network.collection(traced, nnx.BatchStat)

        return jax.value_and_grad(loss, has_aux=True)(params)

    kinds = {type(module) for _, module in nnx.iter_modules(model)}
    return kinds, jax.device_get(run(collections["params"]))


@pytest.mark.parametrize("name", NETWORKS)
def test_loss_gradients_and_batch_norm(name):
    stock_kinds, stock = loss_and_gradients(NETWORKS[name], LayerTypes())
    kinds, swat = loss_and_gradients(NETWORKS[name], LayerTypes(SwatConv, SwatLinear))
    assert {SwatConv, SwatLinear} <= kinds - stock_kinds
    (loss, averages), gradients = stock
    (our_loss, our_averages), ours = swat
    assert our_loss == pytest.approx(loss, rel=1e-6)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradients))
    assert_close(ours, gradients, BOUND * largest)
    assert_close(our_averages, averages, BOUND)


def assert_close(ours, theirs, bound):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, value), other in zip(
        jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        assert np.isfinite(other).all()
        assert np.abs(value - other).max() <= bound, jax.tree_util.keystr(path)
