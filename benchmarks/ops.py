"""Every op of `ops/` alone: time, bytes moved, and the share of what a plain copy reaches.

    python benchmarks/ops.py --output docs/results/ops_h200.json
    python benchmarks/ops.py --dtype float32 --sizes 67

Bytes are those an op has to move: every input read once, every result written once. The share is
their rate over the rate of a device-to-device copy (bytes read and written) of the same number of
values, measured in the same run; `threshold` only reads. Values are what a ReLU leaves of normal
ones, 90 % sparsity. Small sizes stay in the cache from one repetition to the next.
"""

import argparse
import datetime
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from swat_jax import batch_norm, kernels, native
from swat_jax.sparsity import packing, top_k

CHANNELS = 256


def milliseconds(call: Callable[..., Any], *operands: Any, repeats: int = 5) -> float:
    """Median time of one call among several chained ones, so that host time stays out."""

    @functools.partial(jax.jit, static_argnums=0)
    def chained(count: int, operands: Any) -> Any:
        def body(_: Any, carry: Any) -> Any:
            operands, token = carry
            # Every turn waits for the one before, and no result is left unused.
            operands, token = lax.optimization_barrier((operands, token))
            results = lax.optimization_barrier(call(*operands))
            return operands, token + jax.tree.leaves(results)[0].ravel()[0].astype(jnp.float32)

        return lax.fori_loop(0, count, body, (operands, jnp.float32(0)))[1]

    def seconds(count: int) -> float:
        start = time.perf_counter()
        chained(count, operands).block_until_ready()
        return time.perf_counter() - start

    few, many = 2, 12
    for count in (few, many):
        seconds(count)
    found = [(seconds(many) - seconds(few)) / (many - few) for _ in range(repeats)]
    return statistics.median(found) * 1e3


def copy_milliseconds(x: jax.Array, repeats: int = 5, count: int = 20) -> float:
    """Median time of one device-to-device copy; XLA would leave it out of a compiled loop."""
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        copies = [jnp.array(x, copy=True) for _ in range(count)]
        jax.block_until_ready(copies)
        found.append((time.perf_counter() - start) / count)
    return statistics.median(found[1:]) * 1e3


