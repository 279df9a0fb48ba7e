"""`SwatConv` and `SwatDense` for Flax Linen, twins of the layers in `swat_jax.layers`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import canonicalize_dtype, promote_dtype

from swat_jax import kernels
from swat_jax.algorithms import PLAIN, Algorithms
from swat_jax.errors import UsageError
from swat_jax.functional import swat_conv, swat_linear
from swat_jax.sparsity import granularity as granularities
from swat_jax.sparsity import thresholds, top_k
from swat_jax.sparsity.per_layer import LayerSparsity


class SwatConv(nn.Conv):
    """Convolution with sparse weights in both passes, and a sparse saved input.

    Takes all fields of `flax.linen.Conv` but ``conv_general_dilated``, and these:

    Attributes:
      weight_sparsity: fraction of zeros in the weights, in ``[0, 1)``.
      activation_sparsity: fraction of zeros in the saved input, in ``[0, 1)``; None: the weights'.
      granularity: what a weight mask selects, see `swat_jax.sparsity.granularity`.
      threshold_every_steps: steps between recomputed thresholds; 1 is exact SWAT.
      algorithms: what computes its products in training, see `swat_jax.algorithms`.
      deterministic: True for evaluation.

    Example:
      >>> layer = SwatConv(16, (3, 3), weight_sparsity=0.9)
      >>> x = jnp.ones((1, 8, 8, 3))
      >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
      (1, 8, 8, 16)
    """

    weight_sparsity: float = 0.0
    activation_sparsity: float | None = None
    granularity: str = "unstructured"
    threshold_every_steps: int = 1
    algorithms: Algorithms = PLAIN
    deterministic: bool = False

    @nn.compact
    def __call__(self, inputs: jax.Array, deterministic: bool | None = None) -> jax.Array:
        """Applies the convolution; see `flax.linen.Conv`."""
        _refuse(self, "conv_general_dilated", "conv_general_dilated_cls")
        own = product(self, _settings(self), _chosen(self, deterministic), self.algorithms)
        stock = nn.Conv(**_stock_fields(self, nn.Conv, conv_general_dilated=own))
        nn.share_scope(self, stock)
        return stock(inputs)


class SwatDense(nn.Dense):
    """Linear layer with sparse weights in both passes, and a sparse saved input.

    Takes all fields of `flax.linen.Dense` but ``dot_general``, and those of `SwatConv` but
    ``granularity`` and ``threshold_every_steps``: masks are unstructured, thresholds exact.

    Example:
      >>> layer = SwatDense(10, weight_sparsity=0.9)
      >>> x = jnp.ones((8, 64))
      >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
      (8, 10)
    """

    weight_sparsity: float = 0.0
    activation_sparsity: float | None = None
    algorithms: Algorithms = PLAIN
    deterministic: bool = False

    @nn.compact
    def __call__(self, inputs: jax.Array, deterministic: bool | None = None) -> jax.Array:
        """Applies the linear map; see `flax.linen.Dense`."""
        _refuse(self, "dot_general", "dot_general_cls")
        own = product(self, _settings(self), _chosen(self, deterministic), self.algorithms)
        stock = nn.Dense(**_stock_fields(self, nn.Dense, dot_general=own))
        nn.share_scope(self, stock)
        return stock(inputs)


def product(
    layer: nn.Module,
    settings: LayerSparsity,
    deterministic: bool,
    algorithms: Algorithms = PLAIN,
) -> Callable[..., jax.Array]:
    """What a stock layer calls for its product in place of that of `jax.lax`.

    Args:
      layer: an `nn.Conv` or `nn.Dense` inside its call; thresholds become its variables.
      settings: how sparse it is.
      deterministic: whether this is evaluation.
      algorithms: what computes the products, if it is not.
    """
    used = PLAIN if deterministic else algorithms
    select = functools.partial(_selection, layer, settings, deterministic)

    def conv(
        lhs: jax.Array,
        rhs: jax.Array,
        window_strides: Any,
        padding: Any,
        *,
        lhs_dilation: Any,
        rhs_dilation: Any,
        dimension_numbers: Any,
        feature_group_count: int,
        precision: Any,
        **rest: Any,
    ) -> jax.Array:
        del dimension_numbers  # always channels last
        return swat_conv(
            lhs,
            rhs,
            strides=window_strides,
            padding=padding,
            input_dilation=lhs_dilation,
            kernel_dilation=rhs_dilation,
            feature_group_count=feature_group_count,
            granularity=settings.granularity,
            precision=precision,
            algorithms=used,
            **rest,
            **select(lhs, rhs),
        )

    def dot(
        lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any, precision: Any, **rest: Any
    ) -> jax.Array:
        del dimension_numbers  # always over the last axis of the input
        return swat_linear(
            lhs, rhs, precision=precision, algorithms=used, **rest, **select(lhs, rhs)
        )

    return conv if isinstance(layer, nn.Conv) else dot


def _settings(layer: SwatConv | SwatDense) -> LayerSparsity:
    weight, activation = layer.weight_sparsity, layer.activation_sparsity
    return LayerSparsity(
        weight_sparsity=weight,
        activation_sparsity=weight if activation is None else activation,
        granularity=getattr(layer, "granularity", "unstructured"),
        threshold_every_steps=getattr(layer, "threshold_every_steps", 1),
    )


def _chosen(layer: SwatConv | SwatDense, deterministic: bool | None) -> bool:
    """A call may leave the choice to the field, which is never unset."""
    return layer.deterministic if deterministic is None else deterministic


def _selection(
    layer: nn.Module,
    settings: LayerSparsity,
    deterministic: bool,
    x: jax.Array,
    kernel: jax.Array,
) -> dict[str, Any]:
    """The arguments that say to `functional` what is kept, after a refresh if one is due."""
    units = granularities.units(kernel.shape, settings.granularity)
    weight_keep = top_k.keep_count(settings.weight_sparsity, units, argument="weight_sparsity")
    activation_sparsity = settings.activation_sparsity
    activation_keep = top_k.keep_count(activation_sparsity, x.size, argument="activation_sparsity")
    period = thresholds.check_period(settings.threshold_every_steps)
    sparsities: dict[str, Any] = {
        "weight_sparsity": settings.weight_sparsity,
        "activation_sparsity": 0.0 if deterministic else activation_sparsity,
    }
    # Linear layers are cheap: exact at every step.
    if deterministic or period == 1 or isinstance(layer, nn.Dense):
        return sparsities
    age = layer.variable("thresholds", "age", jnp.zeros, (), jnp.int32)
    due = age.value == 0
    # Wide enough to hold a threshold of any type that the input may have.
    dtype = jax.dtypes.canonicalize_dtype(jnp.float64)

    def reuse(name: str, compute: Callable[[], jax.Array]) -> jax.Array:
        stored = layer.variable("thresholds", name, jnp.zeros, (), dtype)
        limit = thresholds.refresh(due, stored.value, compute)
        if not layer.is_initializing():
            stored.value = limit
        return limit

    # Masks of whole channels or filters are cheap: exact at every step.
    if settings.weight_sparsity > 0 and settings.granularity == "unstructured":
        sparsities["weight_threshold"] = reuse(
            "weight", lambda: kernels.threshold(kernel, weight_keep)
        )
    if activation_sparsity > 0:
        sparsities["activation_threshold"] = reuse(
            "activation", lambda: kernels.threshold(x, activation_keep)
        )
    if not layer.is_initializing():
        age.value = (age.value + 1) % period
    return sparsities


def _stock_fields(layer: nn.Module, stock: type[nn.Module], **own: Any) -> dict[str, Any]:
    """The fields of ``layer`` that ``stock`` has too, with ``own`` in their place where given."""
    names = {field.name for field in dataclasses.fields(stock) if field.init}
    fields = {name: getattr(layer, name) for name in names - {"parent", "name"}}
    if fields["promote_dtype"] is promote_dtype:
        fields["promote_dtype"] = keep_kernel_dtype
    return fields | own


def keep_kernel_dtype(
    inputs: jax.Array, kernel: jax.Array, bias: jax.Array | None, *, dtype: Any = None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Stock type promotion but for the kernel: the mask is taken from the master weights."""
    common = canonicalize_dtype(inputs, kernel, bias, dtype=dtype)
    return (
        jnp.asarray(inputs, common),
        kernel,
        None if bias is None else jnp.asarray(bias, common),
    )


def _refuse(layer: nn.Module, *names: str) -> None:
    for name in names:
        if getattr(layer, name) is not None:
            raise UsageError(f"{name} cannot be given: it is what a SWAT layer replaces")
