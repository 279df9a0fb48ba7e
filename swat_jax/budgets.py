"""SWAT-M in training loops of your own: an optimizer step after which budgets move."""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax import nnx

from swat_jax import network, pruning
from swat_jax.build import sparse_layers
from swat_jax.errors import UsageError
from swat_jax.layer_state import WeightBudget, WeightThreshold
from swat_jax.network import Tree


def update_with_budgets(
    model: nnx.Module, optimizer: nnx.Optimizer[Any], grads: Any, **kwargs: Any
) -> None:
    """``optimizer.update(model, grads)``, then SWAT-M's redistribution.

    A layer's share of all kept weights becomes proportional to the mean momentum of the weights
    that it kept in this step. Layers without a budget are left alone. New budgets take effect when
    thresholds are next recomputed.

    Args:
      model: with layers made by ``sparsify(..., distribution="momentum")``, after the forward pass
        that made the gradients.
      optimizer: of the model, with one momentum buffer: that of `optax.trace` (which is `optax.sgd`
        with momentum), or the first moment of `optax.adam` and its kin.
      grads: of the model's loss.
      kwargs: for the optimizer.

    Raises:
      UsageError: no layer has a budget, or the optimizer has no momentum, or several buffers of it.

    Example:
      >>> import swat_jax
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs))
      >>> model = swat_jax.sparsify(model, sparsity=0.75, distribution="momentum")
      >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
      >>> grads = nnx.grad(lambda model: (model(jax.numpy.ones((2, 8))) ** 2).sum())(model)
      >>> update_with_budgets(model, optimizer, grads)
      >>> sum(int(layer.weight_budget[...]) for layer in model.layers)
      64

    Source: SWAT (Raihan & Aamodt, NeurIPS 2020), SWAT-M.
    """
    with_budget = {
        path: layer for path, layer in sparse_layers(model) if layer.weight_budget is not None
    }
    if not with_budget:
        raise UsageError(
            "model has no layer with a budget: sparsify it with distribution='momentum'"
        )
    layers = tuple(one for one in pruning.layers_of(model) if one.path in with_budget)
    params = network.collection(model, nnx.Param)
    budgets = network.collection(model, WeightBudget)
    # The masks of the step that made the gradients, by the thresholds that it used.
    kept = pruning.masks(layers, params, budgets, network.collection(model, WeightThreshold))
    _momentum(optimizer)
    optimizer.update(model, grads, **kwargs)
    budgets = pruning.redistribute(layers, kept, _momentum(optimizer), budgets)
    for path, layer in with_budget.items():
        assert layer.weight_budget is not None
        layer.weight_budget[...] = network.lookup(budgets, f"{path}/weight_budget")


def _momentum(optimizer: nnx.Optimizer[Any]) -> Tree:
    """The momentum buffer of an optimizer, a tree like the weights."""
    kinds = optax.TraceState | optax.ScaleByAdamState
    nodes = jax.tree.leaves(optimizer.opt_state, is_leaf=lambda node: isinstance(node, kinds))
    found = [
        node.trace if isinstance(node, optax.TraceState) else node.mu
        for node in nodes
        if isinstance(node, kinds)
    ]
    if len(found) != 1:
        raise UsageError(
            "optimizer must have one momentum buffer, as optax.sgd with momentum and optax.adam "
            f"have; it has {len(found)}"
        )
    return network.tree_of(found[0])