def measure(size: int, dtype: Any, slow: bool) -> list[dict[str, Any]]:
    """A row for every op.

    Args:
      size: how many values.
      dtype: of the values.
      slow: whether sorting is measured too.
    """
    keys = jax.random.split(jax.random.key(size), 4)
    shape = (size // CHANNELS, CHANNELS)
    make = jax.jit(lambda key: jax.random.normal(key, shape, dtype))
    x, residual, dy, dy2 = map(make, keys)
    y = jax.nn.relu(x)
    keep = top_k.keep_count(0.9, size)
    capacity = packing.capacity(keep, size)
    limit = kernels.threshold(y, keep).astype(jnp.float32)
    packed = jax.jit(lambda y, t: kernels.pack(y, t, capacity))(y, limit)
    mean, variance = kernels.batch_norm_statistics(x)
    vectors = batch_norm.Vectors(mean, variance, jnp.ones(CHANNELS), jnp.zeros(CHANNELS))
    options: dict[str, Any] = {"epsilon": 1e-5, "relu": True}
    words = jnp.asarray([[0, keep]], jnp.uint32)

    def forward(residual_: Any, selection: Any) -> Callable[..., Any]:
        has = residual_ is not None
        return lambda x, residual, stored: kernels.batch_norm_relu(
            x, vectors, residual if has else None, keeps_signs=has,
            selection=selection(stored) if selection else None, **options,
        )  # fmt: skip

    def exact(_: Any) -> kernels.Selection:
        return kernels.Selection(words, capacity)

    def given(stored: Any) -> kernels.Selection:
        return kernels.Selection(words, capacity, stored[0] < 0, stored)

    signs = jax.jit(lambda x: kernels.batch_norm_relu(x, vectors, keeps_signs=True, **options))(x)
    positive = signs.positive
    sums = kernels.batch_norm_gradient_sums(x, [dy], None, vectors, **options)[:2]
    more = {**options, "sums": sums, "count": shape[0]}
    width, bit = jnp.dtype(dtype).itemsize, 1 / 8  # bytes
    compact = bit + width * capacity / size  # bytes a value

    def stored_for(residual_: Any) -> jax.Array:
        y = kernels.batch_norm_relu(x, vectors, residual_, **options).y
        return kernels.threshold(y, keep).astype(jnp.float32)[None]

    stored = stored_for(None)
    alone, added = (x, residual, stored), (x, residual, stored_for(residual))
    parts = tuple(jnp.array_split(y.ravel(), 50))
    some = [round(0.1 * part.size) for part in parts]
    zeros = [jnp.zeros(())] * len(parts)
    ops: list[tuple[str, float, Callable[..., Any] | None, tuple[Any, ...]]] = [
        ("copy", 2 * width, None, (x,)),
        ("threshold", width, lambda y: kernels.threshold(y, keep), (y,)),
        ("thresholds of 50 parts", width,
         lambda *parts: kernels.refreshed_thresholds([True] * 50, parts, some, zeros), parts),
        ("pack", width + compact, lambda y, t: kernels.pack(y, t, capacity), (y, limit)),
        ("unpack", width + compact, kernels.unpack, (packed, limit)),
        ("statistics", width, kernels.batch_norm_statistics, (x,)),
        ("normalize", 2 * width, forward(None, None), alone),
        ("normalize + residual", 3 * width + bit, forward(1, None), alone),
        ("normalize + exact pack", 2 * width + compact, forward(None, exact), alone),
        ("normalize + given pack", 2 * width + compact, forward(None, given), alone),
        ("norm. + res. + exact pack", 3 * width + bit + compact, forward(1, exact), added),
        ("norm. + res. + given pack", 3 * width + bit + compact, forward(1, given), added),
        ("gradient sums", 2 * width,
         lambda x, dy: kernels.batch_norm_gradient_sums(x, [dy], None, vectors, **options),
         (x, dy)),
        ("gradient sums + skip", 4 * width + bit,
         lambda x, dy, dy2, signs: kernels.batch_norm_gradient_sums(
             x, [dy, dy2], signs, vectors, keeps_dz=True, **options),
         (x, dy, dy2, positive)),
        ("gradient", 3 * width,
         lambda x, dy: kernels.batch_norm_gradient(x, dy, vectors, **more),
         (x, dy)),
        ("gradient + through", 4 * width,
         lambda x, dy, dy2: kernels.batch_norm_gradient(x, dy, vectors, through=dy2, **more),
         (x, dy, dy2)),
    ]  # fmt: skip
    if slow:
        ops += [
            ("jnp.sort", 2 * width, lambda y: jnp.sort(jnp.abs(y).ravel()), (y,)),
            ("jax.lax.top_k", width, lambda y: lax.top_k(jnp.abs(y).ravel(), keep)[0], (y,)),
        ]
    rows = []
    for name, bytes_per_value, call, operands in ops:
        repeats = 1 if name.startswith("j") else 5
        ms = milliseconds(call, *operands, repeats=repeats) if call else copy_milliseconds(x)
        rate = bytes_per_value * size / ms / 1e6
        copy = rows[0]["gb_per_s"] if rows else rate
        rows.append({
            "op": name, "values": size, "ms": ms, "bytes": bytes_per_value * size,
            "gb_per_s": rate, "share_of_copy": rate / copy,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of every op.")
    parser.add_argument("--sizes", type=float, nargs="+", default=[1, 4, 16, 51, 205],
                        help="millions of values")  # fmt: skip
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", default=dtypes[0], choices=dtypes, help="default: %(default)s")
    parser.add_argument("--slow", action="store_true", help="sort and top_k at the largest size")
    parser.add_argument("--output", help="JSON file to write")
    options = parser.parse_args()
    rows = []
    for millions in options.sizes:
        size = round(millions * 1e6 / CHANNELS) * CHANNELS
        slow = options.slow and millions == max(options.sizes)
        rows += measure(size, jnp.dtype(options.dtype), slow)
    found = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "backend": kernels.backend(),
        "library": dict(native.load().build_info),
        "versions": {"jax": jax.__version__},
        "dtype": options.dtype,
        "channels": CHANNELS,
        "ops": rows,
    }
    if options.output:
        pathlib.Path(options.output).write_text(json.dumps(found, indent=2) + "\n")
    print(f"{'op':26} {'M':>6} {'ms':>9} {'GB/s':>7} {'of copy':>8}")
    for row in rows:
        print(
            f"{row['op']:26} {row['values'] / 1e6:6.1f} {row['ms']:9.4f} {row['gb_per_s']:7.0f} "
            f"{row['share_of_copy']:8.0%}"
        )


if __name__ == "__main__":
    main()
