"""A network from the registry with the sparsity that a config asks for."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx

from swat_jax import functional, kernels, layer_table, models
from swat_jax.dropout import Dropout
from swat_jax.errors import UsageError
from swat_jax.layers import SwatConv, SwatLinear
from swat_jax.models import LayerTypes
from swat_jax.norm_relu import BatchNormRelu, NormRelu
from swat_jax.sparsity import distribution, granularity, thresholds, top_k

PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def build(
    config: Any, *, num_classes: int, image_shape: tuple[int, int, int], rngs: nnx.Rngs
) -> nnx.Module:
    """Builds the network of a config; the method "dense" gets stock Flax layers.

    Args:
      config: with the keys of `swat_jax.recipe.base`.
      num_classes: width of the output.
      image_shape: (H, W, C) of one image.
      rngs: source of keys for initial weights and dropout.

    Raises:
      UsageError: an unknown name, or a sparsity that cannot be had.

    Example:
      >>> from swat_jax import config_file
      >>> config = config_file.load("configs/digits.py:u90")
      >>> model = build(config, num_classes=10, image_shape=(8, 8, 1), rngs=nnx.Rngs(0))
      >>> model.stage1[0].conv1.weight_sparsity
      0.9
    """
    check(config)
    if config.sparsity.distribution == "dense":
        norm_relu = BatchNormRelu if config.model.fused_batch_norm else NormRelu
        return _create(config, num_classes, image_shape, LayerTypes(norm_relu=norm_relu), rngs)
    fused = config.model.fused_batch_norm
    pack = packs(config.sparsity, kernels.packs())
    if fused is None:
        fused = pack or kernels.packs()
    layers = LayerTypes(
        functools.partial(SwatConv, granularity=config.sparsity.granularity, pack=pack),
        functools.partial(SwatLinear, pack=pack),
        BatchNormRelu if fused else NormRelu,
        functional.max_pool if fused else nnx.max_pool,
        Dropout if fused else nnx.Dropout,
    )
    model = _create(config, num_classes, image_shape, layers, rngs)
    table = layer_table.network_table(
        config.model.name, num_classes=num_classes, image_shape=image_shape
    )
    wanted = layer_table.sparsities(table, config.sparsity)
    for path, layer in sparse_layers(model):
        layer.set_sparsity(
            weight_sparsity=wanted.weight[path],
            activation_sparsity=wanted.activation[path],
            threshold_every_steps=config.sparsity.threshold_every_steps,
            dynamic_budget=config.sparsity.distribution == "momentum",
        )
    return model


def packs(sparsity: Any, by_default: bool) -> bool:
    """Whether a network keeps its activations packed.

    Args:
      sparsity: `config.sparsity`.
      by_default: what it does where the config leaves it open, but under momentum: budgets that
        move may keep all of an input, and with room for that packing saves next to none.
    """
    if sparsity.pack is None:
        return by_default and sparsity.distribution != "momentum"
    return sparsity.pack


def build_dense(
    config: Any, *, num_classes: int, image_shape: tuple[int, int, int], rngs: nnx.Rngs
) -> nnx.Module:
    """The same network of stock layers: what pruned weights are evaluated in."""
    return _create(config, num_classes, image_shape, LayerTypes(), rngs)


def sparse_layers(model: nnx.Module) -> Iterator[tuple[str, SwatConv | SwatLinear]]:
    """The SWAT layers of any NNX model, each with its path, such as ``stage1/0/conv1``."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, SwatConv | SwatLinear):
            yield "/".join(map(str, path)), module


def check(config: Any) -> None:
    """Refuses a network that cannot be had, before its data are opened or anything is built.

    Raises:
      UsageError: names the key, what it is and what is allowed.
    """
    check_sparsity(config.sparsity)
    if config.precision not in PRECISIONS:
        raise UsageError(
            f"config.precision must be one of {', '.join(PRECISIONS)}; got {config.precision!r}"
        )
    models.check(config.model.name, config.model.dropout_rate)
    kernels.backend()


def check_sparsity(sparsity: Any) -> None:
    """Refuses a `config.sparsity` that no network can meet.

    Raises:
      UsageError: names the key, what it is and what is allowed.
    """
    key = "config.sparsity."
    if sparsity.distribution not in distribution.names():
        raise UsageError(
            f"{key}distribution must be one of {', '.join(distribution.names())}; "
            f"got {sparsity.distribution!r}"
        )
    if sparsity.granularity not in granularity.names():
        raise UsageError(
            f"{key}granularity must be one of {', '.join(granularity.names())}; "
            f"got {sparsity.granularity!r}"
        )
    top_k.check_sparsity(sparsity.weight, f"{key}weight")
    top_k.check_sparsity(sparsity.activation, f"{key}activation")
    thresholds.check_period(sparsity.threshold_every_steps, f"{key}threshold_every_steps")
    exact = sparsity.exact_epochs
    if isinstance(exact, bool) or not isinstance(exact, int) or exact < 0:
        raise UsageError(f"{key}exact_epochs must be a whole number >= 0, got {exact!r}")
    if sparsity.distribution == "dense" and (sparsity.weight or sparsity.activation):
        raise UsageError(
            f"{key}weight and {key}activation must be 0 with the distribution dense, got "
            f"{sparsity.weight} and {sparsity.activation}; --config FILE:dense sets all three"
        )
    if sparsity.distribution in ("erk", "momentum") and sparsity.first_layer_dense:
        raise UsageError(
            f"{key}first_layer_dense must be False with the distribution {sparsity.distribution}, "
            f"which decides about every layer, got {sparsity.first_layer_dense!r}"
        )
    if sparsity.distribution == "momentum":
        if sparsity.granularity != "unstructured":
            raise UsageError(
                f"{key}granularity must be unstructured with the distribution momentum, "
                f"got {sparsity.granularity!r}"
            )
        if sparsity.activation != sparsity.weight:
            raise UsageError(
                f"{key}activation must equal {key}weight ({sparsity.weight}) with the "
                f"distribution momentum, where one budget serves both; got {sparsity.activation}"
            )


def _create(
    config: Any,
    num_classes: int,
    image_shape: tuple[int, int, int],
    layers: LayerTypes,
    rngs: nnx.Rngs,
) -> nnx.Module:
    return models.create(
        config.model.name,
        num_classes=num_classes,
        in_channels=image_shape[-1],
        layers=layers,
        dtype=PRECISIONS[config.precision],
        dropout_rate=config.model.dropout_rate,
        batch_norm_axis_name="data" if config.sync_batch_norm else None,
        rngs=rngs,
    )
