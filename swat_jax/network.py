"""An NNX model as a pure function: its structure on one side, dicts of arrays on the other.

Training works on the pure form, since `jax.jit` over dicts of arrays costs a tenth of the host
time of `nnx.jit` over a model. The arrays of a model are sorted into collections by the type of
their variable; each is a nested dict whose keys are the model's attribute names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from swat_jax.layer_state import (
    ActivationThreshold,
    MeasuredSparsity,
    ThresholdAge,
    WeightBudget,
    WeightThreshold,
)

Tree = dict[str, Any]

# What training changes, and a checkpoint holds.
STATEFUL = {
    "params": nnx.Param,
    "batch_stats": nnx.BatchStat,
    "weight_thresholds": WeightThreshold,
    "activation_thresholds": ActivationThreshold,
    "budgets": WeightBudget,
}
_ALL = {**STATEFUL, "ages": ThresholdAge, "rngs": nnx.RngState, "measured": MeasuredSparsity}


@dataclasses.dataclass(frozen=True)
class Network:
    """The structure of a model and the types of its arrays.

    Attributes:
      graph: what `flax.nnx.split` calls the graph definition.
      types: collection name -> `flax.nnx.State` of abstract arrays.
    """

    graph: Any
    types: Mapping[str, Any]

    def model(
        self, collections: Mapping[str, Tree], *, key: jax.Array | None = None, age: Any = 0
    ) -> nnx.Module:
        """The model with these arrays.

        Args:
          collections: values of every collection in `STATEFUL`; one that the model has not may be
            missing.
          key: what dropout draws from; None: a constant, for evaluation.
          age: int32 scalar, the age of all thresholds; 0 makes the next call recompute them.
        """
        streams = jax.random.key(0) if key is None else key
        number = iter(range(10**9))

        def fill(name: str, path: tuple[Any, ...], kind: Any) -> Any:
            if name == "ages":
                return jnp.asarray(age, kind.dtype)
            if name == "rngs":
                if jnp.issubdtype(kind.dtype, jax.dtypes.prng_key):
                    return jax.random.fold_in(streams, next(number))
                return jnp.zeros(kind.shape, kind.dtype)
            value: Any = collections[name]
            for part in path:
                value = value[str(part)]
            return value

        states = []
        for name, types in self.types.items():
            flat = {
                path: variable.replace(fill(name, path, variable.get_value()))
                for path, variable in nnx.to_flat_state(types)
            }
            states.append(nnx.from_flat_state(flat))
        return nnx.merge(self.graph, *states, copy=True)


def split(model: nnx.Module) -> tuple[Network, dict[str, Tree]]:
    """Takes a model apart.

    Returns:
      Its structure, and the values of the collections in `STATEFUL`.
    """
    graph, *states = nnx.split(model, *_ALL.values())
    types = {name: jax.eval_shape(lambda s=s: s) for name, s in zip(_ALL, states, strict=True)}
    return Network(graph, types), values(model)


def values(model: nnx.Module) -> dict[str, Tree]:
    """The arrays of a model by collection, those of `STATEFUL`."""
    return {name: collection(model, kind) for name, kind in STATEFUL.items()}


def collection(model: nnx.Module, kind: type[nnx.Variable[Any]]) -> Tree:
    """The arrays of one variable type as a nested dict with text keys."""
    return tree_of(nnx.state(model, kind))


def tree_of(state: Any) -> Tree:
    """The arrays of an `flax.nnx.State` as a nested dict with text keys."""
    tree: Tree = {}
    for path, variable in nnx.to_flat_state(state):
        *parents, last = map(str, path)
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = variable.get_value()
    return tree


def lookup(tree: Tree, path: str) -> Any:
    """The node of a nested dict at a path such as ``stage1/0/conv1``, or None.

    The path of a layer that is the whole model is empty, so one may start with a slash.
    """
    node: Any = tree
    for part in filter(None, path.split("/")):
        if part not in node:
            return None
        node = node[part]
    return node


def replace(tree: Tree, path: str, value: Any) -> Tree:
    """A copy of a nested dict with another value at a path; what is beside it is shared."""
    first, _, rest = path.lstrip("/").partition("/")
    return {**tree, first: replace(tree[first], rest, value) if rest else value}
