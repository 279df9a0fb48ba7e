"""`fuse`: a function whose batch norms become one pass with what follows them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from swat_jax.fusion.marks import marking
from swat_jax.fusion.report import Report
from swat_jax.fusion.rewrite import Findings, evaluate

_log = logging.getLogger("swat_jax.fuse")


def fuse(fn: Callable[..., Any]) -> Fused:
    """``fn``, computed with batch norm, addition, ReLU and packing in one pass.

    ...
    """
    return Fused(fn)


class Fused:
    """A function as `fuse` returns it.

    Attributes:
      report: what was fused when the function was traced last; None before.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn
        self._said: set[str] = set()
        self.report: Report | None = None
        functools.update_wrapper(self, fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the function itself."""
        leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=_is_object)
        objects = tuple(leaf for leaf in leaves if _is_object(leaf))
        arrays = [leaf for leaf in leaves if _is_array(leaf)]
        graph, state = nnx.split(objects)
        before = tuple(nnx.to_flat_state(state))
        changed: list[tuple[Any, Any]] = []

        def run(values: list[Any], arrays: list[Any]) -> Any:
            flat = {
                path: variable.replace(value)
                for (path, variable), value in zip(before, values, strict=True)
            }
            inner = nnx.merge(graph, nnx.from_flat_state(flat), copy=True)
            for one in inner:
                for path, module in nnx.iter_modules(one):
                    found.names[id(module)] = "/".join(map(str, path))
            ours, theirs = iter(inner), iter(arrays)
            filled = [
                next(ours) if _is_object(leaf) else next(theirs) if _is_array(leaf) else leaf
                for leaf in leaves
            ]
            args, kwargs = jax.tree.unflatten(tree, filled)
            output = self._fn(*args, **kwargs)
            given = {path: value for (path, _), value in zip(before, values, strict=True)}
            changed[:] = [
                (path, variable)
                for path, variable in nnx.to_flat_state(nnx.state(inner))
                if variable.get_value() is not given.get(path)
            ]
            return output, [variable.get_value() for _, variable in changed]

        values = [variable.get_value() for _, variable in before]
        with marking() as found:
            jaxpr, shapes = jax.make_jaxpr(run, return_shape=True)(values, arrays)
        findings = Findings(lost=found.notes)
        results = evaluate(jaxpr, jax.tree.leaves((values, arrays)), findings)
        self._tell(findings.report())
        output, new = jax.tree.unflatten(jax.tree.structure(shapes), results)
        if changed:
            pairs = zip(changed, new, strict=True)
            flat = {path: variable.replace(value) for (path, variable), value in pairs}
            nnx.update(objects, nnx.from_flat_state(flat))
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
    return isinstance(leaf, nnx.Pytree)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)
