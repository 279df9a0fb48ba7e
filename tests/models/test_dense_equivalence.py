"""At sparsity 0 a network of SWAT layers is the network of stock layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from swat_jax import models, network
from swat_jax.layers import SwatConv, SwatLinear
from swat_jax.models import LayerTypes

# Images and bound. The products are the same calls, but XLA may fuse around them in another way,
# which changes how sums are rounded: 1e-5 of the largest value for a few layers. The modules of the
# other families are compared, a few channels wide, in `test_block_equivalence.py`.
NETWORKS = {"resnet8": ((4, 8, 8, 1), 1e-5)}


@functools.cache
def loss_and_gradients(name, shape, sparse):
    layers = LayerTypes(SwatConv, SwatLinear) if sparse else LayerTypes()
    model = models.create(
        name,
        num_classes=10,
        in_channels=shape[-1],
        layers=layers,
        dropout_rate=None if name == "resnet8" else 0.0,
        rngs=nnx.Rngs(0),
    )
    structure, collections = network.split(model)
    images = jax.random.normal(jax.random.key(1), shape)
    labels = jnp.arange(shape[0])

    @jax.jit
    def run(params):
        def loss(params):
            traced = structure.model({**collections, "params": params})
            traced.train()
            logits = traced(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jax.value_and_grad(loss)(params)

    return run(collections["params"])


@pytest.mark.parametrize("name", NETWORKS)
def test_loss_and_gradients(name):
    shape, bound = NETWORKS[name]
    stock, stock_gradients = loss_and_gradients(name, shape, sparse=False)
    swat, swat_gradients = loss_and_gradients(name, shape, sparse=True)
    assert float(swat) == pytest.approx(float(stock), rel=bound)
    assert jax.tree.structure(swat_gradients) == jax.tree.structure(stock_gradients)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(stock_gradients))
    for (path, ours), theirs in zip(
        jax.tree.leaves_with_path(swat_gradients), jax.tree.leaves(stock_gradients), strict=True
    ):
        error = np.abs(ours - theirs).max()
        assert error <= bound * largest, (jax.tree_util.keystr(path), error)
