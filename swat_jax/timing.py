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
    return Timer(call)(*operands)


class Timer:
    """`timed` for operands that are given later; it compiles once for all of the same shapes.

    It does so at its first call, or ahead of it, for shapes alone.

    Args:
      call: as `timed` takes it.

    Example:
      >>> double = Timer(lambda x: x + x)
      >>> double.lower(jax.ShapeDtypeStruct((8,), jnp.float32))
      >>> double.compile()
      >>> [float(double(jnp.ones(8) * one)[1][0]) for one in (1, 2)]
      [2.0, 4.0]
    """

    def __init__(self, call: Callable[..., jax.Array] | None) -> None:
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

        self._run: Any = jax.jit(chained)
        self._lowered: Any = None

    def lower(self, *shapes: Any) -> None:
        """Traces it, for `compile`.

        Args:
          shapes: like the operands, of `jax.ShapeDtypeStruct` or arrays.
        """
        self._lowered = self._run.lower(shapes)

    def compile(self) -> None:
        """Compiles what was traced: from here on it takes operands of those shapes only."""
        self._run, self._lowered = self._lowered.compile(), None

    def __call__(self, *operands: Any) -> tuple[float, Any]:
        """The median time in milliseconds, and the result."""
        result, _ = jax.block_until_ready(self._run(operands))
        found = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            jax.block_until_ready(self._run(operands))
            found.append(time.perf_counter() - start)
        return statistics.median(found) * 1e3 / COUNT, result
