"""The conv and linear layers of a network in execution order: shapes, MACs, planned sparsity."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from swat_jax import models
from swat_jax.abstract_call import abstract_call
from swat_jax.layers import SwatConv, SwatLinear
from swat_jax.sparsity import distribution


@dataclasses.dataclass(frozen=True)
class Layer:
    """One use of a conv or linear layer in a forward pass.

    Attributes:
      path: where it sits in the network, such as `stage2/0/conv1`.
      kind: "conv" or "linear".
      kernel_shape: (kh, kw, Cin / groups, Cout), or (Cin, Cout) for linear layers.
      input_hw: spatial shape of the input; for linear layers the axes between batch and features.
      output_hw: spatial shape of the output.
      groups: feature groups.
    """

    path: str
    kind: Literal["conv", "linear"]
    kernel_shape: tuple[int, ...]
    input_hw: tuple[int, ...]
    output_hw: tuple[int, ...]
    groups: int = 1

    @property
    def weights(self) -> int:
        """Number of weights, without bias."""
        return math.prod(self.kernel_shape)

    @property
    def activations(self) -> int:
        """Number of input values per image: what activation sparsity is a fraction of."""
        return self.kernel_shape[-2] * self.groups * math.prod(self.input_hw)

    @property
    def macs_forward(self) -> int:
        """MACs of the forward pass per image; the weight gradient has as many."""
        return self.weights * math.prod(self.output_hw)

    @property
    def macs_input_gradient(self) -> int:
        """MACs of the input gradient per image, at the input's resolution."""
        return self.weights * math.prod(self.input_hw)


def layer_table(model: nnx.Module, image_shape: Sequence[int]) -> list[Layer]:
    """Conv and linear layers in the order in which a forward pass uses them.

    Nothing is computed: each layer's own product is replaced by a recorder and the model is traced
    abstractly. The model may be abstract itself (`nnx.eval_shape`); it is not changed.

    Args:
      model: any NNX model of stock `nnx.Conv` and `nnx.Linear` layers, called with one batch.
      image_shape: (H, W, C) of its input.
    """
    return trace(model, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))


def trace(model: nnx.Module, *args: Any, **kwargs: Any) -> list[Layer]:
    """`layer_table` of a model that is called with other things than one batch of images.

    Args:
      model: see there.
      args: of the call, see `swat_jax.abstract_call`.
      kwargs: of the call.
    """
    records: list[Layer] = []

    def record(traced: Any, inputs: Sequence[jax.Array]) -> None:
        del inputs
        traced.eval()
        for path, module in nnx.iter_modules(traced):
            name = "/".join(str(part) for part in path)
            if isinstance(module, nnx.Conv):
                module.conv_general_dilated = _record_conv(name, records, _product(module))
            elif isinstance(module, nnx.Linear):
                module.dot_general = _record_linear(name, records, _product(module))

    abstract_call(model, record, args, kwargs)
    return records


def _product(layer: Any) -> Callable[..., jax.Array]:
    """What a layer's product is replaced by: that of JAX for a SWAT layer, else its own."""
    if isinstance(layer, nnx.Conv):
        swat, stock = isinstance(layer, SwatConv), jax.lax.conv_general_dilated
        return stock if swat else layer.conv_general_dilated
    return jax.lax.dot_general if isinstance(layer, SwatLinear) else layer.dot_general


def _record_conv(
    path: str, records: list[Layer], product: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
    def conv(
        x: jax.Array, kernel: jax.Array, *args: Any, given: Any = None, **kwargs: Any
    ) -> jax.Array:
        del given  # in which form the input of a SWAT layer came
        y = product(x, kernel, *args, **kwargs)
        groups = kwargs["feature_group_count"]
        records.append(Layer(path, "conv", kernel.shape, x.shape[1:-1], y.shape[1:-1], groups))
        return y

    return conv


def _record_linear(
    path: str, records: list[Layer], product: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
    def dot(
        x: jax.Array, kernel: jax.Array, *args: Any, given: Any = None, **kwargs: Any
    ) -> jax.Array:
        del given
        records.append(Layer(path, "linear", kernel.shape, x.shape[1:-1], x.shape[1:-1]))
        return product(x, kernel, *args, **kwargs)

    return dot


def network_table(name: str, *, num_classes: int, image_shape: tuple[int, int, int]) -> list[Layer]:
    """`layer_table` of a network from the registry, without allocating it.

    Args:
      name: one of `models.names()`.
      num_classes: width of its output.
      image_shape: (H, W, C) of its input.

    Raises:
      UsageError: no such network, or images too small for it.

    Example:
      >>> layers = network_table("resnet8", num_classes=10, image_shape=(8, 8, 1))
      >>> layers[0].path, layers[0].kernel_shape, layers[0].macs_forward
      ('stem', (3, 3, 1, 24), 13824)
    """
    model = nnx.eval_shape(
        lambda: models.create(
            name, num_classes=num_classes, in_channels=image_shape[-1], rngs=nnx.Rngs(0)
        )
    )
    return layer_table(model, image_shape)


@dataclasses.dataclass(frozen=True)
class Sparsities:
    """Sparsity of each layer, by path.

    Attributes:
      weight: fraction of zeros in the weights.
      activation: fraction of zeros in the input that is kept for the backward pass.
    """

    weight: Mapping[str, float]
    activation: Mapping[str, float]


def sparsities(layers: Sequence[Layer], sparsity: Any) -> Sparsities:
    """Spreads the sparsity of a config over the layers.

    Under "momentum" it is that of the first step: uniform with the first layer sparse.

    Args:
      layers: the layer table.
      sparsity: `config.sparsity`.

    Raises:
      UsageError: a sparsity outside [0, 1).
    """
    shapes = {layer.path: layer.kernel_shape for layer in layers}

    def spread(amount: float) -> dict[str, float]:
        if sparsity.distribution == "dense":
            return dict.fromkeys(shapes, 0.0)
        if sparsity.distribution == "erk":
            return distribution.erdos_renyi_kernel(shapes, amount)
        first = layers[0].path
        dense = (first,) if sparsity.first_layer_dense else ()
        return distribution.uniform(shapes, amount, dense=dense)

    return Sparsities(spread(sparsity.weight), spread(sparsity.activation))
