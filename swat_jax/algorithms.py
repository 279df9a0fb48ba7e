"""Which algorithm computes which product of a SWAT layer: a layer's choice among what there is.

A SWAT layer has three products (`OPS`). Each has a plain way: masked weights, or activations with
zeros, multiplied by XLA, which calls cuDNN on a GPU. And it may have candidates, which compute the
same from an operand in sparse form (`swat_jax.candidates`). Which is fastest depends on shapes,
types and sparsity: `swat_jax.tune` measures it.

An algorithm is written as its name, ``sparse``, which leaves it to cut its work, or with one of its
variants, ``sparse:64x256/132``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from swat_jax.candidates import CANDIDATES, OPS, Problem
from swat_jax.errors import UsageError, warn_once

_NAMES = {"forward": "masked", "input_gradient": "masked", "weight_gradient": "dense"}


@dataclasses.dataclass(frozen=True)
class Algorithms:
    """What computes the three products of a layer.

    Attributes:
      forward: ``masked`` or the name of a candidate.
      input_gradient: likewise.
      weight_gradient: ``dense`` or the name of a candidate.

    Raises:
      UsageError: there is none of this name.

    Example:
      >>> Algorithms(weight_gradient="sparse").forward
      'masked'
    """

    forward: str = _NAMES["forward"]
    input_gradient: str = _NAMES["input_gradient"]
    weight_gradient: str = _NAMES["weight_gradient"]

    def __post_init__(self) -> None:
        for op in OPS:
            check(op, self[op])

    def __getitem__(self, op: str) -> str:
        return getattr(self, op)

    def is_plain(self, op: str) -> bool:
        """Whether an op is computed in the plain way."""
        return self[op] == _NAMES[op]

    def accepted(self, problem: Problem) -> Algorithms:
        """Those that take a problem, the plain way in place of others; a warning says so once."""
        refused = {op: why for op in OPS if (why := refusal(op, self[op], problem))}
        for op, why in refused.items():
            warn_once(
                f"the {op.replace('_', ' ')} of x {problem.x} with a kernel {problem.kernel} is "
                f"computed in the plain way ({_NAMES[op]}) and not by {self[op]}: {why}"
            )
        return dataclasses.replace(self, **{op: _NAMES[op] for op in refused})


def check(op: str, algorithm: str) -> None:
    """Raises a `UsageError` for an algorithm that there is not; see `refusal` for variants."""
    is_text = isinstance(algorithm, str)
    if not is_text or (
        algorithm != _NAMES[op] and algorithm.partition(":")[0] not in CANDIDATES[op]
    ):
        names = ", ".join((_NAMES[op], *CANDIDATES[op]))
        raise UsageError(f"{op} must be one of {names}; got {algorithm!r}")


# Every op in its plain way.
PLAIN = Algorithms()


def refusal(op: str, algorithm: str, problem: Problem) -> str:
    """Why an algorithm does not take a problem; empty if it does, as the plain way always does.

    Args:
      op: one of `OPS`.
      algorithm: one that `check` passes.
      problem: of a layer.
    """
    if algorithm == _NAMES[op]:
        return ""
    if op == "weight_gradient" and not problem.is_packed:
        return "x is not kept packed"
    name, _, variant = algorithm.partition(":")
    candidate = CANDIDATES[op][name]
    if why := candidate.refusal(problem):
        return why
    if variant and variant not in candidate.variants(problem):
        return f"{name} has no variant {variant!r} for it"
    return ""


def variants(op: str, name: str, problem: Problem) -> list[str]:
    """All variants of a candidate that takes a problem, written as algorithms."""
    return [f"{name}:{one}" if one else name for one in CANDIDATES[op][name].variants(problem)]


def run(op: str, algorithm: str, problem: Problem, *operands: Any) -> jax.Array:
    """Calls a candidate that does not refuse; see `Candidate` for the operands."""
    name, _, variant = algorithm.partition(":")
    candidate = CANDIDATES[op][name]
    found = candidate.variants(problem)
    cut = found[variant] if variant else next(iter(found.values()))
    return candidate.call(problem, cut, *operands)
