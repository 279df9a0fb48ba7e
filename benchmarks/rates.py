"""What floors are computed with: how fast this device copies, and multiplies."""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp

from swat_jax.timing import COUNT, REPEATS, milliseconds


def copy_rate(values: int) -> float:
    """Bytes per millisecond that a device-to-device copy reads and writes."""
    x = jnp.zeros(values, jnp.bfloat16)
    found = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        jax.block_until_ready([jnp.array(x, copy=True) for _ in range(COUNT)])
        found.append((time.perf_counter() - start) * 1e3 / COUNT)
    return 4 * values / statistics.median(found[1:])


def product_rate(size: int) -> float:
    """Operations per millisecond of a product of bfloat16 matrices."""
    a = jnp.ones((size, size), jnp.bfloat16)
    return 2 * size**3 / milliseconds(jnp.matmul, a, a)


def device_rates() -> tuple[float, float]:
    """Both; of sizes that are no measure of anything where there is no GPU."""
    large = jax.default_backend() == "gpu"
    return copy_rate(2**27 if large else 2**16), product_rate(8192 if large else 64)
