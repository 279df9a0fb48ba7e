"""SWAT layers for Flax NNX: stock layers whose one product is replaced by a SWAT product.

`SwatConv` and `SwatLinear` take the arguments of `flax.nnx.Conv` and `flax.nnx.Linear`, have
their parameters and initialisers, and at sparsity 0 equal them bit for bit.

In training mode (``model.train()``) masks follow the thresholds; in evaluation mode
(``model.eval()``) weights have exact masks, activations are dense and no state changes.

What both layers do with weights and inputs before the product is in `swat_jax.layer_base`, what
they hold besides parameters in `swat_jax.layer_state`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from swat_jax import kernels
from swat_jax.activations import Activation
from swat_jax.algorithms import PLAIN, Algorithms
from swat_jax.errors import UsageError
from swat_jax.functional import swat_conv, swat_linear
from swat_jax.layer_base import SwatLayer, keep_kernel_dtype
from swat_jax.layer_state import NextWeightThreshold
from swat_jax.sparsity import granularity as granularities
from swat_jax.sparsity.varying import varying_axes


class _Bound:
    """A layer whose product knows in which form the layer's input came."""

    def __init__(self, layer: Any, product: str, given: Activation) -> None:
        self._layer = layer
        setattr(self, product, functools.partial(getattr(layer, product), given=given))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class SwatConv(nnx.Conv, SwatLayer):
    """Convolution whose weights are sparse in both passes, its saved input in the backward one.

    Takes all arguments of `flax.nnx.Conv` but ``conv_general_dilated``, and these:

    Args:
      weight_sparsity: fraction of zeros in the weights, in ``[0, 1)``.
      activation_sparsity: fraction of zeros in the saved input, in ``[0, 1)``; None: the weights'.
      granularity: what a weight mask selects, see `swat_jax.sparsity.granularity`.
      threshold_every_steps: steps between recomputed thresholds; 1 is exact SWAT.
      pack: whether the saved input is packed; None: where `kernels.packs()` says so.
      algorithms: what computes its products in training, see `swat_jax.algorithms`; in evaluation
        mode all of them are plain.

    Raises:
      UsageError: if one of them is out of range.

    Example:
      >>> layer = SwatConv(3, 16, (3, 3), weight_sparsity=0.9, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 8, 8, 3))).shape
      (1, 8, 8, 16)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        weight_sparsity: float = 0.0,
        activation_sparsity: float | None = None,
        granularity: str = "unstructured",
        threshold_every_steps: int = 1,
        pack: bool | None = None,
        algorithms: Algorithms = PLAIN,
        **kwargs: Any,
    ) -> None:
        # An own function that promotes types is obeyed; the stock one would round the kernel
        # before its mask is taken.
        kwargs.setdefault("promote_dtype", keep_kernel_dtype)
        refuse_own_product(kwargs, "conv_general_dilated")
        super().__init__(in_features, out_features, kernel_size, strides, **kwargs)
        # What is left is the method below, which the stock layer then calls.
        del self.conv_general_dilated
        self.start(
            granularity=granularity,
            weight_sparsity=weight_sparsity,
            activation_sparsity=activation_sparsity,
            threshold_every_steps=threshold_every_steps,
            pack=pack,
            algorithms=algorithms,
        )

    def __call__(
        self,
        inputs: jax.Array | Activation,
        out_sharding: Any = None,
        *,
        constant_bias: bool = False,
    ) -> jax.Array:
        """The output for an input that may come with its packed form.

        Args:
          inputs: channels last.
          out_sharding: None.
          constant_bias: whether the bias gets no gradient. It needs none before a batch norm in
            training mode, which takes out every constant; to add up one that is zero but for
            rounding takes as long as a pass of the norm.
        """
        given = inputs if isinstance(inputs, Activation) else Activation(inputs)
        bound: Any = _Bound(self, "conv_general_dilated", given)
        if constant_bias and self.bias is not None:
            bound.bias = nnx.Param(lax.stop_gradient(self.bias[...]))
        return nnx.Conv.__call__(bound, given.x, out_sharding)

    def conv_general_dilated(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        window_strides: Sequence[int],
        padding: Any,
        *,
        lhs_dilation: Sequence[int],
        rhs_dilation: Sequence[int],
        dimension_numbers: Any,
        feature_group_count: int,
        precision: Any = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
        given: Activation | None = None,
    ) -> jax.Array:
        """The product that `flax.nnx.Conv` calls; always channels last."""
        del dimension_numbers
        refuse_out_sharding(out_sharding)
        return swat_conv(
            lhs,
            rhs,
            strides=window_strides,
            padding=padding,
            input_dilation=lhs_dilation,
            kernel_dilation=rhs_dilation,
            feature_group_count=feature_group_count,
            granularity=self.granularity,
            precision=precision,
            preferred_element_type=preferred_element_type,
            **self.selection(given or Activation(lhs), lhs, rhs),
        )


class SwatLinear(nnx.Linear, SwatLayer):
    """Linear layer with sparse weights in both passes, and a sparse input in the backward one.

    Takes all arguments of `flax.nnx.Linear` but ``dot_general``, and those of `SwatConv`.
    Masks are unstructured, and thresholds exact at every step whatever the period.

    Example:
      >>> layer = SwatLinear(64, 10, weight_sparsity=0.9, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((8, 64))).shape
      (8, 10)
    """

    always_exact = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        weight_sparsity: float = 0.0,
        activation_sparsity: float | None = None,
        threshold_every_steps: int = 1,
        pack: bool | None = None,
        algorithms: Algorithms = PLAIN,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("promote_dtype", keep_kernel_dtype)
        refuse_own_product(kwargs, "dot_general")
        super().__init__(in_features, out_features, **kwargs)
        del self.dot_general
        self.start(
            granularity="unstructured",
            weight_sparsity=weight_sparsity,
            activation_sparsity=activation_sparsity,
            threshold_every_steps=threshold_every_steps,
            pack=pack,
            algorithms=algorithms,
        )

    def __call__(self, inputs: jax.Array | Activation, out_sharding: Any = None) -> jax.Array:
        """The output for an input that may come with its packed form."""
        given = inputs if isinstance(inputs, Activation) else Activation(inputs)
        bound: Any = _Bound(self, "dot_general", given)
        return nnx.Linear.__call__(bound, given.x, out_sharding)

    def dot_general(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
        given: Activation | None = None,
    ) -> jax.Array:
        """The product that `flax.nnx.Linear` calls; always over the last axis of the input."""
        del dimension_numbers
        refuse_out_sharding(out_sharding)
        return swat_linear(
            lhs,
            rhs,
            precision=precision,
            preferred_element_type=preferred_element_type,
            **self.selection(given or Activation(lhs), lhs, rhs),
        )


@contextlib.contextmanager
def find_weight_thresholds(model: nnx.Module) -> Iterator[None]:
    """Finds the weight thresholds of all SWAT layers of a model in training mode, for one call.

    Layers would find the same themselves when they are called, one after the other; for all of
    them together it takes one kernel. It changes thresholds that are state. Weights must stay as
    they are inside; what no layer has used is forgotten at the end. Layers whose weights are
    stacked (`flax.nnx.vmap`) are left to themselves.

    Args:
      model: with SWAT layers anywhere in it.

    Example:
      >>> model = SwatConv(3, 16, (3, 3), weight_sparsity=0.9, rngs=nnx.Rngs(0))
      >>> with find_weight_thresholds(model):
      ...     y = model(jnp.ones((1, 8, 8, 3)))
    """
    alike: dict[Any, list[SwatLayer]] = {}
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, SwatLayer) and layer.masks_own_kernel:
            kernel = layer.kernel.get_value()
            alike.setdefault((kernel.dtype, varying_axes(kernel)), []).append(layer)
    for (dtype, _), layers in alike.items():
        zero = jnp.zeros((), jnp.promote_types(dtype, jnp.float32))
        stored = [layer.weight_threshold for layer in layers]
        limits = kernels.refreshed_thresholds(
            [one is None or layer.is_due for one, layer in zip(stored, layers, strict=True)],
            [granularities.score(layer.kernel.get_value(), layer.granularity) for layer in layers],
            [layer.weight_keep() for layer in layers],
            [zero if one is None else one[...] for one in stored],
        )
        for layer, one, limit in zip(layers, stored, limits, strict=True):
            layer.next_weight_threshold = nnx.data(NextWeightThreshold(limit))
            if one is not None:
                one[...] = limit
    try:
        yield
    finally:
        for layer in itertools.chain(*alike.values()):
            if layer.next_weight_threshold is not None:
                layer.next_weight_threshold = nnx.data(None)


def refuse_own_product(kwargs: Mapping[str, Any], name: str) -> None:
    """Raises a `UsageError` if a layer's product, which is SWAT's, is given."""
    if kwargs.get(name) is not None:
        raise UsageError(f"{name} cannot be given: it is what a SWAT layer replaces")


def refuse_out_sharding(out_sharding: Any) -> None:
    """Raises a `UsageError` for a sharding that the product cannot give."""
    if out_sharding is not None:
        raise UsageError(
            f"out_sharding must be None for SWAT layers, got {out_sharding}: use jax.shard_map"
        )
