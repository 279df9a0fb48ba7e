"""`fuse`: a function whose batch norms become one pass with what follows them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from swat_jax.errors import UsageError
from swat_jax.fusion.marks import marking
from swat_jax.fusion.report import Report
from swat_jax.fusion.rewrite import Findings, evaluate
from swat_jax.fusion.state import OTHER_CHANGES, Changes, split

_log = logging.getLogger("swat_jax.fuse")


def fuse(fn: Callable[..., Any]) -> Fused:
    """``fn``, with every batch norm, what follows it and what SWAT layers keep of it in one pass.

    The function returns the same, changes the same state and has the same gradients, but for
    rounding: batch norm takes its statistics in two passes, a product's gradients are added in
    another order, and the bias of a conv before a batch norm in training mode, whose gradient is
    zero but for rounding, gets none. What it keeps for its backward pass is what the networks of
    this package keep: of an activation between batch norm and a SWAT layer the packed values, and
    of a batch norm its input and, after an addition, one bit per value.

    What is recognised:

    * `flax.nnx.BatchNorm` over the last axis, in training mode, or in evaluation mode before
      layers that pack;
    * after it an addition of a value of the same shape and type, ReLU (`jax.nn.relu`,
      `flax.nnx.relu` or ``jnp.maximum(x, 0)``; at zero all have the gradient of the first, none)
      and, where nothing was added, `flax.nnx.Dropout` or `swat_jax.dropout.Dropout`;
    * `swat_jax.SwatConv` and `swat_jax.SwatLinear` that read the result, one or more of them;
    * max pooling (`flax.nnx.max_pool`) of the result, which then keeps who won, not the values;
    * what else reads the result, or the input of the batch norm: it gets a dense copy, whose
      gradient joins within the pass;
    * all of that in functions under `jax.jit`, `jax.checkpoint` and `jax.lax.scan` too.

    Anything else is evaluated as it is. What was done is in the attribute ``report`` after a call;
    its summary is logged (`logging`, ``swat_jax.fuse``), and once, as a warning, what had to be
    left.

    Bits of `flax.nnx.Dropout` are those that it would have drawn. `swat_jax.dropout.Dropout` draws
    other bits of the same key in the pass, in less time, as it does in this package's networks.

    Args:
      fn: takes and returns pytrees, NNX models and other NNX objects among the arguments, which it
        may change. Like a function under `jax.jit` it must not change objects that are no
        arguments. Python numbers and strings are constants.

    Returns:
      A function with the same arguments and results. It may be differentiated, mapped, compiled and
      put into `jax.shard_map`. It is traced at every call, so compile what calls it.

    Example:
      A user's network, trained by a user's step; the one word that is new is ``fuse``.

      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from swat_jax.layers import SwatConv
      >>> class Network(nnx.Module):
      ...     def __init__(self, rngs):
      ...         options = {"weight_sparsity": 0.9, "pack": True, "rngs": rngs}
      ...         self.conv1 = SwatConv(3, 8, (3, 3), **options)
      ...         self.norm = nnx.BatchNorm(8, rngs=rngs)
      ...         self.conv2 = SwatConv(8, 4, (3, 3), **options)
      ...
      ...     def __call__(self, x):
      ...         return self.conv2(nnx.relu(self.norm(self.conv1(x))))
      >>> @fuse
      ... def loss(model, x):
      ...     return jnp.mean(model(x) ** 2)
      >>> model = Network(nnx.Rngs(0))
      >>> value, gradients = nnx.jit(nnx.value_and_grad(loss))(model, jnp.ones((2, 8, 8, 3)))
      >>> print(loss.report)
      1 of 1 batch norms in passes of their own, 1 of them with what SWAT layers keep
      norm (2x8x8x8): one pass of batch norm, relu; packs for conv2
    """
    return Fused(fn)


class Fused:
    """A function as `fuse` returns it; called like the one that it was made of.

    Attributes:
      report: what was fused when the function was traced last; None before.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        functools.update_wrapper(self, fn)
        # After what `fn` has by the same names.
        self._fn = fn
        self._said: set[str] = set()
        self.report: Report | None = None

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """As a method, with the object as first argument."""
        return self if instance is None else functools.partial(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the function itself."""
        leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=_is_object)
        objects = tuple(leaf for leaf in leaves if _is_object(leaf))
        arrays = [leaf for leaf in leaves if _is_array(leaf)]
        structure, values = split(objects)
        changes: list[Changes] = []
        after: list[Any] = []

        def run(values: list[Any], arrays: list[Any]) -> Any:
            inner = structure.merge(values)
            for one in inner:
                for path, module in () if _is_variable(one) else nnx.iter_modules(one):
                    found.names[id(module)] = "/".join(map(str, path))
            ours, theirs = iter(inner), iter(arrays)
            filled = [
                next(ours) if _is_object(leaf) else next(theirs) if _is_array(leaf) else leaf
                for leaf in leaves
            ]
            args, kwargs = jax.tree.unflatten(tree, filled)
            output = self._fn(*args, **kwargs)
            changes.append(structure.changes(inner, values))
            after.append(nnx.graphdef(inner))
            return output, changes[-1].values

        with marking() as found:
            jaxpr, shapes = jax.make_jaxpr(run, return_shape=True)(values, arrays)
        findings = Findings(lost=found.notes)
        results = evaluate(jaxpr, jax.tree.leaves((values, arrays)), findings)
        self._tell(findings.report())
        output, new = jax.tree.unflatten(jax.tree.structure(shapes), results)
        changes[-1].apply(objects, new)
        if nnx.graphdef(objects) != after[-1]:
            raise UsageError(OTHER_CHANGES)
        return output

    def _tell(self, report: Report) -> None:
        """Logs what is new: one line, and what could not be fused."""
        self.report = report
        lines = [(logging.INFO, report.summary)]
        lines += [(logging.WARNING, line) for line in report.lost]
        for level, line in lines:
            if line not in self._said:
                self._said.add(line)
                _log.log(level, "fuse: %s", line)


def _is_object(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Pytree) or _is_variable(leaf)


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)
