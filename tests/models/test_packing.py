"""Networks that pack what they save train as those that do not, and keep nothing dense."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from swat_jax import functional
from swat_jax.build import sparse_layers
from swat_jax.dropout import Dropout
from swat_jax.layer_state import ActivationThreshold
from swat_jax.layers import SwatConv, SwatLinear
from swat_jax.models import densenet, resnet, wide_resnet
from swat_jax.models.layer_factory import LayerFactory
from swat_jax.models.layer_types import LayerTypes
from swat_jax.norm_relu import BatchNormRelu
from swat_jax.sparsity import packing

COMMON: dict[str, Any] = {"num_classes": 3, "in_channels": 3}
NETWORKS: dict[str, Any] = {
    "resnet": lambda make: resnet.ResNet(
        resnet.BasicBlock, (2, 1), widths=(8, 16), make=make, **COMMON
    ),
    "imagenet": lambda make: resnet.ResNet(
        resnet.Bottleneck, (1,), widths=(8,), stem="7x7", make=make, **COMMON
    ),
    "wrn": lambda make: wide_resnet.WideResNet(10, 1, dropout_rate=0.0, make=make, **COMMON),
    "wrn_dropout": lambda make: wide_resnet.WideResNet(
        10, 1, dropout_rate=0.3, make=make, **COMMON
    ),
    "densenet": lambda make: densenet.DenseNet((2, 1), 12, make=make, **COMMON),
}
SHAPE = (4, 16, 16, 3)


class DrawnAlike(Dropout):
    """Stock dropout, with the bits that are drawn where it is part of batch norm's pass."""

    def __call__(self, inputs: jax.Array, **_: Any) -> jax.Array:
        kept = packing.from_bitmap(self.draw(inputs.size), inputs.size).reshape(inputs.shape)
        return jnp.where(kept, inputs / (1 - self.rate), 0)


def build(name: str, packs: bool, period: int, budgets: str = "equal") -> Any:
    options = {"weight_sparsity": 0.9, "threshold_every_steps": period, "pack": packs}
    types = LayerTypes(
        functools.partial(SwatConv, **options),
        functools.partial(SwatLinear, **options),
        dropout=DrawnAlike,
    )
    if packs:
        types = LayerTypes(types.conv, types.linear, BatchNormRelu, functional.max_pool, Dropout)
    model = NETWORKS[name](LayerFactory(types, rngs=nnx.Rngs(0)))
    if budgets != "equal":
        for index, (_, layer) in enumerate(sparse_layers(model)):
            # Two readers of one value are then unlike.
            layer.set_sparsity(
                weight_sparsity=0.9,
                activation_sparsity=(0.9, 0.6, 0.75)[index % 3],
                threshold_every_steps=period,
                dynamic_budget=budgets == "dynamic",
            )
            if budgets == "dynamic":  # some have grown, one as far as can be
                layer.weight_budget[...] = jnp.int32(layer.kernel.size // (2, 8, 1)[index % 3])
    model.train()
    return model


def loss_of(graph, rest, x, params):
    model = nnx.merge(graph, params, rest, copy=True)
    loss = jnp.sum(jnp.sin(model(x)) * jnp.arange(3))
    return loss, nnx.state(model, (nnx.BatchStat, ActivationThreshold))


@pytest.mark.parametrize(
    ("name", "period", "budgets"),
    [
        ("resnet", 1, "equal"),
        *(
            pytest.param(name, 1, "equal", marks=pytest.mark.newest)
            for name in NETWORKS
            if name != "resnet"
        ),
        ("resnet", 10, "equal"),
        ("imagenet", 10, "equal"),
        pytest.param("imagenet", 1, "unlike", marks=pytest.mark.newest),
        pytest.param("imagenet", 10, "unlike", marks=pytest.mark.newest),
        pytest.param("resnet", 10, "dynamic", marks=pytest.mark.newest),
        ("imagenet", 1, "dynamic"),
    ],
)
def test_loss_gradients_and_state(name, period, budgets):
    """Float32: 2e-4 of the largest value of every tensor, and 2e-5 of the largest of all.

    Sums over the batch that nearly cancel have the error of their summands. The networks are wide
    enough that no mask has more ties than a packed tensor has room for: those would be dropped.
    """
    x = jax.random.normal(jax.random.key(1), SHAPE)

    def run(packs):
        model = build(name, packs, period, budgets)
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        function = functools.partial(loss_of, graph, rest, x)
        return jax.value_and_grad(function, has_aux=True)(params)

    found, wanted = jax.jit(lambda: (run(True), run(False)))()
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(wanted))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        bound = 2e-4 * float(jnp.max(jnp.abs(b))) + 2e-5 * largest
        np.testing.assert_allclose(a, b, rtol=0, atol=bound)


def test_saved_for_the_backward_pass():
    """Of large float tensors, only the inputs of batch norms, and the dense stem's images."""
    graph, params, rest = nnx.split(
        nnx.eval_shape(lambda: build("resnet", True, 1)), nnx.Param, ...
    )
    x = jax.ShapeDtypeStruct(SHAPE, jnp.float32)

    def saved(params, rest, x):
        return jax.vjp(lambda p: loss_of(graph, rest, x, p)[0], params)[1]

    leaves = jax.tree.leaves(jax.eval_shape(saved, params, rest, x))
    large = [leaf.shape for leaf in leaves if len(leaf.shape) == 4 and leaf.shape[0] == SHAPE[0]]
    # The stem's norm and two in each of three blocks, and the norm of the one projection.
    assert len(large) <= 8, large
