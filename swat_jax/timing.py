"""How long a call takes on a device, without what Python needs to start it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Calls that are timed together, and how often.
COUNT, REPEATS = 20, 3


def milliseconds(call: Callable[..., jax.Array] | None, *operands: Any) -> float:
    """The time of a call, see `timed`; None: of a turn of the loop alone.

    Example:
      >>> milliseconds(jnp.dot, jnp.ones((8, 8)), jnp.ones((8, 8))) > 0
      True
    """
    return timed(call, *operands)[0]


def timed(call: Callable[..., jax.Array] | None, *operands: Any) -> tuple[float, Any]:
    """Median time of a call, of `COUNT` in one compiled program, in milliseconds; and its result.

    Args:
      call: a function of the operands that can be compiled; None: the loop alone, which is to be
        taken off the time of others.
      operands: pytrees of arrays.
    """
    return timer(call)(*operands)


def timer(call: Callable[..., jax.Array] | None) -> Callable[..., tuple[float, Any]]:
    """`timed` for operands that are given later; it compiles once for all of the same shapes.

    Example:
      >>> double = timer(lambda x: x + x)
      >>> [float(double(jnp.ones(8) * one)[1][0]) for one in (1, 2)]
      [2.0, 4.0]
    """

    @jax.jit
    def chained(operands: Any) -> Any:
        def body(_: Any, carry: Any) -> Any:
            # Every turn waits for the one before, and no result is left unused.
            operands, token = lax.optimization_barrier(carry)
            if call is None:
                return operands, token + 1
            result = lax.optimization_barrier(call(*operands))
            return operands, token + result.ravel()[0].astype(jnp.float32)

        carry = lax.fori_loop(0, COUNT - 1, body, (operands, jnp.float32(0)))
        operands, token = lax.optimization_barrier(carry)
        return token if call is None else call(*operands), token

    def time_it(*operands: Any) -> tuple[float, Any]:
        result, _ = jax.block_until_ready(chained(operands))
        found = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            jax.block_until_ready(chained(operands))
            found.append(time.perf_counter() - start)
        return statistics.median(found) * 1e3 / COUNT, result

    return time_it
