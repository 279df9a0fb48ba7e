"""The weight gradient from packed activations: what `sparse_conv.py` measures by default.

`dense` is XLA's product of dense operands; `unpack` the packed input unpacked and the same product;
`sparse` the kernel that reads the packed input, cut as it chooses, and with `--tiles` with other
tiles and blocks; `nothing` the same kernel on an input that keeps no value, so what it takes
without scattering. The `floor` is what the bytes (packed input, gradient, result) take at the rate
of a device-to-device copy, or the operations at that of a large matrix product, whichever is more,
both measured first.
`error` is what the sparse result differs from the dense one, of the largest value: a rounding to
bfloat16 (0.004) at most, or there is a fault.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from convs import Problem, lines_of_cuts
from programs import Program
from turn import Turn

from swat_jax import kernels, sparse_convolution
from swat_jax.sparse_convolution import Cut
from swat_jax.sparsity import packing, top_k
from swat_jax.timing import Timer
from swat_jax.trial import relative_error

OP = "weight_gradient"
HEADER = (
    f"{'network':18} {'conv':24} {'s_A':>5} {'dense':>8} {'unpack':>8} {'sparse':>8} "
    f"{'nothing':>8} {'floor':>8} {'gain':>6} {'saves':>6} {'cut':>12} {'error':>8}"
)


def refusal(problem: Problem) -> str:
    """Why there is no kernel for it; empty if there is one."""
    shape, kernel, _ = problem.shapes
    return sparse_convolution.refusal(problem.conv, shape, jnp.bfloat16, kernel)


def measure(
    problem: Problem,
    sparsities: Sequence[float],
    every_tile: bool,
    rates: tuple[float, float],
    idle: Callable[[], float],
    turn: Turn | None = None,
) -> Iterator[dict[str, Any]]:
    """Compiles all programs of a conv. What it returns times them: a row for each sparsity.

    Args:
      problem: the conv.
      sparsities: of the packed input, for which there is room at the least of them.
      every_tile: whether all tiles are timed.
      rates: bytes and operations per millisecond.
      idle: measures the milliseconds of a turn of a loop without work.
      turn: of compiling, where other processes do so too.
    """
    conv, window = problem.conv, problem.window
    shape, weights, result = problem.shapes
    size = math.prod(shape)
    kernel = jax.ShapeDtypeStruct(weights, jnp.bfloat16)
    room = packing.capacity(top_k.keep_count(min(sparsities), size), size)

    def operands(keep: jax.Array) -> Any:
        keys = jax.random.split(jax.random.key(0), 2)
        x = jax.nn.relu(jax.random.normal(keys[0], shape, jnp.bfloat16))
        dy = jax.random.normal(keys[1], result)
        limit = kernels.threshold(x, keep).astype(jnp.float32)
        packed = kernels.pack(x, limit, room)
        return kernels.sparsify(x, limit), packed, limit, dy.astype(jnp.bfloat16)

    def no_values(zero: jax.Array) -> Any:
        # An operand, so that XLA does not compute all of it while it compiles.
        return kernels.pack(jnp.full(shape, zero, jnp.bfloat16), jnp.float32(1), 8)

    def dense(x: Any, dy: Any) -> Any:
        return jax.linear_transpose(lambda value: conv(x, value), kernel)(dy)[0]

    def unpacked(packed: Any, limit: Any, dy: Any) -> Any:
        return dense(kernels.unpack(packed, limit), dy)

    def sparse(cut: Cut, packed: Any, limit: Any, dy: Any) -> Any:
        return kernels.sparse_conv_weight_gradient(packed, limit, dy, conv, window, cut)

    count = jax.ShapeDtypeStruct((), jnp.int32)
    x, packed, limit, dy = jax.eval_shape(operands, count)
    chosen, *others = sparse_convolution.cuts(conv, shape, result, window)
    expected = jax.eval_shape(dense, x, dy)
    gradient = jax.eval_shape(functools.partial(sparse, chosen), packed, limit, dy)

    make, make_none = Program(operands, count), Program(no_values, count)
    compare = Program(lambda a, b: relative_error(a, b.astype(jnp.float32)), gradient, expected)
    of_dense, of_unpacked = Timer(dense), Timer(unpacked)
    of_dense.lower(x, dy)
    of_unpacked.lower(packed, limit, dy)
    of_nothing = Timer(functools.partial(sparse, chosen))
    of_nothing.lower(jax.eval_shape(no_values, count), limit, dy)
    of_cuts = {
        cut.name: Timer(functools.partial(sparse, cut))
        for cut in ((chosen, *others) if every_tile else (chosen,))
    }
    for of_cut in of_cuts.values():
        of_cut.lower(packed, limit, dy)
    (turn or Turn()).compile(
        (of_dense, of_unpacked), (make, make_none, compare, of_nothing, *of_cuts.values())
    )

    def rows() -> Iterator[dict[str, Any]]:
        idle_ms, none = idle(), make_none(jnp.int32(0))
        for sparsity in sparsities:
            keep = top_k.keep_count(sparsity, size)
            x, packed, limit, dy = make(jnp.int32(keep))
            dense_ms, expected = of_dense(x, dy)
            times = {
                "dense": dense_ms - idle_ms,
                "nothing": of_nothing(none, limit, dy)[0] - idle_ms,
                "unpack": of_unpacked(packed, limit, dy)[0] - idle_ms,
            }
            timed = {name: of_cut(packed, limit, dy) for name, of_cut in of_cuts.items()}
            cuts = {name: ms - idle_ms for name, (ms, _) in timed.items()}
            error = compare(timed[chosen.name][1], expected)
            compact = 2 * keep + size / 8 + 4 * size / packing.TILE
            moved = compact + 2 * dy.size + 4 * math.prod(weights)
            floors = (moved / rates[0], problem.operations / rates[1])
            yield {
                **dataclasses.asdict(problem),
                "name": problem.name,
                "sparsity": sparsity,
                **{f"{name}_ms": ms for name, ms in times.items()},
                "sparse_ms": cuts[chosen.name],
                "idle_ms": idle_ms,
                "cut": chosen.name,
                "cuts_ms": cuts,
                "bytes": moved,
                "operations": problem.operations,
                "floor_ms": max(floors),
                "floor_is": "bytes" if floors[0] > floors[1] else "operations",
                "error": float(error),
            }
            del x, packed, limit, dy, expected, timed  # before the next ones are made

    return rows()


def lines(row: dict[str, Any]) -> Iterator[str]:
    """A line of the table, and one of all cuts where there are several."""
    yield (
        f"{row['network']:18} {row['name']:24} {row['sparsity']:5} {row['dense_ms']:8.4f} "
        f"{row['unpack_ms']:8.4f} {row['sparse_ms']:8.4f} {row['nothing_ms']:8.4f} "
        f"{row['floor_ms']:8.4f} {row['dense_ms'] / row['sparse_ms']:6.2f} "
        f"{row['unpack_ms'] / row['sparse_ms']:6.2f} {row['cut']:>12} {row['error']:8.1e}"
    )
    yield from lines_of_cuts(row)
