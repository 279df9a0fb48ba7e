"""Weights under their masks, outside of a training step: evaluation, reports, SWAT-M's budgets."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from swat_jax.build import sparse_layers
from swat_jax.network import Tree, lookup, replace
from swat_jax.sparsity import distribution, granularity, top_k


@dataclasses.dataclass(frozen=True)
class SparseLayer:
    """What is fixed of a layer whose weights are sparse.

    Attributes:
      path: where it sits, such as ``stage1/0/conv1``.
      shape: of its kernel.
      granularity: what its mask selects.
      weight_sparsity: fraction of zeros; under SWAT-M that of the start.
    """

    path: str
    shape: tuple[int, ...]
    granularity: str
    weight_sparsity: float

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def layers_of(model: nnx.Module) -> tuple[SparseLayer, ...]:
    """The SWAT layers of a model."""
    return tuple(
        SparseLayer(path, layer.kernel.get_value().shape, layer.granularity, layer.weight_sparsity)
        for path, layer in sparse_layers(model)
    )


def masks(
    layers: tuple[SparseLayer, ...],
    params: Tree,
    budgets: Tree,
    thresholds: Tree | None = None,
) -> dict[str, jax.Array]:
    """The weight mask of each layer, by path.

    Args:
      layers: from `layers_of`.
      params: master weights.
      budgets: how many weights a layer keeps, where that is state.
      thresholds: stored thresholds, used where a layer has one; None: all masks are exact.
    """
    found = {}
    for layer in layers:
        kernel = lookup(params, layer.path)["kernel"]
        stored = lookup(thresholds or {}, f"{layer.path}/weight_threshold")
        if stored is None:
            budget = lookup(budgets, f"{layer.path}/weight_budget")
            keep = budget
            if budget is None:
                units = granularity.units(layer.shape, layer.granularity)
                keep = top_k.keep_count(layer.weight_sparsity, units)
            stored = granularity.weight_threshold(kernel, layer.granularity, keep)
        found[layer.path] = granularity.weight_mask(kernel, layer.granularity, stored)
    return found


def prune(
    layers: tuple[SparseLayer, ...],
    params: Tree,
    budgets: Tree,
    thresholds: Tree | None = None,
) -> Tree:
    """The weights with exact zeros off the masks (see `masks`); what is not sparse stays."""
    for path, mask in masks(layers, params, budgets, thresholds).items():
        kernel = lookup(params, path)["kernel"]
        pruned = jnp.where(mask, kernel, jnp.zeros((), kernel.dtype))
        params = replace(params, f"{path}/kernel", pruned)
    return params


def redistribute(
    layers: tuple[SparseLayer, ...], kept: dict[str, jax.Array], momentum: Tree, budgets: Tree
) -> Tree:
    """SWAT-M: budgets in proportion to the mean |momentum| of each layer's kept weights.

    Args:
      layers: from `layers_of`.
      kept: this step's masks, by path.
      momentum: the optimizer's momentum buffer after the step, a tree like the weights.
      budgets: the present ones.

    Returns:
      The new budgets; they add up to what a uniform distribution would keep.
    """
    if not budgets:
        return budgets
    means = []
    for layer in layers:
        mask = kept[layer.path]
        buffer = jnp.abs(lookup(momentum, layer.path)["kernel"])
        total = jnp.sum(jnp.where(mask, buffer, 0))
        means.append(total / jnp.maximum(jnp.sum(mask), 1))
    sizes = {layer.path: layer.size for layer in layers}
    total = distribution.momentum_total(sizes, layers[0].weight_sparsity)
    keeps = distribution.momentum_budgets(jnp.stack(means), np.array(list(sizes.values())), total)
    for layer, keep in zip(layers, keeps, strict=True):
        budgets = replace(budgets, f"{layer.path}/weight_budget", keep)
    return budgets


def count_zeros(layers: tuple[SparseLayer, ...], params: Tree) -> tuple[int, int]:
    """Zero weights and all weights of the given layers."""
    kernels = [lookup(params, layer.path)["kernel"] for layer in layers]
    return sum(int(jnp.sum(k == 0)) for k in kernels), sum(k.size for k in kernels)
