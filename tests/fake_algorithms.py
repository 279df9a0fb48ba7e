"""Candidates for the tests: right, wrong and failing ones, which say when they are called."""

import functools

import jax
import jax.numpy as jnp

from swat_jax import candidates
from swat_jax.candidates import OPS, Candidate
from swat_jax.sparsity import packing
from swat_jax.sparsity.varying import varying_like
from swat_jax.trial import product_of

# What was called while a program was traced: op and variant.
CALLS: list[tuple[str, str]] = []


def refusal(problem):
    return f"{problem.dtype} is not float32" if problem.dtype != jnp.float32 else ""


def variants(problem):
    del problem
    return {"fast": "fast", "slow": "slow"}


def right(op):
    """As the plain way, with everything doubled and halved: no bit is lost."""

    def call(problem, variant, *operands):
        CALLS.append((op, variant))
        product = product_of(problem)
        if op == "forward":
            return product(2 * operands[0], operands[1]) / 2
        if op == "input_gradient":
            (dy, kernel), shape = operands, problem.x
            linear = functools.partial(_swapped, product, kernel)
        else:
            (packed, least, dy), shape = operands, problem.kernel
            linear = functools.partial(product, packing.unpack(packed, least))
        like = varying_like(jnp.zeros(shape, problem.dtype), operands)
        return jax.linear_transpose(linear, like)(2 * dy)[0] / 2

    return call


def wrong(op):
    """The last value of the result is missing."""

    def call(problem, variant, *operands):
        result = right(op)(problem, variant, *operands)
        return result.at[(-1,) * result.ndim].set(100.0)

    return call


def of_another_type(op):
    return lambda *given: right(op)(*given).astype(jnp.float16)


def failing(problem, variant, *operands):
    raise jax.errors.JaxRuntimeError(f"INTERNAL: no {variant} kernel\nand more")


def nan(op):
    return lambda *given: right(op)(*given) * jnp.nan


def _swapped(product, kernel, x):
    return product(x, kernel)


FAKES = {op: Candidate(refusal, variants, right(op)) for op in OPS}


def add_fakes(monkeypatch, name="fake", **given):
    """Registers ``right`` candidates for all ops, or those that are given by op.

    Of the package's own `sparse` stays: tests should not take longer with each that is added.
    """
    for op, candidate in (given or FAKES).items():
        own = {
            key: one for key, one in candidates.CANDIDATES[op].items() if key in (name, "sparse")
        }
        monkeypatch.setitem(candidates.CANDIDATES, op, {**own, name: candidate})
