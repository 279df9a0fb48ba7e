"""What stands between layers, recognised in the forms that JAX and Flax give it."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from swat_jax.fusion.program import START, Program, Step, called, is_wrapper, open_jaxpr

_CASTS = ("convert_element_type", "broadcast_in_dim", "pvary", "pcast")
_MOST_POSITIONS = 255  # what `functional.max_pool` takes


@dataclasses.dataclass(frozen=True)
class Operation:
    """The one operation of a step, out of what it may be wrapped in.

    Attributes:
      name: of the primitive.
      params: of the primitive.
      operands: numbers of values, or literals.
    """

    name: str
    params: Any
    operands: tuple[Any, ...]


def relu_of(program: Program, step: Step, number: int) -> bool:
    """Whether a step is the ReLU of a value: the larger of it and zero."""
    operation = _operation(program, step)
    if operation is None or operation.name != "max":
        return False
    others = [operand for operand in operation.operands if operand != number]
    return len(others) == 1 and isinstance(others[0], Literal) and _is_zero(others[0])


def addend(program: Program, step: Step, number: int) -> int | None:
    """The number of what a step adds to a value, if it is of the same shape and type."""
    operation = _operation(program, step)
    if operation is None or operation.name not in ("add", "add_any"):
        return None
    others = [operand for operand in operation.operands if operand != number]
    if len(others) != 1 or not isinstance(others[0], int):
        return None
    one, other = program.types[number], program.types[others[0]]
    return others[0] if (one.shape, one.dtype) == (other.shape, other.dtype) else None


def max_pooling(program: Program, step: Step) -> dict[str, Any] | None:
    """The arguments with which `functional.max_pool` does what a step does, or None."""
    operation = _operation(program, step)
    if operation is None or operation.name != "reduce_window_max":
        return None
    params = operation.params
    window, strides = params["window_dimensions"], params["window_strides"]
    padding = tuple(map(tuple, params["padding"]))
    dilations = (*params["base_dilation"], *params["window_dilation"])
    # Batch and channels are not pooled.
    is_plain = len(window) >= 3 and all(
        (window[axis], strides[axis], padding[axis]) == (1, 1, (0, 0)) for axis in (0, -1)
    )
    if not is_plain or set(dilations) != {1} or math.prod(window) > _MOST_POSITIONS:
        return None
    return {"window_shape": window[1:-1], "strides": strides[1:-1], "padding": padding[1:-1]}


def _operation(program: Program, step: Step) -> Operation | None:
    """The one operation of a step, or None if there are several."""
    equation = step.equation
    operands = tuple(_literal(program, number) or number for number in step.inputs)
    while is_wrapper(equation):
        if equation.primitive.name == "custom_jvp_call" and not _is_jax_relu(equation):
            return None
        body = open_jaxpr(called(equation))
        if body.constvars:
            return None
        known: dict[Any, Any] = dict(zip(body.invars, operands, strict=True))
        rest = []
        for inner in body.eqns:
            atoms = tuple(
                atom if isinstance(atom, Literal) else known.get(atom) for atom in inner.invars
            )
            if _casts(inner) and isinstance(atoms[0], Literal):
                known[inner.outvars[0]] = atoms[0]
            else:
                rest.append((inner, atoms))
        if len(rest) != 1:
            return None
        ((equation, operands),) = rest
        if list(body.outvars) != list(equation.outvars):
            return None
    return Operation(equation.primitive.name, equation.params, operands)


def _is_jax_relu(equation: Any) -> bool:
    """Whether a function with a derivative of its own is `jax.nn.relu`.

    Others may have the same values and another derivative, so it is told by where it was written.
    """
    return _source(equation) == _source_of_relu()


@functools.cache
def _source_of_relu() -> str:
    equation = jax.make_jaxpr(jax.nn.relu)(jax.ShapeDtypeStruct((), np.float32)).eqns[0]
    while equation.primitive.name != "custom_jvp_call":
        equation = open_jaxpr(called(equation)).eqns[0]
    return _source(equation)


def _source(equation: Any) -> str:
    return open_jaxpr(called(equation)).debug_info.func_src_info


def _literal(program: Program, number: int) -> Any:
    """The literal that a value is, but for its type and shape; or None."""
    while number not in program.literals:
        place = program.defined[number]
        if place == START or not _casts(program.steps[place].equation):
            return None
        number = program.steps[place].inputs[0]
    return program.literals[number]


def _casts(equation: Any) -> bool:
    """Whether a scalar stays what it is, in another type or shape."""
    return equation.primitive.name in _CASTS and len(equation.invars) == 1


def _is_zero(literal: Any) -> bool:
    return literal.aval.shape == () and not np.any(np.asarray(literal.val))
