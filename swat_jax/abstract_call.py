"""Calling a model for what shows on the way, without computing anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx


def abstract_call(
    model: nnx.Module,
    prepare: Callable[[Any, Sequence[jax.Array]], None],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Traces one call of a copy of a model.

    Args:
      model: any NNX model, with arrays or abstract (`nnx.eval_shape`); it stays as it is.
      prepare: gets the copy and the arrays that it is called with, before the call; may change it.
      args: of the call. Arrays and `jax.ShapeDtypeStruct` become abstract wherever they are in it;
        anything else, such as ``train=True``, is passed as it is.
      kwargs: of the call, likewise.

    Returns:
      What the call returns, abstract.

    Example:
      >>> x = jax.ShapeDtypeStruct((2, 3), "float32")
      >>> layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
      >>> abstract_call(layer, lambda model, inputs: None, (x,), {}).shape
      (2, 4)
    """
    graph, state = nnx.split(model)
    leaves, structure = jax.tree.flatten((tuple(args), dict(kwargs)))
    arrays = {at: leaf for at, leaf in enumerate(leaves) if _is_array(leaf)}

    def forward(state: Any, arrays: dict[int, jax.Array]) -> Any:
        traced: Any = nnx.merge(graph, state)
        prepare(traced, list(arrays.values()))
        given = [arrays.get(at, leaf) for at, leaf in enumerate(leaves)]
        positional, named = jax.tree.unflatten(structure, given)
        return traced(*positional, **named)

    return jax.eval_shape(forward, state, arrays)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
