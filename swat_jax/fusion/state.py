"""The variables of NNX objects by their paths, and what a function changed of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from swat_jax.errors import UsageError

OTHER_CHANGES = (
    "fuse: the function changes more of its arguments than the values of variables, such as "
    "a mode (`model.eval()`), an attribute, or which modules and variables there are; do that "
    "outside of it"
)

# Where a variable sits in an object.
Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """An object without its arrays.

    Attributes:
      graph: as `flax.nnx.split` has it.
      variables: the paths of the object's state, each with its variable.
    """

    graph: Any
    variables: tuple[tuple[Path, Any], ...]

    def merge(self, values: Iterable[Any]) -> Any:
        """The object with these values, one for each of `variables`."""
        pairs = zip(self.variables, values, strict=True)
        flat = {path: variable.replace(value) for (path, variable), value in pairs}
        return nnx.merge(self.graph, nnx.from_flat_state(flat), copy=True)

    def changes(self, node: Any, values: Sequence[Any]) -> Changes:
        """What a function changed of an object that `merge` made of these values."""
        before = {path: value for (path, _), value in zip(self.variables, values, strict=True)}
        after = dict(nnx.to_flat_state(nnx.state(node)))
        new = {
            path: variable
            for path, variable in after.items()
            if path not in before or variable.get_value() is not before[path]
        }
        return Changes(new, tuple(path for path in before if path not in after))


@dataclasses.dataclass(frozen=True, eq=False)
class Changes:
    """What a function changed of an object.

    Attributes:
      new: path -> variable with a new value.
      gone: paths of variables that are None now.
    """

    new: Mapping[Path, Any]
    gone: tuple[Path, ...]

    @property
    def values(self) -> list[jax.Array]:
        """The new values."""
        return [variable.get_value() for variable in self.new.values()]

    def apply(self, node: Any, values: Iterable[Any]) -> None:
        """Changes an object likewise, with these values in place of `values`."""
        known, present = {}, dict(nnx.to_flat_state(nnx.state(node)))
        for (path, variable), value in zip(self.new.items(), values, strict=True):
            new = variable.replace(value)
            if path in present:
                known[path] = new
            else:
                owner, name = _owner(node, path)
                setattr(owner, str(name), nnx.data(new))
        if known:
            nnx.update(node, nnx.from_flat_state(known))
        for path in self.gone:
            owner, name = _owner(node, path)
            setattr(owner, str(name), nnx.data(None))


def split(node: Any) -> tuple[Structure, list[Any]]:
    """Takes an object, or a tuple of them, apart: its structure, and the values of its state."""
    graph, state = nnx.split(node)
    variables = tuple(nnx.to_flat_state(state))
    return Structure(graph, variables), [variable.get_value() for _, variable in variables]


def values_at(node: Any, paths: Iterable[Path]) -> list[Any]:
    """The values of an object's variables at these paths."""
    flat = dict(nnx.to_flat_state(nnx.state(node)))
    return [flat[path].get_value() for path in paths]


def _owner(node: Any, path: Path) -> tuple[Any, Any]:
    *parents, name = path
    try:
        for part in parents:
            is_attribute = isinstance(part, str) and hasattr(node, part)
            node = getattr(node, part) if is_attribute else node[part]
    except (TypeError, LookupError) as error:
        raise UsageError(OTHER_CHANGES) from error
    return node, name
