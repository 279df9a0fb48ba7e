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
    """Median time of a call in one compiled loop of `COUNT` turns.

    Args:
      call: a function of the operands that can be compiled; None: the loop alone, which is to be
        taken off the time of others.
      operands: pytrees of arrays.

    Example:
      >>> milliseconds(jnp.dot, jnp.ones((8, 8)), jnp.ones((8, 8))) > 0
      True
    """

    @jax.jit
    def chained(operands: Any) -> Any:
        def body(_: Any, carry: Any) -> Any:
            operands, token = carry
            # Every turn waits for the one before, and no result is left unused.
            operands, token = lax.optimization_barrier((operands, token))
            if call is None:
                return operands, token + 1
            result = lax.optimization_barrier(call(*operands))
            return operands, token + result.ravel()[0].astype(jnp.float32)

        return lax.fori_loop(0, COUNT, body, (operands, jnp.float32(0)))[1]

    chained(operands).block_until_ready()
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        chained(operands).block_until_ready()
        found.append(time.perf_counter() - start)
    return statistics.median(found) * 1e3 / COUNT
