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
from swat_jax.models import LayerTypes
from swat_jax.models.densenet import DenseNet
from swat_jax.models.layer_factory import LayerFactory
from swat_jax.models.resnet import Bottleneck, ResNet

FACTS = {"num_classes": 5, "in_channels": 3}
NETWORKS = {
    "densenet": lambda make: DenseNet((2, 1), 4, make=make, **FACTS),
    # Identity and projected shortcuts, a stride, the wide 3x3 and the stem with its max pooling.
    "imagenet_wide": lambda make: ResNet(
        Bottleneck, (2, 1), widths=(4, 8), widen=2, stem="7x7", make=make, **FACTS
    ),
}
# Only what XLA fuses around the products may differ: the rounding of float32 sums, by 1e-5 of the
# largest gradient.
BOUND = 1e-5


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
