"""A jaxpr as a flat list of steps over numbered values, and who reads which of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend.core import Literal, jaxprs_in_params

from swat_jax.fusion.marks import Mark, layer_call_p

# Calls that are nothing but their body: the names of their primitives.
_CALLS = ("jit", "pjit", "closed_call", "core_call")
START = -1  # where inputs and constants are defined


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One equation.

    Attributes:
      equation: the jaxpr's; its own variables mean nothing here.
      inputs: numbers of the values that it reads.
      outputs: numbers of the values that it makes.
    """

    equation: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def mark(self) -> Mark | None:
        """What the step stands for, if it is the call of a layer."""
        return self.equation.params["mark"] if self.equation.primitive is layer_call_p else None

    @property
    def name(self) -> str:
        """Of the layer, of the function that is called, or of the primitive."""
        if self.mark is not None:
            return self.mark.name
        equation = self.equation
        while True:
            name = equation.params.get("name")
            if isinstance(name, str):
                return name
            inside = open_jaxpr(called(equation)).eqns if is_wrapper(equation) else ()
            if len(inside) != 1:
                return equation.primitive.name
            (equation,) = inside

    @functools.cached_property
    def has_marks_inside(self) -> bool:
        """Whether a layer is called in a jaxpr that the equation carries."""
        return any(map(_has_marks, jaxprs_in_params(self.equation.params)))


class Program:
    """The steps of a jaxpr, in their order, without those that nobody needs.

    Bodies of `jax.jit` that call layers are part of it.

    Attributes:
      steps: what is computed.
      inputs: numbers of the inputs.
      outputs: numbers of the outputs.
      constants: number -> value.
      literals: number -> literal, of those constants that are written into the program.
      types: number -> abstract value.
      readers: number -> (position of the step, position among its inputs), in order; not of
        outputs.
      defined: number -> position of the step that makes it, or `START`.
    """

    def __init__(self, jaxpr: Any) -> None:
        """Takes a jaxpr, closed or without constants."""
        self.steps: list[Step] = []
        self.constants: dict[int, Any] = {}
        self.literals: dict[int, Any] = {}
        self.types: dict[int, Any] = {}
        body = open_jaxpr(jaxpr)
        self.inputs = [self._new(variable.aval) for variable in body.invars]
        self.outputs = self._add(jaxpr, self.inputs)
        self._drop_what_nobody_needs()
        self.readers: dict[int, list[tuple[int, int]]] = {number: [] for number in self.types}
        self.defined = dict.fromkeys(self.types, START)
        for position, step in enumerate(self.steps):
            for index, number in enumerate(step.inputs):
                self.readers[number].append((position, index))
            self.defined |= dict.fromkeys(step.outputs, position)

    @functools.cached_property
    def returned(self) -> frozenset[int]:
        """Numbers of the outputs."""
        return frozenset(self.outputs)

    def only_reader(self, number: int) -> Step | None:
        """The step that alone reads a value, once."""
        readers = self.readers[number]
        if len(readers) != 1 or number in self.returned:
            return None
        return self.steps[readers[0][0]]

    def _add(self, jaxpr: Any, inputs: Sequence[int]) -> list[int]:
        """Adds the steps of a jaxpr for these inputs; returns its outputs."""
        body = open_jaxpr(jaxpr)
        numbers: dict[Any, int] = dict(zip(body.invars, inputs, strict=True))
        for variable, value in zip(body.constvars, getattr(jaxpr, "consts", ()), strict=True):
            numbers[variable] = self._new(variable.aval)
            self.constants[numbers[variable]] = value

        def read(atom: Any) -> int:
            if not isinstance(atom, Literal):
                return numbers[atom]
            number = self._new(atom.aval)
            self.constants[number] = atom.val
            self.literals[number] = atom
            return number

        for equation in body.eqns:
            operands = [read(atom) for atom in equation.invars]
            whole = Step(equation, (), ())
            if equation.primitive.name in _CALLS and whole.has_marks_inside:
                results = self._add(called(equation), operands)
            else:
                results = [self._new(variable.aval) for variable in equation.outvars]
                self.steps.append(Step(equation, tuple(operands), tuple(results)))
            numbers.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in body.outvars]

    def _new(self, type_: Any) -> int:
        self.types[len(self.types)] = type_
        return len(self.types) - 1

    def _drop_what_nobody_needs(self) -> None:
        needed = set(self.outputs)
        kept = []
        for step in reversed(self.steps):
            if step.equation.effects or needed.intersection(step.outputs):
                needed.update(step.inputs)
                kept.append(step)
        self.steps = kept[::-1]


def open_jaxpr(jaxpr: Any) -> Any:
    """The jaxpr of a closed one, or itself."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def is_wrapper(equation: Any) -> bool:
    """Whether an equation is a call; `jax.nn.relu` is one within another."""
    return equation.primitive.name in (*_CALLS, "custom_jvp_call")


def called(equation: Any) -> Any:
    """The body of an equation that is a call."""
    return equation.params["jaxpr" if "jaxpr" in equation.params else "call_jaxpr"]


def _has_marks(jaxpr: Any) -> bool:
    return any(_marks(open_jaxpr(jaxpr)))


def _marks(body: Any) -> Iterator[bool]:
    for equation in body.eqns:
        yield equation.primitive is layer_call_p
        yield from map(_has_marks, jaxprs_in_params(equation.params))
