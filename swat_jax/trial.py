"""Every algorithm for one layer on random operands: is its result right, and how long does it take.

Results are compared with the plain product in float32 at the highest precision. An algorithm whose
largest error, as a share of the largest value, is above `bound` is never chosen, and neither is one
that is not faster than the plain way by `MARGIN` and by `LEAST_GAIN`: noise must not decide.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from swat_jax import algorithms, candidates, kernels
from swat_jax.algorithm_table import Times
from swat_jax.algorithms import PLAIN
from swat_jax.candidates import OPS, Problem
from swat_jax.sparsity import granularity as granularities
from swat_jax.sparsity import packing, top_k
from swat_jax.timing import timed

# By what share of its time the plain way has to be beaten, and by how many milliseconds at least.
MARGIN, LEAST_GAIN = 0.03, 0.001
# What sums in another order may differ by in float32.
_SUMS = 2.0**-14

Product = Callable[[jax.Array, jax.Array], jax.Array]


def bound(dtype: Any) -> float:
    """The largest error that is right: a rounding to the type, and sums in another order.

    Example:
      >>> bound(jnp.float32) < 2**-13 < bound(jnp.bfloat16) < 0.008
      True
    """
    return float(jnp.finfo(dtype).eps) + _SUMS


@dataclasses.dataclass(frozen=True)
class Operands:
    """What a layer has in a step; a sparse operand is zero off its mask.

    Attributes:
      x: the input.
      saved: the input as it waits for the backward pass: packed, or with zeros.
      least: the threshold of a packed one, or None.
      kernel: masked.
      dy: the gradient of the output.
    """

    x: jax.Array
    saved: Any
    least: jax.Array | None
    kernel: jax.Array
    dy: jax.Array

    def of(self, op: str) -> tuple[Any, ...]:
        """What an algorithm for this op is called with."""
        if op == "weight_gradient":
            return (self.saved, self.least, self.dy)
        return (self.x if op == "forward" else self.dy, self.kernel)


def draw(problem: Problem, weight_sparsity: float, activation_sparsity: float) -> Operands:
    """Operands like those of training: normal, the input after a ReLU, sparse by their magnitude.

    Args:
      problem: what the layer computes.
      weight_sparsity: fraction of zeros in its weights.
      activation_sparsity: fraction of zeros in its saved input.
    """
    units = granularities.units(problem.kernel, problem.granularity)
    weight_keep = top_k.keep_count(weight_sparsity, units)
    size = int(np.prod(problem.x))
    keep = top_k.keep_count(activation_sparsity, size)

    @jax.jit
    def make() -> tuple[Any, ...]:
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.nn.relu(jax.random.normal(keys[0], problem.x, problem.dtype))
        kernel = jax.random.normal(keys[1], problem.kernel)
        limit = kernels.threshold(granularities.score(kernel, problem.granularity), weight_keep)
        kernel = granularities.masked_weights(kernel, problem.granularity, limit)
        dtype = problem.conv.preferred_element_type or problem.dtype
        dy = jax.random.normal(keys[2], problem.y, dtype)
        least = kernels.threshold(x, keep)
        if problem.is_packed:
            saved = kernels.pack(x, least, packing.capacity(keep, size))
            return x, saved, least.astype(jnp.float32), kernel.astype(problem.dtype), dy
        return x, kernels.sparsify(x, least), None, kernel.astype(problem.dtype), dy

    return Operands(*make())


def plain(op: str, problem: Problem, product: Product) -> Callable[..., jax.Array]:
    """The plain way to compute an op, of the operands that its candidates get."""
    x, kernel = (jax.ShapeDtypeStruct(one, problem.dtype) for one in (problem.x, problem.kernel))

    def input_gradient(dy: jax.Array, kernel: jax.Array) -> jax.Array:
        (dx,) = jax.linear_transpose(lambda x: product(x, kernel), x)(dy)
        return dx

    def weight_gradient(saved: Any, least: jax.Array | None, dy: jax.Array) -> jax.Array:
        dense = kernels.unpack(saved, least) if problem.is_packed else saved
        (dw,) = jax.linear_transpose(lambda kernel: product(dense, kernel), kernel)(dy)
        return kernels.settled_gradient(dw)

    ways = {"forward": product, "input_gradient": input_gradient}
    return {**ways, "weight_gradient": weight_gradient}[op]


def product_of(problem: Problem) -> Product:
    """What XLA computes for a layer; for a linear one it is a product of matrices."""
    if not problem.is_linear:
        return problem.conv

    def matrices(x: jax.Array, kernel: jax.Array) -> jax.Array:
        rows = lax.dot_general(
            *(x[:, 0, 0], kernel[0, 0], (((1,), (0,)), ((), ()))),
            precision=problem.conv.precision,
            preferred_element_type=problem.conv.preferred_element_type,
        )
        return rows[:, None, None]

    return matrices


def _reference(op: str, problem: Problem, operands: Operands) -> jax.Array:
    wide = jnp.promote_types(problem.dtype, jnp.float32)
    conv = dataclasses.replace(
        problem.conv, folds=False, precision=lax.Precision.HIGHEST, preferred_element_type=None
    )
    exact = dataclasses.replace(problem, conv=conv, dtype=jnp.dtype(wide), is_packed=False)
    saved = operands.saved
    if problem.is_packed:
        saved = kernels.unpack(saved, operands.least)
    dense = (operands.x, saved, operands.kernel, operands.dy)
    x, saved, kernel, dy = (one.astype(wide) for one in dense)
    given = Operands(x, saved, None, kernel, dy).of(op)
    return jax.jit(plain(op, exact, product_of(exact)))(*given)


@jax.jit
def relative_error(found: jax.Array, expected: jax.Array) -> jax.Array:
    """The largest difference, of the largest expected magnitude; in the expected type.

    Example:
      >>> float(relative_error(jnp.array([1.0, 4.0]), jnp.array([2.0, 4.0])))
      0.25
    """
    largest = jnp.max(jnp.abs(expected))
    return jnp.max(jnp.abs(found.astype(expected.dtype) - expected)) / jnp.maximum(largest, 1e-30)


def _what_is_wrong(found: jax.Array, expected: jax.Array, dtype: Any, most: float) -> str:
    if found.shape != expected.shape or found.dtype != dtype:
        return f"it is {found.dtype}{list(found.shape)}, not {dtype}{list(expected.shape)}"
    error = float(relative_error(found, expected))
    # NaN is no number that is small enough.
    return "" if error <= most else f"its error is {error:.2g}, not {most:.2g} at most"


def run(
    problem: Problem,
    weight_sparsity: float,
    activation_sparsity: float,
    idle: float,
    ops: Sequence[str] = OPS,
) -> dict[str, Times]:
    """Checks and times all algorithms for a layer.

    Args:
      problem: what the layer computes.
      weight_sparsity: fraction of zeros in its weights.
      activation_sparsity: fraction of zeros in its saved input.
      idle: milliseconds of a turn without work, ``milliseconds(None)``.
      ops: those of `OPS` that are timed.

    Returns:
      The times of each of them. A candidate that fails, whatever the reason, is in `Times.wrong`.
    """
    operands = draw(problem, weight_sparsity, activation_sparsity)
    return {op: _run(op, problem, operands, idle) for op in ops}


def _run(op: str, problem: Problem, operands: Operands, idle: float) -> Times:
    given = operands.of(op)

    def run(call: Callable[..., jax.Array]) -> tuple[float, jax.Array]:
        ms, result = timed(call, *given)
        # Of what is shorter than the loop around it nothing is known.
        return max(ms - idle, 1e-6), result

    expected = _reference(op, problem, operands)
    dtype = {
        "forward": operands.dy.dtype,
        "input_gradient": problem.dtype,
        "weight_gradient": expected.dtype,  # wide: sums are not rounded
    }[op]
    times = {PLAIN[op]: run(plain(op, problem, product_of(problem)))[0]}
    refused: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for name in candidates.CANDIDATES[op]:
        if why := algorithms.refusal(op, name, problem):
            refused[name] = why
            continue
        for algorithm in algorithms.variants(op, name, problem):
            call = functools.partial(algorithms.run, op, algorithm, problem)
            try:
                ms, result = run(call)
                why = _what_is_wrong(result, expected, dtype, bound(problem.dtype))
                if not why:
                    times[algorithm] = ms
            except Exception as error:  # whatever goes wrong, the others are tried
                why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            if why:
                wrong[algorithm] = why
    fastest = min(times, key=lambda one: times[one])
    gain = times[PLAIN[op]] - times[fastest]
    is_worth_it = gain > max(MARGIN * times[PLAIN[op]], LEAST_GAIN)
    return Times(fastest if is_worth_it else PLAIN[op], times, refused, wrong)
